"""Expert parallelism: each rank of the `ep` axis holds some of the experts; rows travel to them and back."""

import functools

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from models.ops.grouped_experts import grouped_experts
from models.ops.permute import reorder
from models.qwen35_moe.moe import Experts

# Shapes: R rows routed by this rank, S rows received by it, E experts, P ranks of the ep axis, H hidden.


def apply_expert_parallel(experts: Experts, mesh: DeviceMesh) -> None:
    """Spreads the stacked experts over `mesh` (one axis), contiguous runs of E / P each, and reroutes the forward."""
    for name, parameter in list(experts.named_parameters()):
        sharded = distribute_tensor(parameter.data, mesh, [Shard(0)], src_data_rank=None)
        experts.register_parameter(name, torch.nn.Parameter(sharded))
    experts.forward = functools.partial(_forward, experts, mesh.get_group())  # type: ignore[method-assign]


@torch.compiler.disable  # the numbers of rows that travel are known to the host alone
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
    splits = torch.stack([sent_counts, received_counts]).view(2, num_ranks, -1).sum(dim=-1)
    sent, received = splits.cpu().tolist()  # a copy that activation checkpointing sees, too
    rows = all_to_all_single_autograd(rows, received, sent, group)  # [S, H], sorted by (source, expert)
    weights = all_to_all_single_autograd(weights, received, sent, group)  # [S]

    local_expert = torch.arange(sent_counts.numel() // num_ranks, device=rows.device).repeat(num_ranks)
    local_expert = local_expert.repeat_interleave(received_counts, output_size=sum(received))  # [S]
    order = local_expert.argsort(stable=True)
    inverse = order.argsort()
    local_offsets = received_counts.view(num_ranks, -1).sum(dim=0).cumsum(0, dtype=torch.int32)  # [E / P]
    gate_up_proj, down_proj = _local(experts.gate_up_proj), _local(experts.down_proj)
    rows, weights = reorder(rows, order, inverse), reorder(weights, order, inverse)
    rows = grouped_experts(rows, gate_up_proj, down_proj, weights, local_offsets)
    return all_to_all_single_autograd(reorder(rows, inverse, order), sent, received, group)


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's experts: FSDP has gathered the parameter over efsdp; what is left is the axis `ep`."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
