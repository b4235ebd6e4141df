"""The convolution's own kernel on a GPU in bfloat16, and PyTorch's form there, against float64 on the CPU."""

import pytest
import torch

from models.ops.causal_conv1d import causal_conv1d
from models.ops.documents import Documents
from tests.models.ops.test_gpu import NUM_TOKENS, check, pytestmark, random  # noqa: F401  (marks this file too)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("widths", [(16, 16, 32), (130, 60, 10), (256, 128, 128)])  # a kernel's block: 128 channels
@pytest.mark.parametrize(("backend", "width"), [("torch", 4), ("triton", 4), ("triton", 3)])
def test_causal_conv1d(backend: str, widths: tuple[int, ...], width: int, compiled: bool) -> None:
    def convolution(x: torch.Tensor, weight: torch.Tensor, documents: Documents) -> torch.Tensor:
        parts = causal_conv1d(x, weight, widths, documents, backend=backend if x.is_cuda else "torch")
        assert [part.shape[1] for part in parts] == list(widths)
        return torch.cat(parts, dim=-1)

    check(convolution, random((NUM_TOKENS, sum(widths)), (sum(widths), 1, width)), compiled=compiled)
