"""The kernels that write tokens' rows and add them up, by themselves and in compiled code, as PyTorch on a CPU."""

import pytest
import torch

from models.ops.permute import combine, permute
from tests.distributed import needs_gpus
from tests.models.ops.test_permute import choices, sort


def way_there_and_back(
    x: torch.Tensor, sources: torch.Tensor, places: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is in rows that `places` do not name is any."""
    rows = permute(x, sources, places)
    is_read = torch.arange(len(sources), device=x.device) <= places.max()
    return rows, combine(rows.where(is_read.unsqueeze(1), torch.nan), sources, places)


@pytest.mark.parametrize("needs", [pytest.param(None, marks=needs_gpus(1))])
@pytest.mark.parametrize("dynamic", [None, False, True])
@pytest.mark.parametrize("num_unread", [0, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("num_tokens", "top_k", "width"), [(1, 3, 8), (17, 3, 7), (300, 8, 2048), (40, 2, 4100)])
def test_on_a_gpu_as_on_a_cpu(
    num_tokens: int,
    top_k: int,
    width: int,
    num_unread: int,
    dtype: torch.dtype,
    dynamic: bool | None,
    needs: None,
) -> None:
    found = []
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(num_tokens, width, generator=generator).to(device, dtype).requires_grad_()
        order, places, offsets = (each.to(device) for each in sort(choices(num_tokens, top_k)))
        num_rows, more = int(offsets[-1]), order.new_zeros(num_unread)
        upstream = torch.randn(num_rows, width, generator=generator).to(device, dtype)
        torch._dynamo.reset()  # or most of them would run uncompiled
        call = (
            way_there_and_back
            if dynamic is None or device == "cpu"
            else torch.compile(way_there_and_back, dynamic=dynamic, fullgraph=True)
        )
        rows, sums = call(x, torch.cat([order // top_k, more]), places)
        torch.autograd.backward([rows[:num_rows], sums], [upstream, torch.ones_like(sums)])
        found.append([rows[:num_rows].cpu(), sums.cpu(), x.grad.cpu()])
    for expected, actual in zip(*found):
        assert torch.equal(actual, expected)  # a token's rows in one order, in float32 or wider, rounded once
