"""Turns parallel degrees into named device meshes."""

from typing import NamedTuple

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallelisms.degrees import Degrees


class Meshes(NamedTuple):
    """The process groups of a run, all views of one (replicate, efsdp, ep) mesh; ep is innermost (same node).

    `efsdp * ep = fsdp`: dense parameters are sharded over `fsdp`; experts are spread over `ep` and each expert sharded
    over `efsdp`.
    """

    data_parallel: DeviceMesh
    """All ranks as one axis: gradients are summed over them."""
    dense: DeviceMesh
    """Where everything but the experts is sharded: ("fsdp") or ("replicate", "fsdp")."""
    expert: DeviceMesh
    """Where each expert is sharded: ("efsdp") or ("replicate", "efsdp")."""
    expert_parallel: DeviceMesh
    """Where the experts are spread: ("ep")."""
    degrees: Degrees

    @property
    def num_data_ranks(self) -> int:
        """How many ranks read data of their own."""
        return self.degrees.num_data_ranks

    @property
    def data_rank(self) -> int:
        """Which of these this rank is."""
        return self.data_parallel.get_local_rank()

    @property
    def all(self) -> tuple[DeviceMesh, ...]:
        """Every mesh."""
        return self.data_parallel, self.dense, self.expert, self.expert_parallel


def build_meshes(device_type: str, degrees: Degrees) -> Meshes:
    """Builds the meshes over the whole world."""
    sizes = (degrees.replicate, degrees.shard // degrees.expert, degrees.expert)
    mesh = init_device_mesh(device_type, sizes, mesh_dim_names=("replicate", "efsdp", "ep"))
    fsdp = mesh["efsdp", "ep"]._flatten("fsdp")
    if degrees.replicate == 1:
        return Meshes(fsdp, fsdp, mesh["efsdp"], mesh["ep"], degrees)
    dense = DeviceMesh._concatenate([mesh["replicate"], fsdp])
    all_ranks = mesh._flatten("data_parallel")
    return Meshes(all_ranks, dense, mesh["replicate", "efsdp"], mesh["ep"], degrees)
