"""Moves tokens to their experts' order and back: gathers in both directions, so sums have one order on any device."""

from typing import Any

import torch

from models.ops.precision import at_least_float32

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
        return _sum_of_choices(gradient, ctx.saved_tensors[0], ctx.top_k), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, top_k: int) -> torch.Tensor:
        ctx.save_for_backward(order)
        ctx.top_k = top_k
        return _sum_of_choices(rows, inverse, top_k)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return gradient[ctx.saved_tensors[0] // ctx.top_k], None, None, None


def _sum_of_choices(rows: torch.Tensor, inverse: torch.Tensor, top_k: int) -> torch.Tensor:
    """Adds up the rows of each token, [R, H] -> [T, H], in float32 or wider.

    One gather a choice: compiled, the sum is then elementwise work along H. As a sum over a dimension of size top_k the
    compiler makes it a reduction with rows too short to read memory at speed.
    """
    first, *others = inverse.view(-1, top_k).unbind(-1)
    total = at_least_float32(rows[first])
    for places in others:
        total = total + at_least_float32(rows[places])
    # Not `.to` where it would do nothing: torch 2.11 compiles a Function that ends so to a gradient of zeros.
    return total if total.dtype == rows.dtype else total.to(rows.dtype)


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
    """Each token once for each of its experts, sorted by expert: [T, H] -> [R, H]. order, inverse: integers [R]."""
    return _Permute.apply(x, order, inverse, top_k)


def combine(rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, top_k: int) -> torch.Tensor:
    """The way back: each token gets the sum of its experts' rows, [R, H] -> [T, H]. order, inverse as in `permute`."""
    return _Combine.apply(rows, order, inverse, top_k)


def reorder(rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """rows[order], where `inverse` is the permutation that undoes `order`: [R, ...] -> [R, ...]."""
    return _Reorder.apply(rows, order, inverse)
