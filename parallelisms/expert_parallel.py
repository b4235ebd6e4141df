"""Expert parallelism: each rank of the `ep` axis holds some of the experts; tokens travel to them and back.

A token goes once to each rank that holds any of its experts, which sends back one sum: not once for each expert.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._pytree import tree_leaves

from models.ops.grouped_experts import weighted_swiglu
from models.ops.permute import ExpertOrder, add_up_rows, combine, gather_rows, permute, sort_by_expert
from models.qwen35_moe.moe import IN_EAGER_MODE, Experts, RowOperations, routed_experts

# Shapes: T tokens of this rank, k experts a token, C copies of tokens to send, D copies received, E experts, P ranks of
# the ep axis, m = min(k, P), the most copies of a token, H hidden.

_collectives = torch.ops._c10d_functional


class Copies(NamedTuple):
    """Which token each copy is of, sorted by rank and then token; see permute.py."""

    sources: torch.Tensor
    """[C]"""
    places: torch.Tensor
    """int32 [T, m]"""


class Travelling(NamedTuple):
    """The copies' results [C, H] on their way back, and what `ExpertParallel.arrived` needs beside them."""

    rows: torch.Tensor
    exchange: "Exchange"
    copies: Copies


class ExpertParallel:
    """The forward of a block's experts, in the parts that activation checkpointing and compilation need."""

    def __init__(self, experts: Experts, mesh: DeviceMesh) -> None:
        """Spreads the stacked experts over `mesh` (one axis), contiguous runs of E / P each."""
        for name, parameter in list(experts.named_parameters()):
            sharded = distribute_tensor(parameter.data, mesh, [Shard(0)], src_data_rank=None)
            experts.register_parameter(name, torch.nn.Parameter(sharded))
        self.experts, self.group = experts, mesh.get_group()
        self.num_ranks, self.rank = mesh.size(), mesh.get_local_rank()
        self.num_local, rest = divmod(len(experts.gate_up_proj), self.num_ranks)
        assert rest == 0, (self.num_local, self.num_ranks)
        self.plan_copies, self.make_copies = plan_copies, make_copies
        self.sort_received, self.add_up_copies = sort_received, add_up_copies
        self.row_operations = IN_EAGER_MODE

    def install(self) -> None:
        """Reroutes the experts' forward, which returns while the results travel, and what waits for them."""
        self.experts.forward = self.forward  # type: ignore[method-assign]
        self.experts.arrived = self.arrived  # type: ignore[method-assign]

    def compile(self) -> None:
        """Compiles all but matrix products and what waits: activation checkpointing has to see them, and does not see
        into a graph."""
        self.plan_copies, self.make_copies = _compile(plan_copies), _compile(make_copies)
        self.sort_received, self.add_up_copies = _compile(sort_received), _compile(add_up_copies)
        self.row_operations = RowOperations(_compile(gather_rows), _compile(weighted_swiglu), _compile(add_up_rows))

    def forward(self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> Travelling:
        """As `Experts.forward`. Every rank of the axis takes part, also one that receives nothing.

        One small all-to-all tells how many copies come, one brings their experts and weights, one the copies, and one
        takes the results back; one host synchronisation.
        """
        rows, order, copies, sent, received = self.send_and_compute(x, weights, chosen)
        results = self.row_operations.add_up_rows(rows, order.order, order.places)
        exchange = Exchange(received, sent, self.group)
        return Travelling(exchange.start(results), exchange, copies)

    def arrived(self, results: Travelling) -> torch.Tensor:
        """As `Experts.arrived`: [T, H]."""
        return self.add_up_copies(results.exchange.finish(results.rows), results.copies)

    def send_and_compute(
        self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor
    ) -> tuple[torch.Tensor, ExpertOrder, Copies, list[int], list[int]]:
        """Sends the copies, and applies this rank's experts to those received: rows as of `compute` and their order,
        what was sent, and how many copies went to each rank and came from it."""
        ends, sent_counts, places = self.plan_copies(chosen, self.num_ranks, self.num_local)
        even = [1] * self.num_ranks
        received_counts = _wait(_collectives.all_to_all_single(sent_counts, even, even, self.group.group_name))
        of_sent, of_received = _splits(sent_counts, received_counts).tolist()
        sent, received = ([copies for copies, _ in counts] for counts in (of_sent, of_received))
        num_rows = sum(rows for _, rows in of_received)

        numbers = torch.arange(1, sum(sent) + 1, dtype=torch.int32, device=x.device)  # of the copies
        copies, packed, sources = self.make_copies(x, weights, chosen, ends, places, numbers)
        of_packed, of_copies = Exchange(sent, received, self.group), Exchange(sent, received, self.group)
        packed, copies = of_packed.start(packed), of_copies.start(copies)
        # While the copies travel:
        own_weights, order = self.sort_received(of_packed.finish(packed), self.rank, self.num_local)
        order = order._replace(order=order.order[:num_rows])
        rows = self.compute(of_copies.finish(copies), own_weights, order)
        return rows, order, Copies(sources, places), sent, received

    def compute(self, x: torch.Tensor, weights: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
        """Applies this rank's experts to copies received, x [D, H] and weights [D, k]: rows sorted by expert.

        Adding them up is left to the caller: it keeps nothing, but would be recomputed here, the rows before it too.
        """
        projections = _local(self.experts.gate_up_proj), _local(self.experts.down_proj)
        return routed_experts(x, weights, order, *projections, self.row_operations)


def plan_copies(
    chosen: torch.Tensor, num_ranks: int, num_local: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """chosen [T, k] -> where each (rank, token)'s copies end in their order, int32 [P * T]; how many copies go to each
    rank and how many choices they serve there, int32 [P, 2]; `places` of the copies, int32 [T, m]."""
    num_tokens, top_k = chosen.shape
    targets = chosen // num_local  # [T, k]
    ranks = torch.arange(num_ranks, device=chosen.device)
    serves = (ranks.view(-1, 1, 1) == targets.T).sum(dim=1, dtype=torch.int32)  # [P, T]
    is_sent = (serves > 0).int()
    ends = is_sent.flatten().cumsum(0, dtype=torch.int32)
    counts = torch.stack([is_sent.sum(dim=1, dtype=torch.int32), serves.sum(dim=1, dtype=torch.int32)], dim=1)
    if num_ranks <= top_k:
        places = (ends.view(num_ranks, num_tokens) - 1).where(is_sent > 0, -1).T
    else:
        of_choices = ends.view(num_ranks, num_tokens).T.gather(1, targets) - 1
        is_repeated = (targets.unsqueeze(2) == targets.unsqueeze(1)).tril(-1).any(dim=2)
        places = of_choices.where(~is_repeated, -1)
    return ends, counts, places.contiguous()


def make_copies(
    x: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    ends: torch.Tensor,
    places: torch.Tensor,
    numbers: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The copies, with `numbers` from 1 to C, of x [C, H]; of weights and chosen experts, side by side in the weights'
    dtype [C, 2k]; and `sources` [C]."""
    sources = torch.searchsorted(ends, numbers, out_int32=True) % len(x)
    assert weights.dtype in (torch.float32, torch.float64), weights.dtype  # the first has all integers up to 2^24
    packed = torch.cat([weights, chosen.to(weights.dtype)], dim=-1)
    return permute(x, sources, places), permute(packed, sources, places), sources


def sort_received(packed: torch.Tensor, rank: int, num_local: int) -> tuple[torch.Tensor, ExpertOrder]:
    """What came as `packed` [D, 2k] -> weights [D, k], and the order of the choices that are experts of this rank."""
    weights, chosen = packed.chunk(2, dim=-1)
    local = chosen.detach().int() - rank * num_local
    return weights, sort_by_expert(local.where((local >= 0) & (local < num_local), num_local), num_local)


def add_up_copies(rows: torch.Tensor, copies: Copies) -> torch.Tensor:
    """The copies' results [C, H] -> [T, H]."""
    return combine(rows, copies.sources, copies.places)


def _compile(function: Callable) -> Callable:
    """One graph for any number of rows: unlike the tensors' other dimensions it changes with each block and batch."""
    compiled = torch.compile(function)

    def run(*args: Any) -> Any:
        tensors = [each for each in tree_leaves(args) if isinstance(each, torch.Tensor)]
        if min(map(len, tensors)) < 2:  # the compiler would make a graph of its own for sizes of 0 and of 1
            return function(*args)
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(*args)

    return run


@torch.library.custom_op("qwen35_moe::splits", mutates_args=())
def _splits(sent: torch.Tensor, received: torch.Tensor) -> torch.Tensor:
    """Both [P, 2] -> [2, P, 2] on the host, which waits for the device here.

    An operation of its own, so that activation checkpointing keeps the result: recomputation does not wait again.
    """
    return torch.stack([sent, received]).cpu()


def _wait(tensor: torch.Tensor) -> torch.Tensor:
    return _collectives.wait_tensor(tensor)


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
        return _collectives.all_to_all_single(rows.contiguous(), received, sent, self.group.group_name)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        ctx.exchange = exchange
        return exchange.launch(rows, exchange.sent, exchange.received)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient, ctx.exchange.gradient = ctx.exchange.gradient, None
        return _wait(gradient), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        ctx.exchange = exchange
        return _wait(rows).view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.exchange.gradient = ctx.exchange.launch(gradient, ctx.exchange.received, ctx.exchange.sent)
        return gradient, None  # which only says that there is one


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's experts: FSDP has gathered the parameter over efsdp; what is left is the axis `ep`."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
