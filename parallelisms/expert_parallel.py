"""Expert parallelism: each rank of the `ep` axis holds some of the experts; tokens travel to them and back.

A token goes once to each rank that holds any of its experts, which sends back one sum: not once for each expert.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from models.ops.documents import Documents
from models.ops.grouped_experts import Projection
from models.ops.permute import ExpertOrder, permute, sort_by_expert
from models.ops.permute import combine as add_up_copies
from models.qwen35_moe.block import Block
from models.qwen35_moe.moe import COUNTS_OF_ALL, Measure, RouterStatistics, routed_experts
from models.qwen35_moe.rotary import Rotary
from torch_private import functional_collectives, mark_dynamic, tree_leaves

# Shapes: T tokens of this rank, k experts a token, C copies of tokens to send, D copies received, E experts, P ranks of
# the ep axis, m = min(k, P), the most copies of a token, H hidden.


class Plan(NamedTuple):
    """Which copies go where."""

    chosen: torch.Tensor
    """The experts, integers [T, k]."""
    ends: torch.Tensor
    """int32 [P * T]: how many copies there are up to each (rank, token), in that order."""
    counts: torch.Tensor
    """int32 [P, 2]: how many copies go to each rank, and how many choices they serve there."""
    places: torch.Tensor
    """int32 [T, m], of the copies; see permute.py."""


class Copies(NamedTuple):
    """Which token each copy is of, sorted by rank and then token; see permute.py."""

    sources: torch.Tensor
    """[C]"""
    places: torch.Tensor
    """int32 [T, m]"""


class Travelling(NamedTuple):
    """The copies' results [C, H] on their way back, and what is needed where they arrive."""

    rows: torch.Tensor
    exchange: "Exchange"
    copies: Copies


