"""The norms as modules: they only hold the weight that the functions in models/ops/rms_norm.py take."""

import torch
from torch import nn

from models.ops.rms_norm import gated_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """Zero-centred RMS norm over the last dimension; weight [size], initialised to zeros."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class GatedRMSNorm(nn.Module):
    """RMS norm over the last dimension, then times silu(gate); weight [size], initialised to ones."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return gated_rms_norm(x, gate, self.weight, self.eps)
