"""Which errors become one line and exit code 2, and which keep their traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from config.reading import load_config
from errors import OneLineParser, UserError, exit_on_error, reading

ROOT = Path(__file__).resolve().parents[1]


def test_a_users_mistake_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"), exit_on_error():
        load_config(["--training.stepz", "3"])
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "training.stepz" in error


def test_what_a_parser_raises_while_a_file_is_read_is_one_line_too(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"), exit_on_error(), reading("some.json"):
        json.loads("[" * 100_000)
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert error.startswith("some.json cannot be read")


def test_a_librarys_value_error_is_a_bug() -> None:
    with pytest.raises(json.JSONDecodeError), exit_on_error():
        json.loads("{")


@pytest.mark.parametrize("closed", ["stdout", "another pipe"])
def test_only_a_reader_of_stdout_that_has_gone_is_no_error(closed: str) -> None:
    if closed == "stdout":
        program = "print('x' * 100_000)"
    else:
        program = "import os; r, w = os.pipe(); os.close(r); os.write(w, b'x')"
    program = f"import errors\nwith errors.exit_on_error():\n    {program}"
    reader, writer = os.pipe()
    if closed == "stdout":
        os.close(reader)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    assert (done.returncode == 0) == (closed == "stdout")
    assert ("BrokenPipeError" in done.stderr) == (closed != "stdout")


@pytest.mark.parametrize("words", [["--number=1", "--number", "1"], ["--num=1"], ["--number"], ["--number=x"]])
def test_an_option_twice_cut_short_or_without_its_value_is_a_mistake(words: list[str]) -> None:
    parser = OneLineParser()
    parser.add_argument("--number", type=int)
    assert parser.parse_args(["--number=1"]).number == 1
    with pytest.raises(UserError, match="--num"):
        parser.parse_args(words)
