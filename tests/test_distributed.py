"""The ranks of tests: what they begin with."""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from config.reading import ROOT
from tests.distributed import run_ranks

PROGRAM = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from tests.test_distributed import tell
with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:  # as other tests do before
    assert pool.submit(len, "abc").result() == 3
    tell()
"""


def what_a_rank_begins_with() -> tuple[set[str], int]:
    """Which of these modules are there, and how many threads the server has that forked this rank."""
    modules = {"tests.parallelisms.layouts", "tests.preloaded", "train", "transformers", "datasets"} & {*sys.modules}
    return modules, len(os.listdir(f"/proc/{os.getppid()}/task"))


def tell() -> None:
    for modules, num_threads in run_ranks(what_a_rank_begins_with, 2):
        print(*sorted(modules), num_threads)


def test_ranks_begin_with_everything_imported_and_no_threads(tmp_path: Path) -> None:
    """Or each of the suite's hundreds of ranks would spend more than a second on imports. In a process of its own:
    there is one server in each, which other tests may have started."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    # Forking a process that has threads can hang.
    prepared = "" if torch.backends.cuda.is_built() else "tests.preloaded "
    assert done.stdout.splitlines() == [f"tests.parallelisms.layouts {prepared}train transformers 1"] * 2


def crash_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


def test_a_rank_that_crashed_is_named_beside_what_the_others_say() -> None:
    with pytest.raises(AssertionError, match=r"^1 of 2 ranks failed \(by signals: \{1: -9\}\); the first:\nTraceback"):
        run_ranks(crash_on_rank_1, 2)


def crash_of_rank_1() -> None:
    if dist.get_rank() == 1:
        ctypes.string_at(0)
    dist.all_reduce(torch.ones(1))


def test_a_rank_that_crashed_by_a_broken_pointer_leaves_its_traceback() -> None:
    with pytest.raises(AssertionError, match=r"(?s)\{1: -11\}.*Segmentation fault.*in crash_of_rank_1"):
        run_ranks(crash_of_rank_1, 2)
