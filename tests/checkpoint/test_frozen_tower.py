"""A frozen tower in checkpoints: written once, restored on any layout; its weights go on into other runs."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from checkpoint.checkpointer import Checkpointer
from config.options import Checkpoint
from errors import UserError
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.parts import part_of
from tests.checkpoint.test_checkpointer import run_config
from tests.distributed import run_ranks
from tests.models.qwen35_moe.shapes import tiny_config
from tests.models.qwen35_moe.vision_shapes import tiny_vision
from tests.parallelisms.layouts import Layout, build, full

CONFIG = tiny_config(vision=tiny_vision())
FROZEN = ("vision", "merger")


def start(folder: str, layout: Layout, frozen: tuple[str, ...], shape: ModelConfig = CONFIG, **checkpoint: str):
    """The model's weights and optimizer state's names after `resume`, and what saves them; under bfloat16."""
    model, meshes, optimizer = build(shape, layout, torch.bfloat16, is_trained=lambda name: part_of(name) not in frozen)
    config = dataclasses.replace(run_config(folder), checkpoint=Checkpoint(**checkpoint))
    return model, optimizer, Checkpointer(config, shape, model, optimizer, meshes)


def save(folder: str, layout: Layout, frozen: tuple[str, ...], shape: ModelConfig = CONFIG) -> dict[str, torch.Tensor]:
    model, optimizer, checkpointer = start(folder, layout, frozen, shape)
    assert checkpointer.resume() is None
    with torch.no_grad():
        for parameter in model.parameters():  # so that they are not the initial ones
            parameter.mul_(1.5) if parameter.requires_grad else parameter.add_(0.5)
            if parameter.requires_grad:
                parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    slots = 4 // dist.get_world_size()
    checkpointer.save(3, 300, torch.zeros(slots, 2, dtype=torch.int64))
    assert checkpointer.wait()
    return {name: full(parameter) for name, parameter in model.named_parameters()}


def load(folder: str, layout: Layout, frozen: tuple[str, ...], options: dict[str, str], shape: ModelConfig = CONFIG):
    """The weights and the names of the optimizer's state, or what was said."""
    model, optimizer, checkpointer = start(folder, layout, frozen, shape, **options)
    try:
        checkpointer.resume()
    except UserError as error:
        return str(error), set()
    weights = {name: full(parameter) for name, parameter in model.named_parameters()}
    return weights, {name.rpartition(".")[0] for name in optimizer.named_state()}


def test_a_frozen_tower_is_written_once_and_restored_on_any_layout(tmp_path: Path) -> None:
    saved = run_ranks(save, 2, str(tmp_path), Layout(world=2), FROZEN)[0]
    folder = tmp_path / "checkpoints/step-00000003"
    written = sum(file.stat().st_size for file in folder.glob("*.distcp"))
    entries = dcp.FileSystemReader(folder).read_metadata().storage_data
    assert written == sum(entry.length for entry in entries.values())
    tower = {name for name in saved if name.startswith("visual.")}
    assert all(saved[name].dtype == torch.bfloat16 for name in tower)
    for layout in (Layout(), Layout(world=2, ep=2), Layout(world=2, replicate=2)):
        for weights, state in run_ranks(load, layout.world, str(tmp_path), layout, FROZEN, {}):
            assert weights.keys() == saved.keys()
            assert state == saved.keys() - tower
            for name, weight in saved.items():
                assert torch.equal(weights[name], weight), (layout, name)
                assert weights[name].dtype == weight.dtype, (layout, name)


@pytest.mark.parametrize(("before", "now"), [((), FROZEN), (FROZEN, ()), (FROZEN, ("vision",))])
def test_another_choice_takes_the_weights_alone(tmp_path: Path, before: tuple[str, ...], now: tuple[str, ...]) -> None:
    (saved,) = run_ranks(save, 1, str(tmp_path / "before"), Layout(), before)
    ((said, _),) = run_ranks(load, 1, str(tmp_path / "before"), Layout(), now, {})
    assert "'optimizer.visual." in said
    assert "expected one of the same model with the same model.freeze, or checkpoint.start_from" in said
    options = {"start_from": str(tmp_path / "before/checkpoints/step-00000003")}
    ((weights, state),) = run_ranks(load, 1, str(tmp_path / "now"), Layout(), now, options)
    assert state == {name for name in saved if part_of(name) not in now}
    for name, weight in saved.items():
        expected = torch.bfloat16 if part_of(name) in now else torch.float32
        assert torch.equal(weights[name], weight.to(expected)), name
        assert weights[name].dtype == expected, name


@pytest.mark.parametrize("option", ["resume", "start_from"])
@pytest.mark.parametrize("had_tower", [True, False])
def test_a_tower_that_one_of_both_lacks_is_told_by_the_option_for_it(
    tmp_path: Path, had_tower: bool, option: str
) -> None:
    """`model.vision = "auto"` goes by the data: with other data the same command makes another model."""
    shapes = CONFIG, dataclasses.replace(CONFIG, vision=None)
    before, now = shapes if had_tower else shapes[::-1]
    run_ranks(save, 1, str(tmp_path / "before"), Layout(), (), before)
    options = {option: str(tmp_path / "before/checkpoints/step-00000003")}
    ((said, _),) = run_ranks(load, 1, str(tmp_path / "now"), Layout(), (), options, now)
    assert "tensor 'model.visual." in said
    assert said.endswith(f"expected one of the same model, or model.vision = {'on' if had_tower else 'off'!r}")
