"""Buffers of fixed sizes for tokens that travel to their experts: what fits is exact, what does not is made anew."""

from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from config.options import MoE, Parallelism
from data.batch import MicroBatch
from models.qwen35_moe.config import FULL, LINEAR, ModelConfig
from models.qwen35_moe.parts import frozen_parts, part_of
from parallelisms.expert_parallel import deal_fillers, fixed_copies, make_copies, plan_copies
from parallelisms.room import Room, room_factor
from tests.distributed import run_ranks
from tests.models.qwen35_moe.shapes import tiny_config
from tests.parallelisms import test_context_parallel, test_lora_layouts, test_vision_layouts
from tests.parallelisms.layouts import OFF, Layout, Run, build, full, own_batches, step, train_layouts
from tests.parallelisms.test_layouts import CONFIG, ROWS, check, relative_error
from training.step import StepResult

AMPLE = 8.0  # of 8 experts all tokens fit on one rank
NUM_LOCAL = 3
NUM_STEPS = 4  # in the fourth there may be no room any more: see below

# Pairwise with what changes the graphs; a rank's tokens are as many as another's. (Kernels of such graphs:
# test_context_parallel.py.)
LAYOUTS = [
    Layout(world=2, ep=2, room=AMPLE, accumulation=2, activation_checkpoint="selective"),
    Layout(world=2, ep=2, room=AMPLE, activation_checkpoint="full", adam_eps=1e-8),
    Layout(world=2, ep=2, room=AMPLE, activation_checkpoint="selective", compile="aot_eager"),
    Layout(world=4, ep=4, room=AMPLE, activation_checkpoint="full", accumulation=2),
    Layout(world=4, ep=2, room=AMPLE, activation_checkpoint="selective"),
    Layout(world=4, ep=2, replicate=2, room=AMPLE),
    Layout(world=4, ep=4, room=AMPLE),
    Layout(world=8, ep=8, room=AMPLE, activation_checkpoint="selective"),
    # More tokens come than there is room for, in each step until there is enough:
    Layout(world=2, ep=2, room=1.0, accumulation=2),
    Layout(world=4, ep=4, room=1.0, activation_checkpoint="selective"),
]


@pytest.fixture(scope="module")
def expected() -> dict[float, Run]:
    """One process on the whole batch, for each eps of Adam."""
    layouts = [Layout(), Layout(adam_eps=1e-8)]
    (runs,) = run_ranks(train_layouts, 1, CONFIG, layouts, ROWS, NUM_STEPS)
    return {layout.adam_eps: run for layout, run in zip(layouts, runs)}


@pytest.mark.parametrize("world", [2, 4, 8])
def test_equals_one_process(expected: dict[float, Run], world: int) -> None:
    layouts = [layout for layout in LAYOUTS if layout.world == world]
    for rank, runs in enumerate(run_ranks(train_layouts, world, CONFIG, layouts, ROWS, NUM_STEPS)):
        for layout, run in zip(layouts, runs):
            check(run, expected[layout.adam_eps], layout, f"{layout}, rank {rank}")


@pytest.mark.slow
@pytest.mark.parametrize("experts", [(5,), (0, 1)], ids=["all to one expert", "ranks without rows"])
def test_unequal_routing_equals_one_process(experts: tuple[int, ...]) -> None:
    config = tiny_config(num_experts_per_tok=len(experts))
    ((one,),) = run_ranks(train_layouts, 1, config, [Layout()], ROWS, NUM_STEPS, experts)
    # From 1.2 on there is never enough, so that in the fourth step there is no room any more, but sizes are asked for.
    layouts = [Layout(world=4, ep=4, room=room) for room in (1.2, AMPLE)]
    for rank, runs in enumerate(run_ranks(train_layouts, 4, config, layouts, ROWS, NUM_STEPS, experts)):
        for layout, run in zip(layouts, runs):
            check(run, one, layout, f"{layout}, rank {rank}")


@pytest.mark.slow
def test_adapters_and_images_equal_one_process() -> None:
    layout = Layout(world=2, ep=2, room=AMPLE, activation_checkpoint="selective")
    for module, name in ((test_lora_layouts, "all"), (test_vision_layouts, "nothing frozen")):
        one = module.expected(name)[1e-4]
        for rank, (run,) in enumerate(run_ranks(module.run, 2, [layout], name)):
            check(run, one, layout, f"{name}, rank {rank}")


def count_steps(layout: Layout) -> list[tuple[bool, float]]:
    """Of five steps whether each was made anew, and how much room there is behind it."""
    model, meshes, optimizer = build(CONFIG, layout)
    found = []
    for number in range(5):
        before = meshes.room.num_repeated
        step(model, meshes, optimizer, own_batches(CONFIG, layout, ROWS, 1000 * number))
        found.append((meshes.room.num_repeated > before, meshes.room.factor))
    return found


