"""Short causal depthwise convolution with SiLU; no tap reaches over a document's start."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from models.ops.documents import Documents
from models.ops.has_triton import HAS_TRITON
from models.ops.precision import at_least_float32

if HAS_TRITON:
    from models.ops import causal_conv1d_triton

MAX_TRITON_WIDTH = 4  # its kernels carry so many tokens along


def causal_conv1d(
    x: torch.Tensor, weight: torch.Tensor, widths: Sequence[int], documents: Documents, *, backend: str = "torch"
) -> list[torch.Tensor]:
    """SiLU(sum_i weight[:, 0, W - 1 - i] * x[t - i]) over the taps i < W that lie in t's document.

    x [T, C], weight [C, 1, W] -> parts of `widths` channels, in x's dtype [T, width] each: q, k and v, which are read
    apart. Taps are summed in float32 or wider. backend "torch": one masked, shifted product a tap, the reference;
    "triton": one kernel each way, CUDA, W at most 4, three parts, keeps nothing but x.
    """
    if backend == "triton":
        return causal_conv1d_triton.forward(x, weight, documents.token_offsets, list(widths))
    offsets = documents.token_offsets.unsqueeze(-1)  # [T, 1]
    taps, rows = at_least_float32(weight[:, 0]).unbind(-1), at_least_float32(x)
    out = rows * taps[-1]
    for shift in range(1, min(len(taps), x.shape[0])):
        shifted = F.pad(rows[:-shift], (0, 0, shift, 0))
        out = out + torch.where(offsets >= shift, shifted, 0) * taps[-1 - shift]
    return list(F.silu(out).to(x.dtype).split(widths, dim=-1))
