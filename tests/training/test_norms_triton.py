"""The kernels that take all tensors' norms at once against float64: dtypes, sizes and addresses of any kind."""

import pytest
import torch

from tests.distributed import needs_gpus
from training.gradients import gradient_norm

pytestmark = needs_gpus(1)
TYPES = [torch.float32, torch.bfloat16]
SIZES = [1, 15, 16, 0, 4096, 4097, 32769, 100_003, 6_300_000]


def tensors(dtype: torch.dtype, shift: int) -> list[torch.Tensor]:
    """Each `shift` numbers behind the address that memory was given out at."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size + shift, generator=generator).to(dtype).cuda()[shift:] for size in SIZES]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_each_is_float64s(dtype: torch.dtype, shift: int) -> None:
    from training.norms_triton import norms

    given = tensors(dtype, shift)
    found, expected = norms(given), torch.stack([each.double().norm() for each in given])
    # Squares and sums of 4 numbers in a row and of 1024 in a tree are rounded to float32: 16 roundings of 6e-8, halved
    # by the root.
    assert torch.allclose(found, expected, rtol=5e-7, atol=0)
    assert torch.equal(found, norms(given))


def test_of_two_dtypes_and_of_what_is_not_contiguous() -> None:
    from training.norms_triton import norms

    numbers = torch.arange(6.0, device="cuda").view(2, 3)
    given = [numbers.bfloat16(), numbers.T, numbers[:, 1]]
    assert torch.allclose(norms(given), torch.tensor([55**0.5, 55**0.5, 17**0.5], device="cuda").double())


def test_a_tensor_that_is_not_finite_is_told_apart() -> None:
    from training.norms_triton import norms

    given = tensors(torch.bfloat16, 0)
    given[6][-1], given[7][5] = torch.nan, torch.inf
    assert (~norms(given).isfinite()).nonzero().flatten().tolist() == [6, 7]


def test_a_gpus_gradients_of_two_dtypes_are_one_piece() -> None:
    parameters = [torch.nn.Parameter(torch.ones(5, device="cuda", dtype=dtype)) for dtype in TYPES]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    ((numbers, found),) = gradient_norm(parameters).pieces
    assert numbers == [0, 1]
    assert torch.equal(found, torch.full([2], 5.0, device="cuda").double().sqrt())