def test_a_step_without_room_is_made_anew_and_there_is_more_afterwards() -> None:
    own, other = run_ranks(count_steps, 2, Layout(world=2, ep=2, room=1.0))
    assert own == other
    assert own[0] == (True, 1.25)
    assert not own[-1][0]
    for (_, before), (is_second, after) in pairwise(own):
        assert after == (before * 1.25 if is_second else before)
    assert run_ranks(count_steps, 2, Layout(world=2, ep=2, room=AMPLE)) == [[(False, AMPLE)] * 5] * 2
    assert run_ranks(count_steps, 2, Layout(world=2, ep=2)) == [[(False, 0.0)] * 5] * 2


class Case(NamedTuple):
    """What beside experts takes part in a step."""

    layout: Layout
    config: ModelConfig = CONFIG
    moe: MoE = OFF
    mtp_train: str = "joint"  # where there is multi-token prediction


class Steps(NamedTuple):
    """What two steps made; of a rank, but weights are whole."""

    results: list[StepResult]
    weights: dict[str, torch.Tensor]
    num_repeated: int


WITH_MTP = replace(CONFIG, mtp_num_hidden_layers=1)
SHARED = replace(test_context_parallel.CONFIG, mtp_num_hidden_layers=1)
GLOBAL = MoE(aux_loss_coef=0.3, z_loss_coef=0.1)
HF = MoE(aux_loss_coef=0.3, aux_loss_scope="hf")
CASES = {
    2: [
        Case(Layout(world=2, ep=2, accumulation=2), WITH_MTP, GLOBAL),
        Case(Layout(world=2, ep=2, accumulation=2, activation_checkpoint="selective"), WITH_MTP, GLOBAL, "head"),
        Case(Layout(world=2, ep=2, cp=2, activation_checkpoint="full"), SHARED, HF),
    ],
    4: [
        Case(Layout(world=4, ep=2, replicate=2, accumulation=2), WITH_MTP, GLOBAL),
        Case(Layout(world=4, ep=2, replicate=2, activation_checkpoint="full"), WITH_MTP, HF, "head"),
        Case(Layout(world=4, ep=4, cp=2, accumulation=2), SHARED, GLOBAL),
    ],
}


def two_steps(case: Case, room: float, fillers: bool = False) -> Steps:
    """`room`: in each of them, however much there was too little."""
    frozen = frozen_parts((), case.mtp_train)
    model, meshes, optimizer = build(case.config, case.layout, is_trained=lambda name: part_of(name) not in frozen)
    results = []
    for number in range(2):
        meshes.room.factor = room
        batches = own_batches(case.config, case.layout, ROWS, 1000 * number)
        batches = list(map(filled, batches)) if fillers else batches
        results.append(step(model, meshes, optimizer, batches, case.moe, of_all_ranks=fillers))
    weights = {name: full(parameter) for name, parameter in model.named_parameters()}
    return Steps(results, weights, meshes.room.num_repeated)


def without_and_with_room(cases: list[Case]) -> list[tuple[Steps, Steps]]:
    return [(two_steps(case, 0.0), two_steps(case, 1.0)) for case in cases]


@pytest.mark.parametrize("world", CASES)
def test_a_step_made_anew_is_the_one_that_asks(world: int) -> None:
    for of_rank in run_ranks(without_and_with_room, world, CASES[world]):
        for case, (asking, anew) in zip(CASES[world], of_rank):
            assert (asking.num_repeated, anew.num_repeated) == (0, 2), case
            for expected, found in zip(asking.results, anew.results):
                for name, loss in expected.losses.items():
                    assert found.losses[name].equal(loss), (name, case)
                assert found.expert_counts.equal(expected.expert_counts), case
                assert found.grad_norm.equal(expected.grad_norm), case
            for name, weight in asking.weights.items():
                assert anew.weights[name].equal(weight), (name, case)


def filled(batch: MicroBatch) -> MicroBatch:
    """Documents of ten tokens or more, whole rows and the ends of some, are fillers."""
    is_real = torch.tensor([length < 10 for length in batch.documents.lengths() for _ in range(length)])
    batch = replace(batch, tokens=batch.tokens.where(is_real, 3), labels=batch.labels.where(is_real, -100))
    return replace(batch.with_mtp_labels(), is_real=is_real)


def test_fillers_take_no_room() -> None:
    one_process, spread = (Case(layout, WITH_MTP, GLOBAL) for layout in (Layout(), Layout(world=2, ep=2)))
    (expected,) = run_ranks(two_steps, 1, one_process, 0.0, True)
    for found in run_ranks(two_steps, 2, spread, 1.3, True):
        assert found.num_repeated == 0
        for wanted, result in zip(expected.results, found.results):
            assert result.expert_counts.equal(wanted.expert_counts)
            for name, loss in wanted.losses.items():
                assert result.losses[name].item() == pytest.approx(loss.item(), rel=1e-6), name
            assert result.grad_norm.item() == pytest.approx(wanted.grad_norm.item(), rel=1e-5)
        for name, weight in expected.weights.items():
            offset = 1.0 if name.endswith("norm.weight") and "linear_attn" not in name else 0.0  # see test_layouts.py
            assert relative_error(found.weights[name] + offset, weight + offset) < 1e-5, name


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 4), st.integers(4, 9))
def test_fillers_take_the_experts_in_turn(are_real: list[bool], top_k: int, num_experts: int) -> None:
    chosen, is_real = torch.full((len(are_real), top_k), 99), torch.tensor(are_real)
    dealt = deal_fillers(chosen, is_real, num_experts)
    assert dealt[is_real].equal(chosen[is_real])
    counts = dealt[~is_real].flatten().bincount(minlength=num_experts)
    assert len(counts) == num_experts
    assert counts.max() - counts.min() <= 1
    assert all(len(set(of_token)) == top_k for of_token in dealt[~is_real].tolist())
    assert deal_fillers(chosen, None, num_experts) is chosen


