"""The choice of kernels."""

import importlib.util
import logging

import pytest
import torch

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
    assert select_kernels({"attention": requested}, device_type, dtype, HEAD_DIMS, 4).attention == chosen
    if requested == "auto":
        assert select_kernels({}, device_type, dtype, HEAD_DIMS, 4).attention == chosen


def test_delta_rule(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Each library where it works, the faster one first; without any, a word about which would help."""
    monkeypatch.setattr(kernels, "_fla_hindrance", lambda: "the package flash-linear-attention")
    monkeypatch.setattr(kernels, "_flash_qla_hindrance", lambda dims: "" if dims == HEAD_DIMS else "dims of 128")

    def chosen(device_type: str, dtype: torch.dtype, head_dims: tuple[int, int]) -> str:
        return select_kernels({}, device_type, dtype, head_dims, 4).gated_delta_rule

    with caplog.at_level(logging.WARNING, logger="train"):
        assert chosen("cuda", torch.bfloat16, HEAD_DIMS) == "flash_qla"
        assert chosen("cpu", torch.bfloat16, HEAD_DIMS) == "torch"
        assert not caplog.messages
        assert chosen("cuda", torch.bfloat16, (64, 64)) == "torch"
        assert "'fla' needs the package flash-linear-attention; 'flash_qla' needs dims of 128" in caplog.messages[0]
    monkeypatch.setattr(kernels, "_fla_hindrance", lambda: "")
    assert chosen("cuda", torch.bfloat16, (64, 64)) == "fla"
    with pytest.raises(ValueError, match=r"gated_delta_rule = 'flash_qla' needs dims of 128"):
        select_kernels({"gated_delta_rule": "flash_qla"}, "cuda", torch.bfloat16, (64, 64), 4)


@pytest.mark.usefixtures("without_libraries")
def test_missing_packages_are_named() -> None:
    for choice, package in (("fla", "flash-linear-attention"), ("flash_qla", "flash-qla")):
        with pytest.raises(ValueError, match=f"'{choice}' needs the package {package}"):
            select_kernels({"gated_delta_rule": choice}, "cuda", torch.bfloat16, HEAD_DIMS, 4)


@pytest.mark.parametrize(("device_type", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32)])
@pytest.mark.parametrize(("operation", "choice"), [("attention", "varlen"), ("gated_delta_rule", "flash_qla")])
def test_where_it_cannot_run(operation: str, choice: str, device_type: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"kernels\.{operation} = '{choice}' needs a CUDA GPU and bfloat16"):
        select_kernels({operation: choice}, device_type, dtype, HEAD_DIMS, 4)


@pytest.mark.parametrize("operation", CHOICES)
def test_unknown_choice(operation: str) -> None:
    with pytest.raises(ValueError, match=rf"kernels\.{operation} = 'quick': expected 'auto', '.*' or '.*'"):
        select_kernels({operation: "quick"}, "cpu", torch.float32, HEAD_DIMS, 4)


@pytest.mark.usefixtures("without_libraries")
def test_the_convolution_by_triton_has_four_taps_at_most() -> None:
    def chosen(width: int, requested: str = "auto") -> str:
        kernels = select_kernels({"causal_conv1d": requested}, "cuda", torch.bfloat16, HEAD_DIMS, width)
        return kernels.causal_conv1d

    assert [chosen(width) for width in (1, 4, 5)] == ["triton", "triton", "torch"]
    with pytest.raises(ValueError, match="'triton' needs a convolution of 4 taps at most, not 5"):
        chosen(5, "triton")
