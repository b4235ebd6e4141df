"""The meshes of 1, 2 and 4 processes: their sizes, and each rank's number."""

import pytest
import torch

from parallelisms.degrees import Degrees
from parallelisms.mesh import build_meshes
from tests.distributed import run_ranks


def numbers(degrees: Degrees) -> tuple:
    meshes = build_meshes("cpu", degrees)
    return meshes.data_rank, meshes.num_data_ranks, [tuple(mesh.shape) for mesh in meshes.all]


def of_context(layouts: list[Degrees]) -> list[tuple]:
    found = []
    for degrees in layouts:
        meshes = build_meshes("cpu", degrees)
        assert meshes.context_parallel is not None
        assert meshes.all[-1] is meshes.context_parallel
        group = meshes.context_parallel.get_group()
        same = [mesh.mesh_dim_names for mesh in meshes.all[:-1] if mesh.ndim == 1 and mesh.get_group() is group]
        ranks = torch.distributed.get_process_group_ranks(group)
        total = meshes.sum_over_context(torch.tensor(1 + torch.distributed.get_rank()))
        reader = (meshes.data_rank, meshes.num_data_ranks, meshes.is_first_reader)
        found.append((ranks, same[0] if same else None, reader, int(total)))
    return found


def within_host(local_ranks: list[str], layouts: list[Degrees]) -> list[tuple[bool, bool]]:
    """Of each layout, whether dense weights, and experts, are sharded within this rank's host."""
    found = []
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("LOCAL_RANK")
        if local_ranks:
            environment.setenv("LOCAL_RANK", local_ranks[torch.distributed.get_rank()])
        for degrees in layouts:
            meshes = build_meshes("cpu", degrees)
            found.append((meshes.shards_within_host(meshes.dense), meshes.shards_within_host(meshes.expert)))
    return found


def test_all_ranks_of_a_group_know_whether_they_share_a_host() -> None:
    layouts = [Degrees(1, 4, 1), Degrees(1, 4, 2), Degrees(2, 2, 1), Degrees(2, 2, 2)]
    one, two = (True, True), (False, False)
    # With ep = fsdp an expert is on one rank, and nothing of it is sharded.
    assert run_ranks(within_host, 4, list("0123"), layouts) == [[one, one, one, (True, False)]] * 4
    assert run_ranks(within_host, 4, list("0101"), layouts) == [[two, two, one, (True, False)]] * 4
    assert run_ranks(within_host, 4, [], layouts) == [[two] * 4] * 4  # not told
    # Hosts of 1, 2 and 1 ranks: no pair shares one. Of 2, 1 and 1: the first does.
    assert run_ranks(within_host, 4, list("0010"), layouts) == [[two] * 4] * 4
    first, second = [two, two, one, (True, False)], [two] * 4
    assert run_ranks(within_host, 4, list("0100"), layouts) == [first, first, second, second]


@pytest.mark.parametrize(
    ("degrees", "shapes"),
    [
        (Degrees(1, 1, 1), [(1,), (1,), (1,), (1,)]),
        (Degrees(1, 2, 2), [(2,), (2,), (1,), (2,)]),
        (Degrees(1, 4, 2), [(4,), (4,), (2,), (2,)]),
        (Degrees(2, 2, 2), [(4,), (2, 2), (2, 1), (2,)]),
    ],
)
def test_every_rank_reads_data_of_its_own(degrees: Degrees, shapes: list):
    world_size = degrees.replicate * degrees.shard
    assert run_ranks(numbers, world_size, degrees) == [(rank, world_size, shapes) for rank in range(world_size)]


def test_ranks_of_a_context_read_the_same_rows_and_share_communicators() -> None:
    layouts = {
        Degrees(1, 4, 1, 2): None,
        Degrees(1, 4, 4, 2): None,
        Degrees(1, 4, 2, 2): ("ep",),
        Degrees(1, 4, 2, 4): ("fsdp",),
        Degrees(2, 2, 1, 2): None,  # but the second dimension of the mesh (replicate, fsdp)
        Degrees(2, 2, 2, 4): ("data_parallel",),
    }
    for rank, found in enumerate(run_ranks(of_context, 4, list(layouts))):
        for (degrees, shared), of_rank in zip(layouts.items(), found):
            first = rank // degrees.context * degrees.context
            ranks = list(range(first, first + degrees.context))
            reader = (rank // degrees.context, 4 // degrees.context, rank == first)
            assert of_rank == (ranks, shared, reader, sum(ranks) + degrees.context), degrees
