"""The gradient norm against float64, at sizes and in dtypes where a plain running sum is off."""

import pytest
import torch

from tests.distributed import needs_gpus
from training.gradients import gradient_norm


def parameters_with(*gradients: torch.Tensor) -> list[torch.nn.Parameter]:
    parameters = []
    for gradient in gradients:
        parameters.append(torch.nn.Parameter(torch.empty_like(gradient)))
        parameters[-1].grad = gradient
    return parameters


def check(device: str, sizes: list[int], dtype: torch.dtype, scale: float) -> None:
    generator = torch.Generator(device).manual_seed(0)
    gradients = [(torch.randn(n, generator=generator, device=device) * scale).to(dtype) for n in sizes]
    exact = sum(float(gradient.double().square().sum()) for gradient in gradients) ** 0.5
    assert gradient_norm(parameters_with(*gradients)).total.item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [[1], [7, 100_003, 1], [6_300_000], [20_000_000, 3]], ids=str)
def test_within_1e_6_of_float64(sizes: list[int], dtype: torch.dtype) -> None:
    check("cpu", sizes, dtype, 1e-3)


def test_of_two_dtypes() -> None:
    # As of weights in bfloat16 beside routers and decays, which are float32 always.
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(n, generator=generator) for n in (3, 6_300_000)]
    gradients[1] = gradients[1].bfloat16()
    exact = sum(float(gradient.double().square().sum()) for gradient in gradients) ** 0.5
    assert gradient_norm(parameters_with(*gradients)).total.item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_of_numbers_whose_squares_are_small_or_large(scale: float) -> None:
    check("cpu", [5000, 3], torch.float32, scale)


def test_what_has_no_gradient_or_no_numbers_adds_nothing() -> None:
    parameters = parameters_with(torch.tensor([3.0, 4.0]), torch.empty(0), torch.zeros(2, 0, 3))
    parameters.append(torch.nn.Parameter(torch.ones(5)))
    assert gradient_norm(parameters).total.item() == 5.0


def test_of_a_gradient_that_is_not_contiguous() -> None:
    parameters = parameters_with(torch.arange(6.0).view(2, 3))
    parameters[0].grad = torch.arange(6.0).view(3, 2).T
    assert gradient_norm(parameters).total.item() == pytest.approx(55**0.5, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [[1, 5], [64_000_000, 100_003], [512_000_000]], ids=str)
@pytest.mark.parametrize("needs", [pytest.param(None, marks=needs_gpus(1))])
def test_within_1e_6_of_float64_on_a_gpu(sizes: list[int], dtype: torch.dtype, needs: None) -> None:
    check("cuda", sizes, dtype, 1e-3)
