"""Whole runs: killed at random moments, moved to other layouts, started from Hugging Face weights, exported."""

import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint.directories import complete_checkpoints
from tests.checkpoint.runs import ROOT, Run


@pytest.mark.slow
def test_killed_at_random_moments() -> None:
    command = [sys.executable, str(ROOT / "tests/checkpoint/kill_harness.py"), "--kills=5", "--seed=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "5 kills" in done.stdout


def options(replicate: int, ep: int) -> list[str]:
    return [
        f"--parallelism.data_parallel_replicate_degree={replicate}",
        f"--parallelism.expert_parallel_degree={ep}",
        "--training.steps=8",
        "--checkpoint.interval=3",
        "--checkpoint.keep=0",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved", "resumed"),
    [((1, 1, 1), (4, 1, 2)), ((4, 1, 4), (2, 1, 1)), ((4, 2, 1), (4, 1, 1)), ((2, 1, 2), (4, 2, 2))],
    ids=lambda layout: "world {} replicate {} ep {}".format(*layout),
)
def test_five_steps_after_a_move_are_those_of_the_run_that_stayed(tmp_path: Path, saved: tuple, resumed: tuple) -> None:
    stayed = Run(tmp_path / "stayed", saved[0], *options(*saved[1:])).finish()
    first = complete_checkpoints(tmp_path / "stayed/checkpoints")[0]
    moved = Run(tmp_path / "moved", resumed[0], *options(*resumed[1:]), f"--checkpoint.resume={first}").finish()
    assert [line["step"] for line in moved] == [4, 5, 6, 7, 8]
    for line, expected in zip(moved, stayed[3:]):
        # Sums in another order and nothing else: as in the tests of layouts.
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
