"""Rotary position embedding: partial (the first dims of a head) and interleaved over three axes (MRoPE)."""

from typing import NamedTuple

import torch

from models.qwen35_moe.config import ModelConfig


class Rotary(NamedTuple):
    """Cosines and sines of every token's rotation angles, both float32 [T, rotary_dim / 2]."""

    cos: torch.Tensor
    sin: torch.Tensor


def rotary_embedding(config: ModelConfig, positions: torch.Tensor) -> Rotary:
    """The rotation of each token (Su et al. 2021, arXiv 2104.09864): angle = position * theta^(-2i / rotary_dim).

    positions: integers, [T] for text, or [3, T] (time, height, width) where pair i of a head turns by one of the three:
    height for i = 1, 4, 7, ... below 3 * mrope_section[1], width for i = 2, 5, 8, ... below 3 * mrope_section[2], time
    for all others. Equal axes give the text's angles. Computed in float32.
    """
    num_pairs = config.rotary_dim // 2
    exponent = torch.arange(0, config.rotary_dim, 2, device=positions.device, dtype=torch.float32) / config.rotary_dim
    inverse_frequency = 1.0 / config.rope_theta**exponent
    if positions.dim() == 1:
        turns = positions[:, None]  # [T, 1]
    else:
        axes = [0] * num_pairs
        for axis in (1, 2):
            for i in range(axis, min(num_pairs, 3 * config.mrope_section[axis]), 3):
                axes[i] = axis
        turns = torch.stack([positions[axis] for axis in axes], dim=1)  # [T, pairs]; indexing would wait for the GPU
    angles = turns.float() * inverse_frequency
    return Rotary(angles.cos(), angles.sin())


def apply_rotary(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Rotates the first `rotary_dim` dims of every head; x [T, N, K]. Pair i is (dim i, dim i + rotary_dim / 2)."""
    num_pairs = rotary.cos.shape[-1]
    cos, sin = (t.to(torch.promote_types(x.dtype, t.dtype)).unsqueeze(1) for t in rotary)  # [T, 1, pairs]
    first, second, rest = x.split([num_pairs, num_pairs, x.shape[-1] - 2 * num_pairs], dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)
