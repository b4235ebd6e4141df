"""Every layout trains the same multi-token prediction, alone and with the model; router losses and images included."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import pytest

from config.options import MoE
from data.batch import Frame
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.parts import frozen_parts
from tests.distributed import run_ranks
from tests.parallelisms import test_context_parallel, test_layouts, test_vision_layouts
from tests.parallelisms.layouts import OFF, Layout, Run, train
from tests.parallelisms.test_layouts import check

NUM_STEPS = 3
ROUTER_LOSSES = MoE(aux_loss_coef=0.3, z_loss_coef=0.1)

TEXT = [
    Layout(accumulation=2),
    Layout(compile="aot_eager", activation_checkpoint="selective"),
    Layout(world=2, accumulation=4),
    Layout(world=2, ep=2, accumulation=2, activation_checkpoint="selective"),
    replace(test_layouts.COMPILED, compile="aot_eager"),
    Layout(world=2, replicate=2, activation_checkpoint="full"),
    Layout(world=4),
    Layout(world=4, ep=4, accumulation=2, activation_checkpoint="full"),
    Layout(world=4, ep=2, adam_eps=1e-8),
    Layout(world=4, replicate=2, ep=2, activation_checkpoint="selective"),
    Layout(world=4, replicate=2, accumulation=4),
]
SOME = [Layout(activation_checkpoint="full"), Layout(world=2), Layout(world=2, ep=2, activation_checkpoint="selective")]
SOME += [Layout(world=4, replicate=2, ep=2)]


# The borders between ranks lie inside documents, and inside images.
CONTEXT = [
    Layout(world=2, cp=2, accumulation=2),
    Layout(world=2, cp=2, ep=2, activation_checkpoint="selective", compile="aot_eager"),
    Layout(world=4, cp=4, activation_checkpoint="full"),
    Layout(world=4, cp=2, ep=4),
]


class Case(NamedTuple):
    """What is trained, and on which layouts."""

    layouts: list[Layout]
    config: ModelConfig = test_layouts.CONFIG
    rows: list[list[int]] = test_layouts.ROWS
    steps: list[dict[int, list[Frame]]] = []  # noqa: RUF012 (nobody changes it)
    mtp_train: str = "joint"
    moe: MoE = OFF


CASES = {
    "joint": Case(TEXT),
    "head": Case(TEXT, mtp_train="head"),
    "router losses": Case(SOME, moe=ROUTER_LOSSES),
    "images": Case(SOME, test_vision_layouts.CONFIG, steps=test_vision_layouts.STEPS),
    "context": Case(CONTEXT, test_context_parallel.CONFIG, test_context_parallel.ROWS),
    "context, images": Case(
        [layout for layout in CONTEXT if layout.accumulation == 1],
        test_context_parallel.VISION_CONFIG,
        test_context_parallel.IMAGE_ROWS,
        test_context_parallel.STEPS,
    ),
}


def run(layouts: Sequence[Layout], name: str) -> list[Run]:
    case = CASES[name]
    config, frozen = replace(case.config, mtp_num_hidden_layers=1), list(frozen_parts((), case.mtp_train))
    frames = [[of_rows.get(row, []) for row in range(len(case.rows))] for of_rows in case.steps]
    return [train(config, each, case.rows, NUM_STEPS, case.moe, frames=frames, frozen=frozen) for each in layouts]


@functools.cache
def expected(name: str) -> dict[float, Run]:
    """One process on the whole batch, for each eps of Adam."""
    layouts = [Layout(adam_eps=eps) for eps in sorted({layout.adam_eps for layout in CASES[name].layouts})]
    (runs,) = run_ranks(run, 1, layouts, name)
    assert min(each.smallest_gap for each in runs) > 2e-6  # see test_layouts.py
    return {layout.adam_eps: each for layout, each in zip(layouts, runs)}


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(name: str, world: int) -> None:
    layouts = [layout for layout in CASES[name].layouts if layout.world == world]
    if not layouts:
        return
    one = expected(name)
    for rank, runs in enumerate(run_ranks(run, world, layouts, name)):
        for layout, each in zip(layouts, runs):
            where = f"{name}, {layout}, rank {rank}"
            check(each, one[layout.adam_eps], layout, where)
            for losses in ("mtp_losses", "aux_losses", "z_losses"):
                found, wanted = getattr(each, losses), getattr(one[layout.adam_eps], losses)
                if losses == "mtp_losses" or layout.accumulation == 1:  # the routers' are means over micro-steps
                    assert found == pytest.approx(wanted, rel=1e-6), (where, losses)


def test_what_one_process_trains() -> None:
    joint, head = expected("joint")[1e-4], expected("head")[1e-4]
    assert joint.mtp_losses[0] == head.mtp_losses[0] > 0
    assert joint.losses[0] == head.losses[0] > 0
    assert len(joint.expert_counts) == test_layouts.CONFIG.num_hidden_layers + 1
    of_mtp = {name for name in joint.first_gradients if name.startswith("mtp.")}
    assert of_mtp == head.first_gradients.keys()
    moved = {name for name, weight in head.weights.items() if not weight.equal(head.initial_weights[name])}
    assert moved == of_mtp
