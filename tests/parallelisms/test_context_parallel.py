"""Ranks that share the tokens of a micro-batch train the same model as one process that has them all."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from data.batch import Frame
from models.qwen35_moe.parts import OF_TEXT
from parallelisms.context_parallel import SharedPatches, deal, share_of
from tests.distributed import run_ranks
from tests.models.qwen35_moe.shapes import tiny_config
from tests.parallelisms import test_vision_layouts
from tests.parallelisms.layouts import Layout, Run, rows_as_micro_batch, train_layouts
from tests.parallelisms.test_layouts import NUM_STEPS, check

# 47 divides nothing: dense parameters are sharded unevenly. Of 4 ranks two share a key head of full attention.
HEADS = {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
CONFIG = tiny_config(vocab_size=47, initializer_range=0.05, **HEADS)
# Whatever part of them is a micro-batch, the borders between ranks lie inside documents.
ROWS = [[10, 13], [1, 1, 14, 3], [2, 2, 2, 1, 1, 1, 1, 6], [14], [3, 10], [1] * 9 + [3], [15], [5, 11]]
ROWS += [[27], [2, 5], [1] * 8, [8, 2], [1] * 16, [1] * 10, [1] * 12, [1] * 10]

# Pairwise, with test_layouts.py's: a test there counts.
LAYOUTS = [
    Layout(world=2, cp=2),
    # All exchanges in one graph: tokens for heads, and copies with their experts.
    Layout(world=2, cp=2, ep=2, room=8.0, activation_checkpoint="selective", compile=True),
    Layout(world=2, cp=2, replicate=2, accumulation=4, activation_checkpoint="full"),
    Layout(world=4, cp=2),
    Layout(world=4, cp=2, ep=4, accumulation=2, activation_checkpoint="selective"),
    Layout(world=4, cp=4),
    Layout(world=4, cp=4, ep=4, compile="aot_eager"),
    Layout(world=4, cp=4, activation_checkpoint="full"),
    Layout(world=4, cp=4, ep=4, accumulation=2, activation_checkpoint="selective"),
    Layout(world=4, cp=4, ep=2, replicate=2, accumulation=4),
]


def borders(layout: Layout, rows: Sequence[Sequence[int]]) -> set[int]:
    """Where in the first micro-batch another rank's tokens begin."""
    rows = rows[: len(rows) * layout.cp // (layout.world * layout.accumulation)]
    size, rest = divmod(sum(map(sum, rows)), layout.cp)
    assert rest == 0, layout
    return {size * rank for rank in range(1, layout.cp)}


def test_borders_lie_inside_documents() -> None:
    ends = set(itertools.accumulate(length for row in ROWS for length in row))
    for layout in LAYOUTS:
        assert not ends & borders(layout, ROWS), layout


@functools.cache
def expected() -> Run:
    """One process on the whole batch."""
    ((run,),) = run_ranks(train_layouts, 1, CONFIG, [Layout()], ROWS, NUM_STEPS)
    assert run.smallest_gap > 2e-6  # see test_layouts.py
    return run


@pytest.mark.parametrize("world", [2, 4])
def test_equals_one_process(world: int) -> None:
    layouts = [layout for layout in LAYOUTS if layout.world == world]
    for rank, runs in enumerate(run_ranks(train_layouts, world, CONFIG, layouts, ROWS, NUM_STEPS)):
        for layout, run in zip(layouts, runs):
            check(run, expected(), layout, f"{layout}, rank {rank}")


def test_many_key_heads_and_one() -> None:
    """Of full attention: several on a rank, and one that all ranks read."""
    for num_heads in (1, 8):
        config = replace(CONFIG, num_attention_heads=8, num_key_value_heads=num_heads)
        ((run,),) = run_ranks(train_layouts, 1, config, [Layout()], ROWS, 2)
        layout = Layout(world=4, cp=4)
        for rank, (shared,) in enumerate(run_ranks(train_layouts, 4, config, [layout], ROWS, 2)):
            check(shared, run, layout, f"{num_heads} key heads, rank {rank}")


# With images

VISION_CONFIG = replace(test_vision_layouts.CONFIG, **HEADS)
IMAGE_ROWS = [[32], [3, 29], [11, 21], [1] * 32, [32], [10, 22]]
STEPS: list[dict[int, list[Frame]]] = [
    # In the first micro-batch of all layouts a frame stands across a border; some micro-batches have none.
    {0: [Frame(13, 4, 6), Frame(22, 4, 4)], 1: [Frame(14, 2, 10)]},
    {},
    # One frame has most of the patches, so that some ranks have none.
    {2: [Frame(6, 4, 4), Frame(12, 8, 8)], 4: [Frame(14, 4, 4), Frame(19, 4, 4)]},
]
FROZEN: dict[str, tuple[tuple[str, ...], list[Layout]]] = {
    "nothing": (
        (),
        [
            Layout(world=2, cp=2, ep=2, accumulation=2, activation_checkpoint="selective", compile="aot_eager"),
            Layout(world=2, cp=2, accumulation=6, activation_checkpoint="full"),
            Layout(world=4, cp=2, ep=4),
            Layout(world=4, cp=4),
            Layout(world=4, cp=4, replicate=2, ep=2, accumulation=3, activation_checkpoint="full"),
        ],
    ),
    "tower": (("vision", "merger"), [Layout(world=2, cp=2, accumulation=2), Layout(world=4, cp=4, ep=4)]),
    "tower but its merger": (("vision",), [Layout(world=4, cp=2, activation_checkpoint="full")]),
    "merger alone trained": (("vision", *OF_TEXT), [Layout(world=4, cp=4, accumulation=2)]),
    "text": (OF_TEXT, [Layout(world=2, cp=2, accumulation=2, activation_checkpoint="selective")]),
}


def test_borders_lie_inside_images() -> None:
    length = sum(IMAGE_ROWS[0])
    inside = {
        row * length + place
        for row, frames in STEPS[0].items()
        for begin, height, width in frames
        for place in range(begin + 1, begin + height * width // 4)
    }
    for _, layouts in FROZEN.values():
        for layout in layouts:
            assert inside & borders(layout, IMAGE_ROWS), layout


def run_with_images(layouts: list[Layout], frozen: tuple[str, ...]) -> list[Run]:
    frames = [[of_rows.get(row, []) for row in range(len(IMAGE_ROWS))] for of_rows in STEPS]
    return train_layouts(VISION_CONFIG, layouts, IMAGE_ROWS, len(STEPS), frames=frames, frozen=frozen)


@functools.cache
def expected_with_images(frozen: tuple[str, ...]) -> Run:
    ((run,),) = run_ranks(run_with_images, 1, [Layout()], frozen)
    assert run.smallest_gap > 2e-6
    return run


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", FROZEN)
def test_with_images_equals_one_process(name: str, world: int) -> None:
    frozen, layouts = FROZEN[name]
    layouts = [layout for layout in layouts if layout.world == world]
    if layouts:
        for rank, runs in enumerate(run_ranks(run_with_images, world, layouts, frozen)):
            for layout, run in zip(layouts, runs):
                check(run, expected_with_images(frozen), layout, f"{name}, {layout}, rank {rank}")


# The shares themselves


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_shares_are_the_micro_batch_and_each_frame_is_looked_at_once(num_ranks: int) -> None:
    vision = VISION_CONFIG.vision
    assert vision is not None
    num_travelling = 0
    for shown in STEPS:
        frames = [shown.get(row, []) for row in range(len(IMAGE_ROWS))]
        batch = rows_as_micro_batch(VISION_CONFIG, IMAGE_ROWS, 0, frames)
        whole = batch.patches
        assert whole is not None
        shares = [share_of(batch, rank, num_ranks, vision) for rank in range(num_ranks)]
        for name in ("tokens", "labels", "positions"):
            parts = [getattr(share, name) for share in shares]
            assert torch.equal(torch.cat(parts, dim=-1), getattr(batch, name)), name
        assert all(share.documents is batch.documents for share in shares)
        patches = [share.patches for share in shares]
        assert all(isinstance(each, SharedPatches) for each in patches)
        looking = [each for each in patches if each.num_shown]
        if shown:
            assert torch.equal(torch.cat([each.pixels for each in looking]), whole.pixels)
            assert torch.equal(torch.cat([each.grid for each in looking], dim=1), whole.grid)
            assert [n for each in looking for n in each.frames.lengths()] == whole.frames.lengths()
        size = len(batch.tokens) // num_ranks
        assert torch.cat([e.places + r * size for r, e in enumerate(patches)]).tolist() == whole.places.tolist()
        for rank, each in enumerate(patches):
            assert each.received == [other.sent[rank] for other in patches]
            assert sum(each.received) == len(each.places)
            assert each.frames.max_seqlen == whole.frames.max_seqlen
            if not each.num_shown:  # a grey frame: every rank runs its tower
                assert each.pixels.shape == (4, vision.patch_values)
                assert each.pixels.unique().tolist() == [127]
        num_travelling += sum(sum(each.sent) - each.sent[rank] for rank, each in enumerate(patches))
    assert num_travelling > 0


def test_frames_are_dealt_evenly() -> None:
    assert deal([], 2) == [0, 0, 0]
    assert deal([5], 4) in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])
    assert deal([1] * 8, 4) == [0, 2, 4, 6, 8]
    generator = torch.Generator().manual_seed(0)
    for num_ranks in (2, 3, 8):
        costs = torch.randint(1, 1000, (50,), generator=generator).tolist()
        cuts = deal(costs, num_ranks)
        assert cuts[0] == 0
        assert cuts[-1] == len(costs)
        assert cuts == sorted(cuts)
        most = max(sum(costs[first:last]) for first, last in itertools.pairwise(cuts))
        assert most <= sum(costs) / num_ranks + max(costs)
