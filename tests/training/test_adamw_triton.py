"""The kernel that updates all tensors at once against plain PyTorch: dtypes, sizes and addresses of any kind."""

import pytest
import torch

from tests.distributed import needs_gpus
from training.optimizer import Hyperparameters, Tensors, adamw_updates

SIZES = [1, 15, 16, 4096, 32768, 32769, 100_003, 1 << 20, 0]
HYPERPARAMETERS = Hyperparameters(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def tensors(dtypes: tuple[torch.dtype, ...], shift: int) -> list[Tensors]:
    """Each `shift` numbers behind the address that memory was given out at."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for size in SIZES:
        numbers = [torch.randn(size + shift, generator=generator).abs().to(dtype) for dtype in dtypes]
        found.append(Tensors(*(each.cuda()[shift:] for each in numbers)))
    return found


@pytest.mark.parametrize("needs", [pytest.param(None, marks=needs_gpus(1))])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("skips", [None, 0.0, 1.0])
@pytest.mark.parametrize("divisor", [None, 3.0])
@pytest.mark.parametrize(
    "dtypes", [("float32",) * 4, ("bfloat16",) * 4, ("float32", "bfloat16", "bfloat16", "float32")], ids="-".join
)
def test_is_plain_pytorchs(
    dtypes: tuple[str, ...], divisor: float | None, skips: float | None, shift: int, needs: None
) -> None:
    from training.adamw_triton import update

    kinds = tuple(getattr(torch, name) for name in dtypes)
    ours, expected = tensors(kinds, shift), tensors(kinds, shift)
    before = [[x.clone() for x in each] for each in expected]
    corrections = torch.rand(2, len(SIZES), device="cuda") + 0.1
    scalars = [None if value is None else torch.tensor(value, device="cuda") for value in (divisor, skips)]
    update(ours, corrections, *scalars, HYPERPARAMETERS)
    adamw_updates(expected, corrections, *scalars, HYPERPARAMETERS)
    for each, plain, old in zip(ours, expected, before):
        for x, y, z in zip(each, plain, old):
            # Quotients and roots are off by 2 units of the last place, and updates are as large as 1 here; a mean on
            # the other side of a tie is one step of bfloat16 off. Without the decay, say, it would be 1e-4.
            assert torch.allclose(x.float(), y.float(), rtol=2**-7 if x.dtype == torch.bfloat16 else 3e-7, atol=3e-6)
            assert skips != 1.0 or torch.equal(x, z)
    assert skips == 1.0 or not torch.equal(ours[-2].parameter, before[-2][0])
