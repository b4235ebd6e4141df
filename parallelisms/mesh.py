"""Turns parallel degrees into named device meshes."""

from typing import NamedTuple

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


class Meshes(NamedTuple):
    """The process groups of a run, all views of one (replicate, efsdp, ep) mesh; ep is innermost (same node).

    Every rank reads its own data, so all of them together are the data-parallel ranks. `efsdp * ep = fsdp`: dense
    parameters are sharded over `fsdp`; experts are spread over `ep` and each expert sharded over `efsdp`.
    """

    data_parallel: DeviceMesh
    """All ranks as one axis."""
    dense: DeviceMesh
    """Where everything but the experts is sharded: ("fsdp") or ("replicate", "fsdp")."""
    expert: DeviceMesh
    """Where each expert is sharded: ("efsdp") or ("replicate", "efsdp")."""
    expert_parallel: DeviceMesh
    """Where the experts are spread: ("ep")."""


def build_meshes(device_type: str, replicate_degree: int, shard_degree: int, expert_degree: int) -> Meshes:
    """Builds the meshes over the whole world: `replicate_degree * shard_degree` ranks, `shard_degree` a multiple of
    `expert_degree`."""
    sizes = (replicate_degree, shard_degree // expert_degree, expert_degree)
    mesh = init_device_mesh(device_type, sizes, mesh_dim_names=("replicate", "efsdp", "ep"))
    fsdp = mesh["efsdp", "ep"]._flatten("fsdp")
    if replicate_degree == 1:
        return Meshes(fsdp, fsdp, mesh["efsdp"], mesh["ep"])
    dense = DeviceMesh._concatenate([mesh["replicate"], fsdp])
    return Meshes(mesh._flatten("data_parallel"), dense, mesh["replicate", "efsdp"], mesh["ep"])
