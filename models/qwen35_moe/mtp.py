"""Multi-token prediction: a module that drafts the token after the next, by which serving is faster.

For position i of a document, h the trunk's hidden state after its final norm:

    x = fc([pre_fc_norm_embedding(embedding of token i + 1), pre_fc_norm_hidden(h_i)])
    x = layers.0(x)                one full-attention block, as in the trunk; positions are the trunk's
    logits = lm_head(norm(x))      of token i + 2; embeddings and head are the trunk's

DeepSeek-V3 (arXiv 2412.19437, section 2.2) describes it, with the halves of fc's input the other way round.
"""

from typing import cast

import torch
from torch import nn

from models.ops.documents import Documents
from models.ops.kernels import Kernels
from models.ops.labels import IGNORED
from models.qwen35_moe.block import Block
from models.qwen35_moe.config import FULL, ModelConfig
from models.qwen35_moe.moe import Measure, RouterStatistics
from models.qwen35_moe.norms import RMSNorm
from models.qwen35_moe.rotary import Rotary

# Shapes: T tokens (of all documents, end to end), H hidden.


class MultiTokenPrediction(nn.Module):
    """What it has of its own. A checkpoint may hold several layers, which are for drafts further ahead; what runs here
    is one."""

    def __init__(self, config: ModelConfig, num_layers: int, kernels: Kernels) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.pre_fc_norm_embedding = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_fc_norm_hidden = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(Block(config, FULL, kernels) for _ in range(num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def blocks(self) -> list[Block]:
        """`layers` as what they are."""
        return cast(list[Block], list(self.layers))

    def forward(
        self, hidden: torch.Tensor, embedded: torch.Tensor, rotary: Rotary, documents: Documents, measure: Measure
    ) -> tuple[torch.Tensor, RouterStatistics]:
        """What the head reads [T, H], and what the router did. hidden [T, H], after the trunk's final norm; embedded
        [T, H], of each token itself, images' features included."""
        embedding = self.pre_fc_norm_embedding(self.take_next(embedded))
        x = self.fc(torch.cat([embedding, self.pre_fc_norm_hidden(hidden)], dim=-1))
        (layer,) = self.layers
        x, statistics = layer(x, rotary, documents, measure)
        return self.norm(x), statistics

    def take_next(self, values: torch.Tensor) -> torch.Tensor:
        """The one place beside attention where a token reads another: at each that of the next, [T, ...] -> [T, ...].
        At a document's last it is another document's, but no later token reads it, and it has no label."""
        return values.roll(-1, dims=0)


def mtp_labels(labels: torch.Tensor, documents: Documents) -> torch.Tensor:
    """What is to be drafted at each token: the next one's label if that is of the same document, or IGNORED. Both
    int64 [T], of whole documents."""
    has_next = documents.token_offsets.roll(-1) > 0
    return labels.roll(-1).where(has_next, IGNORED)
