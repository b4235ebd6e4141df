"""How many processes share what: the degrees of [parallelism] worked out for a number of processes, and checked.

Without torch, as the check before a run needs them too.
"""

from typing import NamedTuple

from config.options import Parallelism
from errors import UserError
from models.qwen35_moe.config import ModelConfig


class Degrees(NamedTuple):
    """replicate * shard = number of processes; expert divides shard."""

    replicate: int
    """Groups of processes that each hold the whole model between them."""
    shard: int
    """Processes over which FSDP shards."""
    expert: int
    """Processes over which the experts are spread."""

    @property
    def num_data_ranks(self) -> int:
        """How many ranks read data of their own: all of them."""
        return self.replicate * self.shard


def work_out_degrees(parallelism: Parallelism, shape: ModelConfig, world_size: int) -> Degrees:
    """The degrees for `world_size` processes. Raises UserError for those that do not fit them or the model."""
    replicate, shard = parallelism.data_parallel_replicate_degree, parallelism.data_parallel_shard_degree
    if shard == -1:
        shard = world_size // replicate
    if replicate * shard != world_size:
        raise UserError(
            f"parallelism.data_parallel_replicate_degree = {replicate}, data_parallel_shard_degree = "
            f"{parallelism.data_parallel_shard_degree}: expected a product of {world_size}, the number of processes"
        )
    expert = parallelism.expert_parallel_degree
    if expert == -1:  # the largest that fits; 1 always does
        expert = next(e for e in range(shard, 0, -1) if not _hindrance(e, shard, shape, world_size))
    if hindrance := _hindrance(expert, shard, shape, world_size):
        raise UserError(f"parallelism.expert_parallel_degree = {expert}: {hindrance}")
    return Degrees(replicate, shard, expert)


def _hindrance(expert: int, shard: int, shape: ModelConfig, world_size: int) -> str:
    """Why this expert degree cannot be; empty if it can."""
    if shard % expert:
        return f"expected a divisor of the shard degree {shard} ({world_size} processes)"
    if shape.num_experts % expert:
        return f"expected a divisor of the model's num_experts = {shape.num_experts}"
    if expert > 1:  # each expert's own dimensions are sharded over the rest of the shard degree, evenly or not at all
        sizes = {"2 * moe_intermediate_size": 2 * shape.moe_intermediate_size, "hidden_size": shape.hidden_size}
        for name, size in sizes.items():
            if size % (shard // expert):
                return (
                    f"shard degree {shard} / {expert} = {shard // expert} does not divide the model's "
                    f"{name} = {size}: expected degrees whose quotient does"
                )
    return ""
