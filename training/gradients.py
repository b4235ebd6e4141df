"""One gradient norm over all meshes, and where values that are not finite lie."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from models.ops.has_triton import HAS_TRITON
from models.qwen35_moe.parts import part_of

if HAS_TRITON:
    from training import norms_triton

# On a CPU a norm's running sum is one long chain of additions, and loses 5e-3 of 64 M numbers; of so many 2e-8. The
# kernels of GPUs add up in short chains themselves.
_CHUNK = 1 << 14


class GradientNorm(NamedTuple):
    """The global 2-norm of all gradients, and of what: it can be told which was not finite when they have gone."""

    total: torch.Tensor
    """[] float64, the same on all ranks; off by 1e-6 of it at most."""
    pieces: list[tuple[list[int], torch.Tensor]]
    """Of this rank, on a CPU by dtype: of which parameters, in the order given, and the norm of each piece, float32 or
    wider."""


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter], shards: dist.ProcessGroup | None = None) -> GradientNorm:
    """`shards`: the ranks over which the sharded gradients, which are DTensors, are spread, whatever their meshes:
    dense ones over `fsdp`, experts over `efsdp` and `ep`, which are the same ranks. Plain ones are the same on all.
    """
    gradients = {index: each.grad for index, each in enumerate(parameters) if each.grad is not None}
    totals, pieces = _norms({"all": gradients}, shards)
    return GradientNorm(totals["all"], pieces)


@torch.no_grad()
def gradient_norms(
    named: Iterable[tuple[str, nn.Parameter]], shards: dist.ProcessGroup | None = None
) -> dict[str, torch.Tensor]:
    """The total of each part of the model that has gradients (models/qwen35_moe/parts.py), by its name, in one
    all-reduce. All ranks have the same parts."""
    of_parts: dict[str, dict[int, torch.Tensor]] = {}
    for index, (name, parameter) in enumerate(named):
        if parameter.grad is not None:
            of_parts.setdefault(part_of(name), {})[index] = parameter.grad
    return _norms(of_parts, shards)[0]


_Pieces = list[tuple[list[int], torch.Tensor]]


def _norms(
    groups: dict[str, dict[int, torch.Tensor]], shards: dist.ProcessGroup | None
) -> tuple[dict[str, torch.Tensor], _Pieces]:
    sharded = {
        name: _norms_of_pieces({i: each.to_local() for i, each in group.items() if isinstance(each, DTensor)})
        for name, group in groups.items()
    }
    plain = {
        name: _norms_of_pieces({i: each for i, each in group.items() if not isinstance(each, DTensor)})
        for name, group in groups.items()
    }
    squares = {name: _sum_of_squares(pieces) for name, pieces in sharded.items()}
    if squares and shards is not None and shards.size() > 1:
        device = next((pieces[0][1].device for pieces in sharded.values() if pieces), None)
        of_all = torch.stack([square.to(device) for square in squares.values()])
        dist.all_reduce(of_all, group=shards)
        squares = dict(zip(squares, of_all))
    totals = {name: (square + _sum_of_squares(plain[name])).sqrt() for name, square in squares.items()}
    return totals, [each for pieces in (*sharded.values(), *plain.values()) for each in pieces]


def _sum_of_squares(pieces: _Pieces) -> torch.Tensor:
    """Of this rank's numbers, a float64 scalar."""
    if not pieces:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([norms.double().square().sum() for _, norms in pieces]).sum()


def _norms_of_pieces(tensors: dict[int, torch.Tensor]) -> _Pieces:
    """By kernels of our own on a GPU; else by dtype: so one call of PyTorch's takes all pieces, where a mixture would
    take one a piece."""
    if HAS_TRITON and tensors and all(each.is_cuda and each.dtype != torch.float64 for each in tensors.values()):
        return [(list(tensors), norms_triton.norms(list(tensors.values())))]
    of_dtypes: dict[torch.dtype, list[tuple[int, torch.Tensor]]] = {}
    for index, tensor in tensors.items():
        flat = tensor.detach().flatten()
        pieces = (flat,) if flat.is_cuda else flat.split(_CHUNK)
        of_dtypes.setdefault(tensor.dtype, []).extend((index, piece) for piece in pieces)
    found = []
    for dtype, of_one in of_dtypes.items():
        wide = torch.promote_types(dtype, torch.float32)
        if dtype != wide and not of_one[0][1].is_cuda:
            wide = torch.float64  # what is converted on the way is added up one by one
        norms = torch._foreach_norm([piece for _, piece in of_one], 2, dtype=wide)
        found.append(([index for index, _ in of_one], torch.stack(norms)))
    return found


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def last_nonfinite(tensors: dict[str, torch.Tensor]) -> str | None:
    """ "NAME on rank R" of the last tensor, in the order given, with a value that is not finite on some rank; or None.

    All ranks call it together, with the same names, and get the same answer.
    """
    local = [local_part(tensor) for tensor in tensors.values()]
    return _last_of_ranks(list(tensors), [index for index, t in enumerate(local) if not t.isfinite().all()])


def _last_of_ranks(names: Sequence[str], bad: Iterable[int]) -> str | None:
    last_of_ranks: list[int] = [-1] * dist.get_world_size()
    dist.all_gather_object(last_of_ranks, max(bad, default=-1))
    last = max(last_of_ranks)
    return None if last < 0 else f"{names[last]} on rank {last_of_ranks.index(last)}"


def describe_nonfinite(model: nn.Module, loss: torch.Tensor, norm: GradientNorm) -> str:
    """Where a step went wrong, in words; all ranks together. loss: this rank's; norm: of the model's parameters.

    Of gradients in the model's order, the last is the one that the backward pass reached first: from there it went to
    all before. A sharded gradient lies on another rank than its cause.
    """
    of_loss = last_nonfinite({"not finite": loss})
    bad = [indices[at] for indices, norms in norm.pieces for at in (~norms.isfinite()).nonzero().flatten().tolist()]
    of_gradients = _last_of_ranks([name for name, _ in model.named_parameters()], bad)
    return f"loss {of_loss or 'finite'}, gradient norm {norm.total.item()}, first in the backward pass: {of_gradients}"
