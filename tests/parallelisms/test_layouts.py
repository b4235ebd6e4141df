"""Every layout trains the same model: initial weights, losses, gradient norms, gradients and weights of one process."""

import pytest
import torch

from tests.distributed import run_ranks
from tests.models.qwen35_moe.shapes import tiny_config
from tests.parallelisms.layouts import Layout, Run, train_layouts

# 47 and 5 divide nothing: dense parameters are sharded unevenly. The expert shapes must divide (FSDP's dim 1).
CONFIG = tiny_config(vocab_size=47, linear_num_key_heads=1, linear_num_value_heads=5, initializer_range=0.05)
# Unequal work: documents of one token (nothing to train on), a row with 4 trained tokens, a row with none.
ROWS = [[40, 24], [1, 1, 1, 61], [2, 2, 2, 2] + [1] * 56, [1] * 64]
NUM_STEPS = 5

LAYOUTS = [
    Layout(accumulation=2),
    Layout(accumulation=4, activation_checkpoint="full"),
    Layout(compile=True, activation_checkpoint="selective"),
    Layout(world=2),
    Layout(world=2, ep=2, accumulation=2),
    Layout(world=2, replicate=2, activation_checkpoint="selective"),
    Layout(world=4),
    Layout(world=4, ep=2, activation_checkpoint="selective"),
    Layout(world=4, ep=4, activation_checkpoint="full"),
    Layout(world=4, replicate=2, ep=1, compile=True),
    Layout(world=4, replicate=2, ep=2),
]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def one_process() -> Run:
    return run_ranks(train_layouts, 1, CONFIG, [Layout()], ROWS, NUM_STEPS)[0][0]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_equals_one_process(one_process: Run, world: int) -> None:
    layouts = [layout for layout in LAYOUTS if layout.world == world]
    results = run_ranks(train_layouts, world, CONFIG, layouts, ROWS, NUM_STEPS, seconds=240)
    for index, layout in enumerate(layouts):
        for rank in range(world):
            check(results[rank][index], one_process, f"{layout}, rank {rank}")


def check(run: Run, expected: Run, where: str) -> None:
    # Sums in another order: losses and norms agree to 1.1e-7 as measured on one process with accumulation; gradients
    # to 3e-7. Weights are compared with Adam's eps at 1e-4, else Adam divides noise by noise.
    for name, weight in expected.initial_weights.items():
        assert torch.equal(run.initial_weights[name], weight), (where, name)
    assert run.losses == pytest.approx(expected.losses, rel=1e-6), where
    assert run.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5), where
    assert torch.equal(run.expert_counts, expected.expert_counts), where
    for name, gradient in expected.first_gradients.items():
        assert gradient.abs().max() > 0, name
        assert relative_error(run.first_gradients[name], gradient) < 1e-5, (where, name)
    for name, weight in expected.weights.items():
        # A zero-centred norm multiplies by 1 + weight: its scale is 1, not the few updates that it holds so far.
        offset = 1.0 if name.endswith("norm.weight") and "linear_attn" not in name else 0.0
        assert relative_error(run.weights[name] + offset, weight + offset) < 1e-5, (where, name)
