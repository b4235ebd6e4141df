"""Records the collectives of this rank, in the order of their issue: kind, mesh axis, bytes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from parallelisms.mesh import Meshes


class Collective(NamedTuple):
    """One call. `num_bytes`: of the whole that an all-gather makes and a reduce-scatter takes, else of the input."""

    kind: str
    axis: str
    num_bytes: int


def _axes(meshes: Meshes) -> dict[str, str]:
    """Names of process groups -> names of mesh axes; "world" for the default group."""
    assert dist.group.WORLD is not None
    names = {dist.group.WORLD.group_name: "world"}
    for mesh in reversed(meshes.all):  # where axes coincide: the name in Meshes that stands first
        for axis in mesh.mesh_dim_names or ():
            names[mesh.get_group(axis).group_name] = axis
    return names


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def recorded(meshes: Meshes) -> Iterator[list[Collective]]:
    """FSDP and its reductions (reduction.py) call `torch.distributed`; DTensors, autograd and this repository call
    functional collectives, which a dispatch mode sees (FSDP's calls are hidden from modes inside checkpointed
    blocks)."""
    axes, calls = _axes(meshes), []
    renamed = hasattr(dist, "all_gather_single")  # in torch 2.13
    kinds = {
        "all_gather_single" if renamed else "all_gather_into_tensor": "all-gather",
        "reduce_scatter_single" if renamed else "reduce_scatter_tensor": "reduce-scatter",
        "all_reduce": "all-reduce",
        "all_to_all_single": "reduce-scatter",  # as FSDP is given one here; tokens travel by functional ones
    }

    class Functional(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if any(issubclass(kind, dist.tensor.DTensor) for kind in types):
                return NotImplemented  # it calls again with plain tensors
            name = func._schema.name
            if name.startswith("_c10d_functional::") and "wait_tensor" not in name and "wrap_tensor" not in name:
                name = name.removeprefix("_c10d_functional::").rstrip("_")
                kind = "all-to-all" if name == "all_to_all_single" else kinds[name]
                calls.append(Collective(kind, axes[args[-1]], _num_bytes(args[0])))
            return func(*args, **(kwargs or {}))

    def wrapped(name: str, function: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            tensors = [*args, *kwargs.values()]
            group = next((value for value in tensors if isinstance(value, dist.ProcessGroup)), dist.group.WORLD)
            size = max(_num_bytes(value) for value in tensors if isinstance(value, torch.Tensor))
            if name == "all_to_all_single":
                size = _num_bytes(args[1])
            calls.append(Collective(kinds[name], axes[group.group_name], size))
            return function(*args, **kwargs)

        return run

    originals = {name: getattr(dist, name) for name in kinds}
    for name, function in originals.items():
        setattr(dist, name, wrapped(name, function))
    try:
        with Functional():
            yield calls
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)