def step_that_is_not_finite(layout: Layout) -> tuple[bool, bool, float]:
    model, meshes, optimizer = build(CONFIG, layout)
    with torch.no_grad():
        for parameter in model.float32_parameters():
            parameter.fill_(torch.nan)
    result = step(model, meshes, optimizer, own_batches(CONFIG, layout, ROWS, 0))
    return meshes.room.num_repeated == 1, bool(result.nonfinite), meshes.room.factor


def test_room_ends_at_twice_an_even_share() -> None:
    room, seen = Room(1.2), []
    while room.factor:
        room.note_repeat(grows=True)
        seen.append(room.factor)
    assert seen == [1.5, 1.875, 0.0]


def test_tokens_that_are_not_finite_ask_for_no_more_room() -> None:
    assert run_ranks(step_that_is_not_finite, 2, Layout(world=2, ep=2, room=1.0)) == [(True, True, 1.0)] * 2


def breaks_of_graphs() -> list[str]:
    """Of two steps, with fillers and without."""
    layout = Layout(world=2, ep=2, room=AMPLE, activation_checkpoint="selective", compile="eager")
    config = tiny_config(num_hidden_layers=2, layer_types=(LINEAR, FULL))
    model, meshes, optimizer = build(config, layout)
    counters.clear()
    for number in range(2):
        batches = own_batches(config, layout, ROWS, number)
        step(model, meshes, optimizer, batches)
        step(model, meshes, optimizer, list(map(filled, batches)))
    return list(counters["graph_break"])


def test_graphs_hold_the_exchanges() -> None:
    assert run_ranks(breaks_of_graphs, 2) == [[], []]


@given(st.integers(1, 9), st.integers(1, 4), st.sampled_from([2, 3, 4, 8]), st.integers(1, 12), st.integers(0, 2**31))
def test_copies_lie_in_buffers_of_their_ranks(
    num_tokens: int, top_k: int, num_ranks: int, capacity: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(num_tokens, NUM_LOCAL * num_ranks, generator=generator).topk(top_k, dim=1)[1]
    plan = plan_copies(chosen, num_ranks, NUM_LOCAL, capacity)
    numbers, is_copy = fixed_copies(plan, num_tokens, capacity)
    x, weights = torch.arange(num_tokens).view(-1, 1).double(), torch.rand(num_tokens, top_k)
    copies, _, sources = make_copies(x, weights, plan.chosen, plan.ends, plan.places, numbers)
    assert len(copies) == len(is_copy) == num_ranks * capacity
    places: list[list[int]] = [[] for _ in range(num_tokens)]
    for rank in range(num_ranks):
        tokens = [token for token, experts in enumerate((chosen // NUM_LOCAL).tolist()) if rank in experts]
        assert plan.counts[rank, 0] == len(tokens)
        tokens = tokens[:capacity]
        own = slice(rank * capacity, rank * capacity + capacity)
        assert sources[own][: len(tokens)].tolist() == tokens == copies[own, 0][: len(tokens)].long().tolist()
        assert is_copy[own].tolist() == [True] * len(tokens) + [False] * (capacity - len(tokens))
        for index, token in enumerate(tokens):
            places[token].append(rank * capacity + index)
    for expected, found in zip(places, plan.places.tolist(), strict=True):
        assert sorted(place for place in found if place >= 0) == expected


@given(st.floats(1, 4), st.integers(1, 100), st.integers(1, 8), st.sampled_from([2, 4, 8]), st.integers(1, 8))
def test_sizes(factor: float, num_tokens: int, top_k: int, num_ranks: int, num_local: int) -> None:
    copies, rows = Room(factor).sizes(num_tokens, top_k, num_ranks, num_local)
    assert 1 <= copies <= num_tokens
    assert 1 <= rows <= num_ranks * copies * min(top_k, num_local)
    assert rows <= factor * num_tokens * top_k + 1
    most = Room(1e9).sizes(num_tokens, top_k, num_ranks, num_local)  # whatever comes
    assert most == (num_tokens, num_ranks * num_tokens * min(top_k, num_local))


def test_by_default_gpus_have_room() -> None:
    options = Parallelism()
    assert (room_factor(options, "cuda"), room_factor(options, "cpu")) == (1.2, 0.0)
    options = replace(options, expert_room=1.5)
    assert room_factor(options, "cuda") == room_factor(options, "cpu") == 1.5
    assert room_factor(replace(options, expert_room=0.0), "cuda") == 0.0
