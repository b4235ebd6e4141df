"""Expert parallelism: each rank of the `ep` axis holds some of the experts; tokens travel to them and back.

A token goes once to each rank that holds any of its experts, which sends back one sum: not once for each expert.

How many rows travel and how many a rank's experts get is known to the device alone. So there are two ways. With `room`
buffers have fixed sizes, somewhat more than even shares: the host never waits, and graphs hold the exchanges. What a
buffer has no room for is counted, and then the step is made anew in the other way (training/step.py). There the host
asks for the sizes, once a block, and buffers have just these.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from models.ops.any_number_of_rows import compile_for_any_number_of_rows
from models.ops.documents import Documents
from models.ops.grouped_experts import Projection
from models.ops.permute import ExpertOrder, permute, sort_by_expert
from models.ops.permute import combine as add_up_copies
from models.qwen35_moe.block import Block
from models.qwen35_moe.moe import COUNTS_OF_ALL, Measure, RouterStatistics, routed_experts
from models.qwen35_moe.rotary import Rotary
from parallelisms.exchange import Exchange, Receive, Send, splits, wait
from parallelisms.room import Room, Sizes
from torch_private import functional_collectives

# Shapes: T tokens of this rank, k experts a token, C copies of tokens to send, D copies received, E experts, P ranks of
# the ep axis, m = min(k, P), the most copies of a token, R rows of experts, H hidden. With room each rank sends as many
# copies to each, some of them blank, so that C = D.


class Plan(NamedTuple):
    """Which copies go where."""

    chosen: torch.Tensor
    """The experts, integers [T, k]."""
    ends: torch.Tensor
    """int32 [P * T]: how many copies there are up to each (rank, token), in that order."""
    counts: torch.Tensor
    """int32 [P, 2]: how many copies go to each rank, and how many choices they serve there."""
    places: torch.Tensor
    """int32 [T, m], of the copies, in buffers of fixed sizes or as close as they get; see permute.py."""


class Attended(NamedTuple):
    """A block up to its experts."""

    hidden: torch.Tensor
    """[T, H], the first residual added."""
    x: torch.Tensor
    """[T, H], what the experts read."""
    weights: torch.Tensor
    """float32 [T, k]"""
    plan: Plan
    statistics: RouterStatistics


class Copies(NamedTuple):
    """Which token each copy is of, sorted by rank and then token; see permute.py."""

    sources: torch.Tensor
    """[C]"""
    places: torch.Tensor
    """int32 [T, m]"""


class Travelling(NamedTuple):
    """The copies' results [C, H] on their way back, and what is needed where they arrive."""

    rows: torch.Tensor
    exchange: Exchange
    copies: Copies


