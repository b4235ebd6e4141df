"""The experts' SwiGLU in kernels, by itself and in compiled code, against PyTorch in float64; unread rows hold NaN."""

import pytest
import torch
import torch.nn.functional as F

from models.ops.grouped_experts import weighted_swiglu
from models.ops.has_triton import HAS_TRITON
from tests.distributed import needs_gpus
from tests.models.ops.compare import relative_error

# Arithmetic is float32's: a few roundings of 6e-8 each, sums of up to 1100 for the weights' gradients. bfloat16: each
# result is rounded once, by at most 2^-8, 3.9e-3, of itself.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 4e-3}


@pytest.mark.parametrize("needs", [pytest.param(None, marks=needs_gpus(1))])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("num_unread", [0, 6])
@pytest.mark.parametrize(("counts", "inner"), [([1], 8), ([3, 0, 5], 20), ([0, 70], 1100), ([0, 0], 512)], ids=str)
def test_results_and_gradients(
    counts: list[int], inner: int, num_unread: int, dtype: torch.dtype, compiled: bool, needs: None
) -> None:
    check(counts, inner, num_unread, dtype, compiled, "cuda")


def check(counts: list[int], inner: int, num_unread: int, dtype: torch.dtype, compiled: bool, device: str) -> None:
    assert HAS_TRITON
    generator = torch.Generator().manual_seed(0)
    offsets, num_rows = torch.tensor(counts).cumsum(0).int(), sum(counts)
    gate_up = torch.randn(num_rows, 2 * inner, generator=generator).to(dtype)
    weights, upstream = torch.rand(num_rows, generator=generator), torch.randn(num_rows, inner, generator=generator)
    unread = torch.full([num_unread, 2 * inner], torch.nan)

    inputs = gate_up.double().requires_grad_(), weights.double().requires_grad_()
    gate, up = inputs[0].chunk(2, dim=-1)
    expected = F.silu(gate) * up * inputs[1].unsqueeze(-1)
    of_inputs = torch.autograd.grad(expected, inputs, upstream.to(dtype).double())

    inputs = torch.cat([gate_up, unread.to(dtype)]).to(device), torch.cat([weights, unread[:, 0]]).to(device)
    inputs = tuple(each.requires_grad_() for each in inputs)
    torch._dynamo.reset()
    function = torch.compile(weighted_swiglu, fullgraph=True) if compiled else weighted_swiglu
    found = function(*inputs, offsets.to(device))
    assert found.dtype == dtype
    gradient = torch.cat([upstream, unread[:, :inner]]).to(device, dtype)
    for ours, exact in zip(
        [found, *torch.autograd.grad(found, inputs, gradient)], [expected.detach(), *of_inputs], strict=True
    ):
        assert relative_error(ours[:num_rows].detach().cpu(), exact) <= TOLERANCES[dtype]
