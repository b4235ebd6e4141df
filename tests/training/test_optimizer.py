"""Learning-rate schedule and AdamW's parameter groups."""

import math

import pytest
import torch

from config import LRScheduler, Optimizer
from tests.models.qwen35_moe.shapes import random_model, tiny_config
from training.optimizer import build_optimizer, lr_factor


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
