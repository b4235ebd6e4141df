"""What is said where a run on a GPU takes a slow path, which needs no GPU to be said."""

import dataclasses
from unittest.mock import patch

import pytest
import torch

from config.reading import ROOT, load_config, model_config
from models.ops import kernels as kernels_module
from models.ops.kernels import Kernels
from models.qwen35_moe.slow_paths import slow_paths
from tests.models.qwen35_moe.shapes import tiny_config
from tests.models.qwen35_moe.vision_shapes import tiny_vision

FAST = Kernels("cudnn", "flash_qla", "triton", "compiled")
WIDE = {"hidden_size": 64, "moe_intermediate_size": 32}


@pytest.fixture(autouse=True)
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all packages were there, on a GPU that they run on."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(kernels_module, "_fla_hindrance", lambda: "")
    monkeypatch.setattr(kernels_module.importlib.util, "find_spec", lambda name: object())


def test_fast_paths_and_cpus_are_passed_over() -> None:
    assert slow_paths(FAST, tiny_config(**WIDE), "cuda", torch.bfloat16) == []
    assert slow_paths(Kernels(), tiny_config(), "cpu", torch.float32) == []


@pytest.mark.parametrize(("operation", "plain"), zip(Kernels._fields, ("sdpa", "torch", "torch", "torch")))
def test_every_operation_in_plain_pytorch_is_named_with_the_way_out(operation: str, plain: str) -> None:
    kernels = FAST._replace(**{operation: plain})
    (asked,) = slow_paths(
        kernels, tiny_config(**WIDE, linear_key_head_dim=128, linear_value_head_dim=128), "cuda", torch.bfloat16
    )
    assert asked.startswith(f"kernels.{operation} = '{plain}': ")
    if operation != "attention":  # its other choices need a package that may not be there
        assert asked.endswith("asked for")
    with patch.object(kernels_module, "_flash_qla_hindrance", lambda dims: f"other head dims than {dims}"):
        (found,) = slow_paths(kernels, tiny_config(**WIDE), "cuda", torch.bfloat16)
    if operation == "gated_delta_rule":
        assert "'flash_qla' needs other head dims than (" in found


def test_blocks_that_are_not_compiled_are_named_with_the_way_out() -> None:
    (found,) = slow_paths(FAST, tiny_config(**WIDE), "cuda", torch.bfloat16, compiles=False)
    assert found.startswith("compile.enable = false: ")


def test_float32_says_what_it_costs() -> None:
    found = slow_paths(
        FAST._replace(attention="sdpa", gated_delta_rule="torch"), tiny_config(**WIDE), "cuda", torch.float32
    )
    assert len(found) == 2
    assert all("a CUDA GPU and bfloat16, not cuda and torch.float32" in line for line in found)


@pytest.mark.parametrize(("key", "width"), [("hidden_size", 68), ("moe_intermediate_size", 20)])
def test_widths_that_no_grouped_product_takes(key: str, width: int) -> None:
    (found,) = slow_paths(FAST, dataclasses.replace(tiny_config(**WIDE), **{key: width}), "cuda", torch.bfloat16)
    assert f"a multiple of 8, not {key} = {width}" in found


def test_a_tower_whose_heads_have_no_kernel() -> None:
    vision = dataclasses.replace(tiny_vision(), hidden_size=36, num_heads=3, out_hidden_size=64)
    (found,) = slow_paths(FAST, tiny_config(**WIDE, vision=vision), "cuda", torch.bfloat16)
    assert "vision tower" in found
    assert "not 12" in found


def test_what_we_recommend_for_gpus_is_fast() -> None:
    for name in ("qwen35moe_100m", "qwen35moe_35b_a3b"):
        options = [
            "--config",
            str(ROOT / f"train_configs/{name}.toml"),
            f"--data.tokenizer={ROOT / 'data/tiny/tokenizer'}",
        ]
        config = load_config(options)
        shape = model_config(config)
        kernels = kernels_module.select_kernels({}, "cuda", torch.bfloat16, *shape.kernel_sizes)
        assert slow_paths(kernels, shape, "cuda", torch.bfloat16, config.compile.enable) == []
