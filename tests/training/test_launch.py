"""What becomes of the ranks' exit statuses."""

import sys
from pathlib import Path

import pytest

from training.launch import launch

TWO_RANKS = ("--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2", "--max-restarts", "0")


@pytest.mark.parametrize(
    ("codes", "status", "said"),
    [((0, 0), 0, ""), ((2, 2), 2, ""), ((3, 0), 1, "ended with status 3"), ((-9, 0), 1, "was ended by SIGKILL")],
)
def test_statuses(
    tmp_path: Path, capsys: pytest.CaptureFixture, codes: tuple[int, int], status: int, said: str
) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(
        "import os, signal, sys\n"
        f"code = {codes!r}[int(os.environ['RANK'])]\n"
        "if code < 0: os.kill(os.getpid(), -code)\n"
        "sys.exit(code)\n"
    )
    assert launch(["0", *TWO_RANKS, str(script)]) == status
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == (1 if said else 0)
    assert sys.executable not in error


@pytest.mark.parametrize(
    ("codes", "status", "starts", "said"),
    [
        ((3, 3, 0), 0, 3, ["ended with status 3; the others were stopped: restart 1 of 2", "restart 2 of 2"]),
        ((-9, 0), 0, 2, ["was ended by SIGKILL; the others were stopped: restart 1 of 2"]),
        ((3, 3, 3, 0), 1, 3, ["restart 1 of 2", "restart 2 of 2", "ended with status 3; the others were stopped"]),
        ((3, 2, 0), 2, 2, ["restart 1 of 2"]),  # a mistake is not tried again
    ],
)
def test_restarts(
    tmp_path: Path, capsys: pytest.CaptureFixture, codes: tuple[int, ...], status: int, starts: int, said: list[str]
) -> None:
    """`codes`: of rank 1, start by start; rank 0 is fine."""
    script = tmp_path / "ranks.py"
    script.write_text(
        "import os, sys, pathlib\n"
        f"starts = pathlib.Path({str(tmp_path / 'starts')!r} + os.environ['RANK'])\n"
        "number = len(starts.read_text()) if starts.exists() else 0\n"
        "starts.write_text('.' * (number + 1))\n"
        f"code = {codes!r}[number] * (os.environ['RANK'] == '1')\n"
        "if code < 0: os.kill(os.getpid(), -code)\n"
        "sys.exit(code)\n"
    )
    assert launch(["2", *TWO_RANKS, str(script)]) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(said)
    assert all(part in line for part, line in zip(said, lines))
    assert len((tmp_path / "starts1").read_text()) == starts
