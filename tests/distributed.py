"""Runs a test function in real processes, one a rank: `run_ranks(function, world_size, *arguments)`."""

import contextlib
import faulthandler
import multiprocessing
import os
import random
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from models.ops import gated_delta_rule
from tests.patience import PATIENCE
from training.distributed import init_distributed

# A server that has imported torch and all that trains, has never run an OpenMP region and never asked for a GPU forks
# the ranks: a rank starts in milliseconds instead of the seconds that importing takes, and inherits no threads and no
# CUDA state. (Not `datasets`: importing it starts a thread.) It is none that others use: Python has one for all, which
# has imported what the first wanted who asked for it, say a loader, or nothing.
_server = forkserver.ForkServer()


class _Process(ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: BaseProcess) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(forkserver, "connect_to_new_process", _server.connect_to_new_process)
            return ForkServerProcess._Popen(process_obj)  # type: ignore[attr-defined]


class _Context(ForkServerContext):
    Process = _Process


on_cpus = _Context()
_PRELOADED = ["torch.distributed.checkpoint", "transformers", "tests.parallelisms.layouts", "train"]
# Compiling asks for a GPU; and a PyTorch that is built for GPUs, be there any or not, starts the threads of backward
# passes for it: what is forked from a process with such threads can make no backward pass.
_PRELOADED += [] if torch.backends.cuda.is_built() else ["tests.preloaded"]
_REPOSITORY = Path(__file__).resolve().parents[1]


def free_port(count: int = 1) -> int:
    """The first of `count` TCP ports in a row that were free a moment ago: below 32768, where on Linux no connection
    takes its own end (scripts/train.sbatch chooses from the same range), and others for every process that asks."""
    for first in random.Random(os.urandom(8)).sample(range(20000, 30000 - count), 100):
        with contextlib.ExitStack() as listeners:
            try:
                for port in range(first, first + count):
                    listener = listeners.enter_context(socket.socket())
                    listener.bind(("", port))
            except OSError:
                continue
            return first
    raise AssertionError("no free port")


def needs_gpus(number: int) -> list[pytest.MarkDecorator]:
    """Marks of a test that runs on so many GPUs."""
    reason = f"needs {number} CUDA GPU{'s' if number > 1 else ''}"
    return [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < number, reason=reason)]


def start_server() -> None:
    """Starts this process's server unless it runs. Python 3.11 gives it no sys.path: what it does not find it skips in
    silence."""
    _server.set_forkserver_preload(_PRELOADED)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(_REPOSITORY), prepend=os.pathsep)
        _server.ensure_running()


def shorten_chunks() -> None:
    """In this process the plain delta rule cuts documents into 16 tokens instead of 64. Tests' documents are short:
    most of a chunk would lie beyond their ends, and take most of the time. And so some reach over a chunk's border."""
    gated_delta_rule.CHUNK = 16


def _rank_main(
    function: Callable, rank: int, world_size: int, device_type: str, port: int, folder: str, arguments: tuple
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    # Where one crashes, as by a broken pointer, this is all that is left of it.
    faulthandler.enable(os.open(f"{folder}/crash-{rank}", os.O_WRONLY | os.O_CREAT))
    try:
        if device_type == "cuda":
            init_distributed(timeout_seconds=300)  # one rank may compile while the others wait
        else:
            shorten_chunks()
            dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE))
        torch.save(function(*arguments), f"{folder}/result-{rank}")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)  # a peer may be waiting in a collective: no orderly way out exists


def run_ranks(
    function: Callable, world_size: int, *arguments: Any, seconds: float = PATIENCE, device_type: str = "cpu"
) -> list[Any]:
    """Calls `function(*arguments)` on each of `world_size` ranks; returns what they returned, in rank order.

    device_type "cpu": over gloo; "cuda": over NCCL, each rank with a GPU of its own, as train.py would have it.
    `function` must be importable (a module's top level), and what it returns be on the CPU. Fails with the traceback of
    the rank that failed first (others may only have missed it), and after `seconds` (a hang) with the ranks that were
    still running.
    """
    # What the server has imported may have asked for a GPU where there is one, and that outlives no fork.
    context = on_cpus if device_type == "cpu" else multiprocessing.get_context("spawn")
    if context is on_cpus:
        start_server()
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        ranks: list[BaseProcess] = [
            context.Process(target=_rank_main, args=(function, rank, world_size, device_type, port, folder, arguments))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + seconds
        while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
            if any(process.exitcode not in (None, 0) for process in ranks):
                deadline = min(deadline, time.monotonic() + 2)  # let the peers write their errors too
            time.sleep(0.02)
        running = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        # Of those that a signal ended, say a crash: they leave no traceback, and are why the others failed.
        crashed = {rank: process.exitcode for rank, process in enumerate(ranks) if (process.exitcode or 0) < 0}
        for process in ranks:
            process.kill()
            process.join()
        failed = sorted(Path(folder).glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
        by_signal = f" (by signals: {crashed})" if crashed else ""
        files = (Path(folder, f"crash-{rank}") for rank in crashed)
        traces = "\n".join(file.read_text() for file in files if file.exists())
        assert not failed, (
            f"{len(failed)} of {world_size} ranks failed{by_signal}; the first:\n{failed[0].read_text()}{traces}"
        )
        assert not running, f"ranks {running} of {world_size} were still running after {seconds} s"
        assert all(process.exitcode == 0 for process in ranks), f"{[each.exitcode for each in ranks]}\n{traces}"
        return [torch.load(f"{folder}/result-{rank}", weights_only=False) for rank in range(world_size)]
