"""The two RMS norms of the model: zero-centred (decoder, q and k) and gated (inside linear attention)."""

import torch
import torch.nn.functional as F

from models.ops.precision import at_least_float32


def _normalise(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x * rsqrt(mean(x^2) + eps) * (1 + weight)`, computed in float32 or wider, returned in x's dtype.

    Source: Zhang & Sennrich 2019 (arXiv 1910.07467), with the weight centred on zero. x [..., K], weight [K].
    """
    return (_normalise(at_least_float32(x), eps) * (1.0 + at_least_float32(weight))).to(x.dtype)


def gated_rms_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`weight * norm(x) * silu(gate)`, norm before gate, computed in float32 or wider, returned in x's dtype.

    x and gate [..., K], weight [K] (centred on one).
    """
    normed = at_least_float32(weight) * _normalise(at_least_float32(x), eps)
    return (normed * F.silu(at_least_float32(gate))).to(x.dtype)
