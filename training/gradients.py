"""One gradient norm over all meshes, and one clip by it."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scales all gradients so that their global 2-norm is at most `max_norm`; returns the norm before, a scalar.

    Parameters may be sharded over different meshes (dense, experts) or plain and replicated: a norm is taken for each
    mesh, where it is reduced over the axes that shard it, and the norms are combined.
    """
    by_mesh: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            by_mesh.setdefault(mesh, []).append(parameter)
    norms = []
    for members in by_mesh.values():
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in members if parameter.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.linalg.vector_norm(torch.stack(norms))
    for members in by_mesh.values():
        torch.nn.utils.clip_grads_with_norm_(members, max_norm, total)
    return total
