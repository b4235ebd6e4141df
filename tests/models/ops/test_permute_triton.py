"""The kernel that adds up tokens' rows, by itself and launched by compiled code, against plain PyTorch on a CPU."""

import pytest
import torch

from models.ops.permute import permute
from tests.distributed import needs_gpus
from tests.models.ops.test_permute import choices, sort


@pytest.mark.parametrize("needs", [pytest.param(None, marks=needs_gpus(1))])
@pytest.mark.parametrize("dynamic", [None, False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("num_tokens", "top_k", "width"), [(1, 3, 8), (17, 3, 7), (300, 8, 2048), (40, 2, 4100)])
def test_sums_on_a_gpu_are_those_on_a_cpu(
    num_tokens: int, top_k: int, width: int, dtype: torch.dtype, dynamic: bool | None, needs: None
) -> None:
    gradients = []
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(num_tokens, width, generator=generator).to(device, dtype).requires_grad_()
        order, places, *_ = (each.to(device) for each in sort(choices(num_tokens, top_k))[:3])
        upstream = torch.randn(len(order), width, generator=generator).to(device, dtype)
        call = permute if dynamic is None or device == "cpu" else torch.compile(permute, dynamic=dynamic)
        call(x, order // top_k, places).backward(upstream)
        gradients.append(x.grad.cpu())
    assert torch.equal(*gradients)  # a token's rows in one order, in float32 or wider, rounded once
