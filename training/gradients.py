"""One gradient norm over all meshes, and where values that are not finite lie."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def gradient_norm(parameters: list[nn.Parameter]) -> torch.Tensor:
    """The global 2-norm of all gradients, a scalar, the same on all ranks.

    Parameters may be sharded over different meshes (dense, experts) or plain and replicated: a norm is taken for each
    mesh, as foreach operations take no mixture, reduced there over the axes that shard it, and the norms are combined.
    """
    by_mesh: dict[object, list[torch.Tensor]] = {}
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            mesh = gradient.device_mesh if isinstance(gradient, DTensor) else None
            by_mesh.setdefault(mesh, []).append(gradient)
    norms = []
    for gradients in by_mesh.values():
        norm = torch.nn.utils.get_total_norm(gradients)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return torch.linalg.vector_norm(torch.stack(norms))


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