class ExpertParallelBlock:
    """`Block.forward` and `MixtureOfExperts.forward` where the experts lie on several ranks: the same composition, but
    tokens are dispatched to their experts and what comes back is combined.

    In parts, as no graph can hold the exchanges: how many rows travel is known to the host alone. One break inside
    would leave all of a checkpointed block uncompiled, so what stands before, between, beside and after them is
    compiled and checkpointed by itself.
    """

    def __init__(self, block: Block, mesh: DeviceMesh) -> None:
        """Spreads the block's stacked experts over `mesh` (one axis), contiguous runs of E / P each, and takes over."""
        self.block, self.mlp = block, block.mlp
        experts = self.mlp.experts
        for name, parameter in list(experts.named_parameters()):
            sharded = distribute_tensor(parameter.data, mesh, [Shard(0)], src_data_rank=None)
            requires_grad = parameter.requires_grad
            experts.register_parameter(name, torch.nn.Parameter(sharded, requires_grad=requires_grad))
        self.group = mesh.get_group()
        self.num_ranks, self.rank = mesh.size(), mesh.get_local_rank()
        self.num_local, rest = divmod(len(experts.gate_up_proj), self.num_ranks)
        assert rest == 0, (self.num_local, self.num_ranks)
        self.make_copies, self.sort_received, self.compute = make_copies, sort_received, compute

    def install(self) -> None:
        """Puts this in the place of the block's forward, once its parts are what they are to be."""
        # `dispatch` stands inside the module Experts, since FSDP gathers the experts' weights around its forward.
        setattr(self.mlp.experts, "forward", self.dispatch)  # noqa: B010  (another signature than its own)
        setattr(self.block, "forward", self.forward)  # noqa: B010

    def parts(self, activation_checkpoint: str) -> list[tuple[object, str]]:
        """What is checkpointed, each by itself; the first is the one with attention."""
        # "full" sends the copies again, "selective" keeps those received.
        of_experts = "send_and_compute" if activation_checkpoint == "full" else "compute"
        return [(self, part) for part in ("attend_and_route", of_experts, "run_shared_expert")]

    def compile(self) -> None:
        """Compiles each part."""
        setattr(self, "attend_and_route", torch.compile(self.attend_and_route))  # noqa: B010
        self.make_copies = compile_for_any_number_of_rows(self.make_copies)
        self.sort_received = compile_for_any_number_of_rows(self.sort_received)
        self.compute = compile_for_any_number_of_rows(self.compute, num_others=3)
        setattr(self, "run_shared_expert", torch.compile(self.run_shared_expert))  # noqa: B010
        setattr(self, "combine", compile_for_any_number_of_rows(self.combine))  # noqa: B010

    def forward(
        self, hidden: torch.Tensor, rotary: Rotary, documents: Documents, measure: Measure = COUNTS_OF_ALL
    ) -> tuple[torch.Tensor, RouterStatistics]:
        """As `Block.forward`. Every rank of the axis takes part, also one that receives nothing.

        One small all-to-all tells how many copies come, one brings their experts and weights, one the copies, and one
        takes the results back; one host synchronisation.
        """
        hidden, x, weights, plan, statistics = self.attend_and_route(hidden, rotary, documents, measure)
        results: Travelling = self.mlp.experts(x, weights, plan)
        shared = self.run_shared_expert(x)  # while the results are on their way back
        rows = results.exchange.finish(results.rows)
        return self.combine(hidden, shared, rows, results.copies), statistics

    def attend_and_route(
        self, hidden: torch.Tensor, rotary: Rotary, documents: Documents, measure: Measure
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Plan, RouterStatistics]:
        """hidden [T, H] -> hidden after attention and what the experts read, both [T, H]; weights [T, k], plan."""
        hidden = hidden + self.block.attend(self.block.input_layernorm(hidden), rotary, documents)
        x = self.block.post_attention_layernorm(hidden)
        weights, chosen, statistics = self.mlp.route(x, measure)
        return hidden, x, weights, plan_copies(chosen, self.num_ranks, self.num_local), statistics

    def dispatch(self, x: torch.Tensor, weights: torch.Tensor, plan: Plan) -> Travelling:
        """Sends the copies, applies this rank's experts to those that come, and starts their results' way back."""
        results, copies, sent, received = self.send_and_compute(x, weights, plan)
        exchange = Exchange(received, sent, self.group)
        return Travelling(exchange.start(results), exchange, copies)

    def run_shared_expert(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, H] -> [T, H]."""
        return self.mlp.run_shared_expert(x)

    def combine(self, hidden: torch.Tensor, shared: torch.Tensor, rows: torch.Tensor, copies: Copies) -> torch.Tensor:
        """The second residual: hidden and the shared expert's result [T, H], the copies' results [C, H] -> [T, H]."""
        return hidden + (add_up_copies(rows, copies.sources, copies.places) + shared)

    def send_and_compute(
        self, x: torch.Tensor, weights: torch.Tensor, plan: Plan
    ) -> tuple[torch.Tensor, Copies, list[int], list[int]]:
        """Sends the copies, and applies this rank's experts to those received: their results [D, H], what was sent, and
        how many copies went to each rank and came from it."""
        even = [1] * self.num_ranks
        received_counts = _wait(
            functional_collectives.all_to_all_single(plan.counts, even, even, self.group.group_name)
        )
        of_sent, of_received = _splits(plan.counts, received_counts).tolist()
        sent, received = ([copies for copies, _ in counts] for counts in (of_sent, of_received))
        num_rows = sum(rows for _, rows in of_received)

        numbers = torch.arange(1, sum(sent) + 1, dtype=torch.int32, device=x.device)  # of the copies
        copies, packed, sources = self.make_copies(x, weights, plan.chosen, plan.ends, plan.places, numbers)
        of_packed, of_copies = Exchange(sent, received, self.group), Exchange(sent, received, self.group)
        packed, copies = of_packed.start(packed), of_copies.start(copies)
        # While the copies travel:
        own_weights, order = self.sort_received(of_packed.finish(packed), self.rank, self.num_local)
        rows = order.order[:num_rows], order.places
        projections = map(_local, self.mlp.experts.projections())
        results = self.compute(of_copies.finish(copies), own_weights, *rows, order.offsets, *projections)
        return results, Copies(sources, plan.places), sent, received


def plan_copies(chosen: torch.Tensor, num_ranks: int, num_local: int) -> Plan:
    """chosen, integers [T, k]; of `num_ranks` ranks, each with `num_local` experts."""
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
    return Plan(chosen, ends, counts, places.contiguous())


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


def compute(
    x: torch.Tensor,
    weights: torch.Tensor,
    order: torch.Tensor,
    places: torch.Tensor,
    offsets: torch.Tensor,
    gate_up_proj: Projection,
    down_proj: Projection,
) -> torch.Tensor:
    """`routed_experts` of copies received, x [D, H] and weights [D, k], in flat arguments."""
    return routed_experts(x, weights, ExpertOrder(order, places, offsets), gate_up_proj, down_proj)


def compile_for_any_number_of_rows(function: Callable, num_others: int = 0) -> Callable:
    """One graph however many rows the arguments have, but for the last `num_others`: their shapes stay.

    Rows are the first dimension. As they are copies or copies' choices, there are others in each block and batch.
    """
    compiled = torch.compile(function)

    def run(*args: Any) -> Any:
        of_rows = [each for each in tree_leaves(args[: len(args) - num_others]) if isinstance(each, torch.Tensor)]
        if min(map(len, of_rows)) < 2:  # the compiler would make a graph of its own for sizes of 0 and of 1
            return function(*args)
        for tensor in of_rows:
            mark_dynamic(tensor, 0)
        return compiled(*args)

    return run


@torch.library.custom_op("qwen35_moe::splits", mutates_args=())
def _splits(sent: torch.Tensor, received: torch.Tensor) -> torch.Tensor:
    """Both [P, 2] -> [2, P, 2] on the host, which waits for the device here.

    An operation of its own, so that activation checkpointing keeps the result: recomputation does not wait again.
    """
    return torch.stack([sent, received]).cpu()


def _wait(tensor: torch.Tensor) -> torch.Tensor:
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


def _local(projection: Projection) -> Projection:
    """This rank's experts: FSDP has gathered the parameters over efsdp; what is left is the axis `ep`."""
    return Projection._make(each.to_local() if isinstance(each, DTensor) else each for each in projection)
