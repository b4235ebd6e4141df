"""Learning-rate schedule and AdamW's parameter groups."""

import math
from typing import Any

import pytest
import torch

from config.options import LRScheduler, Optimizer
from models.ops.kernels import Kernels
from models.qwen35_moe.init import init_weights
from models.qwen35_moe.model import Qwen35Moe
from tests.models.qwen35_moe.shapes import random_model, tiny_config
from tests.models.qwen35_moe.vision_shapes import tiny_vision
from training.optimizer import build_optimizer, cut_short, lr_factor, set_learning_rate, step_clipped


def factors(total: int, **changes) -> list[float]:
    config = LRScheduler(**{"warmup_steps": 4, "min_lr_ratio": 0.1, **changes})
    return [lr_factor(step, total, config) for step in range(1, total + 1)]


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(decay: str) -> None:
    assert factors(20, decay=decay)[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_no_warm_up_starts_at_the_peak() -> None:
    assert factors(5, decay="constant", warmup_steps=0) == [1.0] * 5


def test_cosine_and_linear_meet_half_way_and_end_at_the_minimum() -> None:
    cosine, linear = factors(20, decay="cosine"), factors(20, decay="linear")
    assert cosine[11] == pytest.approx(0.55)
    assert linear[11] == pytest.approx(0.55)
    assert cosine[-1] == pytest.approx(0.1)
    assert linear[-1] == pytest.approx(0.1)
    assert cosine[7] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)


def test_wsd_is_flat_until_its_last_steps() -> None:
    wsd = factors(20, decay="wsd", decay_steps=5)
    assert wsd[3:15] == [1.0] * 12
    assert wsd[15:] == pytest.approx([0.82, 0.64, 0.46, 0.28, 0.1])


def test_a_fall_that_is_too_long_begins_at_the_peak() -> None:
    for decay_steps in (17, 20, 1000):
        assert factors(20, decay="wsd", decay_steps=decay_steps) == factors(20, decay="linear")
    assert factors(3, decay="wsd", decay_steps=2) == pytest.approx([0.25, 0.5, 0.75])


@pytest.mark.parametrize(
    ("total", "changes", "expected"),
    [
        (20, {}, ""),
        (5, {}, ""),
        (4, {}, "lr_scheduler.warmup_steps = 4: the rise takes all 4 steps"),
        (3, {}, "lr_scheduler.warmup_steps = 4: the rise is not finished in 3 steps"),
        (20, {"decay": "wsd", "decay_steps": 16}, ""),
        (
            20,
            {"decay": "wsd", "decay_steps": 17},
            "lr_scheduler.decay_steps = 17: the rise leaves 16 of 20 for the fall",
        ),
    ],
)
def test_what_of_a_schedule_has_no_room_is_told(total: int, changes: dict[str, Any], expected: str) -> None:
    assert cut_short(total, LRScheduler(**{"warmup_steps": 4, **changes})) == expected


def test_only_matrices_decay_and_every_parameter_is_optimised_once() -> None:
    model = random_model(tiny_config())
    optimizer = build_optimizer(model, Optimizer(lr=1e-3, weight_decay=0.1))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decays) == len(list(model.parameters())) == sum(len(g["params"]) for g in optimizer.param_groups)
    for name, parameter in model.named_parameters():
        is_vector = name.endswith(("norm.weight", "A_log", "dt_bias"))
        assert decays[id(parameter)] == (0.0 if is_vector else 0.1), name
        assert is_vector == (parameter.dim() == 1), name
    assert all(
        isinstance(group["lr"], float) and not isinstance(group["lr"], torch.Tensor) for group in optimizer.param_groups
    )


@pytest.mark.parametrize("max_norm", [0.1, 100.0], ids=["clips", "does not"])
def test_a_clipped_step_is_torchs(max_norm: float) -> None:
    models = [random_model(tiny_config()) for _ in range(2)]
    for model in models:
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator) / parameter.numel()
    config = Optimizer(lr=1e-3, eps=1e-4, weight_decay=0.1)  # with a small eps Adam's step would not show the scale
    ours, theirs = (build_optimizer(model, config) for model in models)
    norm = torch.nn.utils.clip_grad_norm_(models[1].parameters(), max_norm)
    assert 0.1 < norm < 100.0
    theirs.step()
    step_clipped(ours, norm, max_norm)
    # One divides by norm / max_norm, the other multiplies by max_norm / (norm + 1e-6): that and a few roundings are
    # below 1e-5. Weights, which are as large as 1, are rounded to 1e-7.
    for (name, parameter), expected in zip(models[0].named_parameters(), models[1].parameters()):
        assert torch.allclose(parameter.grad, expected.grad, rtol=1e-5, atol=0), name
        for moment in ("exp_avg", "exp_avg_sq"):
            ours_now, theirs_now = ours.state[parameter][moment], theirs.state[expected][moment]
            assert torch.allclose(ours_now, theirs_now, rtol=2e-5, atol=0), (name, moment)
        assert torch.allclose(parameter, expected, rtol=2e-7, atol=1e-8), name


