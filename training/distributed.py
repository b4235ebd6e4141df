"""Process start-up: the process group, this rank's device, determinism."""

import os

import torch
import torch.distributed as dist


def world_from_environment() -> tuple[int, int]:
    """(rank, world size) as torchrun sets them; (0, 1) for a plain `python train.py`."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def init_distributed() -> torch.device:
    """Joins the process group (NCCL on GPUs, gloo on CPUs) and returns this rank's device."""
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    # Host tensors (checkpoint metadata) travel over gloo beside NCCL.
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    return device


def set_deterministic() -> None:
    """Makes two runs on one machine and layout agree bit for bit; call before the first CUDA operation."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of each rank's `values` (any shape), on all ranks; one all-reduce, none in a world of one."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values
