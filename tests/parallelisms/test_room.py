"""Buffers of fixed sizes for tokens that travel to their experts: what fits is exact, what does not is made anew."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from config.options import Parallelism
from models.qwen35_moe.config import FULL
from parallelisms.expert_parallel import fixed_copies, make_copies, plan_copies
from parallelisms.room import Room, room_factor
from tests.distributed import run_ranks
from tests.models.qwen35_moe.shapes import tiny_config
from tests.parallelisms import test_lora_layouts, test_vision_layouts
from tests.parallelisms.layouts import Layout, Run, build, own_batches, step, train_layouts
from tests.parallelisms.test_layouts import CONFIG, NUM_STEPS, ROWS, check

AMPLE = 8.0  # of 8 experts all tokens fit on one rank
NUM_LOCAL = 3

# Pairwise with what changes the graphs; a rank's tokens are as many as another's.
LAYOUTS = [
    Layout(world=2, ep=2, room=AMPLE, accumulation=2, activation_checkpoint="selective"),
    Layout(world=2, ep=2, room=AMPLE, activation_checkpoint="full", adam_eps=1e-8),
    Layout(world=2, ep=2, room=AMPLE, activation_checkpoint="selective", compile=True),
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


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow), 8])
def test_equals_one_process(expected: dict[float, Run], world: int) -> None:
    layouts = [layout for layout in LAYOUTS if layout.world == world]
    for rank, runs in enumerate(run_ranks(train_layouts, world, CONFIG, layouts, ROWS, NUM_STEPS, seconds=240)):
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
    """Of a step in bfloat16, where the compiler knows the experts' products."""
    layout = Layout(world=2, ep=2, room=AMPLE, activation_checkpoint="selective", compile=True)
    config = tiny_config(num_hidden_layers=2, layer_types=(FULL, FULL))
    model, meshes, optimizer = build(config, layout, torch.bfloat16)
    counters.clear()
    for number in range(2):
        step(model, meshes, optimizer, own_batches(config, layout, ROWS, number))
    return list(counters["graph_break"])


def test_graphs_hold_the_exchanges() -> None:
    for (reason,) in run_ranks(breaks_of_graphs, 2):
        assert "_sdpa" in reason  # plain attention, one document at a time


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
