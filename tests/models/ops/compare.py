"""What the tests of the operations share: errors, gradients under a random cotangent, and the operations that ran."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest deviation, relative to the largest expected magnitude (absolute where all is expected zero)."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if expected.numel() == 0:
        return 0.0
    largest = expected.double().abs().max().item()
    return (actual.double() - expected.double()).abs().max().item() / (largest or 1.0)


def run(
    function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], seed: int = 0
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """function(*inputs) and the gradient of each input, under a random cotangent that depends on `seed` alone."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return out.detach(), list(torch.autograd.grad(out, inputs, cotangent.to(out)))


def assert_close(
    actual: tuple[torch.Tensor, list[torch.Tensor]], expected: tuple[torch.Tensor, list[torch.Tensor]], tolerance: float
) -> None:
    """The outputs and every gradient of two `run`s agree within `tolerance`, relative to each tensor's largest."""
    errors = [relative_error(a, e) for a, e in zip([actual[0], *actual[1]], [expected[0], *expected[1]], strict=True)]
    assert max(errors) <= tolerance, errors  # the output's, then each gradient's; not a number fails too


class OperationLog(TorchDispatchMode):
    """Records each ATen operation that runs: its name, and the number of elements of its largest output."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        self.sizes.append(max((x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)), default=0))
        return out
