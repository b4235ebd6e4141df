"""The convolution's own kernel on a GPU in bfloat16, and PyTorch's form there, against float64 on the CPU."""

import pytest
import torch

from models.ops.causal_conv1d import causal_conv1d
from models.ops.documents import Documents
from tests.models.ops.test_gpu import NUM_TOKENS, check, pytestmark, random  # noqa: F401  (marks this file too)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("backend", "channels", "width"), [("torch", 64, 4), ("triton", 64, 4), ("triton", 200, 3)])
def test_causal_conv1d(backend: str, channels: int, width: int, compiled: bool) -> None:
    def convolution(x: torch.Tensor, weight: torch.Tensor, documents: Documents) -> torch.Tensor:
        return causal_conv1d(x, weight, documents, backend=backend if x.is_cuda else "torch")

    check(convolution, random((NUM_TOKENS, channels), (channels, 1, width)), compiled=compiled)
