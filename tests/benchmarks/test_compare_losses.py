"""The comparison of two runs finds where they part, and says so in its exit status."""

import json
from pathlib import Path

import pytest

from benchmarks.compare_losses import main
from tests.commands import status_of

LOSSES = [8.0, 7.0, 6.0, 5.0]


def write(path: Path, losses: list[float | None], start: int = 1) -> str:
    path.mkdir()
    lines = [{"step": step, "loss": loss, "grad_norm": 1.0} for step, loss in enumerate(losses, start)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_equal_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before, after = write(tmp_path / "a", [*LOSSES, None]), write(tmp_path / "b", [*LOSSES, None])
    assert status_of(main, [before, f"{after}/metrics.jsonl"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "5 common steps, 1 to 5",
        "loss: equal bit for bit",
        "grad_norm: equal bit for bit",
    ]


def test_the_step_where_runs_part_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before, after = write(tmp_path / "a", LOSSES), write(tmp_path / "b", [8.0, 7.0, 6.00003, 5.005])
    assert status_of(main, [before, after]) == 1
    assert "loss: part at step 3 (6.0 and 6.00003); at most 1.0e-03 apart" in capsys.readouterr().out
    assert status_of(main, [before, after, "--tolerance=1e-4"]) == 1
    assert "loss: more than 0.0001 apart from step 4 (5.0 and 5.005)" in capsys.readouterr().out
    assert status_of(main, [before, after, "--tolerance=1e-2"]) == 0


def test_only_common_steps_are_compared(tmp_path: Path) -> None:
    before, after = write(tmp_path / "a", LOSSES), write(tmp_path / "b", LOSSES[2:], start=3)
    assert status_of(main, [before, after]) == 0


def test_a_loss_that_is_not_finite_is_another(tmp_path: Path) -> None:
    before, after = write(tmp_path / "a", LOSSES), write(tmp_path / "b", [*LOSSES[:3], None])
    assert status_of(main, [before, after, "--tolerance=1e9"]) == 1


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before, later = write(tmp_path / "a", LOSSES), write(tmp_path / "b", LOSSES, start=9)
    (tmp_path / "text").write_text("no metrics\n")
    for other in (later, str(tmp_path / "missing"), str(tmp_path / "text")):
        assert status_of(main, [before, other]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert "expected" in error
