"""What the tower had to do, as the metrics tell it."""

import dataclasses

import pytest
import torch

from data.batch import Frame
from models.ops.kernels import Kernels
from models.qwen35_moe.model import Qwen35Moe
from models.qwen35_moe.parts import freeze
from parallelisms.degrees import Degrees
from parallelisms.mesh import Meshes
from parallelisms.room import Room
from tests.models.qwen35_moe.shapes import tiny_config
from tests.models.qwen35_moe.vision_shapes import tiny_vision
from tests.parallelisms.layouts import rows_as_micro_batch
from training.flops import vision_flops
from training.vision_work import VisionWork

CONFIG = tiny_config(vision=tiny_vision())
ROWS = [[64]]


class OfRank:
    """In the place of a mesh, without process groups."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.get_local_rank, self.size = lambda: rank, lambda: num_ranks


def work_of(rank: int, num_ranks: int, frozen: tuple[str, ...] = (), vision: bool = True) -> VisionWork:
    with torch.device("meta"):
        model = Qwen35Moe(CONFIG if vision else dataclasses.replace(CONFIG, vision=None), Kernels())
    freeze(model, frozen)
    return VisionWork(model, Meshes(OfRank(rank, num_ranks), None, None, None, Degrees(1, num_ranks, 1), Room()))


@pytest.mark.parametrize("frozen", [(), ("vision",), ("vision", "merger")])
def test_tokens_flops_and_unevenness_of_two_ranks_and_steps(frozen: tuple[str, ...]) -> None:
    works = [work_of(rank, 2, frozen) for rank in range(2)]
    first = [[Frame(0, 4, 4), Frame(9, 2, 6)], [Frame(3, 8, 8)]]  # of the first rank's two micro-batches
    steps = [
        [[rows_as_micro_batch(CONFIG, ROWS, 0, [frames]) for frames in shown] for shown in (first, [[], []])],
        [[rows_as_micro_batch(CONFIG, ROWS, 0, [frames])] for frames in ([], [Frame(1, 2, 2)])],
    ]
    for of_ranks in steps:
        sums = torch.stack([torch.tensor(work.of(batches)) for work, batches in zip(works, of_ranks)]).sum(dim=0)
        for work in works:
            work.add(sums.tolist())
    trains = ("vision" not in frozen, "merger" not in frozen)
    flops = vision_flops(CONFIG.vision, [16, 12, 64, 4], *trains)
    for work in works:
        metrics, mean_flops = work.read()
        assert metrics["vision_tokens"] == (4 + 3 + 16 + 1) / 2
        # The first rank 92 patches and the second two grey frames; then one each.
        assert metrics["patches_max_over_mean"] == pytest.approx((92 / 50 + 1) / 2)
        assert mean_flops == pytest.approx(flops / 2, abs=2000)
        assert mean_flops > 1e6
        work.add(sums.tolist())
        assert work.read()[0]["vision_tokens"] == 1  # since the last time alone


def test_a_text_model_has_none() -> None:
    work = work_of(0, 1, vision=False)
    assert work.of([rows_as_micro_batch(dataclasses.replace(CONFIG, vision=None), ROWS, 0)]) == []
    work.add([])
    assert work.read() == ({}, 0.0)
