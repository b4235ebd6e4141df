"""The two norms against their formulas in float64, values and gradients, and their dtype."""

import pytest
import torch

from models.ops.rms_norm import gated_rms_norm, rms_norm

EPS = 1e-6


def by_formula(x: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    normed = torch.stack([row / (row.dot(row) / len(row) + EPS).sqrt() for row in x])
    if gate is None:
        return normed * (1 + weight)
    return normed * weight * gate / (1 + (-gate).exp())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_equals_the_formula(dtype: torch.dtype, gated: bool) -> None:
    x, gate = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = torch.randn(24, generator=torch.Generator().manual_seed(1)).to(dtype)
    inputs = [tensor.clone().requires_grad_() for tensor in ([x, gate, weight] if gated else [x, weight])]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    out = gated_rms_norm(*inputs, EPS) if gated else rms_norm(*inputs, EPS)
    expected = by_formula(exact[0], exact[-1], exact[1] if gated else None)
    assert out.dtype == dtype
    cotangent = torch.randn(5, 24, generator=torch.Generator().manual_seed(2)).to(dtype)
    gradients = torch.autograd.grad(out, inputs, cotangent)
    expected_gradients = torch.autograd.grad(expected, exact, cotangent.double())
    # One rounding of the result: 2^-8 of it in bfloat16, and of sums over 5 rows; float32's 2^-24, a few of them.
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-6
    for actual, wanted in zip((out, *gradients), (expected, *expected_gradients)):
        assert (actual.double() - wanted).norm() < bound * wanted.norm()
