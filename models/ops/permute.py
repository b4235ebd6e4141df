"""Moves tokens to their experts' order and back: sums are gathered, so they have one order on any device."""

from typing import Any, NamedTuple

import torch

from models.ops.has_triton import HAS_TRITON
from models.ops.precision import at_least_float32

if HAS_TRITON:
    from models.ops import permute_triton

# Shapes: N tokens, k experts a token, R rows (of tokens, each as often as it is needed), E experts, H hidden.
# sources [R]: row -> its token; places [N, m]: token -> its rows, at most m of them, the rest -1. They describe the
# same pairs, so each is the way back of the other. Autograd would scatter the gradients with atomic additions.


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sources: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        return _rows_of(x, sources, places)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return _sum_of_rows(gradient, places), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, sources: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(sources, places)
        return _sum_of_rows(rows, places)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _rows_of(gradient, *ctx.saved_tensors), None, None


_INT32_MAX = 2**31 - 1


def _has_kernel(values: torch.Tensor, places: torch.Tensor) -> bool:
    """Not for float64, with which the self-test compares."""
    return HAS_TRITON and values.is_cuda and values.dtype != torch.float64 and places.shape[1] > 1


def _rows_of(x: torch.Tensor, sources: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Each token's row wherever it is wanted, [N, H] -> [R, H]. A row that is no token's is any."""
    if _has_kernel(x, places):
        return permute_triton.rows_of(x, places, len(sources))
    return x[sources]


def _sum_of_rows(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Adds up each token's rows, [R, H] -> [N, H], in float32 or wider.

    In a kernel of its own where it gathers several: as part of other work, like the norm's backward pass, the gathers
    take as long again, and a row that is not there is read too.
    """
    if _has_kernel(rows, places):
        return permute_triton.sum_of_rows(rows, places)
    # One gather a column: compiled, the sum is then elementwise work along H. As a sum over a dimension of size m the
    # compiler makes it a reduction with rows too short to read memory at speed. And torch 2.11 compiles place * H to as
    # many bits as places have.
    places = places.long() if rows.numel() > _INT32_MAX else places
    # Where there is no row, -1 reads the last one: some row that is there to be read, whatever it holds.
    total, *others = (
        at_least_float32(rows[column]).where((column >= 0).unsqueeze(-1), 0.0) for column in places.unbind(-1)
    )
    for each in others:
        total = total + each
    # Not `.to` where it would do nothing: torch 2.11 compiles a Function that ends so to a gradient of zeros.
    return total if total.dtype == rows.dtype else total.to(rows.dtype)


def permute(x: torch.Tensor, sources: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Each token as often as it has rows: [N, H] -> [R, H]. sources [R], places [N, m]: integers, see above. What is in
    rows beyond those that places name is any."""
    return _Permute.apply(x, sources, places)


def combine(rows: torch.Tensor, sources: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The way back: each token gets the sum of its rows, [R, H] -> [N, H]; zeros if it has none."""
    return _Combine.apply(rows, sources, places)


class ExpertOrder(NamedTuple):
    """Which row is which choice when rows are sorted by expert, and by token within an expert."""

    order: torch.Tensor
    """int32 [R]: row -> choice, token * k + place among its k."""
    places: torch.Tensor
    """int32 [N, k]: choice -> row; -1 for a choice that has none."""
    offsets: torch.Tensor
    """int32 [E]: where each expert's rows end."""


def sort_by_expert(chosen: torch.Tensor, num_experts: int) -> ExpertOrder:
    """chosen, integers [N, k]: an expert, or `num_experts` for none, which gets no row.

    `order` has N * k entries: those of the rows first, as many as the last of `offsets` says, then the others.
    """
    assert num_experts < 2**15, num_experts
    # The fewer bits a key has, the fewer passes a radix sort makes.
    experts, order = chosen.flatten().to(torch.int16).sort(stable=True)
    rows = torch.arange(order.shape[0], dtype=torch.int32, device=chosen.device)
    places = torch.empty_like(rows).scatter_(0, order, rows).view_as(chosen)
    # Where each expert's rows end, by binary search: no atomics, no host synchronisation.
    ids = torch.arange(num_experts, dtype=torch.int16, device=chosen.device)
    offsets = torch.searchsorted(experts, ids, right=True, out_int32=True)
    # Indices of 32 bits: 64-bit arithmetic costs a GPU more than moving the rows.
    return ExpertOrder(order.int(), places.where(chosen < num_experts, -1), offsets)


def gather_rows(x: torch.Tensor, weights: torch.Tensor, order: ExpertOrder) -> tuple[torch.Tensor, torch.Tensor]:
    """x [N, H], weights [N, k] -> rows [R, H] and their weights [R], sorted by expert."""
    rows = permute(x, order.order // weights.shape[-1], order.places)
    return rows, permute(weights.reshape(-1, 1), order.order, order.places.view(-1, 1)).flatten()


def add_up_rows(rows: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """The way back: rows [R, H] -> each token's sum [N, H]."""
    return combine(rows, order.order // order.places.shape[-1], order.places)
