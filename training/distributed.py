"""Process start-up: the process group, this rank's device, determinism; who is missing when a wait is too long; and the
end beside a process group."""

import atexit
import dataclasses
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from config.options import Config
from errors import RunError, UserError

# What gloo says when a peer does not come, and when it has gone.
_WAITED_IN_VAIN = re.compile("[Tt]imed out|timeout|Connection (closed|reset) by peer|Broken pipe")


_TASKS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""By which schedulers tell how many processes they start."""


def world_from_environment() -> tuple[int, int]:
    """(rank, world size) as torchrun sets them; (0, 1) for a plain `python train.py`.

    Raises UserError for a world of one process where a scheduler starts several: each would be a run of its own.
    """
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        if not re.fullmatch("[0-9]{1,6}", value := os.environ.get(name, "1")):
            raise UserError(f"{name} = {value!r}: expected an integer, as torchrun sets it")
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if rank >= world_size:
        raise UserError(f"RANK = {rank}: expected less than WORLD_SIZE = {world_size}")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if world_size > 1 else ():
        if not os.environ.get(name):
            raise UserError(f"{name} is not set, but WORLD_SIZE = {world_size}: expected run_train.sh or torchrun")
    for name in _TASKS if world_size == 1 else ():
        if os.environ.get(name, "1") not in ("", "0", "1"):
            raise UserError(
                f"{name} = {os.environ[name]!r}: that many runs of one process each would start: expected run_train.sh "
                f"or torchrun in one task a node, or {name} unset"
            )
    return rank, world_size


def init_distributed(timeout_seconds: int) -> torch.device:
    """Joins the process group (NCCL on GPUs, gloo on CPUs) and returns this rank's device."""
    timeout = timedelta(seconds=timeout_seconds)
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if not torch.cuda.is_available():
        dist.init_process_group("gloo", timeout=timeout)
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    # For who looks for a collective that hangs PyTorch's flight recorder keeps the stack of each. That takes the host's
    # time: a step of 40 layers over two GPUs has 300 collectives, and was 8 % longer (docs/experiments.md). For the
    # same reason nothing here asks for the report of who did not join (TORCH_NCCL_DESYNC_DEBUG).
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:  # its old name
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "0")
    # Host tensors (a step's agreement, checkpoint metadata) travel over gloo beside NCCL.
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device)
    return device


_OF_A_MACHINE = ("data.num_workers", "compile.cache_dir", "kernels.self_test")


def check_same_options(config: Config) -> None:
    """Raises UserError, the same on all ranks, where one was started with another option than the first: with a shorter
    row, say, it would send the others another number of bytes than they wait for. What is a machine's own may differ:
    paths, workers, where compiled kernels are kept, and whether they are tested."""
    tables = {section.rstrip("_"): options for section, options in dataclasses.asdict(config).items()}
    own = {f"{section}.{key.rstrip('_')}": options[key] for section, options in tables.items() for key in options}
    own = {key: _without_paths(value) for key, value in own.items() if key not in _OF_A_MACHINE}
    of_ranks = [own] * dist.get_world_size()
    dist.all_gather_object(of_ranks, own)
    for rank, options in enumerate(of_ranks):
        for key, expected in of_ranks[0].items():
            if (value := options.get(key)) != expected:
                raise UserError(f"{key} = {value!r} on rank {rank}: expected {expected!r}, as on rank 0")


def _without_paths(value: object) -> object:
    """An option's value with "PATH" for each path: config/reading.py has made them absolute."""
    if isinstance(value, str):
        return "PATH" if os.path.isabs(value) else value
    if isinstance(value, dict):
        return {key: _without_paths(each) for key, each in value.items()}
    return [_without_paths(each) for each in value] if isinstance(value, (tuple, list)) else value


def set_timeout(meshes: Iterable[DeviceMesh], timeout_seconds: int) -> None:
    """Bounds the waits in every mesh's groups: new groups have torch's own timeout, not that of the first."""
    for mesh in meshes:
        for group in mesh.get_all_groups():
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_seconds), group)


@contextmanager
def name_missing_ranks() -> Iterator[None]:
    """Turns a collective of the host that waited in vain into a RunError that names the ranks that did not come.

    All that wait give up at about the same time and say so through the store; the others are the missing.
    """
    try:
        yield
    except RuntimeError as error:
        if not dist.is_initialized() or not _WAITED_IN_VAIN.search(str(error)):
            raise
        store = dist.distributed_c10d._get_default_store()
        store.set(f"gave_up/{dist.get_rank()}", "")
        time.sleep(5)
        missing = [rank for rank in range(dist.get_world_size()) if not store.check([f"gave_up/{rank}"])]
        raise RunError(f"a collective waited in vain: missing ranks {missing} (stuck or ended); {error}") from error


@contextmanager
def keep_exit_status() -> Iterator[None]:
    """Has a process that exits beside its process group do so with its own status.

    Around all else. Python's last act takes the interpreter from threads that still run; one of gloo's that lets go of
    a Python object at that moment ends in `terminate called without an active exception`, and the process in SIGABRT
    instead of its status. So all that Python does at an end is done here, but for that act.
    """
    try:
        yield
    except SystemExit as exit:
        if dist.is_initialized():
            threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as that of a save
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(exit.code if isinstance(exit.code, int) else int(exit.code is not None))
        raise


def set_deterministic() -> None:
    """Makes two runs on one machine and layout agree bit for bit; call before the first CUDA operation."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def most_over_ranks(number: int) -> int:
    """The largest of the ranks' numbers, on all of them. Those that were long in coming by theirs may be minutes apart,
    which counts as no rank's failure."""
    largest = torch.tensor(number)
    if dist.get_world_size() > 1:
        group = dist.new_group(backend="gloo", timeout=timedelta(hours=4))
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    return int(largest)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of each rank's `values` (any shape), on all ranks; one all-reduce, none in a world of one."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


class ToHost:
    """Tensors on their way from the device, which may have got more to do in between: they are waited for, that is
    not."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._on_host = [each.to("cpu", non_blocking=True) for each in tensors]
        on_device = [each.device for each in tensors if each.is_cuda]
        self._arrived = torch.cuda.current_stream(on_device[0]).record_event() if on_device else None

    def has_arrived(self) -> bool:
        return self._arrived is None or self._arrived.query()

    def wait(self) -> list[torch.Tensor]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._on_host
