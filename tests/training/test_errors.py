"""Which errors become one line and exit code 2, and which keep their traceback."""

import json

import pytest

from config import load_config
from training.errors import exit_on_error


def test_our_own_value_error_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"), exit_on_error():
        load_config(["--training.stepz", "3"])
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "training.stepz" in error


def test_a_librarys_value_error_is_a_bug() -> None:
    with pytest.raises(json.JSONDecodeError), exit_on_error():
        json.loads("{")
