"""A block of the model, of the trunk and of multi-token prediction alike."""

import torch
from torch import nn

from models.ops.documents import Documents
from models.ops.kernels import Kernels
from models.qwen35_moe.attention import GatedAttention
from models.qwen35_moe.config import FULL, ModelConfig
from models.qwen35_moe.gated_delta_net import GatedDeltaNet
from models.qwen35_moe.moe import COUNTS_OF_ALL, Measure, MixtureOfExperts, RouterStatistics
from models.qwen35_moe.norms import RMSNorm
from models.qwen35_moe.rotary import Rotary

# Shapes: T tokens (of all documents, end to end), H hidden.


class Block(nn.Module):
    """norm -> full or linear attention -> residual -> norm -> mixture of experts -> residual."""

    def __init__(self, config: ModelConfig, layer_type: str, kernels: Kernels) -> None:
        super().__init__()
        self.layer_type = layer_type
        if layer_type == FULL:
            self.self_attn = GatedAttention(config, kernels.attention)
        else:
            self.linear_attn = GatedDeltaNet(config, kernels)
        self.mlp = MixtureOfExperts(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden: torch.Tensor, rotary: Rotary, documents: Documents, measure: Measure = COUNTS_OF_ALL
    ) -> tuple[torch.Tensor, RouterStatistics]:
        """hidden [T, H] -> hidden [T, H], and what the router did."""
        hidden = hidden + self.attend(self.input_layernorm(hidden), rotary, documents)
        out, statistics = self.mlp(self.post_attention_layernorm(hidden), measure)
        return hidden + out, statistics

    def attend(self, x: torch.Tensor, rotary: Rotary, documents: Documents) -> torch.Tensor:
        """Full or linear attention, in whose `mix` alone a token reads others: x [T, H] -> [T, H]."""
        if self.layer_type == FULL:
            return self.self_attn(x, rotary, documents)
        return self.linear_attn(x, documents)
