"""Gradients that travel in bfloat16 within a host have the sums of those that are reduced in float32."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from parallelisms.reduction import ExchangeAndAddUp
from tests.distributed import needs_gpus, run_ranks
from tests.models.qwen35_moe.shapes import tiny_config
from tests.parallelisms.layouts import Layout, Run, train_layouts

NUMBERS = (1, 7, 4096)  # of a rank's part
ROWS = [[40, 24], [10, 54], [64], [1, 63]] * 2


def gradients_of(rank: int, number: int, world: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * number + rank)
    return torch.randn(world * number, generator=generator).mul(10.0 ** (rank % 3)).bfloat16()


def reduced(device_type: str) -> list[list[torch.Tensor]]:
    """Of each number of gradients this rank's part, in float32 and in bfloat16."""
    world, rank, found = dist.get_world_size(), dist.get_rank(), []
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    for number in NUMBERS:
        of_both = []
        for dtype in (torch.float32, torch.bfloat16):
            reduce = ExchangeAndAddUp(torch.bfloat16)
            for _ in range(2):  # FSDP has one for all its steps
                given = reduce.allocate((world * number,), dtype=dtype, device=device)
                result = reduce.allocate((number,), dtype=dtype, device=device)
                assert (given.dtype, result.dtype) == (torch.bfloat16, dtype)
                given.copy_(gradients_of(rank, number, world))
                assert dist.group.WORLD is not None
                reduce(output_tensor=result, input_tensor=given, group=dist.group.WORLD, op=dist.ReduceOp.SUM)
            of_both.append(result.cpu())
        found.append(of_both)
    return found


def check_sums(world: int, device_type: str) -> None:
    for rank, of_numbers in enumerate(run_ranks(reduced, world, device_type, device_type=device_type)):
        for number, (wide, rounded) in zip(NUMBERS, of_numbers):
            parts = [gradients_of(each, number, world).view(world, number)[rank].double() for each in range(world)]
            exact = torch.stack(parts).sum(dim=0)
            # Each of world - 1 additions may be off by half a unit in the last of float32's 24 bits, of what is added.
            bound = (world - 1) * 2**-24 * torch.stack(parts).abs().sum(dim=0)
            assert ((wide.double() - exact).abs() <= bound).all()
            assert torch.equal(rounded, wide.bfloat16())


@pytest.mark.parametrize("world", [2, 4])
def test_sums_are_float32s_and_rounded_once(world: int) -> None:
    check_sums(world, "cpu")


@pytest.mark.parametrize("world", [pytest.param(2, marks=needs_gpus(2))])
def test_sums_on_gpus(world: int) -> None:
    check_sums(world, "cuda")


def runs(layouts: list[Layout]) -> list[Run]:
    config = tiny_config(layer_types=("linear_attention", "full_attention"), num_hidden_layers=2)
    return run_ranks(train_layouts, layouts[0].world, config, layouts, ROWS, 2, (), False, torch.bfloat16)[0]


@pytest.mark.parametrize(
    "layout",
    [
        Layout(world=2),
        Layout(world=2, accumulation=2, masters=torch.bfloat16),
        Layout(world=2, ep=2, masters=torch.bfloat16),
        Layout(world=4, replicate=2, accumulation=2),
        Layout(world=4, replicate=2, masters=torch.bfloat16),
        Layout(world=4, ep=2),
    ],
    ids=str,
)
def test_a_run_is_that_of_fsdps_own_reduction(layout: Layout) -> None:
    """Over two ranks, to which replicas add one sum, there is one addition, whose order does not matter: bit for bit.
    Experts of four ranks at ep 2 are over two, all else is not."""
    exchanged, reduced = runs([layout, replace(layout, hosts=layout.world)])
    is_exact = layout.world // layout.replicate == 2
    for name, expected in reduced.first_gradients.items():
        found = exchanged.first_gradients[name]
        if is_exact or ".experts." in name:
            assert torch.equal(found, expected), name
        else:  # sums of four in another order: float32's rounding
            assert (found - expected).norm() <= 1e-6 * expected.norm(), name
    if is_exact:
        assert exchanged.losses == reduced.losses
        assert all(torch.equal(exchanged.weights[name], expected) for name, expected in reduced.weights.items())
