"""How many processes share what: the degrees of [parallelism] worked out for a number of processes, and checked.

Without torch, as the check before a run needs them too.
"""

from dataclasses import replace
from typing import NamedTuple

from config.options import Parallelism, Training
from errors import UserError
from models.qwen35_moe.config import FULL, LINEAR, ModelConfig


class Degrees(NamedTuple):
    """replicate * shard = number of processes; expert divides shard, context the number of processes."""

    replicate: int
    """Groups of processes that each hold the whole model between them."""
    shard: int
    """Processes over which FSDP shards."""
    expert: int
    """Processes over which the experts are spread."""
    context: int = 1
    """Processes that share the tokens of a micro-batch."""

    @property
    def num_data_ranks(self) -> int:
        """How many read data of their own: ranks, or groups of ranks that share it."""
        return self.replicate * self.shard // self.context


def work_out_degrees(parallelism: Parallelism, training: Training, shape: ModelConfig, world_size: int) -> Degrees:
    """The degrees for `world_size` processes. Raises UserError for those that do not fit them, the model, the rows."""
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
    context = parallelism.context_parallel_degree
    if hindrance := _hindrance_of_context(context, training, shape, world_size):
        raise UserError(f"parallelism.context_parallel_degree = {context}: {hindrance}")
    return Degrees(replicate, shard, expert, context)


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


def _hindrance_of_context(context: int, training: Training, shape: ModelConfig, world_size: int) -> str:
    """Why this context degree cannot be; empty if it can."""
    if world_size % context:
        return f"expected a divisor of {world_size}, the number of processes"
    heads = {}  # each rank has as many
    has_full = FULL in shape.layer_types or shape.mtp_num_hidden_layers > 0  # whose layer has full attention always
    if has_full:
        heads["num_attention_heads"] = shape.num_attention_heads
    if LINEAR in shape.layer_types:  # whose value heads are a multiple of its key heads
        heads["linear_num_key_heads"] = shape.linear_num_key_heads
    for name, number in heads.items():
        if number % context:
            return f"expected a divisor of the model's {name} = {number}"
    keys = shape.num_key_value_heads
    if has_full and keys % context and context % keys:
        return f"expected a divisor or a multiple of the model's num_key_value_heads = {keys}"
    num_tokens = training.local_batch_size * training.sequence_length
    if num_tokens % context:
        return f"expected a divisor of training.local_batch_size * sequence_length = {num_tokens}"
    return ""


def shape_on_a_rank(shape: ModelConfig, context: int) -> ModelConfig:
    """The model's shape with as many heads as attention of either kind sees on a rank. (A kind that the model lacks may
    have numbers that `context` does not divide: then about as many.)"""
    keys = max(shape.num_key_value_heads // context, 1)
    linear_keys = max(shape.linear_num_key_heads // context, 1)
    return replace(
        shape,
        num_attention_heads=max(shape.num_attention_heads // context // keys, 1) * keys,
        num_key_value_heads=keys,
        linear_num_key_heads=linear_keys,
        linear_num_value_heads=shape.linear_num_value_heads // shape.linear_num_key_heads * linear_keys,
    )
