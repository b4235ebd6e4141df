"""The linear layer in parts against float64 and against float32."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.ops.float32_linear import float32_linear, linear_in_parts, three_parts
from tests.models.ops.compare import relative_error, run


@given(st.floats(min_value=2.0**-100, max_value=2.0**120, width=32), st.sampled_from([-1.0, 1.0]))
def test_three_parts_are_the_whole(size: float, sign: float) -> None:
    x = torch.tensor([size * sign])
    assert sum(part.double() for part in three_parts(x)).item() == x.item()


@pytest.mark.parametrize(("num_tokens", "hidden", "num_outputs"), [(40, 64, 8), (1, 3, 1), (7, 129, 5), (0, 8, 3)])
def test_in_parts_is_as_exact_as_float32(num_tokens: int, hidden: int, num_outputs: int) -> None:
    # Products are exact in both; sums of float32 numbers are off by 2^-24 of the largest a few times. The gradient of x
    # is rounded to bfloat16, by 2^-9 of itself.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, hidden, generator=generator).bfloat16()
    weight = torch.randn(num_outputs, hidden, generator=generator)
    exact, (of_x, of_weight) = run(lambda x, w: x @ w.T, [x.double(), weight.double()])
    for linear in linear_in_parts, float32_linear:  # the second is plain float32 here
        actual, gradients = run(linear, [x, weight])
        assert actual.dtype == gradients[1].dtype == torch.float32
        assert gradients[0].dtype == torch.bfloat16
        assert relative_error(actual, exact) < 1e-6
        assert relative_error(gradients[1], of_weight) < 1e-6
        assert relative_error(gradients[0], of_x) < 2**-8


def test_in_parts_is_what_torch_demands_of_an_operation() -> None:
    x, weight = torch.randn(6, 16).bfloat16().requires_grad_(), torch.randn(4, 16, requires_grad=True)
    torch.library.opcheck(linear_in_parts, (x, weight))
    compiled = torch.compile(linear_in_parts, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight), linear_in_parts(x, weight))


def test_what_is_not_finite_stays_so() -> None:
    x, weight = torch.ones(1, 2).bfloat16(), torch.tensor([[1.0, torch.inf], [1.0, 2.0]])
    out = linear_in_parts(x, weight)[0]
    assert not out[0].isfinite()
    assert out[1] == 3.0


def test_float64_stays_float64() -> None:
    x, weight = torch.randn(3, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    assert torch.equal(float32_linear(x, weight), x @ weight.T)
