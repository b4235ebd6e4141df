"""Peak memory of a GPU by term, without one: what is alive at each moment of a step that could be the worst."""

import itertools
from dataclasses import dataclass

from config.options import Config, Lora
from config.reading import model_config
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.parts import OF_TEXT, frozen_parts
from parallelisms.degrees import Degrees, work_out_degrees
from training.formulas import (
    NO_LORA,
    Sizes,
    adapter_sizes,
    backward_of_layer,
    copies_of_a_token,
    kept_by_layer,
    kept_by_vision_block,
    layer_types,
    sizes,
)

GIB = 2**30
_BYTES = {"float32": 4, "bfloat16": 2}
_CHUNK_BYTES = 2**31  # of logits: models/ops/linear_cross_entropy.py


@dataclass(frozen=True)
class Case:
    """All that memory and time depend on."""

    shape: ModelConfig
    degrees: Degrees
    mode: str
    """Of activation checkpointing."""
    num_tokens: int
    """Of a rank in a micro-batch."""
    mean_document: float
    """The length of a token's document, on the average over tokens."""
    longest_document: int
    accumulation: int
    """Micro-batches a rank and step."""
    master_bytes: int
    """Of a stored weight and its gradient."""
    state_bytes: int
    """Of each of Adam's moments."""
    trains_text: bool = True
    trains_tower: bool = True
    partly_frozen: bool = False
    """Parts of the text are, not all: they are counted as if they trained."""
    lora: Lora = NO_LORA
    imbalance: float = 1.0
    """Copies and rows that the fullest rank of `ep` receives, over the mean."""
    patches: int = 0
    """Of the fullest micro-batch."""
    frames: tuple[int, ...] = ()
    """Patches of each frame of a rank's step."""
    compiled: bool = True
    c: int = 2
    """Bytes of the compute dtype, bfloat16."""


