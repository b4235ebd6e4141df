"""The layouts on real GPUs over NCCL, in float32 and bfloat16, ranks without rows too.

Worlds that do not fit are skipped. The cases of one world run in one set of processes, as each process takes seconds to
find its GPU. `pytest -s` shows the errors.
"""

import dataclasses
from typing import Any

import pytest
import torch

from tests.distributed import needs_gpus, run_ranks
from tests.parallelisms.layouts import Layout, Run, train_layouts
from tests.parallelisms.test_layouts import CONFIG, LAYOUTS, NUM_STEPS, ROWS, check

DEVICE = "cuda"
LAYOUTS_OF = {world: [layout for layout in LAYOUTS if layout.world == world] for world in (1, 2, 4)} | {
    8: [
        Layout(world=8),
        Layout(world=8, ep=8, activation_checkpoint="selective"),
        Layout(world=8, ep=8, accumulation=2, activation_checkpoint="full"),
        Layout(world=8, ep=8, activation_checkpoint="selective", compile=True),
        Layout(world=8, ep=4),
        Layout(world=8, replicate=2, ep=2, accumulation=2, activation_checkpoint="selective"),
        Layout(world=8, replicate=2, ep=4, compile=True),
    ]
}
ONE_PROCESS = [Layout(), Layout(adam_eps=1e-8)]

# Rounding to bfloat16 would send tokens near a tie elsewhere in each layout: there the routing is given.
GIVEN = {"experts": (0, 3), "by_token": True}
CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, routing given": GIVEN,
    "bfloat16, routing given": {**GIVEN, "compute_dtype": torch.bfloat16},
    "all to one expert": {"experts": (5,)},
    "ranks without rows": {"experts": (0, 1)},
}
Results = dict[str, dict[Layout, Run]]


def train_cases(layouts_of_cases: dict[str, list[Layout]], device_type: str) -> Results:
    results = {}
    for case, layouts in layouts_of_cases.items():
        top_k = len(CASES[case].get("experts", ())) or CONFIG.num_experts_per_tok
        config = dataclasses.replace(CONFIG, num_experts_per_tok=top_k)
        runs = train_layouts(config, layouts, ROWS, NUM_STEPS, **CASES[case], device_type=device_type)
        results[case] = dict(zip(layouts, runs))
    return results


@pytest.fixture(scope="module")
def one_process() -> Results:
    """One process on the whole batch, in each case."""
    cases = dict.fromkeys(CASES, ONE_PROCESS)
    (results,) = run_ranks(train_cases, 1, cases, DEVICE, seconds=300, device_type=DEVICE)
    assert results["float32"][Layout()].smallest_gap > 2e-6  # see test_layouts.py
    return results


@pytest.fixture(scope="module", params=[pytest.param(world, marks=needs_gpus(world)) for world in LAYOUTS_OF])
def results(request: pytest.FixtureRequest) -> list[Results]:
    """Of each rank of a world, what it did in each case and layout."""
    world, layouts = request.param, LAYOUTS_OF[request.param]
    cases = {"float32": layouts, "bfloat16, routing given": [each for each in layouts if each.adam_eps == 1e-4]}
    if world > 1:  # experts of one rank alone, or of few
        uneven = [
            Layout(world=world, ep=world),
            Layout(world=world, ep=max(world // 2, 2), activation_checkpoint="full"),
        ]
        cases |= {"all to one expert": uneven, "ranks without rows": uneven}
    return run_ranks(train_cases, world, cases, DEVICE, seconds=560, device_type=DEVICE)


@pytest.mark.parametrize("case", ["float32", "all to one expert", "ranks without rows"])
def test_float32_equals_one_process(one_process: Results, results: list[Results], case: str) -> None:
    # Bounds as on CPUs: matrix products are in float32 (PyTorch's default, no TF32), and sums differ in their order.
    if case not in results[0]:
        pytest.skip("one rank has all rows")
    for rank, of_rank in enumerate(results):
        for layout, run in of_rank[case].items():
            expected = one_process[case][Layout(adam_eps=layout.adam_eps)]
            if rank == 0:
                print(f"\n{case}, {layout}:", *(f"{what} {e:.1e}" for what, e in errors(run, expected).items()), end="")
            check(run, expected, layout, f"{case}, {layout}, rank {rank}")


def test_bfloat16_is_as_near_to_float32_as_one_process(one_process: Results, results: list[Results]) -> None:
    # Each layout rounds in its own way, and so does one process: neither is the other's truth, float32 is. From there
    # no layout may be further than twice one process (in practice it is as far).
    case = "bfloat16, routing given"
    exact = one_process["float32, routing given"][Layout()]
    bounds = {what: 2 * error for what, error in errors(one_process[case][Layout()], exact).items()}
    print("\none process:", *(f"{what} {bound / 2:.1e}" for what, bound in bounds.items()), end="")
    assert max(bounds.values()) < 0.3  # what is lost, or twice too large, is an error of 1
    for rank, of_rank in enumerate(results):
        for layout, run in of_rank[case].items():
            found = errors(run, exact)
            if rank == 0:
                print(f"\n{layout}:", *(f"{what} {error:.1e}" for what, error in found.items()), end="")
            assert torch.equal(run.expert_counts, exact.expert_counts), (layout, rank)
            for what, error in found.items():
                assert error <= bounds[what], (what, str(layout), rank)


def errors(run: Run, exact: Run) -> dict[str, float]:
    """How far a run is from `exact`, relative: by norm, the worst tensor's gradient and update; the worst step's loss
    and gradient norm."""

    def worst(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
        sizes = {name: tensor.norm() for name, tensor in expected.items()}
        return max(((actual[n] - expected[n]).norm() / size).item() for n, size in sizes.items() if size > 0)

    def updates(run: Run) -> dict[str, torch.Tensor]:
        return {name: weight - run.initial_weights[name] for name, weight in run.weights.items()}

    def worst_step(actual: list[float], expected: list[float]) -> float:
        return max(abs(a - e) / e for a, e in zip(actual, expected, strict=True))

    return {
        "gradient": worst(run.first_gradients, exact.first_gradients),
        "update": worst(updates(run), updates(exact)),
        "loss": worst_step(run.losses, exact.losses),
        "gradient norm": worst_step(run.grad_norms, exact.grad_norms),
    }
