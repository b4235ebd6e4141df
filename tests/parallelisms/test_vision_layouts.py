"""Every layout trains the same model with images too: on some ranks only, on none, videos; tower trained and frozen."""

import functools

import pytest

from data.batch import Frame
from models.qwen35_moe.parts import OF_TEXT
from tests.distributed import run_ranks
from tests.models.qwen35_moe.shapes import tiny_config
from tests.models.qwen35_moe.vision_shapes import tiny_vision
from tests.parallelisms.layouts import Layout, Run, train_layouts
from tests.parallelisms.test_layouts import ROWS, check

# 5 and 7 divide nothing, as 47 and 5 in the text: the tower's parameters are sharded unevenly.
VISION = tiny_vision(
    hidden_size=20,
    intermediate_size=35,
    num_heads=1,
    initializer_range=0.1,
    image_token_id=43,
    video_token_id=44,
    vision_start_token_id=45,
    vision_end_token_id=46,
)
CONFIG = tiny_config(
    vocab_size=47, linear_num_key_heads=1, linear_num_value_heads=5, initializer_range=0.05, vision=VISION
)
NUM_STEPS = 3
IMAGE, TWO, TOKEN = [Frame(2, 4, 6)], [Frame(0, 2, 2), Frame(3, 2, 8)], [Frame(5, 2, 2)]
VIDEO = [Frame(1, 4, 4), Frame(6, 4, 4), Frame(11, 4, 4)]
# What rows show, by their numbers. In the first step the first ranks alone see something: of four, two see nothing, nor
# is there anything in the last two of four micro-batches. Then a step without any, then one where a document of one
# token is an image, and a rank with nothing to train (see ROWS) sees it.
STEPS: list[dict[int, list[Frame]]] = [{0: IMAGE, 3: TWO, 6: VIDEO}, {}, {6: TWO, 10: VIDEO, 13: TOKEN}]

TRAINED = [
    Layout(accumulation=4, activation_checkpoint="full"),
    Layout(compile=True, activation_checkpoint="selective"),
    Layout(world=2, accumulation=2, activation_checkpoint="selective"),
    Layout(world=2, ep=2, activation_checkpoint="full", adam_eps=1e-8),
    Layout(world=2, replicate=2, accumulation=4),
    Layout(world=4),
    Layout(world=4, ep=4, accumulation=2, activation_checkpoint="full"),
    Layout(world=4, ep=2, accumulation=4, activation_checkpoint="selective"),
    Layout(world=4, replicate=2, ep=2),
    Layout(world=4, replicate=2, accumulation=4, activation_checkpoint="full"),
]
SOME = [
    Layout(accumulation=2, activation_checkpoint="selective"),
    Layout(world=2, ep=2, activation_checkpoint="full"),
    Layout(world=2, replicate=2, accumulation=4),
]
COMPILED = Layout(world=2, compile="aot_eager", activation_checkpoint="selective")
FROZEN: dict[str, tuple[tuple[str, ...], list[Layout]]] = {
    "nothing frozen": ((), TRAINED),
    "tower": (("vision", "merger"), SOME),
    "tower but its merger": (("vision",), [*SOME, COMPILED]),
    "merger alone trained": (("vision", "text"), SOME),
    "merger, and experts": (("merger", "experts"), SOME[1:]),
    "text": (("text",), SOME),
}


@functools.cache
def expected(name: str) -> dict[float, Run]:
    """One process on the whole batch, for each eps of Adam."""
    layouts = [Layout(adam_eps=eps) for eps in sorted({layout.adam_eps for layout in FROZEN[name][1]})]
    (runs,) = run_ranks(run, 1, layouts, name)
    assert min(each.smallest_gap for each in runs) > 2e-6  # see test_layouts.py
    return {layout.adam_eps: each for layout, each in zip(layouts, runs)}


def run(layouts: list[Layout], name: str) -> list[Run]:
    frozen = FROZEN[name][0]
    singles = [part for part in frozen if part != "text"] + (list(OF_TEXT) if "text" in frozen else [])
    frames = [[of_rows.get(row, []) for row in range(len(ROWS))] for of_rows in STEPS]
    return train_layouts(CONFIG, layouts, ROWS, NUM_STEPS, frames=frames, frozen=singles)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("name", FROZEN)
def test_equals_one_process(name: str, world: int) -> None:
    layouts = [layout for layout in FROZEN[name][1] if layout.world == world]
    if layouts:
        one = expected(name)
        for rank, runs in enumerate(run_ranks(run, world, layouts, name)):
            for layout, each in zip(layouts, runs):
                check(each, one[layout.adam_eps], layout, f"{name}, {layout}, rank {rank}")
