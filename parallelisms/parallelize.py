"""parallelize_fn: context parallel -> expert parallel -> activation checkpointing -> compile -> FSDP2, in order."""

import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from models.ops.any_number_of_rows import compile_for_any_number_of_rows
from models.qwen35_moe.init import LocalPart, whole
from models.qwen35_moe.lora import is_adapter
from models.qwen35_moe.model import Qwen35Moe
from models.qwen35_moe.vision import VisionTower
from parallelisms.activation_checkpoint import apply_activation_checkpointing
from parallelisms.context_parallel import (
    exchange_around_mix,
    exchange_behind_tower,
    exchange_next,
    products_that_travel,
)
from parallelisms.expert_parallel import ExpertParallelBlock
from parallelisms.fsdp_copies import lay_out_gradients_without_tables
from parallelisms.mesh import Meshes
from parallelisms.overlap import OVERLAPPING
from parallelisms.reduction import ExchangeAndAddUp, NothingToReduce
from parallelisms.units import Kept, dense_units, head_is_unit, kept_gathered
from torch_private import compute_local_shape_and_global_offset, free_what_was_gathered, set_recompile_limit


def parallelize_fn(
    model: Qwen35Moe,
    meshes: Meshes,
    *,
    compute_dtype: torch.dtype,
    activation_checkpoint: str = "none",
    compile_blocks: bool = False,
    reshard_after_forward: str = "auto",
) -> None:
    """Applies every parallelism to a model on the meta device, in place; give it memory (`to_empty`) afterwards.

    compute_dtype: of parameters and activations inside forward and backward. Gradients are reduced in float32 (float64
    for a float64 model). Raises UserError where FSDP cannot shard the experts evenly.
    """
    if compile_blocks:
        # To the compiler all checkpointed parts are one function, of which it makes 8 graphs by default; what comes
        # after that would run uncompiled. There are more: two kinds of blocks, and at ep > 1 the parts beside the
        # experts, each in training and in validation, with fillers and without.
        set_recompile_limit(32)
    _store_frozen_as(model, compute_dtype)
    context = meshes.context_parallel
    if model.visual is not None:
        if context is not None:
            exchange_behind_tower(model.visual, context)
        _prepare_tower(model.visual, activation_checkpoint, compile_blocks)
    if model.mtp is not None and context is not None:
        exchange_next(model.mtp, context)
    # What is sent early and awaited late is there meanwhile: so not where tokens are shared and memory is short.
    options = None if context is not None and activation_checkpoint == "full" else OVERLAPPING
    for block in model.blocks:
        travelling: list[torch.Size] = []
        if context is not None:
            exchange_around_mix(block, context)
            travelling = products_that_travel(block)
        if meshes.expert_parallel.size() > 1:
            in_parts = ExpertParallelBlock(block, meshes.expert_parallel, meshes.room)
            attending, *others = in_parts.parts(activation_checkpoint)
            apply_activation_checkpointing([attending], activation_checkpoint, travelling)
            apply_activation_checkpointing(others, activation_checkpoint)
            if compile_blocks:
                in_parts.compile(options)
            in_parts.install()
        else:
            apply_activation_checkpointing([(block, "forward")], activation_checkpoint, travelling)
            if compile_blocks:
                block.compile(options=options if context is not None else None)
    kept = kept_gathered(model.config, meshes.degrees, reshard_after_forward, activation_checkpoint)
    apply_fsdp(model, meshes, compute_dtype, kept)


def _store_frozen_as(model: Qwen35Moe, compute_dtype: torch.dtype) -> None:
    """What is frozen needs no master weights: it is stored as it is computed with, which keeps it in memory once."""
    is_float32 = set(model.float32_parameters())
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter not in is_float32:
            parameter.data = parameter.data.to(compute_dtype)


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _frozen_parts(tower: VisionTower) -> list[nn.Module]:
    """What of the tower has nothing to train, so that it needs no unit of FSDP."""
    return [part for part in (*tower.before_merger, tower.merger) if not _trains(part)]


def _prepare_tower(tower: VisionTower, activation_checkpoint: str, compile_blocks: bool) -> None:
    if any(map(_trains, tower.before_merger)):  # else there is no graph, and nothing to recompute
        apply_activation_checkpointing([(block, "forward") for block in tower.blocks], activation_checkpoint)
    if compile_blocks:
        for block in tower.vision_blocks:
            # What is marked is the tensors that arrive here: FSDP makes new ones of a module's inputs. (With
            # `dynamic=True` a first batch with as many patches as channels would be taken for a rule.)
            compiled = compile_for_any_number_of_rows(block.forward, num_others=1)  # all but the frames
            setattr(block, "forward", compiled)  # noqa: B010 (of a method)


