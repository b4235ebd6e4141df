"""Short causal depthwise convolution with SiLU; no tap reaches over a document's start."""

import torch
import torch.nn.functional as F

from models.ops.documents import Documents


def causal_conv1d(x: torch.Tensor, weight: torch.Tensor, documents: Documents) -> torch.Tensor:
    """SiLU(sum_i weight[:, 0, W - 1 - i] * x[t - i]) over the taps i < W that lie in t's document.

    x [T, C], weight [C, 1, W] -> [T, C]. One masked, shifted product a tap: no loop over documents.
    """
    offsets = documents.token_offsets().unsqueeze(-1)  # [T, 1]
    width = weight.shape[-1]
    out = x * weight[:, 0, -1]
    for shift in range(1, min(width, x.shape[0])):
        shifted = F.pad(x[:-shift], (0, 0, shift, 0))
        out = out + torch.where(offsets >= shift, shifted, 0) * weight[:, 0, width - 1 - shift]
    return F.silu(out)