class ExpertParallelBlock:
    """`Block.forward` and `MixtureOfExperts.forward` where the experts lie on several ranks: the same composition, but
    tokens are dispatched to their experts and what comes back is combined.

    With room all of it is one graph. Where the host asks for sizes no graph can hold the exchanges, and one break
    inside would leave all of a checkpointed block uncompiled: what stands before, between, beside and after them is
    compiled by itself, and checkpointed by itself in both ways.
    """

    def __init__(self, block: Block, mesh: DeviceMesh, room: Room) -> None:
        """Spreads the block's stacked experts over `mesh` (one axis), contiguous runs of E / P each, and takes over."""
        self.block, self.mlp, self.room = block, block.mlp, room
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
        # Where they are no part of one graph:
        self.attend_and_route_alone: Callable[..., Attended] = lambda *inputs: self.attend_and_route(*inputs)
        self.run_shared_expert_alone: Callable[[torch.Tensor], torch.Tensor] = lambda x: self.run_shared_expert(x)

    def install(self) -> None:
        """Puts this in the place of the block's forward, once its parts are what they are to be."""
        # FSDP gathers the experts' weights around this forward, so what reads them runs inside of it.
        setattr(self.mlp.experts, "forward", lambda run, *args: run(*args))  # noqa: B010  (not its own signature)
        setattr(self.block, "forward", self.forward)  # noqa: B010

    def parts(self, activation_checkpoint: str) -> list[tuple[object, str]]:
        """What is checkpointed, each by itself; the first is the one with attention."""
        # "full" sends the copies again, "selective" keeps those received.
        of_experts = "send_and_compute" if activation_checkpoint == "full" else "compute"
        parts = "attend_and_route", of_experts, "exchange_and_compute", "run_shared_expert"
        return [(self, part) for part in parts]

    def compile(self, options: dict[str, Any] | None) -> None:
        """Compiles each part; options: of torch.compile, for graphs that hold exchanges."""
        setattr(self, "compute_with_room", torch.compile(self.compute_with_room, options=options))  # noqa: B010
        self.attend_and_route_alone = torch.compile(self.attend_and_route, options=options)
        self.make_copies = compile_for_any_number_of_rows(self.make_copies)
        self.sort_received = compile_for_any_number_of_rows(self.sort_received)
        self.compute = compile_for_any_number_of_rows(self.compute, num_others=3)
        self.run_shared_expert_alone = torch.compile(self.run_shared_expert)
        setattr(self, "combine", compile_for_any_number_of_rows(self.combine))  # noqa: B010

    def forward(
        self, hidden: torch.Tensor, rotary: Rotary, documents: Documents, measure: Measure = COUNTS_OF_ALL
    ) -> tuple[torch.Tensor, RouterStatistics]:
        """As `Block.forward`. Every rank of the axis takes part, also one that receives nothing.

        One small all-to-all brings the copies' experts and weights, one the copies, and one takes the results back.
        Where the host asks for sizes another one, smaller still, tells of them, and the host waits once.
        """
        if self.room.factor and torch.is_grad_enabled():  # without a backward pass there is no step to make anew
            return self.mlp.experts(self.forward_with_room, hidden, rotary, documents, measure)
        hidden, x, weights, plan, statistics = self.attend_and_route_alone(hidden, rotary, documents, measure)
        results: Travelling = self.mlp.experts(self.dispatch, x, weights, plan)
        shared = self.run_shared_expert_alone(x)  # while the results are on their way back
        rows = results.exchange.finish(results.rows)
        return self.combine(hidden, shared, rows, results.copies), statistics

    def attend_and_route(
        self,
        hidden: torch.Tensor,
        rotary: Rotary,
        documents: Documents,
        measure: Measure,
        capacity: int | None = None,
    ) -> Attended:
        """hidden [T, H]; at most `capacity` copies go to a rank."""
        hidden = hidden + self.block.attend(self.block.input_layernorm(hidden), rotary, documents)
        x = self.block.post_attention_layernorm(hidden)
        weights, chosen, statistics = self.mlp.route(x, measure)
        chosen = deal_fillers(chosen, measure.is_real, self.mlp.num_experts)
        plan = plan_copies(chosen, self.num_ranks, self.num_local, capacity)
        return Attended(hidden, x, weights, plan, statistics)

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
        return add_results(hidden, shared, rows, copies)

    def send_and_compute(
        self, x: torch.Tensor, weights: torch.Tensor, plan: Plan
    ) -> tuple[torch.Tensor, Copies, list[int], list[int]]:
        """Sends the copies, and applies this rank's experts to those received: their results [D, H], what was sent, and
        how many copies went to each rank and came from it."""
        even = [1] * self.num_ranks
        received_counts = wait(functional_collectives.all_to_all_single(plan.counts, even, even, self.group.group_name))
        of_sent, of_received = splits(plan.counts, received_counts).tolist()
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

    # With room:

    def forward_with_room(
        self, hidden: torch.Tensor, rotary: Rotary, documents: Documents, measure: Measure
    ) -> tuple[torch.Tensor, RouterStatistics]:
        """See `forward`."""
        sizes = self.room.sizes(len(hidden), self.mlp.gate.top_k, self.num_ranks, self.num_local)
        projections = map(_local, self.mlp.experts.projections())
        results = self.compute_with_room(hidden, rotary, documents, measure, sizes, *projections)
        hidden, statistics, num_missed = results
        return hidden, statistics._replace(num_missed=num_missed)  # torch 2.11 compiles no return of it

    def compute_with_room(
        self,
        hidden: torch.Tensor,
        rotary: Rotary,
        documents: Documents,
        measure: Measure,
        sizes: Sizes,
        gate_up_proj: Projection,
        down_proj: Projection,
    ) -> tuple[torch.Tensor, RouterStatistics, torch.Tensor]:
        """`forward_with_room`, with the experts' weights as arguments, and how many rows were missed by itself."""
        hidden, x, weights, plan, statistics = self.attend_and_route(hidden, rotary, documents, measure, sizes.copies)
        numbers, is_copy = fixed_copies(plan, len(x), sizes.copies)
        results, sources, num_missed = self.exchange_and_compute(
            x, weights, plan, numbers, is_copy, sizes.rows, gate_up_proj, down_proj
        )
        num_missed = num_missed + (plan.counts[:, 0] - sizes.copies).clamp(min=0).sum(dtype=torch.int32)
        results = self._send(results)
        shared = self.run_shared_expert(x)  # while they are on their way back
        hidden = add_results(hidden, shared, self._receive(results), Copies(sources, plan.places))
        return hidden, statistics, num_missed

    def exchange_and_compute(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        plan: Plan,
        numbers: torch.Tensor,
        is_copy: torch.Tensor,
        num_rows: int,
        gate_up_proj: Projection,
        down_proj: Projection,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The results [D, H], `sources` [C], and how many rows there was no room for."""
        copies, packed, sources = make_copies(x, weights, plan.chosen, plan.ends, plan.places, numbers)
        of_weights = torch.arange(packed.shape[1], device=x.device) < weights.shape[1]
        packed = packed.where(is_copy.unsqueeze(1) | of_weights, -1)  # blank copies choose no expert
        packed, copies = self._send(packed), self._send(copies)
        own_weights, order = sort_received(self._receive(packed), self.rank, self.num_local)
        places = order.places.where(order.places < num_rows, -1)
        offsets = order.offsets.clamp(max=num_rows)
        rows = self._receive(copies), own_weights, order.order[:num_rows], places, offsets
        return compute(*rows, gate_up_proj, down_proj), sources, order.offsets[-1] - offsets[-1]

    def _send(self, rows: torch.Tensor) -> torch.Tensor:
        return Send.apply(rows, self.group.group_name, self.num_ranks)

    def _receive(self, rows: torch.Tensor) -> torch.Tensor:
        return Receive.apply(rows, self.group.group_name, self.num_ranks)


def add_results(hidden: torch.Tensor, shared: torch.Tensor, rows: torch.Tensor, copies: Copies) -> torch.Tensor:
    """See `combine`."""
    return hidden + (add_up_copies(rows, copies.sources, copies.places) + shared)


def deal_fillers(chosen: torch.Tensor, is_real: torch.Tensor | None, num_experts: int) -> torch.Tensor:
    """chosen, integers [T, k], where fillers take the experts in turn. By themselves they all choose the same ones,
    whose ranks would get more than there is room for, of copies that nobody reads. `is_real` as in Measure."""
    if is_real is None:
        return chosen
    numbers = is_real.logical_not().cumsum(0).unsqueeze(-1) * chosen.shape[-1]  # that fillers far apart differ too
    in_turn = (numbers + torch.arange(chosen.shape[-1], device=chosen.device)) % num_experts
    return chosen.where(is_real.unsqueeze(-1), in_turn)


def plan_copies(chosen: torch.Tensor, num_ranks: int, num_local: int, capacity: int | None = None) -> Plan:
    """chosen, integers [T, k]; of `num_ranks` ranks, each with `num_local` experts, to which at most `capacity` copies
    go."""
    num_tokens, top_k = chosen.shape
    targets = chosen // num_local  # [T, k]
    ranks = torch.arange(num_ranks, device=chosen.device)
    serves = (ranks.view(-1, 1, 1) == targets.T).sum(dim=1, dtype=torch.int32)  # [P, T]
    is_sent = (serves > 0).int()
    ends = is_sent.flatten().cumsum(0, dtype=torch.int32)
    counts = torch.stack([is_sent.sum(dim=1, dtype=torch.int32), serves.sum(dim=1, dtype=torch.int32)], dim=1)
    numbers = ends.view(num_ranks, num_tokens)
    if capacity is not None:  # each rank's copies have a buffer of their own
        within = numbers - _starts(numbers)
        numbers = (within + capacity * ranks.unsqueeze(1)).where(within <= capacity, 0).int()
    if num_ranks <= top_k:
        places = (numbers - 1).where(is_sent > 0, -1).T
    else:
        of_choices = numbers.T.gather(1, targets) - 1
        is_repeated = (targets.unsqueeze(2) == targets.unsqueeze(1)).tril(-1).any(dim=2)
        places = of_choices.where(~is_repeated, -1)
    return Plan(chosen, ends, counts, places.contiguous())


def _starts(ends: torch.Tensor) -> torch.Tensor:
    """ends [P, T], counted through -> [P, 1]: how many there are before each rank's first."""
    return torch.cat([ends.new_zeros(1), ends[:-1, -1]]).unsqueeze(1)


def fixed_copies(plan: Plan, num_tokens: int, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of buffers of `capacity` copies for each rank [P * capacity]: their numbers, as `make_copies` wants them, and
    which are copies; the others are blank, with numbers of whichever."""
    ends = plan.ends.view(-1, num_tokens)
    steps = torch.arange(1, capacity + 1, dtype=torch.int32, device=ends.device)
    numbers = (_starts(ends) + steps).clamp(max=ends[-1, -1])
    return numbers.flatten(), (steps <= plan.counts[:, :1]).flatten()


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


def _local(projection: Projection) -> Projection:
    """This rank's experts: FSDP has gathered the parameters over efsdp; what is left is the axis `ep`."""
    return Projection._make(_ToLocal.apply(each) if isinstance(each, DTensor) else each for each in projection)


class _ToLocal(torch.autograd.Function):
    """`DTensor.to_local` where gradients lie as the tensor does, without the search for another way, for which the host
    takes 70 us a tensor there and back (2026-11-30, a CPU), and this 25. None for one that there is none of."""

    @staticmethod
    def forward(ctx: Any, whole: DTensor) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.layout = whole.device_mesh, whole.placements, whole.shape, whole.stride()
        return whole.to_local().detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor | None) -> DTensor | None:
        if gradient is None:
            return None
        mesh, placements, shape, stride = ctx.layout
        return DTensor.from_local(gradient.contiguous(), mesh, placements, run_check=False, shape=shape, stride=stride)