def apply_fsdp(model: Qwen35Moe, meshes: Meshes, compute_dtype: torch.dtype, kept: Kept) -> None:
    """Shards the model: one unit a block, or at ep > 1 one for a few (units.py) and one for each block's experts, maybe
    one for the head, and one for the rest; of a vision tower likewise one a block and one for the rest, of what is
    trained.

    Gradients are summed, never averaged: the loss is already divided by the global batch's number of trained tokens.
    The float32 parameters stay outside FSDP, which would round them to `compute_dtype` before the forward sees them;
    `reduce_replicated_gradients` keeps them equal on all ranks. What is frozen of the tower stays outside too, whole on
    each rank: half a billion numbers, which are not worth a collective. So does what is whole on its rank anyway and
    stored as it is computed with: FSDP would copy it and its gradient for nothing.
    """
    lay_out_gradients_without_tables()
    outside = set(model.float32_parameters())
    if model.visual is not None:
        outside |= {parameter for part in _frozen_parts(model.visual) for parameter in part.parameters()}
    blocks, has_expert_units = model.blocks, meshes.expert_parallel.size() > 1
    of_experts = {parameter for block in blocks for parameter in block.mlp.experts.parameters()}
    for name, parameter in model.named_parameters():
        mesh = meshes.expert if has_expert_units and parameter in of_experts else meshes.dense
        is_whole = mesh.size(mesh.ndim - 1) == 1  # replicas do not shard, but add up gradients
        needs_no_cast = parameter.dtype == compute_dtype or is_adapter(name)  # adapters are cast where they are used
        if is_whole and needs_no_cast and (mesh.size() == 1 or not parameter.requires_grad):
            outside.add(parameter)

    nothing_to_reduce = NothingToReduce({each.dtype for each in model.parameters() if each not in outside})
    wide = torch.promote_types(compute_dtype, torch.float32)

    def shard(modules: Sequence[nn.Module], mesh: DeviceMesh, **options: Any) -> None:
        modules = [each for each in modules if each is model or not outside.issuperset(each.parameters())]
        if not modules:
            return
        exchanges = compute_dtype != wide and meshes.shards_within_host(mesh)
        masters = {each.dtype for module in modules for each in module.parameters() if each not in outside}
        # Their gradients are rounded once, as they are added up; but not before replicas' sums. (Of the root these are
        # the whole model's: one that is wider keeps its sums wide.)
        is_rounded = exchanges and masters == {compute_dtype} and mesh.ndim == 1
        # Casting inputs would round the rotary angles; activations have the right dtype from the embedding on.
        policy = MixedPrecisionPolicy(compute_dtype, compute_dtype if is_rounded else wide, cast_forward_inputs=False)
        fully_shard(modules, mesh=mesh, mp_policy=policy, ignored_params=outside, **options)
        unit = cast(FSDPModule, modules[0])
        if mesh.size() == 1:  # nothing to divide, not even by 1, and nothing to add up
            unit.set_custom_reduce_scatter(nothing_to_reduce)
            return
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
        if exchanges:
            unit.set_custom_reduce_scatter(ExchangeAndAddUp(compute_dtype))

    # Weights are freed after the forward pass and gathered again for the backward pass, but for what is kept. The last
    # unit is, with which the backward pass begins at once. What has no backward pass would be kept for good.
    first = _first_with_gradients(model)
    for index, block in enumerate(blocks if has_expert_units else []):
        # Experts alone are sharded over another mesh. The axis ep has cut their dim 0, so efsdp cuts another.
        experts = block.mlp.experts
        rows = {parameter for name, parameter in experts.named_parameters() if not name.endswith("lora_A")}

        def dim_to_cut(parameter: nn.Parameter, rows: set[nn.Parameter] = rows) -> Shard:
            return Shard(1 if parameter in rows else 2)  # not an adapter's rank, which may be small

        free = index < first or (not kept.experts and block is not blocks[-1])
        shard([experts], meshes.expert, shard_placement_fn=dim_to_cut, reshard_after_forward=free)
    units = dense_units(model.config, meshes.degrees.expert, kept.dense)
    for indices in units:
        free = indices[-1] < first or (not kept.dense and indices != units[-1])
        shard([blocks[index] for index in indices], meshes.dense, reshard_after_forward=free)
    if head_is_unit(model.config, meshes.degrees.shard):
        shard([model.lm_head], meshes.dense, reshard_after_forward=False)
        free_what_was_gathered(cast(FSDPModule, model.lm_head))  # the loss is where memory is scarcest
    if model.visual is not None:
        for part in [*model.visual.blocks, model.visual]:
            shard([part], meshes.dense, reshard_after_forward=meshes.degrees.shard > 1)
    shard([model], meshes.dense)
    setattr(model, "nothing_to_reduce", nothing_to_reduce)  # noqa: B010 (of no class; for `begin_micro_batch`)
    if has_expert_units:
        _prefetch_neighbours(model, units)
    for unit in _dense(model, units)[-1]:
        unit.set_modules_to_forward_prefetch(_head(model))
    _gather_nothing_below_gradients(model, units)


