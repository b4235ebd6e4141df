"""All-to-alls of rows between the ranks of the `ep` axis: of sizes that the host knows, and of fixed, even ones."""

from typing import Any

import torch
import torch.distributed as dist

from torch_private import functional_collectives

# Shapes: P ranks.


@torch.library.custom_op("qwen35_moe::splits", mutates_args=())
def splits(sent: torch.Tensor, received: torch.Tensor) -> torch.Tensor:
    """Both [P, 2] -> [2, P, 2] on the host, which waits for the device here.

    An operation of its own, so that activation checkpointing keeps the result: recomputation does not wait again.
    """
    return torch.stack([sent, received]).cpu()


def wait(tensor: torch.Tensor) -> torch.Tensor:
    return functional_collectives.wait_tensor(tensor)


class Exchange:
    """One all-to-all of rows and, in the backward pass, of their gradients, each launched and awaited separately.

    Autograd runs what was recorded last first. So what the forward pass computes between `start` and `finish` is
    differentiated between the launch and the wait of the gradients' all-to-all.
    """

    def __init__(self, sent: list[int], received: list[int], group: dist.ProcessGroup) -> None:
        """How many rows go to each rank and come from it."""
        self.sent, self.received, self.group = sent, received, group
        self.gradient: torch.Tensor | None = None
        """Of the rows sent, between launch and wait: it has not their results' shape, so autograd cannot carry it."""

    def start(self, rows: torch.Tensor) -> torch.Tensor:
        """Launches the rows; the result is for `finish` alone."""
        return _Start.apply(rows, self)

    def finish(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows received."""
        return _Finish.apply(rows, self)

    def launch(self, rows: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        return functional_collectives.all_to_all_single(rows.contiguous(), received, sent, self.group.group_name)


class Send(torch.autograd.Function):
    """Launches an even all-to-all of rows, which `Receive` awaits; in the backward pass it is the other way round.
    Both directions have one shape, so that autograd can carry what is on its way."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, group: str, num_ranks: int) -> torch.Tensor:
        return _launch_even(rows, group, num_ranks)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return wait(gradient), None, None


class Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, group: str, num_ranks: int) -> torch.Tensor:
        ctx.group, ctx.num_ranks = group, num_ranks
        return wait(rows).view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _launch_even(gradient, ctx.group, ctx.num_ranks), None, None


def _launch_even(rows: torch.Tensor, group: str, num_ranks: int) -> torch.Tensor:
    even = [len(rows) // num_ranks] * num_ranks
    return functional_collectives.all_to_all_single(rows.contiguous(), even, even, group)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        ctx.exchange = exchange
        return exchange.launch(rows, exchange.sent, exchange.received)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient, ctx.exchange.gradient = ctx.exchange.gradient, None
        return wait(gradient), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        ctx.exchange = exchange
        return wait(rows).view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.exchange.gradient = ctx.exchange.launch(gradient, ctx.exchange.received, ctx.exchange.sent)
        return gradient, None  # which only says that there is one
