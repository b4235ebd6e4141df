"""What a run tells of its steps: one step late where a device works on alone, and then the same."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from config.options import Config, Optimizer, Training
from errors import RunError
from parallelisms.room import Room
from tests.patience import PATIENCE
from tests.test_train import SMALL, metrics, run, without_times
from training.step import Attempt, LaunchedStep, StepResult
from training.step_report import Logged, StepReport

ROOT = Path(__file__).resolve().parents[2]


class Told:
    """Writes down which steps it is told of, as the writer and as the comparison with the plan."""

    waits = False

    def __init__(self) -> None:
        self.steps: list[int] = []

    def write(self, metrics: dict[str, Any]) -> None:
        self.steps.append(metrics["step"])

    def write_view(self, *_: Any) -> None: ...

    def compare(self, *_: Any, **__: Any) -> None: ...


def report(is_late: bool, nonfinite: str = "stop") -> tuple[StepReport, Told]:
    told = Told()
    training = Training(steps=9, sequence_length=8, global_batch_size=1, nonfinite=nonfinite)
    config = Config(training=training, optimizer=Optimizer(lr=1e-3))
    made = StepReport(config, torch.device("cpu"), told, told, 0, 1.0, None, is_late)  # type: ignore[arg-type]
    return made, told


def add(
    to: StepReport,
    step: int,
    at_once: bool = False,
    is_finite: bool = True,
    logs: bool = True,
    has_ended: bool = True,
    num_missed: int = 0,
) -> None:
    counts = torch.ones(1, 2, dtype=torch.int64)
    one = torch.tensor(1.0)
    result = StepResult({"loss": one}, counts, one.double(), "" if is_finite else "yet to be told", {})
    launched = LaunchedStep(Attempt(lambda: has_ended, lambda: result, lambda: "here", lambda: num_missed))
    to.add(step, 0.0, launched, Logged({}, 0.0, lambda: "", None, Room()) if logs else None, at_once)


def test_a_step_is_told_when_the_next_has_been_launched() -> None:
    late, told = report(is_late=True)
    seen = []
    for step in (1, 2, 3, 4):
        add(late, step, at_once=step == 4, logs=step != 3)
        seen.append(list(told.steps))
    # The first compiles and is told alone; the fourth is the last, or is saved.
    assert seen == [[1], [1], [1, 2], [1, 2, 4]]
    late.tell()
    assert told.steps == [1, 2, 4]

    at_once, told = report(is_late=False)
    for step in (1, 2):
        add(at_once, step)
        assert told.steps[-1] == step


def test_a_step_that_is_not_finite_stops_the_run_at_the_next_or_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    late, told = report(is_late=True)
    for step in (1, 2):
        add(late, step, is_finite=step == 1)
    with pytest.raises(RunError, match=r"^step 2 is not applied: here$"):
        add(late, 3)
    assert told.steps == [1]

    late, told = report(is_late=True, nonfinite="skip")
    for step in (1, 2, 3):
        add(late, step, is_finite=step != 2, logs=step != 2)
    assert caplog.messages == ["step 2 is skipped: here"]
    late.tell()
    assert told.steps == [1, 3]


@pytest.mark.parametrize(
    ("is_finite", "has_ended", "num_missed", "why_not"),
    [
        (True, True, 0, ""),
        (False, True, 0, "not finite"),
        (True, False, 0, ""),
        (True, True, 3, "experts had no room for all rows"),
        (False, True, 3, "not finite"),
    ],
)
def test_a_rank_that_ends_alone_tells_its_last_step_and_asks_no_other(
    is_finite: bool,
    has_ended: bool,
    num_missed: int,
    why_not: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("training.step_report._PATIENCE", 0.1)
    late, told = report(is_late=True)
    late.tell_alone()
    add(late, 1)
    add(late, 2, is_finite=is_finite, has_ended=has_ended, num_missed=num_missed)
    late.tell_alone()
    assert told.steps == ([1, 2] if not why_not and has_ended else [1])
    assert caplog.messages == ([f"step 2 is not applied: {why_not}"] if why_not else [])


def test_the_step_that_is_compared_with_the_plan_is_alone() -> None:
    late, told = report(is_late=True)
    late._config = replace(late._config, metrics=replace(late._config.metrics, log_interval=4))
    told.waits = True
    seen = []
    for step in range(1, 7):
        add(late, step, logs=step == 4)
        seen.append(late._untold is None)
        told.waits = step < 4
    assert seen == [True, False, True, True, False, False]


LATE = """
import sys
import train
at_once = train.StepReport
train.StepReport = lambda *of, **named: at_once(*of, **{**named, "is_late": True})
with train.exit_on_error():
    train.main(sys.argv[1:])
"""


def test_a_run_that_tells_late_tells_the_same(tmp_path: Path) -> None:
    """With validation, saves, and lines of two steps each."""
    config = tmp_path / "run.toml"
    validation = "[validation]\nenable = true\nshare = 0.2\ninterval = 4\nsteps = 2\n"
    config.write_text(SMALL.format(root=ROOT).replace("steps = 6", "steps = 9") + validation)
    options = ["--metrics.log_interval=2", "--metrics.grad_norm_by_part", "--checkpoint.interval=3"]
    run(config, tmp_path / "at_once", *options, ranks=1)
    command = [sys.executable, "-c", LATE, "--config", str(config), f"--job.output_dir={tmp_path}/late", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=PATIENCE)
    at_once, late = metrics(tmp_path / "at_once"), metrics(tmp_path / "late")
    assert [line["step"] for line in late] == [2, 4, 6, 8, 9]
    assert without_times(late) == without_times(at_once)
    saved = sorted(path.name for path in (tmp_path / "late/checkpoints").iterdir())
    assert saved == sorted(path.name for path in (tmp_path / "at_once/checkpoints").iterdir())
