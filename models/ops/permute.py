"""Moves tokens to their experts' order and back, without additions in memory: sums have one order on any device."""

from typing import Any, NamedTuple

import torch

from models.ops.precision import at_least_float32

# Shapes: N tokens, k experts a token, R rows (each of a token, which may have several), E experts, H hidden.
# places [N, m]: a token's rows, at most m of them, the rest -1; each row is some token's. Autograd would scatter the
# gradients with atomic additions.


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, places: torch.Tensor, num_rows: int) -> torch.Tensor:
        ctx.save_for_backward(places)
        return _spread(x, places, num_rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return _add_up(gradient, places), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.num_rows = len(rows)
        return _add_up(rows, places)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (places,) = ctx.saved_tensors
        return _spread(gradient, places, ctx.num_rows), None


def _spread(x: torch.Tensor, places: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Writes each token to its places, [N, H] -> [R, H].

    A gather by row would read a token as often as it has rows, and in an order that no cache can hold.
    """
    rows = x.new_empty(num_rows + 1, x.shape[-1])  # the last takes what goes to -1
    rows[places] = x.unsqueeze(1)
    return rows[:num_rows]


def _add_up(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Adds up each token's rows, [R, H] -> [N, H], in float32 or wider.

    One gather a column: compiled, the sum is then elementwise work along H. As a sum over a dimension of size m the
    compiler makes it a reduction with rows too short to read memory at speed.
    """
    # Where there is no row, -1 reads the last one: some row that is there to be read, whatever it holds.
    total, *others = (
        at_least_float32(rows[column]).where((column >= 0).unsqueeze(-1), 0.0) for column in places.unbind(-1)
    )
    for each in others:
        total = total + each
    # Not `.to` where it would do nothing: torch 2.11 compiles a Function that ends so to a gradient of zeros.
    return total if total.dtype == rows.dtype else total.to(rows.dtype)


def permute(x: torch.Tensor, places: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Each token as often as it has rows: [N, H] -> [R, H]. places: integers [N, m], see above."""
    return _Permute.apply(x, places, num_rows)


def combine(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The way back: each token gets the sum of its rows, [R, H] -> [N, H]; zeros if it has none."""
    return _Combine.apply(rows, places)


class ExpertOrder(NamedTuple):
    """Which choice is which row when rows are sorted by expert, and by token within an expert."""

    places: torch.Tensor
    """int32 [N, k]: choice -> row; -1 for a choice that has none."""
    offsets: torch.Tensor
    """int32 [E]: where each expert's rows end."""


def sort_by_expert(chosen: torch.Tensor, num_experts: int) -> ExpertOrder:
    """chosen, integers [N, k]: an expert, or `num_experts` for none, which gets no row."""
    # The fewer bits a key has, the fewer passes a radix sort makes.
    experts, order = chosen.flatten().to(torch.int16).sort(stable=True)
    # Indices of 32 bits: 64-bit arithmetic costs a GPU more than moving the rows.
    rows = torch.arange(order.shape[0], dtype=torch.int32, device=chosen.device)
    places = torch.empty_like(rows).scatter_(0, order, rows).view_as(chosen)
    # Where each expert's rows end, by binary search: no atomics, no host synchronisation.
    ids = torch.arange(num_experts, dtype=torch.int16, device=chosen.device)
    offsets = torch.searchsorted(experts, ids, right=True, out_int32=True)
    return ExpertOrder(places.where(chosen < num_experts, -1), offsets)


def permute_weighted(
    x: torch.Tensor, weights: torch.Tensor, places: torch.Tensor, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [N, H], weights [N, k] -> rows [R, H], and of each the weight of its choice [R]; places [N, k]."""
    of_choices = permute(weights.reshape(-1, 1), places.view(-1, 1), num_rows)
    return permute(x, places, num_rows), of_choices.flatten()
