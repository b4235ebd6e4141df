"""Moves tokens to their experts' order and back: gathers in both directions, so sums have one order on any device."""

from typing import Any

import torch

# Shapes: T tokens, H hidden, R = T * top_k routed rows. order [R]: sorted row -> routed row (token * top_k + choice);
# inverse [R]: routed row -> sorted row. Autograd would scatter the gradients with atomic additions.


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, top_k: int) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return x[order // top_k]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        rows = gradient[inverse]
        return rows.view(-1, ctx.top_k, rows.shape[-1]).sum(dim=1), None, None, None


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient[inverse], None, None


def permute(x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, top_k: int) -> torch.Tensor:
    """Each token once for each of its experts, sorted by expert: [T, H] -> [R, H]. order, inverse int64 [R]."""
    return _Permute.apply(x, order, inverse, top_k)


def reorder(rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """rows[order], where `inverse` is the permutation that undoes `order`: [R, ...] -> [R, ...]."""
    return _Reorder.apply(rows, order, inverse)
