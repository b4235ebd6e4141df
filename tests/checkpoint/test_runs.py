"""Whole runs: killed at random moments, moved to other layouts, started from Hugging Face weights, exported."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint.directories import complete_checkpoints, find_damage
from config.reading import load_config, model_config
from models.qwen35_moe.hf_weights import hf_name, is_published_in_float32, mtp_shapes
from models.qwen35_moe.parameters import parameters
from tests.checkpoint.runs import OPTIONS, ROOT, Run
from tests.distributed import needs_gpus
from tests.patience import PATIENCE


@pytest.mark.slow
def test_killed_at_random_moments() -> None:
    command = [sys.executable, str(ROOT / "tests/checkpoint/kill_harness.py"), "--kills=5", "--seed=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "5 kills" in done.stdout


def options(replicate: int, ep: int, cp: int = 1) -> list[str]:
    return [
        f"--parallelism.data_parallel_replicate_degree={replicate}",
        f"--parallelism.expert_parallel_degree={ep}",
        f"--parallelism.context_parallel_degree={cp}",
        "--training.steps=8",
        "--checkpoint.interval=3",
        "--checkpoint.keep=0",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        ((1, 1, 1, 1), (4, 1, 2, 1)),
        ((4, 1, 4, 1), (2, 1, 1, 1)),
        ((4, 2, 1, 1), (4, 1, 1, 1)),
        ((2, 1, 2, 1), (4, 2, 2, 1)),
        ((2, 1, 1, 2), (2, 1, 2, 1)),
        ((1, 1, 1, 1), (4, 1, 4, 2)),
    ],
    ids=lambda layout: "world {} replicate {} ep {} cp {}".format(*layout),
)
def test_five_steps_after_a_move_are_those_of_the_run_that_stayed(tmp_path: Path, saved: tuple, resumed: tuple) -> None:
    check_move(tmp_path, saved, resumed)


# To half of the GPUs, or from half of them, on machines of 2, 4 and 8.
@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        pytest.param(saved, resumed, marks=needs_gpus(max(saved[0], resumed[0])))
        for saved, resumed in [
            ((2, 1, 2), (1, 1, 1)),
            ((1, 1, 1), (2, 1, 2)),
            ((4, 1, 4), (2, 2, 1)),
            ((2, 1, 1), (4, 2, 2)),
            ((8, 1, 8), (4, 1, 2)),
            ((4, 1, 4), (8, 2, 4)),
        ]
    ],
    ids=lambda layout: "world {} replicate {} ep {}".format(*layout),
)
def test_five_steps_after_a_move_between_numbers_of_gpus(tmp_path: Path, saved: tuple, resumed: tuple) -> None:
    # float32, else routing at a tie would differ. The softmax of the loss need not be compiled for so few tokens.
    on_gpus = ["--training.dtype=float32", "--training.global_batch_size=8", "--kernels.cross_entropy=torch"]
    check_move(tmp_path, saved, resumed, *on_gpus, on_gpus=True)


def check_move(tmp_path: Path, saved: tuple, resumed: tuple, *others: str, on_gpus: bool = False) -> None:
    """Trains 8 steps in one layout, and from its third step's checkpoint on in the other."""
    stayed = Run(tmp_path / "stayed", saved[0], *options(*saved[1:]), *others, on_gpus=on_gpus).finish()
    first = complete_checkpoints(tmp_path / "stayed/checkpoints")[0]
    resume = f"--checkpoint.resume={first}"
    moved = Run(tmp_path / "moved", resumed[0], *options(*resumed[1:]), resume, *others, on_gpus=on_gpus).finish()
    assert all(("mfu" in line) == on_gpus for line in stayed + moved)
    assert [line["step"] for line in moved] == [4, 5, 6, 7, 8]
    for line, expected in zip(moved, stayed[3:]):
        # Sums in another order and nothing else: as in the tests of layouts.
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


def test_from_hugging_face_weights_and_out_again(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    steps = ["--training.steps=2", "--checkpoint.interval=1", "--checkpoint.export_hf=all"]
    start = [f"--model.path={tmp_path / 'hf'}", "--model.initial_load=hf", "--data.tokenizer=data/tiny/tokenizer"]
    # A learning rate of nothing: what comes out is what went in, and what was not trained is there too.
    run = Run(tmp_path / "run", 2, *start, *steps, "--optimizer.lr=1e-30", "--optimizer.weight_decay=0")
    run.finish()
    expected = load_file(tmp_path / "hf/model.safetensors")
    assert any(key.startswith("mtp.") for key in expected)
    for step in (1, 2):
        out = load_file(tmp_path / f"run/hf/step-0000000{step}/model.safetensors")
        assert out.keys() == expected.keys()
        assert all(torch.equal(out[key], tensor) for key, tensor in expected.items())
    assert (tmp_path / "run/checkpoints/step-00000002/hf/tokenizer.json").exists()
    # Once there are checkpoints of its own, the run goes on from them; the directory may be gone but for its config.
    (tmp_path / "hf/model.safetensors").write_bytes(b"")
    run = Run(tmp_path / "run", 2, *start, *steps)
    assert len(run.finish()) == 2


def write_hf(folder: Path) -> None:
    """A causal-LM directory with MTP, its shape that of OPTIONS, bfloat16 as published."""
    shape = model_config(load_config([*OPTIONS, "--job.output_dir=/tmp/none"]))
    shapes = {hf_name(name): parameter.shape for name, parameter in parameters(shape).items()} | mtp_shapes(shape, 1)
    generator = torch.Generator().manual_seed(0)
    tensors = {key: 0.02 * torch.randn(size, generator=generator) for key, size in shapes.items()}
    folder.mkdir()
    save_file(
        {k: t if is_published_in_float32(k) else t.bfloat16() for k, t in tensors.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(shape.to_dict() | {"mtp_num_hidden_layers": 1}))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_save_is_under_way(tmp_path: Path, number: signal.Signals) -> None:
    run = Run(tmp_path, 2, "--training.steps=100000", "--checkpoint.interval=1", "--checkpoint.keep=1")
    unfinished = tmp_path / "checkpoints"
    while not (len(run.metrics()) > 2 and list(unfinished.glob(".step-????????"))):
        assert run.alive, run.log.read_text()
        time.sleep(0.001)
    os.kill(run.ranks[1].pid, number)  # it tells the other
    last = len(run.finish())
    assert [path.name for path in unfinished.iterdir()] == [f"step-{last:08}"]
    assert find_damage(unfinished / f"step-{last:08}") is None
