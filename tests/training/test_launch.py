"""What becomes of the ranks' exit statuses."""

import sys
from pathlib import Path

import pytest

from training.launch import launch


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
    arguments = [
        "--standalone",
        "--local-addr",
        "127.0.0.1",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "0",
        str(script),
    ]
    assert launch(arguments) == status
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == (1 if said else 0)
    assert sys.executable not in error
