"""Gated full attention: grouped queries, q and k norms, partial rotary embedding, a sigmoid gate on the output."""

import torch
from torch import nn

from models.ops.attention import attention
from models.ops.documents import Documents
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.norms import RMSNorm
from models.qwen35_moe.rotary import Rotary, apply_rotary


class GatedAttention(nn.Module):
    """Softmax attention inside each document. Shapes: T tokens, H hidden, N query heads, Nkv key and value heads,
    K head dim.

    `q_proj` gives, for each head, its query and then its gate: [T, N, 2K].
    """

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.backend = backend
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, 2 * query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, rotary: Rotary, documents: Documents) -> torch.Tensor:
        """x [T, H] -> [T, H]."""
        num_tokens = x.shape[0]
        q, gate = self.q_proj(x).view(num_tokens, -1, 2 * self.head_dim).chunk(2, dim=-1)  # [T, N, K] each
        k = self.k_proj(x).view(num_tokens, -1, self.head_dim)
        v = self.v_proj(x).view(num_tokens, -1, self.head_dim)
        q = apply_rotary(self.q_norm(q), rotary)
        k = apply_rotary(self.k_norm(k), rotary)
        out = self.mix(q, k, v, documents) * torch.sigmoid(gate)
        return self.o_proj(out.reshape(num_tokens, -1))

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents) -> torch.Tensor:
        """The one place where a token reads others, each head by itself: q [T, N, K]; k, v [T, Nkv, K] -> [T, N, K]."""
        return attention(q, k, v, documents, backend=self.backend)
