"""Gradients that travel in bfloat16 within a host have the sums of those that are reduced in float32; and what of those
that nothing reduces is kept as it is."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from config.options import Lora
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.parts import PARTS
from parallelisms.reduction import ExchangeAndAddUp, NothingToReduce
from tests.distributed import needs_gpus, run_ranks
from tests.models.qwen35_moe.shapes import tiny_config
from tests.parallelisms.layouts import NO_LORA, Layout, Run, train_layouts

NUMBERS = (1, 7, 4096)  # of a rank's part
ROWS = [[40, 24], [10, 54], [64], [1, 63]] * 2


def test_what_becomes_a_gradient_as_it_is() -> None:
    """Only that may be given out again without FSDP's stream: the others go while it still reads them."""
    reduce = NothingToReduce({torch.float32})
    assert not reduce.is_kept(torch.float32)  # unless it is said that no gradients are there
    reduce.adds_up = False
    assert reduce.is_kept(torch.float32)
    assert not NothingToReduce({torch.bfloat16}).is_kept(torch.float32)
    mixed = NothingToReduce({torch.bfloat16, torch.float32})
    mixed.adds_up = False
    assert not mixed.is_kept(torch.float32)


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


SHAPE = tiny_config(layer_types=("linear_attention", "full_attention"), num_hidden_layers=2)
WITH_MTP = replace(SHAPE, mtp_num_hidden_layers=1)


def both(
    layout: Layout,
    shape: ModelConfig = SHAPE,
    frozen: tuple[str, ...] = (),
    lora: Lora = NO_LORA,
    device_type: str = "cpu",
) -> tuple[Run, Run]:
    """A run under bfloat16 in this layout, and the same with FSDP's own reduction."""
    layouts = [layout, replace(layout, hosts=layout.world)]
    options = (), False, torch.bfloat16, device_type, (), frozen, lora
    exchanged, reduced = run_ranks(
        train_layouts, layout.world, shape, layouts, ROWS, 2, *options, device_type=device_type
    )[0]
    return exchanged, reduced


def check_bit_for_bit(exchanged: Run, reduced: Run) -> None:
    assert exchanged.losses == reduced.losses
    for name, expected in reduced.first_gradients.items():
        assert torch.equal(exchanged.first_gradients[name], expected), name
    assert all(torch.equal(exchanged.weights[name], expected) for name, expected in reduced.weights.items())


@pytest.mark.parametrize(
    "layout",
    [
        Layout(world=2),
        Layout(world=2, accumulation=2, masters=torch.bfloat16),
        Layout(world=2, ep=2, masters=torch.bfloat16),
        Layout(world=4, replicate=2, accumulation=2),
        Layout(world=4, replicate=2, masters=torch.bfloat16),
    ],
    ids=str,
)
def test_a_run_is_that_of_fsdps_own_reduction(layout: Layout) -> None:
    """Over two ranks, to which replicas add one sum, there is one addition, whose order does not matter."""
    check_bit_for_bit(*both(layout))


@pytest.mark.parametrize(
    ("shape", "frozen", "lora"),
    [
        (replace(SHAPE, vocab_size=47), (), NO_LORA),  # rows that do not divide
        (replace(SHAPE, tie_word_embeddings=True), (), NO_LORA),
        (WITH_MTP, (), NO_LORA),
        (SHAPE, ("head",), NO_LORA),
        (SHAPE, ("embeddings",), NO_LORA),
        (SHAPE, tuple(set(PARTS) - {"head"}), NO_LORA),
        (SHAPE, (), Lora(rank=4, targets=("attention", "experts", "shared_expert", "head"))),
    ],
    ids=["uneven", "tied", "mtp", "head frozen", "embedding frozen", "head alone", "adapters"],
)
def test_whatever_trains_is_reduced_alike(shape: ModelConfig, frozen: tuple[str, ...], lora: Lora) -> None:
    check_bit_for_bit(*both(Layout(world=2, ep=2, masters=torch.bfloat16), shape, frozen, lora))


def test_sums_of_four_differ_by_their_order() -> None:
    exchanged, reduced = both(Layout(world=4, ep=2))  # experts of four ranks at ep 2 are over two, all else is not
    for name, expected in reduced.first_gradients.items():
        found = exchanged.first_gradients[name]
        if ".experts." in name:
            assert torch.equal(found, expected), name
        else:
            assert (found - expected).norm() <= 1e-6 * expected.norm(), name  # float32's rounding


@pytest.mark.parametrize("world", [pytest.param(2, marks=needs_gpus(2))])
def test_a_run_on_gpus(world: int) -> None:
    # Kernels that add up in any order make a thousandth; what is read before or after its time has nothing in common.
    exchanged, reduced = both(Layout(world=world, ep=2, accumulation=2), device_type="cuda")
    for name, expected in reduced.first_gradients.items():
        assert (exchanged.first_gradients[name] - expected).norm() <= 0.02 * expected.norm(), name
