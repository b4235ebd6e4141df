"""A loss or gradient that is not finite: the step is not applied, all ranks know where it was, no checkpoint has it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.tensors.dcp import read_dcp
from models.qwen35_moe.model import Qwen35Moe
from tests.checkpoint.runs import Run
from tests.distributed import run_ranks
from tests.models.qwen35_moe.shapes import tiny_config
from tests.parallelisms.layouts import Layout, build, full, own_batches, step
from tests.patience import PATIENCE
from tests.training.test_load_balancing import ROOT, SMALL

CONFIG = tiny_config(initializer_range=0.05)
ROWS = [[40, 24], [10, 54]]


def spoil_loss(model: Qwen35Moe) -> Any:
    return model.register_forward_hook(lambda _, inputs, output: output._replace(result=output.result * float("nan")))


def spoil_gradient(model: Qwen35Moe) -> Any:
    """The loss stays finite; the gradient that comes back to block 1 does not."""

    def spoil(module: torch.nn.Module, inputs: tuple, output: tuple) -> None:
        output[0].register_hook(lambda gradient: gradient * float("inf"))

    return model.blocks[1].register_forward_hook(spoil)


def step_with(layout: Layout, spoil) -> tuple[str, bool]:
    """A good step, one that `spoil` makes bad on the last rank alone, the first again: what the bad one tells, and
    whether it left no trace in weights, Adam's state and the step after."""
    told, states = "", []
    for with_bad_step in (True, False):
        model, meshes, optimizer = build(CONFIG, layout)
        batches = own_batches(CONFIG, layout, ROWS, 0)
        assert step(model, meshes, optimizer, batches).nonfinite == ""
        if with_bad_step:
            hook = spoil(model) if torch.distributed.get_rank() == layout.world - 1 else None
            told = step(model, meshes, optimizer, batches).nonfinite
            if hook is not None:
                hook.remove()
        assert step(model, meshes, optimizer, batches).nonfinite == ""
        adam = [full(tensor) for state in optimizer.state.values() for tensor in state.values()]
        states.append([full(parameter) for parameter in model.parameters()] + adam)
    return told, all(map(torch.equal, *states))


def steps_with(layouts: list[Layout]) -> list[list[tuple[str, bool]]]:
    return [[step_with(layout, spoil) for spoil in (spoil_loss, spoil_gradient)] for layout in layouts]


@pytest.mark.parametrize("world", [1, 2])
def test_a_bad_step_is_not_applied_and_all_ranks_say_where(world: int) -> None:
    layouts = [Layout()] if world == 1 else [Layout(world=2), Layout(world=2, ep=2, activation_checkpoint="full")]
    results = run_ranks(steps_with, world, layouts)
    assert all(result == results[0] for result in results)
    for of_loss, of_gradient in results[0]:
        assert (of_loss[1], of_gradient[1]) == (True, True)
        assert f"loss not finite on rank {world - 1}" in of_loss[0]
        assert "first in the backward pass: lm_head.weight on rank 0" in of_loss[0]
        # Not in lm_head nor in blocks 2 and 3, which the backward pass left before.
        assert re.search(r"loss finite, .*: layers\.1\.\S+ on rank \d$", of_gradient[0]), of_gradient[0]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.toml"
    path.write_text(SMALL.format(root=ROOT).replace("steps = 2", "steps = 4").replace("enable = false", "interval = 1"))
    return path


def run(small: Path, output_dir: Path, *options: str) -> tuple[int | None, list[str]]:
    """One process: its exit code, and what it said."""
    started = Run(output_dir, 1, f"--config={small}", *options, defaults=())
    (code,) = started.wait()
    return code, started.log.read_text().splitlines()


def metrics(output_dir: Path) -> list[dict]:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=no_constant) for line in lines]


def weights_are_finite(checkpoint: Path) -> bool:
    return all(tensor.read().isfinite().all() for tensor in read_dcp(checkpoint).values())


def test_a_run_stops_in_one_line_with_its_last_checkpoint_good(small: Path, tmp_path: Path) -> None:
    # The first update makes weights so large that the second step overflows.
    # Under torchrun, which ends the second before it says the same.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(ROOT / "train.py"), "--config", str(small), f"--job.output_dir={tmp_path}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--optimizer.lr=1e30"], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if "is not applied" in line]
    assert len(told) == 1
    where = r"loss not finite on rank 0, gradient norm \S+, first in the backward pass: \S+ on rank \d"
    assert re.fullmatch(f"step 2 is not applied: {where}", told[0])
    assert "Error: step 2" not in done.stderr  # no traceback of our own
    assert [line["step"] for line in metrics(tmp_path)] == [1]
    checkpoints = list((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["step-00000001"]
    assert weights_are_finite(checkpoints[0])


def test_bad_weights_are_not_saved(small: Path, tmp_path: Path) -> None:
    # Finite gradients, but the update itself overflows float32.
    code, said = run(small, tmp_path, "--optimizer.lr=1e39")
    assert code == 1
    (line,) = [line for line in said if " [rank 0] " not in line]  # beside the log
    assert re.fullmatch(r"step 1: no checkpoint is written, weights are not finite: \S+ on rank 0", line), line
    assert not list(tmp_path.glob("checkpoints/**/step-*"))


def test_a_run_skips_if_asked_and_counts(small: Path, tmp_path: Path) -> None:
    code, said = run(small, tmp_path, "--optimizer.lr=1e30", "--training.nonfinite=skip")
    assert code == 0, said
    assert [line["skipped_steps"] for line in metrics(tmp_path)] == [0, 1, 2, 3]
    assert [line["loss"] is None for line in metrics(tmp_path)] == [False, True, True, True]
    assert sum("is skipped: loss not finite on rank 0" in line for line in said) == 3
