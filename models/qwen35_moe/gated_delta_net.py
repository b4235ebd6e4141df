"""Linear attention: GatedDeltaNet (Yang et al. 2024, arXiv 2412.06464) with a short causal convolution before it."""

import torch
import torch.nn.functional as F
from torch import nn

from models.ops.causal_conv1d import causal_conv1d
from models.ops.documents import Documents
from models.ops.gated_delta_rule import gated_delta_rule
from models.ops.kernels import Kernels
from models.ops.precision import at_least_float32
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.norms import GatedRMSNorm


class CausalConv1d(nn.Module):
    """Holds the depthwise convolution's weight [C, 1, W] under its Hugging Face name; `mix` applies it."""

    def __init__(self, channels: int, width: int, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(channels, 1, width))


class GatedDeltaNet(nn.Module):
    """Shapes: T tokens, H hidden, Nk key heads of dim K, Nv value heads of dim Kv (each key head serves Nv / Nk).

    `A_log` and `dt_bias` [Nv] are stored and used in float32 whatever the model's dtype: rounding the decay
    exp(-exp(A_log) * softplus(.)) to bfloat16 is an error that grows with the length of a document.
    """

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.backend = kernels.gated_delta_rule
        self.key_head_dim, self.value_head_dim = config.linear_key_head_dim, config.linear_value_head_dim
        num_value_heads, num_channels = config.linear_num_value_heads, 2 * config.key_dim + config.value_dim
        self.in_proj_qkv = nn.Linear(config.hidden_size, num_channels, bias=False)
        self.in_proj_z = nn.Linear(config.hidden_size, config.value_dim, bias=False)
        self.in_proj_b = nn.Linear(config.hidden_size, num_value_heads, bias=False)
        self.in_proj_a = nn.Linear(config.hidden_size, num_value_heads, bias=False)
        self.conv1d = CausalConv1d(num_channels, config.linear_conv_kernel_dim, kernels.causal_conv1d)
        self.A_log = nn.Parameter(torch.empty(num_value_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(num_value_heads, dtype=torch.float32))
        self.norm = GatedRMSNorm(config.linear_value_head_dim, config.rms_norm_eps)
        self.out_proj = nn.Linear(config.value_dim, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, documents: Documents) -> torch.Tensor:
        """x [T, H] -> [T, H]."""
        num_tokens = x.shape[0]
        qkv = self.in_proj_qkv(x)
        beta = self.in_proj_b(x).sigmoid()  # [T, Nv]
        g = -self.A_log.exp() * F.softplus(at_least_float32(self.in_proj_a(x)) + self.dt_bias)  # log of the decay
        out = self.mix(qkv, g, beta, documents, self.conv1d.weight)
        out = self.norm(out, self.in_proj_z(x).view_as(out))
        return self.out_proj(out.reshape(num_tokens, -1))

    def mix(
        self, qkv: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, documents: Documents, weight: torch.Tensor
    ) -> torch.Tensor:
        """The one place where a token reads others, each head by itself; how many heads there are, the arguments tell.

        qkv [T, C], of C = 2 Nk K + Nv Kv channels, q's before k's before v's; g, beta [T, Nv]; weight [C, 1, W] of the
        convolution -> [T, Nv, Kv].
        """
        num_tokens, num_value_heads = g.shape
        value_width = num_value_heads * self.value_head_dim
        key_width = (qkv.shape[1] - value_width) // 2
        widths = (key_width, key_width, value_width)
        q, k, v = causal_conv1d(qkv, weight, widths, documents, backend=self.conv1d.backend)
        q = q.view(num_tokens, -1, self.key_head_dim)  # [T, Nk, K]
        k = k.view(num_tokens, -1, self.key_head_dim)
        v = v.view(num_tokens, -1, self.value_head_dim)  # [T, Nv, Kv]
        return gated_delta_rule(q, k, v, g, beta, documents, backend=self.backend)
