"""Expert parallelism: each rank of the `ep` axis holds some of the experts; rows travel to them and back."""

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from models.ops.grouped_experts import grouped_experts
from models.ops.permute import reorder
from models.qwen35_moe.moe import Experts

# Shapes: R rows routed by this rank, S rows received by it, E experts, P ranks of the ep axis, H hidden.


def apply_expert_parallel(experts: Experts, mesh: DeviceMesh) -> None:
    """Spreads the stacked experts over `mesh` (one axis), contiguous runs of E / P each, and reroutes the forward.

    It returns while the results travel; `experts.arrived` waits for them.
    """
    for name, parameter in list(experts.named_parameters()):
        sharded = distribute_tensor(parameter.data, mesh, [Shard(0)], src_data_rank=None)
        experts.register_parameter(name, torch.nn.Parameter(sharded))
    experts.forward = functools.partial(_forward, experts, mesh.get_group())  # type: ignore[method-assign]
    experts.arrived = _arrived  # type: ignore[method-assign]


@torch.library.custom_op("qwen35_moe::splits", mutates_args=())
def _splits(sent_counts: torch.Tensor, received_counts: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """How many rows go to each rank and come from it, int64 [2, P] on the host, which waits for the device here.

    An operation of its own, so that activation checkpointing keeps the result: recomputation does not wait again.
    """
    return torch.stack([sent_counts, received_counts]).view(2, num_ranks, -1).sum(dim=-1).cpu()


def _forward(
    experts: Experts, group: dist.ProcessGroup, rows: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """As `Experts.forward`: rows [R, H] sorted by expert, weights float32 [R], offsets int32 [E] -> [R, H].

    One small all-to-all tells how many rows come, one brings them, a small one their weights, one takes the results
    back; one host synchronisation. A rank that receives no rows takes part like any other.
    """
    num_ranks = dist.get_world_size(group)
    sent_counts = offsets.diff(prepend=offsets.new_zeros(1))  # [E], destination-major: experts are contiguous
    even = [sent_counts.numel() // num_ranks] * num_ranks
    # [P * E/P], source-major. The functional form, so that activation checkpointing sees it and need not repeat it.
    received_counts = all_to_all_single_autograd(sent_counts, even, even, group)
    sent, received = _splits(sent_counts, received_counts, num_ranks).tolist()
    rows = all_to_all_single_autograd(rows, received, sent, group)  # [S, H], sorted by (source, expert)
    weights = all_to_all_single_autograd(weights, received, sent, group)  # [S]

    local_expert = torch.arange(sent_counts.numel() // num_ranks, device=rows.device).repeat(num_ranks)
    local_expert = local_expert.repeat_interleave(received_counts, output_size=sum(received))  # [S]
    order = local_expert.argsort(stable=True)
    inverse = order.argsort()
    local_offsets = received_counts.view(num_ranks, -1).sum(dim=0).cumsum(0, dtype=torch.int32)  # [E / P]
    gate_up_proj, down_proj = _local(experts.gate_up_proj), _local(experts.down_proj)
    rows, weights = reorder(rows, order, inverse), reorder(weights, order, inverse)
    rows = grouped_experts(rows, gate_up_proj, down_proj, weights, local_offsets, experts.activation)
    return all_to_all_single_autograd(reorder(rows, inverse, order), sent, received, group)


def _arrived(rows: torch.Tensor) -> torch.Tensor:
    return _Arrived.apply(rows)


class _Arrived(torch.autograd.Function):
    """The identity. What is launched after it runs when the collective that makes `rows` has ended."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        return rows.trigger_wait() if isinstance(rows, AsyncCollectiveTensor) else rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's experts: FSDP has gathered the parameter over efsdp; what is left is the axis `ep`."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
