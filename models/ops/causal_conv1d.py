"""Short causal depthwise convolution with SiLU; no tap reaches over a document's start."""

import torch
import torch.nn.functional as F

from models.ops.documents import Documents
from models.ops.precision import at_least_float32


def causal_conv1d(x: torch.Tensor, weight: torch.Tensor, documents: Documents) -> torch.Tensor:
    """SiLU(sum_i weight[:, 0, W - 1 - i] * x[t - i]) over the taps i < W that lie in t's document.

    x [T, C], weight [C, 1, W] -> [T, C] in x's dtype. One masked, shifted product a tap: no loop over documents. The
    taps are summed in float32 or wider and rounded once before SiLU, as a convolution kernel does.
    """
    offsets = documents.token_offsets(x.shape[0]).unsqueeze(-1)  # [T, 1]
    taps, rows = at_least_float32(weight[:, 0]).unbind(-1), at_least_float32(x)
    out = rows * taps[-1]
    for shift in range(1, min(len(taps), x.shape[0])):
        shifted = F.pad(rows[:-shift], (0, 0, shift, 0))
        out = out + torch.where(offsets >= shift, shifted, 0) * taps[-1 - shift]
    return F.silu(out.to(x.dtype))
