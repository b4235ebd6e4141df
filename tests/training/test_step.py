"""A step is launched without a word from the device: the host asks for what it came to when the next is on its way."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from config.options import Optimizer
from tests.distributed import needs_gpus, run_ranks
from tests.models.qwen35_moe.shapes import random_model, tiny_config
from tests.parallelisms.layouts import MTP, OFF, TRAINING, Layout, build, count_tokens, full, own_batches, step
from tests.parallelisms.test_layouts import CONFIG as LAYOUTS_CONFIG
from tests.parallelisms.test_layouts import ROWS as LAYOUTS_ROWS
from training.optimizer import build_optimizer, set_learning_rate, step_clipped
from training.step import Stepper, StepResult

# Attention alone: the delta rule in plain PyTorch lays out chunks by what the host knows, and waits to send that.
CONFIG = tiny_config(initializer_range=0.05, layer_types=("full_attention",) * 4)
ROWS = [[40, 24], [10, 54]]


class _Asked(TorchDispatchMode):
    """Counts the tensors whose number the host asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_an_update_that_may_be_skipped_asks_for_no_number() -> None:
    model = random_model(tiny_config())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = build_optimizer(model, Optimizer(lr=1e-3, state_dtype="bfloat16"))
    with _Asked() as asked:
        step_clipped(optimizer, torch.tensor(3.0), 1.0, skips=torch.tensor(False))
    assert asked.count == 0


def two_steps_at_once(device_type: str) -> tuple[list[float], list[float], bool]:
    """The losses of steps that are launched one after the other before any is asked for, and of steps that are not;
    and whether both came to the same weights."""
    losses, weights = [], []
    device = torch.device(device_type)
    for at_once in (True, False):
        # Experts' products in float32 ask a GPU how many rows each has.
        dtype = torch.bfloat16 if device_type == "cuda" else torch.float32
        model, meshes, optimizer = build(CONFIG, Layout(), dtype, device_type)
        batches = [own_batches(CONFIG, Layout(), ROWS, seed) for seed in range(3)]
        step(model, meshes, optimizer, batches[0])  # what is done once a run is done
        if at_once:
            numbers = [count_tokens(each) for each in batches]
            if device_type == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            stepper = Stepper(model, optimizer, meshes, device, TRAINING, OFF, MTP)
            launched = [stepper.launch(each, *number) for each, number in zip(batches[1:], numbers[1:])]
            if device_type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            results = [each.result() for each in launched]
        else:
            results = [step(model, meshes, optimizer, each) for each in batches[1:]]
        losses.append([result.losses["loss"].item() for result in results])
        weights.append([full(parameter).cpu() for parameter in model.parameters()])
    return losses[0], losses[1], all(map(torch.equal, *weights))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpus(1))])
def test_steps_may_be_launched_before_any_is_asked_for(device: str) -> None:
    ((at_once, one_by_one, same),) = run_ranks(two_steps_at_once, 1, device, device_type=device)
    assert at_once == one_by_one
    assert len(set(at_once)) == 2
    assert same


def steps_with_room(rooms: list[float | None], at_once: bool) -> tuple[list[StepResult], list[torch.Tensor], list[int]]:
    """What steps told, each launched with another learning rate, and with so much room or with what there is by then;
    all launched before any is asked for, or not; the weights; and how many were made anew behind each launch and at
    the end."""
    layout = Layout(world=2, ep=2, room=1.0, accumulation=2)
    model, meshes, optimizer = build(LAYOUTS_CONFIG, layout)
    stepper = Stepper(model, optimizer, meshes, torch.device("cpu"), TRAINING, OFF, MTP)
    launched, results, repeated = [], [], []
    for number, room in enumerate(rooms):
        batches = own_batches(LAYOUTS_CONFIG, layout, LAYOUTS_ROWS, 1000 * number)
        set_learning_rate(optimizer, 1e-3 * (number + 1))
        meshes.room.factor = room or meshes.room.factor
        launched.append(stepper.launch(batches, *count_tokens(batches)))
        if not at_once:
            results.append(launched[-1].result())
        repeated.append(meshes.room.num_repeated)
    results = results or [each.result() for each in launched]
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3 * len(rooms)}
    return results, [full(parameter) for parameter in model.parameters()], [*repeated, meshes.room.num_repeated]


@pytest.mark.parametrize(
    ("at_once", "one_by_one"),
    [
        # The second misses rows too, before the first has been made anew. Then there is room for 1.25, which they fit.
        ([1.0, None, None], [1.0, None, None]),
        # The second misses none, but came from weights that were not updated. Behind the first there is a quarter more.
        ([1.0, 1.25], [1.0, 1.25**2]),
    ],
)
def test_a_step_that_misses_rows_and_the_one_launched_behind_it_are_made_anew_in_their_order(
    at_once: list[float | None], one_by_one: list[float | None]
) -> None:
    of_all = run_ranks(steps_with_room, 2, at_once, True)
    alone = run_ranks(steps_with_room, 2, one_by_one, False)
    for (results, weights, repeated), (expected, expected_weights, expected_repeated) in zip(of_all, alone):
        assert expected_repeated == [1] * (len(at_once) + 1)
        assert repeated == [0] + [1] * len(at_once)
        for result, of_one in zip(results, expected, strict=True):
            assert result.losses == of_one.losses
            assert result.grad_norm == of_one.grad_norm
            assert torch.equal(result.expert_counts, of_one.expert_counts)
        assert all(map(torch.equal, weights, expected_weights))
