"""Router losses in every layout: values, gradients and weights of one process with the same micro-steps."""

import functools

import pytest
import torch
import torch.distributed as dist

from config.options import MoE
from tests.distributed import run_ranks
from tests.models.qwen35_moe.shapes import tiny_config
from tests.parallelisms.layouts import OFF, Layout, Run, train
from tests.parallelisms.test_layouts import relative_error

CONFIG = tiny_config(initializer_range=0.05, linear_num_key_heads=4)
# Ranks differ in what they train, not in their number of tokens: rows are full.
ROWS = [[40, 24], [1, 1, 1, 61], [2, 2, 2, 2] + [1] * 56, [1] * 64]
NUM_STEPS = 2

# Coefficients far above a real run's, so that the gradients of these losses are not lost beside the cross-entropy's.
GLOBAL = MoE(aux_loss_coef=0.3, z_loss_coef=0.1)
HF = MoE(aux_loss_coef=0.3, aux_loss_scope="hf")

# What one process computes, and the layouts that must compute the same.
ONE_PROCESS = [
    (GLOBAL, Layout()),
    (GLOBAL, Layout(accumulation=2)),
    (HF, Layout(accumulation=2)),
    (HF, Layout(accumulation=4)),
    (OFF, Layout()),
]
SAME = {
    1: [
        (GLOBAL, Layout(), Layout(activation_checkpoint="full")),
        (GLOBAL, Layout(), Layout(activation_checkpoint="selective", compile="aot_eager")),
    ],
    2: [
        (GLOBAL, Layout(), Layout(world=2, compile="aot_eager")),
        (GLOBAL, Layout(), Layout(world=2, ep=2, activation_checkpoint="selective")),
        (GLOBAL, Layout(accumulation=2), Layout(world=2, ep=2, accumulation=2, activation_checkpoint="full")),
        (GLOBAL, Layout(), Layout(world=2, replicate=2)),
        # Each process by itself is as each micro-step by itself.
        (HF, Layout(accumulation=2), Layout(world=2, ep=2)),
        # A micro-batch that is shared is one.
        (HF, Layout(accumulation=2), Layout(world=2, cp=2, accumulation=2, activation_checkpoint="full")),
        (GLOBAL, Layout(accumulation=2), Layout(world=2, cp=2, accumulation=2)),
        (OFF, Layout(), Layout(world=2)),
    ],
    4: [
        (GLOBAL, Layout(), Layout(world=4, activation_checkpoint="selective")),
        (GLOBAL, Layout(), Layout(world=4, ep=2, replicate=2)),
        (GLOBAL, Layout(), Layout(world=4, ep=4, activation_checkpoint="full")),
        (GLOBAL, Layout(), Layout(world=4, ep=2)),
        (HF, Layout(accumulation=4), Layout(world=4, ep=4)),
        (HF, Layout(accumulation=2), Layout(world=4, cp=2, ep=4)),
        (HF, Layout(accumulation=4), Layout(world=4, cp=4, replicate=2, accumulation=4)),
        (GLOBAL, Layout(), Layout(world=4, cp=4, activation_checkpoint="selective")),
        (GLOBAL, Layout(accumulation=2), Layout(world=4, cp=2, ep=2, accumulation=2)),
    ],
}


def train_cases(cases: list[tuple[MoE, Layout]]) -> list[tuple[Run, int]]:
    """On each rank: the runs, and how many all-reduces of expert counts alone each of them made."""
    runs = []
    all_reduce = dist.all_reduce
    for moe, layout in cases:
        num_reductions = 0

        @functools.wraps(all_reduce)
        def counted(tensor: torch.Tensor, *args, **kwargs):
            nonlocal num_reductions
            num_reductions += tensor.shape == (CONFIG.num_hidden_layers, CONFIG.num_experts)
            return all_reduce(tensor, *args, **kwargs)

        dist.all_reduce = counted
        try:
            runs.append((train(CONFIG, layout, ROWS, NUM_STEPS, moe), num_reductions))
        finally:
            dist.all_reduce = all_reduce
    return runs


@pytest.fixture(scope="module")
def one_process() -> dict[tuple[MoE, Layout], Run]:
    (runs,) = run_ranks(train_cases, 1, ONE_PROCESS)
    expected = {case: run for case, (run, _) in zip(ONE_PROCESS, runs)}
    # No token so near a tie that rounding could send it elsewhere (see test_layouts.py).
    assert min(run.smallest_gap for run in expected.values()) > 2e-6
    return expected


def test_losses_are_in_the_gradient_and_not_in_the_loss(one_process: dict[tuple[MoE, Layout], Run]) -> None:
    off, on = one_process[OFF, Layout()], one_process[GLOBAL, Layout()]
    assert on.losses[0] == off.losses[0]
    assert (off.aux_losses, off.z_losses) == ([0, 0], [0, 0])
    assert on.aux_losses[0] > CONFIG.num_experts_per_tok
    assert on.z_losses[0] > 1
    for name, gradient in off.first_gradients.items():
        if "mlp.gate" in name:
            assert relative_error(on.first_gradients[name], gradient) > 0.1, name
    # With other micro-steps or another scope it is another loss.
    auxiliary = {case: run.aux_losses[0] for case, run in one_process.items()}
    assert len(set(auxiliary.values())) == len(auxiliary)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_equals_one_process(one_process: dict[tuple[MoE, Layout], Run], world: int) -> None:
    results = run_ranks(train_cases, world, [(moe, layout) for moe, _, layout in SAME[world]])
    for rank in range(world):
        for (moe, expected_layout, layout), (run, num_reductions) in zip(SAME[world], results[rank]):
            where = f"{moe}, {layout}, rank {rank}"
            check(run, one_process[moe, expected_layout], where)
            reduces = world > 1 and (moe == GLOBAL or (moe == HF and layout.cp > 1))
            assert num_reductions == (NUM_STEPS * layout.accumulation if reduces else 0), where


def check(run: Run, expected: Run, where: str) -> None:
    # As in test_layouts.py: sums in another order.
    assert run.losses == pytest.approx(expected.losses, rel=1e-6), where
    assert run.aux_losses == pytest.approx(expected.aux_losses, rel=1e-6), where
    assert run.z_losses == pytest.approx(expected.z_losses, rel=1e-6), where
    assert run.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5), where
    assert torch.equal(run.expert_counts, expected.expert_counts), where
    for name, gradient in expected.first_gradients.items():
        assert relative_error(run.first_gradients[name], gradient) < 1e-5, (where, name)
