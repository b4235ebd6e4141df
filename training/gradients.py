"""One gradient norm over all meshes, and where values that are not finite lie."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from models.qwen35_moe.parts import part_of

# On a CPU a norm's running sum is one long chain of additions, and loses 5e-3 of 64 M numbers; of so many 2e-8. The
# kernels of GPUs add up in short chains themselves.
_CHUNK = 1 << 14


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter], shards: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The global 2-norm of all gradients, a float64 scalar, the same on all ranks; off by 1e-6 of it at most.

    `shards`: the ranks over which the sharded gradients, which are DTensors, are spread, whatever their meshes: dense
    ones over `fsdp`, experts over `efsdp` and `ep`, which are the same ranks. Plain gradients are the same on all.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return _norms({"all": gradients}, shards)["all"]


@torch.no_grad()
def gradient_norms(
    named: Iterable[tuple[str, nn.Parameter]], shards: dist.ProcessGroup | None = None
) -> dict[str, torch.Tensor]:
    """The same of each part of the model that has gradients (models/qwen35_moe/parts.py), by its name, in one
    all-reduce. All ranks have the same parts."""
    of_parts: dict[str, list[torch.Tensor]] = {}
    for name, parameter in named:
        if parameter.grad is not None:
            of_parts.setdefault(part_of(name), []).append(parameter.grad)
    return _norms(of_parts, shards)


def _norms(groups: dict[str, list[torch.Tensor]], shards: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
    sharded = {name: [each.to_local() for each in group if isinstance(each, DTensor)] for name, group in groups.items()}
    plain = {name: [each for each in group if not isinstance(each, DTensor)] for name, group in groups.items()}
    squares = {name: _sum_of_squares(group) for name, group in sharded.items()}
    if squares and shards is not None and shards.size() > 1:
        device = next((group[0].device for group in sharded.values() if group), None)
        of_all = torch.stack([square.to(device) for square in squares.values()])
        dist.all_reduce(of_all, group=shards)
        squares = dict(zip(squares, of_all))
    return {name: (square + _sum_of_squares(plain[name])).sqrt() for name, square in squares.items()}


def _sum_of_squares(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Of this rank's numbers, a float64 scalar."""
    of_dtypes: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        of_dtypes.setdefault(tensor.dtype, []).append(tensor.detach().flatten())
    if not of_dtypes:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([_sum_of_squares_of_one_dtype(pieces) for pieces in of_dtypes.values()]).sum()


def _sum_of_squares_of_one_dtype(pieces: list[torch.Tensor]) -> torch.Tensor:
    """So a GPU has one kernel for all pieces, where a mixture would take one a piece."""
    wide = torch.promote_types(pieces[0].dtype, torch.float32)
    if not pieces[0].is_cuda:
        pieces = [chunk for piece in pieces for chunk in piece.split(_CHUNK)]
        if pieces[0].dtype != wide:
            wide = torch.float64  # what is converted on the way is added up one by one
    return torch.stack(torch._foreach_norm(pieces, 2, dtype=wide)).double().square().sum()


def last_nonfinite(tensors: dict[str, torch.Tensor | None]) -> str | None:
    """ "NAME on rank R" of the last tensor, in the order given, with a value that is not finite on some rank; or None.

    All ranks call it together, with the same names, and get the same answer. Of gradients in the model's order, the
    last is the one that the backward pass reached first: from there it went to all before.
    """
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors.values()]
    bad = [index for index, t in enumerate(local) if t is not None and not t.isfinite().all()]
    last_of_ranks: list[int] = [-1] * dist.get_world_size()
    dist.all_gather_object(last_of_ranks, max(bad, default=-1))
    last = max(last_of_ranks)
    return None if last < 0 else f"{list(tensors)[last]} on rank {last_of_ranks.index(last)}"


def describe_nonfinite(model: nn.Module, loss: torch.Tensor, grad_norm: torch.Tensor) -> str:
    """Where a step went wrong, in words; all ranks together. A sharded gradient lies on another rank than its cause."""
    of_loss = last_nonfinite({"not finite": loss})
    of_gradients = last_nonfinite({name: parameter.grad for name, parameter in model.named_parameters()})
    return f"loss {of_loss or 'finite'}, gradient norm {grad_norm.item()}, first in the backward pass: {of_gradients}"
