"""Turns parallel degrees into named device meshes."""

import os
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallelisms.degrees import Degrees
from parallelisms.room import Room


class Meshes(NamedTuple):
    """The process groups of a run, all views of one (replicate, efsdp, ep) mesh; ep is innermost (same node).

    `efsdp * ep = fsdp`: dense parameters are sharded over `fsdp`; experts are spread over `ep` and each expert sharded
    over `efsdp`.

    Beside it stands a second view of the same ranks, (data, cp), cp innermost: the ranks of `cp` read the same rows and
    share their tokens. Parameters know nothing of it, so it meets the other axes in any way.
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
    room: Room
    """In the buffers of tokens that travel over `ep`."""
    context_parallel: DeviceMesh | None = None
    """Which ranks share a micro-batch's tokens: ("cp"), or the name of an axis that has the same ranks; None: none."""

    hosts: tuple[int, ...] = ()
    """Of each rank the first one on its host."""

    def shards_within_host(self, mesh: DeviceMesh) -> bool:
        """Whether several ranks shard over one of these meshes, its last axis, all of them on one host. The ranks of a
        group say the same."""
        ranks = dist.get_process_group_ranks(mesh.get_group(mesh.ndim - 1))
        return len(ranks) > 1 and len({self.hosts[rank] for rank in ranks}) == 1

    @property
    def num_data_ranks(self) -> int:
        """How many read data of their own: ranks, or groups of ranks that share it."""
        return self.degrees.num_data_ranks

    @property
    def data_rank(self) -> int:
        """Which of these this rank is, or belongs to."""
        return self.data_parallel.get_local_rank() // self.degrees.context

    @property
    def is_first_reader(self) -> bool:
        """Whether this rank is the first of those that read its rows, so that it speaks for all of them."""
        return self.data_parallel.get_local_rank() % self.degrees.context == 0

    @property
    def all(self) -> tuple[DeviceMesh, ...]:
        """Every mesh."""
        context = () if self.context_parallel is None else (self.context_parallel,)
        return self.data_parallel, self.dense, self.expert, self.expert_parallel, *context

    def sum_over_context(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of the `values`, which may be overwritten, of all ranks that read the same rows."""
        if self.context_parallel is not None:
            dist.all_reduce(values, group=self.context_parallel.get_group())
        return values


def build_meshes(device_type: str, degrees: Degrees, room: float = 0.0) -> Meshes:
    """Builds the meshes over the whole world; `room`: see Room."""
    sizes = (degrees.replicate, degrees.shard // degrees.expert, degrees.expert)
    mesh = init_device_mesh(device_type, sizes, mesh_dim_names=("replicate", "efsdp", "ep"))
    fsdp = mesh["efsdp", "ep"]._flatten("fsdp")
    own_room = Room(room if degrees.expert > 1 else 0.0)
    hosts = [0] * dist.get_world_size()
    # torchrun counts a host's ranks from 0; without it each rank is taken for a host, so that nothing is assumed.
    dist.all_gather_object(hosts, dist.get_rank() - int(os.environ.get("LOCAL_RANK", "0")))
    if degrees.replicate == 1:
        context = _context(degrees.context, mesh["ep"], fsdp)
        return Meshes(fsdp, fsdp, mesh["efsdp"], mesh["ep"], degrees, own_room, context, tuple(hosts))
    dense = DeviceMesh._concatenate([mesh["replicate"], fsdp])
    all_ranks = mesh._flatten("data_parallel")
    context = _context(degrees.context, mesh["ep"], fsdp, all_ranks)
    return Meshes(
        all_ranks,
        dense,
        mesh["replicate", "efsdp"],
        mesh["ep"],
        degrees,
        own_room,
        context,
        tuple(hosts),
    )


def _context(degree: int, *innermost: DeviceMesh) -> DeviceMesh | None:
    """The cp axis: consecutive ranks, as those of the axes `innermost`; of one that has the same it is the group."""
    if degree == 1:
        return None
    same = next((mesh for mesh in innermost if mesh.size() == degree), None)
    if same is not None:
        return same
    group, _ = dist.new_subgroups(degree)
    return DeviceMesh.from_group(group, innermost[0].device_type, mesh_dim_names=("cp",))