def _prefetch_neighbours(model: Qwen35Moe, units: Sequence[range]) -> None:
    """Has each unit gather the next one before it computes, and each block the next one's experts, in both directions.

    Left to itself FSDP gathers a unit when the host comes to it, which is early enough only where the host runs ahead;
    at ep > 1, without room, the host waits in every block for the number of rows that travel.
    """
    dense, experts = _dense(model, units), [_units(block.mlp.experts) for block in model.blocks]
    for unit in _units(model):
        unit.set_modules_to_forward_prefetch([*dense[0], *experts[0]])
    for of_kind in (dense, experts):
        for before, after in itertools.pairwise(of_kind):
            for unit in before:
                unit.set_modules_to_forward_prefetch(after)
            for unit in after:
                unit.set_modules_to_backward_prefetch(before)


def _first_with_gradients(model: Qwen35Moe) -> int:
    """The first block that has a backward pass; the number of blocks if none has."""
    if any(map(_trains, filter(None, [model.visual, model.embed_tokens]))):
        return 0
    return next((index for index, block in enumerate(model.blocks) if _trains(block)), len(model.blocks))


def _gather_nothing_below_gradients(model: Qwen35Moe, units: Sequence[range]) -> None:
    """With a unit's backward pass FSDP gathers what ran before it, also below the first block that trains, where there
    is no backward pass: as in a trunk that is frozen for multi-token prediction, or below a head that alone trains."""
    first = _first_with_gradients(model)
    for unit in _head(model) if first == len(model.blocks) else []:
        unit.set_modules_to_backward_prefetch([unit])
    if not 0 < first < len(model.blocks):
        return
    (of_dense,) = (dense for dense, indices in zip(_dense(model, units), units) if first in indices)
    for unit in [*of_dense, *_units(model.blocks[first].mlp.experts)]:
        unit.set_modules_to_backward_prefetch([unit])  # it is there already; for none FSDP chooses itself


def _dense(model: Qwen35Moe, units: Sequence[range]) -> list[list[FSDPModule]]:
    """Of each unit of blocks the first module, which stands for it; none where it is no unit."""
    return [_units(*(model.blocks[index] for index in indices))[:1] for indices in units]


def _head(model: Qwen35Moe) -> list[FSDPModule]:
    """None where it is no unit."""
    return [] if model.config.tie_word_embeddings else _units(model.lm_head)


def _units(*modules: nn.Module) -> list[FSDPModule]:
    """Those that are units: what is frozen may be none."""
    return [module for module in modules if isinstance(module, FSDPModule)]


def local_region(parameter: torch.Tensor) -> LocalPart:
    """This rank's part of a parameter, or of a state like it, and where it lies in the whole."""
    if not isinstance(parameter, DTensor):
        return whole(parameter)
    shape, start = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), tuple((first, first + size) for first, size in zip(start, shape))


def begin_micro_batch(model: nn.Module, *, is_first: bool, is_last: bool) -> None:
    """Of a step. HSDP: replicas sum their gradients after the last alone; until then each adds up its own. The first
    finds no gradients."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(is_last)
        cast(Any, model).nothing_to_reduce.adds_up = not is_first


@torch.no_grad()
def reduce_replicated_gradients(parameters: list[nn.Parameter], shares: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """Sums the gradients of the parameters outside FSDP over all data-parallel ranks, in one flat all-reduce.

    Those that are not trained are passed over. Call once a step, after the last micro-batch. Each rank's `shares` [N]
    travel along: returns their sums [N], as of the loss, so that every rank knows whether all are finite.
    """
    if mesh.size() == 1:
        return shares
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    assert len(gradients) == len(trained), "every block's router and decay parameters take part in every step"
    flat = torch.cat([gradient.flatten() for gradient in gradients] + [shares])
    dist.all_reduce(flat, group=mesh.get_group())
    *parts, sums = flat.split([gradient.numel() for gradient in gradients] + [len(shares)])
    views = [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
    if gradients:
        torch._foreach_copy_(gradients, views)  # in a few launches, not a hundred
    return sums
