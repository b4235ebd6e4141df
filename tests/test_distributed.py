"""The ranks of tests: what they begin with."""

import os
import sys
from pathlib import Path

import pytest

from tests.distributed import run_ranks


def what_a_rank_begins_with() -> tuple[set[str], int]:
    return {"tests.parallelisms.layouts", "transformers", "datasets"} & {*sys.modules}, os.getppid()


def test_ranks_begin_with_everything_imported_and_no_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or each of the suite's hundreds of ranks would spend more than a second on imports."""
    monkeypatch.chdir(tmp_path)
    for modules, server in run_ranks(what_a_rank_begins_with, 2):
        assert modules == {"tests.parallelisms.layouts", "transformers"}
        assert len(os.listdir(f"/proc/{server}/task")) == 1  # forking a process that has threads can hang
