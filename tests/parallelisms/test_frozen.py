"""What trains is what requires a gradient: a frozen part has no state and stays, and the rest trains as ever."""

from typing import NamedTuple

import pytest
import torch

from tests.distributed import run_ranks
from tests.models.qwen35_moe.shapes import tiny_config
from tests.parallelisms.layouts import Layout, build, full, own_batches, step
from tests.parallelisms.test_layouts import relative_error

CONFIG = tiny_config(vocab_size=47, initializer_range=0.05)
ROWS = [[10, 6], [1, 1, 14], [16], [3, 13]]
FROZEN = {
    "experts": ("experts.gate_up_proj", "experts.down_proj"),
    "decays and routers, all that is outside FSDP": ("A_log", "dt_bias", "mlp.gate.weight"),
    "whole units: all but the embedding and the last norm": ("layers",),
}
LAYOUTS = [
    Layout(world=2),
    Layout(world=2, ep=2),
    Layout(world=2, ep=2, activation_checkpoint="selective", accumulation=2),
    Layout(world=2, replicate=2, activation_checkpoint="full"),
]


class Frozen(NamedTuple):
    """What two steps did. Weights are whole."""

    initial_weights: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    grad_norms: list[float]
    names_of_state: set[str]


def is_frozen(name: str, part: str) -> bool:
    return name.startswith(FROZEN[part]) or name.endswith(FROZEN[part])


def train_frozen(layouts: list[Layout], part: str) -> list[Frozen]:
    found = []
    for layout in layouts:
        model, meshes, optimizer = build(CONFIG, layout, is_trained=lambda name: not is_frozen(name, part))
        before = {name: full(parameter) for name, parameter in model.named_parameters()}
        norms = [
            step(model, meshes, optimizer, own_batches(CONFIG, layout, ROWS, seed)).grad_norm.item()
            for seed in (0, 1000)
        ]
        after = {name: full(parameter) for name, parameter in model.named_parameters()}
        state = {name.rpartition(".")[0] for name in optimizer.named_state()}
        found.append(Frozen(before, after, norms, state))
    return found


@pytest.mark.parametrize("part", FROZEN)
def test_a_frozen_part_stays_and_the_rest_trains_as_in_one_process(part: str) -> None:
    ((one,),) = run_ranks(train_frozen, 1, [Layout()], part)
    trained = {name for name in one.weights if not is_frozen(name, part)}
    assert 0 < len(trained) < len(one.weights)
    moved = {name for name, weight in one.weights.items() if not torch.equal(weight, one.initial_weights[name])}
    assert moved == one.names_of_state == trained
    for of_rank in run_ranks(train_frozen, 2, LAYOUTS, part):
        for layout, run in zip(LAYOUTS, of_rank):
            assert run.names_of_state == trained, layout
            # The bounds of test_layouts.py, for the reasons given there.
            assert run.grad_norms == pytest.approx(one.grad_norms, rel=1e-5), layout
            for name, weight in one.weights.items():
                offset = 1.0 if name.endswith("norm.weight") and "linear_attn" not in name else 0.0
                assert relative_error(run.weights[name] + offset, weight + offset) < 1e-5, (layout, name)