def case_of(
    config: Config,
    world_size: int,
    documents: tuple[int, ...] = (),
    imbalance: float = 1.0,
    patches: int = 0,
    frames: tuple[int, ...] = (),
) -> Case:
    """What a configuration is for so many GPUs. documents: the lengths that rows are cut into, over and over; none: a
    row is one. Raises UserError for degrees that do not fit."""
    shape, training, state = model_config(config), config.training, config.optimizer.state_dtype
    degrees = work_out_degrees(config.parallelism, training, shape, world_size)
    lengths = [min(length, training.sequence_length) for length in documents] or [training.sequence_length]
    frozen = set(frozen_parts(config.model.freeze, config.mtp.train))
    rows = degrees.num_data_ranks * training.local_batch_size
    return Case(
        shape=shape,
        degrees=degrees,
        mode=config.activation_checkpoint.mode,
        num_tokens=training.local_batch_size * training.sequence_length // degrees.context,
        mean_document=sum(length**2 for length in lengths) / sum(lengths),
        longest_document=max(lengths),
        accumulation=max(1, -(-training.global_batch_size // rows)),
        master_bytes=_BYTES[training.master_dtype],
        state_bytes=_BYTES[training.master_dtype if state == "auto" else state],
        partly_frozen=config.mtp.train != "head" and bool(frozen & set(OF_TEXT)) and not frozen.issuperset(OF_TEXT),
        trains_text=not config.lora.rank and not ("text" in frozen or frozen.issuperset(OF_TEXT)),
        trains_tower=shape.vision is not None and not config.lora.rank and "vision" not in frozen,
        lora=config.lora,
        imbalance=imbalance,
        patches=patches,
        frames=frames,
        compiled=config.compile.enable,
    )


def trained_sizes(case: Case) -> Sizes:
    """Of the parameters that train."""
    if case.lora.rank:
        return adapter_sizes(case.shape, case.lora, case.degrees.shard)
    whole, nothing = sizes(case.shape, case.degrees.shard), ((0, 0),)
    if not case.trains_text:
        whole = Sizes(nothing, 0, 0, whole.visual)
    return whole if case.trains_tower else Sizes(whole.by_block, whole.root, whole.outside, 0)


def _loss_buffers(case: Case) -> float:
    """At the worst moment of the loss: logits and their gradient of a chunk, those of the chunk before beside them, the
    head's gradient in float32, and the hidden states around the final norm."""
    shape, tokens, c = case.shape, case.num_tokens, case.c
    num_chunks = -(-tokens // max(1, _CHUNK_BYTES // (c * shape.vocab_size)))
    chunk = c * shape.vocab_size * -(-tokens // num_chunks)
    head = 4 * shape.vocab_size * shape.hidden_size if case.trains_text else 0
    hidden = tokens * shape.hidden_size * (2 * c + (8 if case.trains_text else 4))  # the norm's, in float32
    angles = tokens * shape.rotary_dim * 4
    return chunk * (3 if num_chunks > 1 else 2) + head + hidden + angles


def peak_memory(case: Case) -> tuple[str, dict[str, float]]:
    """The worst moment of a step, and bytes alive then by term.

    Moments: the loss, when all activations are kept; the backward pass of a block of either kind, as late in the model
    as there is one; the root's gradients, when nearly all others are there.
    """
    shape, degrees, c, types = case.shape, case.degrees, case.c, list(layer_types(case.shape))
    whole, trained = sizes(shape, degrees.shard), trained_sizes(case)
    is_sharded, trains = degrees.shard > 1, case.trains_text
    of_head = c * shape.vocab_size * shape.hidden_size if trains else 0.0
    has_dense, has_experts = in_units(case)
    root = c * whole.root * has_dense
    tower = c * whole.visual if case.trains_tower and has_dense and not is_sharded else 0.0
    units = [c * (dense * has_dense + experts / degrees.expert * has_experts) for dense, experts in whole.by_block]
    # The last block stays gathered, and while one computes so is the next; one process keeps all.
    two = max(map(sum, itertools.pairwise([*units, 0.0]))) + units[-1]

    gradients = case.master_bytes * trained.on_a_rank(degrees)
    before = gradients if case.accumulation > 1 else 0.0  # of the micro-batches before
    # Of one block, before they are reduced: as computed, and in float32, which for one process are those that it keeps.
    unreduced = units[0] * (1 + 4 / c * is_sharded) if trains else 0.0
    kept = [_kept(case, kind) for kind in types]

    def activations(number: int) -> dict[str, float]:
        """Of so many blocks, by kind."""
        names = {kind: f"activations, {kind.replace('_', ' ')}, {case.mode}" for kind in types}
        return {name: sum(kept[i] for i in range(number) if types[i] == kind) for kind, name in names.items()}

    moments = {
        "the loss": {
            "gradients": before,
            "gathered weights": root + tower + (units[-1] if is_sharded else sum(units)),
            **activations(len(types)),
            "loss: logits, the head's gradient": _loss_buffers(case),
        }
    }
    for kind in dict.fromkeys(types):
        index = len(types) - 1 - types[::-1].index(kind)
        later = sum(dense + experts for dense, experts in trained.by_block[index + 1 :]) * case.master_bytes
        alive = backward_of_layer(shape, kind, case.mode, degrees, case.imbalance, c)
        moments[f"the backward pass of block {index}, {kind.replace('_', ' ')}"] = {
            "gradients": max(before, later / degrees.shard) + unreduced + of_head,
            "gathered weights": root + tower + (two if is_sharded else sum(units[: index + 1])),
            **activations(index),
            "recomputed, gradients of activations": case.num_tokens * alive,
            "exchange buffers": _exchange(case),
        }
    if trains:  # of the root once as computed and, where they are reduced or added up, once in float32
        computed = c * whole.root
        in_float32 = 4 / c * computed if is_sharded or case.accumulation > 1 else 0.0
        moments["the root's gradients"] = {
            "gradients": gradients + computed * has_dense + in_float32,
            "gathered weights": root + tower,
        }
    worst = max(moments, key=lambda name: sum(moments[name].values()))
    terms = _lasting(case) | moments[worst] | {"vision": _vision(case)}
    return worst, {name: size for name, size in terms.items() if size}


def in_units(case: Case) -> tuple[bool, bool]:
    """Whether dense weights, and experts, are in units of FSDP, which gathers or casts them: not what is whole on its
    rank and stored as it is computed with (parallelize.py)."""
    degrees = case.degrees
    needs_no_cast = bool(case.lora.rank) or not case.trains_text or case.master_bytes == case.c
    if degrees.replicate > 1 and case.trains_text:
        return True, True
    return not needs_no_cast or degrees.shard > 1, not needs_no_cast or degrees.shard > degrees.expert


def _kept(case: Case, kind: str) -> float:
    return case.num_tokens * kept_by_layer(case.shape, kind, case.mode, case.degrees, case.imbalance, case.c)


def _lasting(case: Case) -> dict[str, float]:
    """What is there from step to step."""
    whole, trained = sizes(case.shape, case.degrees.shard), trained_sizes(case).on_a_rank(case.degrees)
    # What is frozen lies there as it is computed with: sharded with the rest, of the tower whole on each rank.
    frozen = 0 if case.trains_text else (whole.total - whole.visual) * case.c / case.degrees.shard
    frozen += 0 if case.trains_tower else whole.visual * case.c
    name = "adapters" if case.lora.rank else "weights"
    moments = 2 * trained * case.state_bytes
    return {name: trained * case.master_bytes, "moments": moments, "frozen weights": frozen}


LASTING = ("weights", "adapters", "moments", "frozen weights")


def _vision(case: Case) -> float:
    """Features; and of a tower that trains, activations and the weights of a block."""
    vision = case.shape.vision
    if vision is None or not case.patches:
        return 0.0
    features = case.patches * case.shape.hidden_size * case.c / vision.patches_per_token
    if not case.trains_tower:
        return features
    weights = case.c * sizes(case.shape, case.degrees.shard).visual / (vision.depth + 1)
    return features + weights + case.patches * vision.depth * kept_by_vision_block(vision, case.mode, case.c)


def _exchange(case: Case) -> float:
    """Copies on their way to their experts and back, of one block."""
    if case.degrees.expert == 1:
        return 0.0
    copies = case.num_tokens * copies_of_a_token(case.shape, case.degrees.expert) * case.imbalance
    return 2 * copies * case.shape.hidden_size * case.c
