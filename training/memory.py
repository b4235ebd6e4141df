"""Peak memory of a GPU by term, without one: what is alive at each moment of a step that could be the worst."""

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
    """Of a stored weight, and of each of Adam's moments and gradients."""
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
    shape, training = model_config(config), config.training
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
        master_bytes=4 if training.master_dtype == "float32" else 2,
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


def _loss_buffers(case: Case) -> tuple[float, float]:
    """(at the worst moment of the loss, kept until its backward pass): logits and their gradient of a chunk, those of
    the chunk before beside them, the head's gradient in float32, and the hidden states around the final norm."""
    shape, tokens, c = case.shape, case.num_tokens, case.c
    vocabulary = shape.vocab_size
    num_chunks = -(-tokens // max(1, _CHUNK_BYTES // (c * vocabulary)))
    chunk = c * vocabulary * -(-tokens // num_chunks)
    kept = 0.0 if case.lora.rank or not case.trains_text else 4.0 * vocabulary * shape.hidden_size
    hidden = tokens * shape.hidden_size * (2 * c + (8 if case.trains_text else 4))  # the norm's, in float32
    return chunk * (3 if num_chunks > 1 else 2) + kept + hidden, kept + hidden


def peak_memory(case: Case) -> tuple[str, dict[str, float]]:
    """The worst moment of a step, and bytes alive then by term.

    Moments: the loss, when all activations are kept; the backward pass of a block of either kind, as late in the model
    as there is one; the root's gradients, when nearly all others are there.
    """
    shape, degrees, c, tokens = case.shape, case.degrees, case.c, case.num_tokens
    whole, trained = sizes(shape, degrees.shard), trained_sizes(case)
    on_rank, m = trained.on_a_rank(degrees), case.master_bytes
    fixed = {"weights" if case.trains_text else "adapters, trained weights": on_rank * m, "moments": on_rank * 2 * m}
    is_sharded = degrees.shard > 1
    # What is frozen lies there as it is computed with: sharded with the rest, of the tower whole on each rank.
    frozen = (0 if case.trains_text else whole.total - whole.visual) * c / degrees.shard
    fixed["frozen weights"] = frozen + (0 if case.trains_tower else whole.visual * c)

    blocks = whole.by_block
    of_units = [c * (dense + experts / degrees.expert) for dense, experts in blocks]
    gathers = is_sharded or case.trains_text  # one process keeps a cast copy, but none of what is frozen
    root = c * whole.root if gathers else 0.0
    if is_sharded:
        neighbours = max(a + b for a, b in zip(of_units, of_units[1:] or [0.0]))
    unit_trained = 4 * max(dense + experts / degrees.expert for dense, experts in trained.by_block)
    if trained.total and case.trains_text:
        unit_gradients = unit_trained * (c / 4 + (1 if is_sharded else 0))
    else:
        unit_gradients = 0.0

    kept = [tokens * kept_by_layer(shape, kind, case.mode, degrees, case.imbalance, c) for kind in layer_types(shape)]
    vision = 0.0
    if case.patches and shape.vision is not None:
        vision = case.patches * shape.hidden_size * c / shape.vision.patches_per_token
        if case.trains_tower:
            vision += case.patches * shape.vision.depth * kept_by_vision_block(shape.vision, case.mode, c)
            vision += c * whole.visual / (shape.vision.depth + 1)
    of_tower_gathered = c * whole.visual if case.trains_tower and not is_sharded else 0.0
    at_loss, after_loss = _loss_buffers(case)
    all_gradients = on_rank * m
    from_before = all_gradients if case.accumulation > 1 else 0.0
    rotary = tokens * shape.rotary_dim * 4

    moments: dict[str, dict[str, float]] = {
        "the loss": {
            "gradients": from_before,
            "gathered weights": root + of_tower_gathered + (of_units[-1] if is_sharded else gathers * sum(of_units)),
            "activations": sum(kept),
            "loss": at_loss,
        }
    }
    for kind in set(layer_types(shape)):
        index = max(i for i, each in enumerate(layer_types(shape)) if each == kind)
        later = sum(dense + experts / degrees.expert for dense, experts in trained.by_block[index + 1 :])
        moments[f"the backward pass of block {index}"] = {
            "gradients": max(from_before, later * m / (degrees.shard / degrees.expert)) + unit_gradients,
            "gathered weights": root
            + of_tower_gathered
            + (neighbours + of_units[-1] if is_sharded else gathers * sum(of_units[: index + 1])),
            "activations": sum(kept[:index]),
            "recomputed, and gradients of activations": tokens
            * backward_of_layer(shape, kind, case.mode, degrees, case.imbalance, c),
            "loss": (c * shape.vocab_size * shape.hidden_size if after_loss and case.trains_text else 0),
        }
    if case.trains_text:
        moments["the root's gradients"] = {
            "gradients": all_gradients + root + (2 * root if is_sharded or case.accumulation > 1 else 0),
            "gathered weights": root + of_tower_gathered,
        }
    exchange = 0.0
    if degrees.expert > 1:  # copies on their way, of one layer
        exchange = 2 * tokens * copies_of_a_token(shape, degrees.expert) * case.imbalance * shape.hidden_size * c
    for name, terms in moments.items():
        terms["vision"] = vision
        terms["exchange"] = exchange if "block" in name else 0.0
        terms["rotary angles"] = rotary
    worst = max(moments, key=lambda name: sum(moments[name].values()))
    return worst, {name: size for name, size in (fixed | moments[worst]).items() if size}
