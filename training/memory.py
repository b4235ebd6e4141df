"""Peak memory of a GPU by term, without one: what is alive at each moment of a step that could be the worst."""

import itertools
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from config.checks import check_layout
from config.options import Config, Lora
from config.reading import model_config
from models.qwen35_moe.config import LINEAR, ModelConfig
from models.qwen35_moe.parts import OF_TEXT, frozen_parts, parts_of_model, single_parts
from parallelisms.degrees import Degrees
from parallelisms.room import Room, room_factor
from parallelisms.units import Kept, dense_units, kept_gathered
from training.formulas import (
    NO_LORA,
    OF_OWN_TOKENS,
    Buffers,
    Sizes,
    backward_of_delta_rule,
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
CHUNK = 64  # tokens of the delta rule's


@dataclass(frozen=True)
class Case:
    """All that memory and time depend on."""

    shape: ModelConfig
    degrees: Degrees
    mode: str
    """Of activation checkpointing."""
    num_tokens: int
    """Of a rank in a micro-batch."""
    documents: tuple[tuple[int, int], ...]
    """Of a micro-batch: (length, how many there are)."""
    accumulation: int
    """Micro-batches a rank and step."""
    master_bytes: int
    """Of a stored weight and its gradient; what is outside FSDP has 4."""
    state_bytes: int
    """Of each of Adam's moments."""
    state_outside: int = 4
    """The same of what is outside FSDP."""
    frozen: frozenset[str] = frozenset()
    """Parts that do not train, single ones (parts.py)."""
    lora: Lora = NO_LORA
    imbalance: float = 1.0
    """Copies and rows that the fullest rank of `ep` receives, over the mean: 1 at ep 1."""
    room: float = 0.0
    """In its buffers, on a GPU; 0: the host asks for their sizes."""
    reshard: str = "auto"
    """`parallelism.reshard_after_forward`."""
    patches: int = 0
    """Of the fullest micro-batch."""
    frames: tuple[tuple[int, int], ...] = ()
    """Of a rank's step: (patches of a frame, how many there are)."""
    compiled: bool = True
    c: int = 2
    """Bytes of the compute dtype."""

    @property
    def mean_document(self) -> float:
        """The length of a token's document, on the average over tokens."""
        return sum(n * length**2 for length, n in self.documents) / sum(n * length for length, n in self.documents)

    @property
    def longest_document(self) -> int:
        return max(length for length, _ in self.documents)

    def num_chunks(self, size: int = CHUNK) -> int:
        """So many tokens long, the last one of each document maybe not."""
        return sum(number * -(-length // size) for length, number in self.documents)

    @property
    def buffers(self) -> Buffers:
        """Of the fullest rank of `ep`."""
        shape, ep = self.shape, self.degrees.expert
        if ep == 1:
            return OF_OWN_TOKENS
        if not self.room:
            return Buffers(copies_of_a_token(shape, ep) * self.imbalance, self.imbalance)
        k = shape.num_experts_per_tok
        copies, rows = Room(self.room).sizes(self.num_tokens, k, ep, shape.num_experts // ep)
        return Buffers(ep * copies / self.num_tokens, rows / (k * self.num_tokens))

    @property
    def kept(self) -> Kept:
        """What stays gathered from the forward pass to the backward pass, of what has one: of a trunk that is frozen in
        part all is counted."""
        return kept_gathered(self.shape, self.degrees, self.reshard, self.mode)

    @cached_property
    def trained(self) -> frozenset[str]:
        """The model's own parts that train."""
        return frozenset() if self.lora.rank else frozenset(parts_of_model(self.shape)) - self.frozen

    @property
    def trains_text(self) -> bool:
        """Whether any of the text's own weights does."""
        return not self.trained.isdisjoint(OF_TEXT)

    @property
    def trains_head(self) -> bool:
        return ("embeddings" if self.shape.tie_word_embeddings else "head") in self.trained

    @property
    def trunk_has_graph(self) -> bool:
        """Whether anything but multi-token prediction trains."""
        return bool(self.lora.rank or self.trained - {"mtp"})

    def sizes(self, trains: bool | None = None) -> Sizes:
        """Of all parameters, or of those that train, or do not."""
        degrees = self.degrees
        return sizes(self.shape, degrees.shard, degrees.expert, self.lora, self.frozen, trains)


def case_of(
    config: Config,
    world_size: int,
    documents: tuple[int, ...] = (),
    imbalance: float = 1.0,
    shape: ModelConfig | None = None,
) -> Case:
    """What a configuration is for so many GPUs. documents: the lengths that rows are cut into, over and over; none: a
    row is one; shape: the model's, if it is known. Raises UserError for what train.py would refuse on any machine."""
    shape, training, state = shape or model_config(config), config.training, config.optimizer.state_dtype
    degrees = check_layout(config, shape, world_size)
    lengths = _cut(training.sequence_length, documents or (training.sequence_length,))
    rows = degrees.num_data_ranks * training.local_batch_size
    return Case(
        shape=shape,
        degrees=degrees,
        mode=config.activation_checkpoint.mode,
        num_tokens=training.local_batch_size * training.sequence_length // degrees.context,
        documents=tuple((length, training.local_batch_size * number) for length, number in lengths.items()),
        accumulation=max(1, -(-training.global_batch_size // rows)),
        master_bytes=_BYTES[training.master_dtype],
        state_bytes=_BYTES[training.master_dtype if state == "auto" else state],
        state_outside=_BYTES["float32" if state == "auto" else state],
        frozen=frozenset(single_parts(frozen_parts(config.model.freeze, config.mtp.train))),
        lora=config.lora,
        imbalance=imbalance if degrees.expert > 1 else 1.0,
        room=room_factor(config.parallelism, "cuda"),
        reshard=config.parallelism.reshard_after_forward,
        compiled=config.compile.enable,
        c=_BYTES["bfloat16" if training.dtype == "auto" else training.dtype],
    )


def _cut(row: int, documents: tuple[int, ...]) -> Counter[int]:
    """How many documents of which length a row has."""
    whole, left = divmod(row, sum(documents))
    found = Counter({length: whole * number for length, number in Counter(documents).items()} if whole else {})
    for length in documents:
        if left > 0:
            found[min(length, left)] += 1
            left -= length
    return found


def _loss_buffers(case: Case) -> float:
    """At the worst moment of the loss: logits and their gradient of a chunk, those of the chunk before beside them, the
    head's gradient in float32, and the hidden states around the final norm."""
    shape, tokens, c = case.shape, case.num_tokens, case.c
    num_chunks = -(-tokens // max(1, _CHUNK_BYTES // (c * shape.vocab_size)))
    chunk = c * shape.vocab_size * -(-tokens // num_chunks)
    width = shape.hidden_size if case.trains_head else case.lora.rank if "head" in case.lora.targets else 0
    head = 4 * shape.vocab_size * width
    hidden = tokens * shape.hidden_size * (2 * c + (8 if case.trains_text else 4))  # the norm's, in float32
    angles = tokens * shape.rotary_dim * 4
    return chunk * (3 if num_chunks > 1 else 2) + head + hidden + angles


def peak_memory(case: Case) -> tuple[str, dict[str, float]]:
    """The worst moment of a step, and bytes alive then by term.

    Moments: the loss, when all activations are kept; the backward pass of a block of either kind, as late in the model
    as there is one; the root's gradients, when nearly all others are there.
    """
    shape, degrees, c, types = case.shape, case.degrees, case.c, list(layer_types(case.shape))
    trained, (dense_of, experts_of) = case.sizes(trains=True), gathered_sizes(case)
    is_sharded = degrees.shard > 1
    # As computed, until the root's are reduced; or, of a unit, as they are reduced, until the next unit's are: in
    # float32 between hosts, and no more within one.
    of_head = shape.vocab_size * shape.hidden_size * (4 if dense_of.head else c) if case.trains_head else 0
    root = c * dense_of.root
    tower = 0.0 if is_sharded else c * dense_of.visual
    units = [c * size for size in dense_of.units(shape, degrees.expert, case.kept.dense)]
    experts = [c / degrees.expert * size for _, size in experts_of.by_block] if degrees.expert > 1 else [0.0]
    # What runs without a graph is freed, and keeps nothing: the trunk, where multi-token prediction alone trains.
    first = 0 if case.trunk_has_graph else len(shape.layer_types)
    starts = [indices.start for indices in dense_units(shape, degrees.expert, case.kept.dense)]
    of_units = units, sum(start < first for start in starts), case.kept.dense
    of_experts = experts, first, case.kept.experts

    def gathered(blocks: int) -> float:
        """While the last of so many blocks computes: what is kept of them, or it and the next one; and the last of all,
        which stays gathered."""
        num_units, total = sum(start < blocks for start in starts), 0.0
        for (of_all, begin, is_kept), end in ((of_units, num_units), (of_experts, blocks)):
            total += (
                sum(of_all[begin:end]) if is_kept else of_all[-1] + max(map(sum, itertools.pairwise([*of_all, 0.0])))
            )
        return total

    at_loss = sum(sum(each[begin:]) if is_kept else each[-1] for each, begin, is_kept in (of_units, of_experts))

    gradients = gradient_bytes(case)
    before = gradients if case.accumulation > 1 else 0.0  # of the micro-batches before
    # Of one unit, before they are reduced: as computed, and in float32, which for one process are those that it keeps.
    unreduced = 0.0
    if dense_of.total or experts_of.total:
        of_block = trained.by_block[0][1] / degrees.expert * bool(experts_of.total) if degrees.expert > 1 else 0.0
        computed = c * (trained.units(shape, degrees.expert, case.kept.dense)[0] * bool(dense_of.total) + of_block)
        unreduced = computed * (1 + 4 / c * is_sharded)
    of_layer = (case.mode, degrees, case.buffers, c)
    of_kind = {kind: case.num_tokens * kept_by_layer(shape, kind, *of_layer) for kind in types}
    kept = [of_kind[kind] if index >= first else 0.0 for index, kind in enumerate(types)]

    def activations(number: int) -> dict[str, float]:
        """Of so many blocks, by kind."""
        names = {kind: f"activations, {kind.replace('_', ' ')}, {case.mode}" for kind in types}
        return {name: sum(kept[i] for i in range(number) if types[i] == kind) for kind, name in names.items()}

    moments = {
        "the loss": {
            "gradients": before,
            "gathered weights": root + c * dense_of.head + tower + at_loss,
            **activations(len(types)),
            "loss: logits, the head's gradient": _loss_buffers(case),
        }
    }
    for kind in dict.fromkeys(types[first:]):
        index = len(types) - 1 - types[::-1].index(kind)
        later = trained.head + sum(dense + experts for dense, experts in trained.by_block[index + 1 :])
        alive = case.num_tokens * backward_of_layer(shape, kind, *of_layer)
        if kind == LINEAR:
            number = sum(n for _, n in case.documents)
            alive = max(
                alive, backward_of_delta_rule(shape, *of_layer[:2], case.num_tokens, case.num_chunks(), number, c)
            )
        head = of_head if index == len(types) - 1 or not dense_of.head else 0
        moments[f"the backward pass of block {index}, {kind.replace('_', ' ')}"] = {
            "gradients": max(before, later / degrees.shard * case.master_bytes) + unreduced + head,
            "gathered weights": root + tower + gathered(index + 1),
            **activations(index),
            "recomputed, gradients of activations": alive,
            "exchange buffers": _exchange(case),
        }
    # Of the root once as computed and, where they are reduced or added up, once in float32.
    computed = c * trained.root
    in_float32 = 4 / c * computed if is_sharded or case.accumulation > 1 else 0.0
    moments["the root's gradients"] = {
        "gradients": gradients + computed * bool(dense_of.root) + in_float32,
        "gathered weights": root + tower,
    }
    worst = max(moments, key=lambda name: sum(moments[name].values()))
    terms = _lasting(case) | moments[worst] | {"vision": _vision(case)}
    return worst, {name: size for name, size in terms.items() if size}


def gathered_sizes(case: Case) -> tuple[Sizes, Sizes]:
    """What of dense weights, and of experts, is in units of FSDP, which gathers or casts it: of what is whole on its
    rank all that trains, unless it is stored as it is computed with and has no replicas (parallelize.py)."""
    degrees, nothing = case.degrees, Sizes(((0, 0),) * len(list(layer_types(case.shape))), *[0] * 6)
    needs_cast = case.master_bytes != case.c and not case.lora.rank
    of_whole = case.sizes(trains=True) if needs_cast or degrees.replicate > 1 else nothing
    over_experts = degrees.shard // (degrees.expert if degrees.expert > 1 else 1)
    return case.sizes() if degrees.shard > 1 else of_whole, case.sizes() if over_experts > 1 else of_whole


def gradient_bytes(case: Case) -> float:
    """Of a step, as they are kept."""
    trained = case.sizes(trains=True)
    return trained.sharded / case.degrees.shard * case.master_bytes + 4 * trained.outside


def _lasting(case: Case) -> dict[str, float]:
    """What is there from step to step."""
    trained, frozen, shard = case.sizes(trains=True), case.sizes(trains=False), case.degrees.shard
    return {
        "adapters" if case.lora.rank else "weights": gradient_bytes(case),  # as large
        "moments": 2 * (trained.sharded / shard * case.state_bytes + trained.outside * case.state_outside),
        # As computed with, and of the tower whole on each rank.
        "frozen weights": case.c * (frozen.sharded / shard + frozen.whole) + 4 * frozen.outside,
    }


LASTING = ("weights", "adapters", "moments", "frozen weights")


def _vision(case: Case) -> float:
    """Features; and of a tower that trains, activations and the weights of a block."""
    vision, c = case.shape.vision, case.c
    if vision is None or not case.patches:
        return 0.0
    # The merger's input, that normalised, and its products before and after GELU.
    of_patch = 4 * c * vision.hidden_size + 8 if case.trained & {"vision", "merger"} else 0.0
    weights = 0.0
    if "vision" in case.trained:
        of_patch += vision.depth * kept_by_vision_block(vision, case.mode, c)
        weights = c * case.sizes(trains=True).visual / (vision.depth + 1) * (case.degrees.shard > 1)
    return weights + case.patches * (of_patch + case.shape.hidden_size * c / vision.patches_per_token)


def _exchange(case: Case) -> float:
    """Copies on their way to their experts and back, of one block."""
    if case.degrees.expert == 1:
        return 0.0
    return 2 * case.num_tokens * case.buffers.copies * case.shape.hidden_size * case.c
