"""The choice of kernels."""

import pytest
import torch

from models.ops.kernels import select_kernels


@pytest.mark.parametrize(
    ("requested", "device_type", "dtype", "chosen"),
    [
        ("auto", "cpu", torch.float32, "sdpa"),
        ("auto", "cpu", torch.bfloat16, "sdpa"),
        ("auto", "cuda", torch.float32, "sdpa"),
        ("auto", "cuda", torch.bfloat16, "varlen"),
        ("auto", "cuda", torch.float16, "varlen"),
        ("sdpa", "cuda", torch.bfloat16, "sdpa"),
        ("varlen", "cuda", torch.bfloat16, "varlen"),
    ],
)
def test_choice(requested: str, device_type: str, dtype: torch.dtype, chosen: str) -> None:
    assert select_kernels({"attention": requested}, device_type, dtype).attention == chosen
    if requested == "auto":
        assert select_kernels({}, device_type, dtype).attention == chosen


@pytest.mark.parametrize(("device_type", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32)])
def test_varlen_where_it_cannot_run(device_type: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"kernels\.attention = 'varlen' needs a CUDA GPU"):
        select_kernels({"attention": "varlen"}, device_type, dtype)


def test_unknown_choice() -> None:
    with pytest.raises(ValueError, match=r"kernels\.attention = 'flash': expected 'auto', 'sdpa' or 'varlen'"):
        select_kernels({"attention": "flash"}, "cuda", torch.bfloat16)
