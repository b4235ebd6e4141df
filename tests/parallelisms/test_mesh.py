"""The meshes of 1, 2 and 4 processes: their sizes, and each rank's number."""

import pytest

from parallelisms.degrees import Degrees
from parallelisms.mesh import build_meshes
from tests.distributed import run_ranks


def numbers(degrees: Degrees) -> tuple:
    meshes = build_meshes("cpu", degrees)
    return meshes.data_rank, meshes.num_data_ranks, [tuple(mesh.shape) for mesh in meshes.all]


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
