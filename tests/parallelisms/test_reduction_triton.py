"""The kernel that adds up what ranks have sent, one addition after the other in float32, rounded once."""

import pytest
import torch

from models.ops.has_triton import HAS_TRITON
from tests.distributed import needs_gpus

if HAS_TRITON:
    from parallelisms.reduction_triton import add_up


@pytest.mark.parametrize("needs", [pytest.param(None, marks=needs_gpus(1))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 7, 2048, 5000])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_sums(num_ranks: int, size: int, dtype: torch.dtype, needs: None) -> None:
    parts = torch.randn(num_ranks, size, generator=torch.Generator().manual_seed(size)).bfloat16()
    expected = torch.zeros(size)
    for part in parts:
        expected += part.float()
    out = torch.full([size], torch.nan, dtype=dtype, device="cuda")
    add_up(parts.cuda(), out)
    assert torch.equal(out.cpu(), expected.to(dtype))
