"""Every layout trains the same model: initial weights, losses, gradient norms, gradients and weights of one process."""

import itertools
from dataclasses import replace

import pytest
import torch

from models.qwen35_moe.config import ModelConfig
from parallelisms.units import dense_units
from tests.distributed import run_ranks
from tests.models.qwen35_moe.shapes import tiny_config
from tests.parallelisms.layouts import Layout, Run, train_layouts

# 47 and 5 divide nothing: dense parameters are sharded unevenly. The expert shapes must divide (FSDP's dim 1).
CONFIG = tiny_config(vocab_size=47, linear_num_key_heads=1, linear_num_value_heads=5, initializer_range=0.05)
# Unequal work: documents of one token (nothing to train on), rows with 1 to 14 trained tokens, rows with none. The last
# of 4 ranks has none at all, and so has the last of 4 micro-batches.
ROWS = [[10, 6], [1, 1, 14], [2, 2, 2, 2] + [1] * 8, [16]]
ROWS += [[3, 13], [1] * 14 + [2], [16], [5, 11]] * 2 + [[1] * 16] * 4
NUM_STEPS = 3  # from the first weights, from moved ones, and with moments of both

# Other tables have it too, and find the same kernels.
COMPILED = Layout(world=2, ep=2, accumulation=4, activation_checkpoint="full", compile=True)
# Pairwise: each value of each axis meets each value of the others that it can meet somewhere, here or in
# test_context_parallel.py (a test counts).
LAYOUTS = [
    Layout(accumulation=2),
    Layout(accumulation=4, activation_checkpoint="full"),
    Layout(compile=True, activation_checkpoint="selective"),
    Layout(world=2),
    Layout(world=2, ep=2, accumulation=2, activation_checkpoint="selective"),
    Layout(world=2, replicate=2, accumulation=4, activation_checkpoint="selective"),
    Layout(world=2, accumulation=2, reshard="never"),
    Layout(world=2, ep=2, activation_checkpoint="full", adam_eps=1e-8),
    COMPILED,
    Layout(world=4),
    Layout(world=4, ep=2, activation_checkpoint="selective"),
    Layout(world=4, ep=2, accumulation=2, reshard="never"),
    Layout(world=4, ep=2, reshard="always"),
    Layout(world=4, ep=4, accumulation=2, activation_checkpoint="full"),
    Layout(world=4, ep=4, accumulation=4, activation_checkpoint="selective"),
    Layout(world=4, ep=4),
    Layout(world=4, replicate=2, accumulation=2, activation_checkpoint="full", compile="aot_eager"),
    Layout(world=4, replicate=2, ep=2),
]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest expected value; where that is 0, all must be."""
    largest = expected.abs().max()
    return ((actual - expected).abs().max() / largest).item() if largest else actual.abs().max().item()


def one_process(config: ModelConfig, rows: list[list[int]], experts: tuple[int, ...] = ()) -> dict[float, Run]:
    """One process on the whole batch, for each eps of Adam."""
    layouts = [Layout(), Layout(adam_eps=1e-8)]
    (runs,) = run_ranks(train_layouts, 1, config, layouts, rows, NUM_STEPS, experts)
    return {layout.adam_eps: run for layout, run in zip(layouts, runs)}


@pytest.fixture(scope="module")
def expected() -> dict[float, Run]:
    runs = one_process(CONFIG, ROWS)
    # No token of this data stands so near a tie that rounding could send it elsewhere: in float32 the router's logits,
    # at most about 1 here, differ between layouts by a few 1e-7.
    assert runs[1e-4].smallest_gap > 2e-6
    return runs


def test_each_value_meets_each_other() -> None:
    axes = {
        "world": (1, 2, 4),
        "ep": (1, 2, 4),
        "cp": (1, 2, 4),
        "replicate": (1, 2),
        "accumulation": (1, 2, 4),
        "activation_checkpoint": ("none", "selective", "full"),
        "compile": (False, True),
    }

    def pairs(layout: Layout) -> set[frozenset]:
        values = [(axis, getattr(layout, axis)) for axis in axes if axis != "compile"]
        values.append(("compile", bool(layout.compile)))  # by whatever backend
        return {frozenset(pair) for pair in itertools.combinations(values, 2)}

    possible = [Layout(**dict(zip(axes, values))) for values in itertools.product(*axes.values())]
    possible = [each for each in possible if each.world % (each.replicate * each.ep) == each.world % each.cp == 0]
    from tests.parallelisms import test_context_parallel  # which imports this file

    tested = [*LAYOUTS, *test_context_parallel.LAYOUTS]
    missing = set().union(*map(pairs, possible)) - set().union(*map(pairs, tested))
    assert not missing, missing


@pytest.mark.parametrize("world", [1, 2, 4])
def test_equals_one_process(expected: dict[float, Run], world: int) -> None:
    check_layouts(expected, CONFIG, ROWS, [layout for layout in LAYOUTS if layout.world == world])


def test_several_units_of_several_blocks_equal_one_process() -> None:
    # Of dense weights, four blocks each where they are kept, two where they are freed: with 4 layers there is one.
    config = replace(CONFIG, num_hidden_layers=6, layer_types=CONFIG.layer_types + CONFIG.layer_types[-2:])
    assert [len(dense_units(config, 2, is_kept)) for is_kept in (True, False)] == [2, 3]
    layouts = [Layout(world=4, ep=2, accumulation=2), Layout(world=4, ep=2, reshard="always")]
    check_layouts(one_process(config, ROWS, ()), config, ROWS, layouts)


@pytest.mark.parametrize("experts", [(5,), (0, 1)], ids=["all to one expert", "ranks without rows"])
def test_unequal_routing_equals_one_process(experts: tuple[int, ...]) -> None:
    # Of 4 ranks with two experts each, three receive no row; of 2 one.
    config = replace(CONFIG, num_experts_per_tok=len(experts))
    layouts = [Layout(world=4, ep=4), Layout(world=4, ep=2, activation_checkpoint="full")]
    runs = one_process(config, ROWS, experts)
    assert (runs[1e-4].expert_counts > 0).sum(dim=1).tolist() == [len(experts)] * config.num_hidden_layers
    check_layouts(runs, config, ROWS, layouts, experts)
    check_layouts(runs, config, ROWS, [replace(COMPILED, compile="aot_eager")], experts)


def check_layouts(
    expected: dict[float, Run],
    config: ModelConfig,
    rows: list[list[int]],
    layouts: list[Layout],
    experts: tuple[int, ...] = (),
) -> None:
    """Runs layouts of one world size in one spawn (which fails when it hangs) and compares every rank of each."""
    world = layouts[0].world
    results = run_ranks(train_layouts, world, config, layouts, rows, NUM_STEPS, experts)
    for index, layout in enumerate(layouts):
        for rank in range(world):
            check(results[rank][index], expected[layout.adam_eps], layout, f"{layout}, rank {rank}")


def check(run: Run, expected: Run, layout: Layout, where: str) -> None:
    # Sums in another order: losses and norms agree to 1.1e-7 as measured on one process with accumulation; gradients
    # to 3e-7. Weights are compared with Adam's eps at 1e-4, else Adam divides noise by noise.
    for name, weight in expected.initial_weights.items():
        assert torch.equal(run.initial_weights[name], weight), (where, name)
    assert run.first_gradients.keys() == expected.first_gradients.keys(), where
    assert run.losses == pytest.approx(expected.losses, rel=1e-6), where
    assert run.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5), where
    assert torch.equal(run.expert_counts, expected.expert_counts), where
    for name, gradient in expected.first_gradients.items():
        if "mlp.gate" not in name or expected.expert_counts.count_nonzero() > len(expected.expert_counts):
            assert relative_error(run.first_gradients[name], gradient) < 1e-5, (where, name)
        else:  # one expert, whose weight is 1 whatever the router says: zero but for rounding
            assert run.first_gradients[name].abs().max() < 1e-6, (where, name)
    for name, weight in expected.weights.items():
        if layout.adam_eps == 1e-8:
            update, expected_update = (
                torch.linalg.vector_norm(r.weights[name] - r.initial_weights[name]) for r in (run, expected)
            )
            assert update.item() == pytest.approx(expected_update.item(), rel=1e-3), (where, name)
            continue
        # A zero-centred norm multiplies by 1 + weight: its scale is 1, not the few updates that it holds so far. A bias
        # starts at 0 too; what it is added to is as large as the tower's matrices at least.
        offset = 1.0 if name.endswith("norm.weight") and "linear_attn" not in name else 0.0
        offset = 0.1 if name.endswith(".bias") and name.startswith("visual.") else offset
        assert relative_error(run.weights[name] + offset, weight + offset) < 1e-5, (where, name)
