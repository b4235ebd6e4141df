"""Runs a test function in real processes, one a rank: `run_ranks(function, world_size, *arguments)`."""

import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from training.distributed import init_distributed

# A server that has torch imported and has never run an OpenMP region forks the ranks: a rank starts in
# milliseconds instead of the seconds that importing torch takes, and inherits no threads.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "torch.distributed.checkpoint"])


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _rank_main(
    function: Callable, rank: int, world_size: int, port: int, folder: str, arguments: tuple, on_gpus: bool
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    try:
        if on_gpus:
            init_distributed(timeout_seconds=300)  # a rank may wait until another has compiled
        else:
            dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        torch.save(function(*arguments), f"{folder}/result-{rank}")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)  # a peer may be waiting in a collective: no orderly way out exists


def run_ranks(
    function: Callable, world_size: int, *arguments: Any, seconds: float = 120, on_gpus: bool = False
) -> list[Any]:
    """Calls `function(*arguments)` on each of `world_size` ranks; returns what they returned, in rank order.

    The ranks share a gloo group on CPUs; or, `on_gpus`, they are set up as train.py sets them up, with a GPU each.

    `function` must be importable (a module's top level). Fails with the first rank's traceback, and after `seconds`
    (a hang) with the ranks that were still running.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        ranks = [
            _context.Process(target=_rank_main, args=(function, rank, world_size, port, folder, arguments, on_gpus))
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
        for process in ranks:
            process.kill()
            process.join()
        errors = [path.read_text() for path in sorted(Path(folder).glob("error-*"))]
        assert not errors, f"{len(errors)} of {world_size} ranks failed; the first:\n{errors[0]}"
        assert not running, f"ranks {running} of {world_size} were still running after {seconds} s"
        assert all(process.exitcode == 0 for process in ranks), [process.exitcode for process in ranks]
        return [torch.load(f"{folder}/result-{rank}", weights_only=False) for rank in range(world_size)]
