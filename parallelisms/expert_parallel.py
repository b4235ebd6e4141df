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

from models.ops.permute import ExpertOrder, combine, permute, sort_by_expert
from models.qwen35_moe.moe import IN_EAGER_MODE, Experts, RowOperations, routed_experts

# Shapes: T tokens of this rank, k experts a token, C copies of tokens to send, D copies received, E experts, P ranks of
# the ep axis, m = min(k, P), the most copies of a token, H hidden.

_collectives = torch.ops._c10d_functional


class Travelling(NamedTuple):
    """The copies' results [C, H] on their way back, and what `ExpertParallel.arrived` needs beside them."""

    rows: torch.Tensor
    exchange: "Exchange"
    places: torch.Tensor


class ExpertParallel:
    """The forward of a block's experts, in the parts that activation checkpointing and compilation need."""

    def __init__(self, experts: Experts, mesh: DeviceMesh) -> None:
        """Spreads the stacked experts over `mesh` (one axis), contiguous runs of E / P each."""
        for name, parameter in list(experts.named_parameters()):
            sharded = distribute_tensor(parameter.data, mesh, [Shard(0)], src_data_rank=None)
            experts.register_parameter(name, torch.nn.Parameter(sharded))
        self.experts, self.group = experts, mesh.get_group()
        self.num_ranks, self.rank = mesh.size(), mesh.get_local_rank()
        self.num_local = len(experts.gate_up_proj) // self.num_ranks
        self.plan_copies, self.make_copies, self.add_up_copies = plan_copies, make_copies, combine
        self.sort_received, self.row_operations = sort_received, IN_EAGER_MODE

    def install(self) -> None:
        """Reroutes the experts' forward, which returns while the results travel, and what waits for them."""
        self.experts.forward = self.forward  # type: ignore[method-assign]
        self.experts.arrived = self.arrived  # type: ignore[method-assign]

    def compile(self) -> None:
        """Compiles all but matrix products and what waits: activation checkpointing has to see them, and does not see
        into a graph."""
        self.plan_copies, self.make_copies = _compile(plan_copies), _compile(make_copies)
        self.sort_received, self.add_up_copies = _compile(sort_received), _compile(combine)
        permute, activation, combine_rows = IN_EAGER_MODE
        self.row_operations = RowOperations(_compile(permute), _compile(activation), _compile(combine_rows))

    def forward(self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> Travelling:
        """As `Experts.forward`. Every rank of the axis takes part, also one that receives nothing.

        One small all-to-all tells how many copies come, one brings their experts and weights, one the copies, and one
        takes the results back; one host synchronisation.
        """
        results, places, sent, received = self.send_and_compute(x, weights, chosen)
        exchange = Exchange(received, sent, self.group)
        return Travelling(exchange.start(results), exchange, places)

    def arrived(self, results: Travelling) -> torch.Tensor:
        """As `Experts.arrived`: [T, H]."""
        return self.add_up_copies(results.exchange.finish(results.rows), results.places)

    def send_and_compute(
        self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[int], list[int]]:
        """Sends the copies, and applies this rank's experts to those received: their results [D, H], the places of the
        copies sent, and how many copies went to each rank and came from it."""
        places, sent_counts = self.plan_copies(chosen, self.num_ranks, self.num_local)
        even = [1] * self.num_ranks
        received_counts = _wait(_collectives.all_to_all_single(sent_counts, even, even, self.group.group_name))
        of_sent, of_received = _splits(sent_counts, received_counts).tolist()
        sent, received = ([copies for copies, _ in counts] for counts in (of_sent, of_received))
        num_rows = sum(rows for _, rows in of_received)

        x, packed = self.make_copies(x, weights, chosen, places, sum(sent))
        of_packed, of_x = Exchange(sent, received, self.group), Exchange(sent, received, self.group)
        packed, x = of_packed.start(packed), of_x.start(x)
        weights, order = self.sort_received(of_packed.finish(packed), self.rank, self.num_local)  # while copies travel
        return self.compute(of_x.finish(x), weights, order, num_rows), places, sent, received

    def compute(self, x: torch.Tensor, weights: torch.Tensor, order: ExpertOrder, num_rows: int) -> torch.Tensor:
        """Applies this rank's experts to copies received: x [D, H], weights [D, k] -> [D, H]."""
        projections = _local(self.experts.gate_up_proj), _local(self.experts.down_proj)
        return routed_experts(x, weights, order, num_rows, *projections, self.row_operations)


def plan_copies(chosen: torch.Tensor, num_ranks: int, num_local: int) -> tuple[torch.Tensor, torch.Tensor]:
    """chosen [T, k] -> the places of each token's copies, sorted by rank and then token, int32 [T, m] as in permute.py;
    and how many copies go to each rank and how many choices they serve there, int32 [P, 2]."""
    num_tokens, top_k = chosen.shape
    targets = chosen // num_local  # [T, k]
    ranks = torch.arange(num_ranks, device=chosen.device)
    serves = (ranks.view(-1, 1, 1) == targets.T).sum(dim=1, dtype=torch.int32)  # [P, T]
    is_sent = (serves > 0).int()
    place = is_sent.flatten().cumsum(0, dtype=torch.int32).view(num_ranks, num_tokens) - 1  # of those that are sent
    if num_ranks <= top_k:
        places = place.where(is_sent > 0, -1).T
    else:
        is_repeated = (targets.unsqueeze(2) == targets.unsqueeze(1)).tril(-1).any(dim=2)
        places = place.T.gather(1, targets).where(~is_repeated, -1)
    counts = torch.stack([is_sent.sum(dim=1, dtype=torch.int32), serves.sum(dim=1, dtype=torch.int32)], dim=1)
    return places.contiguous(), counts


def make_copies(
    x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, places: torch.Tensor, num_copies: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The copies of x [C, H]; and of weights and chosen experts, side by side in the weights' dtype [C, 2k]."""
    packed = torch.cat([weights, chosen.to(weights.dtype)], dim=-1)  # float32 has all integers up to 2^24
    return permute(x, places, num_copies), permute(packed, places, num_copies)


def sort_received(packed: torch.Tensor, rank: int, num_local: int) -> tuple[torch.Tensor, ExpertOrder]:
    """What came as `packed` [D, 2k] -> weights [D, k], and the order of the choices that are experts of this rank."""
    weights, chosen = packed.chunk(2, dim=-1)
    local = chosen.detach().int() - rank * num_local
    return weights, sort_by_expert(local.where((local >= 0) & (local < num_local), num_local), num_local)


def _compile(function: Callable) -> Callable:
    """One graph for any number of rows: unlike the tensors' other dimensions it changes with each block and batch."""
    compiled = torch.compile(function)

    def run(*args: Any) -> Any:
        for each in tree_leaves(args):
            if isinstance(each, torch.Tensor):
                torch._dynamo.maybe_mark_dynamic(each, 0)
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
