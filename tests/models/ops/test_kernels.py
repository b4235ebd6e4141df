"""The choice of kernels."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import torch

from config.options import Kernels as Options
from models.ops import kernels
from models.ops.kernels import CHOICES, select_kernels

HEAD_DIMS = (128, 128)


@pytest.fixture
def without_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize(
    ("requested", "device_type", "dtype", "chosen"),
    [
        ("auto", "cpu", torch.float32, "sdpa"),
        ("auto", "cpu", torch.bfloat16, "sdpa"),
        ("auto", "cuda", torch.float32, "sdpa"),
        ("auto", "cuda", torch.bfloat16, "cudnn"),
        ("auto", "cuda", torch.float16, "cudnn"),
        ("sdpa", "cuda", torch.bfloat16, "sdpa"),
        ("varlen", "cuda", torch.bfloat16, "varlen"),
    ],
)
@pytest.mark.usefixtures("without_libraries")
def test_attention(requested: str, device_type: str, dtype: torch.dtype, chosen: str) -> None:
    assert select_kernels({"attention": requested}, device_type, dtype, HEAD_DIMS, 4, 256).attention == chosen
    if requested == "auto":
        assert select_kernels({}, device_type, dtype, HEAD_DIMS, 4, 256).attention == chosen


def test_delta_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each library where it works, the faster one first."""
    monkeypatch.setattr(kernels, "_fla_hindrance", lambda: "the package flash-linear-attention")
    monkeypatch.setattr(kernels, "_flash_qla_hindrance", lambda dims: "" if dims == HEAD_DIMS else "dims of 128")

    def chosen(device_type: str, dtype: torch.dtype, head_dims: tuple[int, int]) -> str:
        return select_kernels({}, device_type, dtype, head_dims, 4, 256).gated_delta_rule

    assert chosen("cuda", torch.bfloat16, HEAD_DIMS) == "flash_qla"
    assert chosen("cpu", torch.bfloat16, HEAD_DIMS) == "torch"
    assert chosen("cuda", torch.bfloat16, (64, 64)) == "torch"
    monkeypatch.setattr(kernels, "_fla_hindrance", lambda: "")
    assert chosen("cuda", torch.bfloat16, (64, 64)) == "fla"
    with pytest.raises(ValueError, match=r"gated_delta_rule = 'flash_qla' needs dims of 128"):
        select_kernels({"gated_delta_rule": "flash_qla"}, "cuda", torch.bfloat16, (64, 64), 4, 256)


@pytest.mark.parametrize(
    ("capability", "version", "works"),
    [
        ((9, 0), "3.3.1", True),
        ((9, 0), "3.4.0", False),
        ((9, 0), "3.6.0", False),
        ((9, 0), "3.7.0", False),
        ((9, 0), "3.7.1", True),
        ((9, 0), "3.10.0", True),
        ((8, 0), "3.6.0", True),
        ((10, 0), "3.6.0", True),
    ],
)
def test_where_flash_linear_attention_is_right(
    capability: tuple[int, int], version: str, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    monkeypatch.setitem(sys.modules, "fla", None)  # an import of it would fail
    assert (kernels._fla_hindrance() == "") == works


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """install(fa4, capability): that version of flash-attn-4 on such a GPU, as far as is looked at."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(kernels, "_fla_hindrance", lambda: "nothing")

    def put(fa4: str = "4.0.0b36", capability: tuple[int, int] = (9, 0)) -> None:
        metadata = tmp_path / f"flash_attn_4-{fa4}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: flash-attn-4\nVersion: {fa4}\n")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    return put


def choose_attention(choice: str, head_dim: int = 256) -> str:
    return select_kernels({"attention": choice}, "cuda", torch.bfloat16, HEAD_DIMS, 4, head_dim).attention


@pytest.mark.parametrize(("capability", "chosen"), [((9, 0), "fa4"), ((10, 0), "cudnn"), ((8, 0), "cudnn")])
def test_flash_attention_4_is_chosen_where_it_was_measured(
    capability: tuple[int, int], chosen: str, install: Callable[..., None]
) -> None:
    install(capability=capability)
    assert choose_attention("auto") == chosen


@pytest.mark.parametrize("version", ["4.0.0b36", "4.0.0b100", "4.0.0", "4.1.0b1"])
@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (10, 3)])
def test_where_flash_attention_4_runs(version: str, capability: tuple[int, int], install: Callable[..., None]) -> None:
    install(version, capability)
    assert [choose_attention("fa4", dim) for dim in (32, 64, 96, 128, 256)] == ["fa4"] * 5


@pytest.mark.parametrize(
    ("version", "capability", "head_dim", "needs"),
    [
        ("4.0.0b35", (9, 0), 256, "flash-attn-4 from 4.0.0b36 on, not 4.0.0b35"),
        ("4.0.0b4", (9, 0), 256, "flash-attn-4 from 4.0.0b36 on, not 4.0.0b4"),
        ("4.0.0b36", (8, 0), 256, "a GPU with compute capability 9.0, 10.0 or 10.3"),
        ("4.0.0b36", (12, 0), 256, "a GPU with compute capability 9.0, 10.0 or 10.3"),
        ("4.0.0b36", (9, 0), 72, "a head dim of 32, 64, 96, 128 or 256, not 72"),
        ("4.0.0b36", (10, 0), 192, "a head dim of 32, 64, 96, 128 or 256, not 192"),
    ],
)
def test_what_hinders_flash_attention_4(
    version: str, capability: tuple[int, int], head_dim: int, needs: str, install: Callable[..., None]
) -> None:
    install(version, capability)
    with pytest.raises(ValueError, match=f"^kernels.attention = 'fa4' needs {needs}: expected 'auto' or 'sdpa' or "):
        choose_attention("fa4", head_dim)


@pytest.mark.usefixtures("without_libraries")
def test_missing_packages_are_named() -> None:
    for operation, choice, package in (
        ("gated_delta_rule", "fla", "flash-linear-attention"),
        ("gated_delta_rule", "flash_qla", "flash-qla"),
        ("attention", "fa4", "flash-attn-4"),
    ):
        with pytest.raises(ValueError, match=f"'{choice}' needs the package {package}"):
            select_kernels({operation: choice}, "cuda", torch.bfloat16, HEAD_DIMS, 4, 256)


@pytest.mark.parametrize(("device_type", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32)])
@pytest.mark.parametrize(
    ("operation", "choice"),
    [("attention", "varlen"), ("attention", "fa4"), ("gated_delta_rule", "flash_qla")],
)
def test_where_it_cannot_run(operation: str, choice: str, device_type: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"kernels\.{operation} = '{choice}' needs a CUDA GPU and bfloat16"):
        select_kernels({operation: choice}, device_type, dtype, HEAD_DIMS, 4, 256)


def test_the_options_offer_what_there_is() -> None:
    offered = {name: get_args(hint) for name, hint in get_type_hints(Options).items() if name in CHOICES}
    assert offered == {name: ("auto", *choices) for name, choices in CHOICES.items()}


@pytest.mark.usefixtures("without_libraries")
def test_the_convolution_by_triton_has_four_taps_at_most() -> None:
    def chosen(width: int, requested: str = "auto") -> str:
        kernels = select_kernels({"causal_conv1d": requested}, "cuda", torch.bfloat16, HEAD_DIMS, width, 256)
        return kernels.causal_conv1d

    assert [chosen(width) for width in (1, 4, 5)] == ["triton", "triton", "torch"]
    with pytest.raises(ValueError, match="'triton' needs a convolution of 4 taps at most, not 5"):
        chosen(5, "triton")