def test_means_in_bfloat16_are_rounded_once_a_step_and_weights_are_not() -> None:
    model = random_model(tiny_config())
    config = Optimizer(lr=1e-3, eps=1e-4, weight_decay=0.1, state_dtype="bfloat16")
    optimizer = build_optimizer(model, config)
    expected = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    means = {name: [torch.zeros_like(value) for _ in range(2)] for name, value in expected.items()}
    (beta1, beta2), generator = config.betas, torch.Generator().manual_seed(0)
    for step in range(1, 4):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            gradient, (mean, square) = parameter.grad.double(), means[name]
            mean = beta1 * mean + (1 - beta1) * gradient
            square = beta2 * square + (1 - beta2) * gradient**2
            decay = config.weight_decay if parameter.dim() > 1 else 0.0
            update = mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + config.eps)
            expected[name] = expected[name] * (1 - config.lr * decay) - config.lr * update
            means[name] = [mean.bfloat16().double(), square.bfloat16().double()]
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        # Three roundings of weights up to 5; and where float32 and float64 lie on two sides of a tie, a mean is a step
        # of bfloat16 off, and so its update.
        off = (parameter.double() - expected[name]).abs()
        assert off.max() < config.lr * 2**-6, name
        assert (off < 1e-6).double().mean() > 0.99, name
        state = optimizer.state[parameter]
        for key, mean in zip(("exp_avg", "exp_avg_sq"), means[name]):
            assert state[key].dtype == torch.bfloat16
            assert torch.allclose(state[key].double(), mean, rtol=2**-7, atol=0), (name, key)
            assert (state[key].double() == mean).double().mean() > 0.99, (name, key)


@pytest.mark.parametrize("max_norm", [0.1, 100.0], ids=["clips", "does not"])
def test_means_in_bfloat16_are_clipped_alike(max_norm: float) -> None:
    """Against torch's fused kernel with float32 means: after one step both have the same update."""
    weights = {}
    for dtype in ("float32", "bfloat16"):
        model = random_model(tiny_config())
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator) / parameter.numel()
        optimizer = build_optimizer(model, Optimizer(lr=1e-3, eps=1e-4, weight_decay=0.1, state_dtype=dtype))
        norm = torch.linalg.vector_norm(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        step_clipped(optimizer, norm, max_norm)
        weights[dtype] = dict(model.named_parameters())
    for name, expected in weights["float32"].items():
        assert torch.allclose(weights["bfloat16"][name], expected, rtol=3e-7, atol=1e-8), name


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("skipped", [0, 1], ids=["the first step", "the second"])
def test_a_step_that_is_skipped_leaves_no_trace(skipped: int, state_dtype: str, device: str) -> None:
    """Bit for bit, also in all steps after it; and the gradients are still there to be looked at."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    states = []
    for is_skipped in (False, True):
        model = random_model(tiny_config()).to(device)
        optimizer = build_optimizer(model, Optimizer(lr=1e-3, weight_decay=0.1, state_dtype=state_dtype))
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
            if is_skipped and step == skipped:
                nan = torch.tensor(torch.nan, device=device)
                next(model.parameters()).grad[0] = nan
                before = [parameter.grad.clone() for parameter in model.parameters()]
                step_clipped(optimizer, nan.double(), 1.0, skips=nan.isnan())
                after = [parameter.grad for parameter in model.parameters()]
                assert all(torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(before, after))
            elif is_skipped or step != skipped:
                step_clipped(optimizer, torch.tensor(2.0, device=device), 1.0, skips=torch.tensor(False, device=device))
        states.append(dict(model.named_parameters()) | optimizer.named_state())
    plain, skipping = states
    assert plain.keys() == skipping.keys()
    assert all(torch.equal(plain[name], skipping[name]) for name in plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_updates_on_a_gpu_are_those_of_plain_pytorch(state_dtype: str) -> None:
    results = {}
    for device in ("cpu", "cuda"):
        model = random_model(tiny_config()).to(device)
        optimizer = build_optimizer(model, Optimizer(lr=1e-3, eps=1e-4, weight_decay=0.1, state_dtype=state_dtype))
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
            step_clipped(optimizer, torch.tensor(2.0, device=device), 1.0)
        results[device] = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
    for name, expected in results["cpu"].items():
        # A mean on the other side of a tie is one step of bfloat16, 2^-7, off, and so is its update of lr. In float32
        # there are a few roundings of the update.
        atol = 1e-3 * (2**-6 if state_dtype == "bfloat16" else 1e-5)
        assert torch.allclose(results["cuda"][name], expected, rtol=3e-7, atol=atol), name


def test_tower_and_merger_have_rates_of_their_own_on_one_schedule() -> None:
    model = Qwen35Moe(tiny_config(vision=tiny_vision()), Kernels())
    init_weights(model, 0)
    config = Optimizer(lr=1e-2, eps=1e-30, weight_decay=0.1, vision_lr_ratio=0.5, merger_lr_ratio=3.0)
    optimizer = build_optimizer(model, config)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    for lr in (1e-2, 2e-3):
        set_learning_rate(optimizer, lr)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        for name, parameter in model.named_parameters():
            rate = lr * (1.0 if not name.startswith("visual.") else 3.0 if "merger" in name else 0.5)
            decay = 0.1 if parameter.dim() > 1 else 0.0
            # With the gradient ever the same, Adam's step is the rate.
            expected = before[name] * (1 - rate * decay) - rate
            assert torch.allclose(parameter, expected, rtol=1e-5, atol=1e-8), name


def test_a_rate_holds_from_the_first_step_and_the_text_keeps_two_groups() -> None:
    model = random_model(tiny_config())
    assert [(group["lr"], group["lr_ratio"]) for group in build_optimizer(model, Optimizer(lr=1e-3)).param_groups] == [
        (1e-3, 1.0)
    ] * 2
    model = Qwen35Moe(tiny_config(vision=tiny_vision()), Kernels())
    groups = build_optimizer(model, Optimizer(lr=1e-3, merger_lr_ratio=2.0)).param_groups
    assert sorted(group["lr"] for group in groups) == [1e-3, 1e-3, 2e-3, 2e-3]
