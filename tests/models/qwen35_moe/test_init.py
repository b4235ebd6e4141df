"""Initial weights: by seed, name and expert alone, with the values of the table."""

import pytest
import torch

from models.ops.kernels import Kernels
from models.qwen35_moe.init import init_weights
from models.qwen35_moe.model import Qwen35Moe
from tests.models.qwen35_moe.shapes import initial_weights, tiny_config


def test_initial_weights_depend_on_seed_name_and_expert_alone() -> None:
    small, large = (initial_weights(tiny_config(num_experts=n), seed=0) for n in (4, 8))
    for name in small:
        if ".experts." in name:
            assert torch.equal(small[name], large[name][:4])  # an expert does not know how many there are
            assert not torch.equal(small[name][0], small[name][1])
        elif "mlp.gate" not in name:
            assert torch.equal(small[name], large[name])
    other = initial_weights(tiny_config(num_experts=4), seed=1)
    matrices = [name for name in small if small[name].dim() > 1]
    assert not any(torch.equal(small[name], other[name]) for name in matrices)
    assert len({small[name].flatten()[0].item() for name in matrices}) == len(matrices)


def test_initial_values_are_those_of_the_table() -> None:
    weights = initial_weights(tiny_config(linear_num_value_heads=64, initializer_range=0.03), seed=0)
    for name, weight in weights.items():
        assert weight.isfinite().all(), name
        if name.endswith("A_log"):
            assert weight.exp().min() >= 0.0099
            assert 10 < weight.exp().max() < 16.01
        elif name.endswith(("dt_bias", "linear_attn.norm.weight")):
            assert (weight == 1).all()
        elif name.endswith("norm.weight"):
            assert (weight == 0).all()
        elif weight.numel() > 2000:
            assert weight.std().item() == pytest.approx(0.03, rel=0.1), name


def test_a_part_is_a_part_of_the_whole() -> None:
    """What a rank fills is what one process has there: rows and columns, and some of the experts."""
    config = tiny_config()
    whole = initial_weights(config, seed=3)
    with torch.device("meta"):
        model = Qwen35Moe(config, Kernels(attention="sdpa"))
    parts: dict[str, torch.Tensor] = {}

    def part_of(parameter: torch.nn.Parameter) -> tuple[torch.Tensor, tuple[tuple[int, int], ...]]:
        name = next(name for name, each in model.named_parameters() if each is parameter)
        box = tuple((size // 3, size - size // 4) for size in parameter.shape)
        parts[name] = torch.full([stop - start for start, stop in box], torch.nan)
        return parts[name], box

    init_weights(model, 3, part_of)
    for name, part in parts.items():
        box = tuple(slice(size // 3, size - size // 4) for size in whole[name].shape)
        assert torch.equal(part, whole[name][box]), name
