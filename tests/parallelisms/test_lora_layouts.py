"""Adapters train the same on every layout; frozen weights lie in memory once, without gradient or state."""

import functools

import pytest
import torch
from torch.distributed.tensor import DTensor

from config.options import Lora
from models.qwen35_moe.lora import is_adapter
from models.qwen35_moe.parts import ADAPTABLE
from tests.distributed import run_ranks
from tests.models.qwen35_moe.shapes import tiny_config
from tests.parallelisms import test_context_parallel, test_vision_layouts
from tests.parallelisms.layouts import Layout, Run, build, own_batches, step, train_layouts
from tests.parallelisms.test_layouts import ROWS, check

CONFIG = tiny_config(vocab_size=47, linear_num_key_heads=1, linear_num_value_heads=5, initializer_range=0.05)
NUM_STEPS = 3
REPLICAS = Layout(world=2, replicate=2)
TARGETS = {
    "all": ADAPTABLE,
    "experts": ("experts",),
    "default": Lora().targets,
    "shared rows": ADAPTABLE,
    "images": ADAPTABLE,
}
DATA = dict.fromkeys(TARGETS, (CONFIG, ROWS))
DATA["shared rows"] = test_context_parallel.CONFIG, test_context_parallel.ROWS
DATA["images"] = test_vision_layouts.CONFIG, ROWS
LAYOUTS = {
    "all": [
        Layout(accumulation=4, activation_checkpoint="full"),
        Layout(compile="aot_eager", activation_checkpoint="selective"),
        Layout(world=2, accumulation=2, activation_checkpoint="selective"),
        Layout(world=2, ep=2, activation_checkpoint="full", adam_eps=1e-8),
        Layout(world=2, replicate=2, accumulation=4),
        Layout(world=4),
        Layout(world=4, ep=4, accumulation=2, activation_checkpoint="full"),
        Layout(world=4, ep=2, accumulation=4, activation_checkpoint="selective"),
        Layout(world=4, replicate=2, ep=2),
    ],
    # The first block's experts read what needs no gradient.
    "experts": [Layout(world=2, ep=2, activation_checkpoint="selective"), Layout(world=4, ep=2)],
    "default": [Layout(world=2, ep=2, accumulation=2, activation_checkpoint="full"), Layout(world=4, ep=2)],
    "shared rows": [
        Layout(world=2, cp=2, ep=2, activation_checkpoint="selective", compile="aot_eager"),
        Layout(world=2, cp=2, accumulation=2, activation_checkpoint="full"),
        Layout(world=4, cp=2, ep=4),
    ],
    # Behind a tower that is whole on each rank and runs without a graph.
    "images": [
        Layout(accumulation=2, activation_checkpoint="full"),
        Layout(world=2, ep=2, accumulation=2, activation_checkpoint="selective"),
        Layout(world=2, replicate=2),
        Layout(world=4, ep=2),
    ],
}


@functools.cache
def expected(name: str) -> dict[float, Run]:
    """One process on the whole batch, for each eps of Adam."""
    layouts = [Layout(adam_eps=eps) for eps in sorted({layout.adam_eps for layout in LAYOUTS[name]})]
    (runs,) = run_ranks(run, 1, layouts, name)
    assert min(each.smallest_gap for each in runs) > 2e-6  # see test_layouts.py
    return {layout.adam_eps: each for layout, each in zip(layouts, runs)}


def run(layouts: list[Layout], name: str) -> list[Run]:
    lora = Lora(rank=8, alpha=12.0, targets=TARGETS[name])
    config, rows = DATA[name]
    frames = [[shown.get(row, []) for row in range(len(rows))] for shown in test_vision_layouts.STEPS]
    return train_layouts(config, layouts, rows, NUM_STEPS, lora=lora, frames=frames if config.vision else ())


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("name", TARGETS)
def test_equals_one_process(name: str, world: int) -> None:
    layouts = [layout for layout in LAYOUTS[name] if layout.world == world]
    if layouts:
        one = expected(name)
        moved = {n for n, weight in one[1e-4].weights.items() if not torch.equal(weight, one[1e-4].initial_weights[n])}
        assert moved == {n for n in one[1e-4].weights if is_adapter(n)} == one[1e-4].first_gradients.keys()
        for rank, runs in enumerate(run_ranks(run, world, layouts, name)):
            for layout, each in zip(layouts, runs):
                check(each, one[layout.adam_eps], layout, f"{name}, {layout}, rank {rank}")


def storage(layout: Layout, targets: tuple[str, ...]) -> tuple[dict[str, str], set[str], set[str]]:
    """After a step under bfloat16: how each parameter lies here, what has a gradient on its way, what has state."""
    lora = Lora(rank=8, targets=targets)
    model, meshes, optimizer = build(CONFIG, layout, torch.bfloat16, lora=lora)
    with_gradient: set[str] = set()

    def keep(*_: object) -> None:
        with_gradient.update(name for name, parameter in model.named_parameters() if parameter.grad is not None)

    optimizer.register_step_pre_hook(keep)
    step(model, meshes, optimizer, own_batches(CONFIG, layout, ROWS[:4], 0))
    lies = {}
    for name, parameter in model.named_parameters():
        how = "sharded" if isinstance(parameter, DTensor) else "plain"
        lies[name] = f"{str(parameter.dtype).removeprefix('torch.')} {how}"
    return lies, with_gradient, {name.rpartition(".")[0] for name in optimizer.named_state()}


@pytest.mark.parametrize("layout", [Layout(), Layout(world=2), Layout(world=2, ep=2), REPLICAS], ids=str)
@pytest.mark.parametrize("targets", [ADAPTABLE, Lora().targets], ids=["all", "default"])
def test_frozen_weights_are_stored_once_as_they_are_computed_with(layout: Layout, targets: tuple[str, ...]) -> None:
    # Plain parameters are outside FSDP, which would gather (here: copy) them beside.
    for lies, with_gradient, with_state in run_ranks(storage, layout.world, layout, targets):
        adapters = {name for name in lies if is_adapter(name)}
        assert with_gradient == with_state == adapters
        for name, how in lies.items():
            if name in adapters:
                assert how == ("float32 plain" if layout == Layout() else "float32 sharded"), name
            elif name.endswith(("mlp.gate.weight", "A_log", "dt_bias")):
                assert how == "float32 plain", name
            else:
                # At ep 2 of 2 an expert lies whole on its rank: a DTensor of the axis ep, which FSDP does not touch.
                assert how == ("bfloat16 plain" if layout in (Layout(), REPLICAS) else "bfloat16 sharded"), name
