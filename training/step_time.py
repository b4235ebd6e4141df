"""How long a step takes, by kind of work: operations and bytes over the rates of hardware.py."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import NamedTuple

from models.qwen35_moe.config import FULL, LINEAR, ModelConfig
from models.qwen35_moe.parameters import adapter_parameters_per_token, parameters
from models.qwen35_moe.vision_config import VisionConfig
from training import hardware
from training.flops import flops_per_token, vision_flops
from training.formulas import (
    Traffic,
    kept_by_layer,
    kept_by_vision_block,
    layer_types,
    traffic,
)
from training.hardware import GPUS, HIDDEN, LINKS, Gpu
from training.memory import CHUNK, Case, gathered_sizes


@dataclass(frozen=True)
class Link:
    """Collectives of one axis."""

    traffic: Traffic
    over: str
    seconds: float
    hidden: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step."""

    by_kind: dict[str, float]
    """Of the GPU, what is not hidden; the host's beside them, where the GPU waits for it."""
    links: list[Link]
    flops: float
    """Of a token, as MFU counts them."""

    @property
    def seconds(self) -> float:
        return sum(self.by_kind.values())


class Part(NamedTuple):
    """Of the model: the trunk's blocks, or those of multi-token prediction."""

    types: list[str]
    dense: int
    """Parameters of dense matrix products that a token passes, without the head's."""
    experts: int
    """The same of its experts."""
    stored: int
    """Of all experts, on a rank."""
    forwards: int
    """How often it runs forward."""
    backward: int
    """How often backward: 2 with gradients of weights, 1 with those of activations alone, 0 without a graph."""


def parts_of(case: Case) -> list[Part]:
    """What runs: the trunk, and multi-token prediction if there is any."""
    shape, number = case.shape, len(case.shape.layer_types)
    dense, experts = products_per_token(replace(shape, mtp_num_hidden_layers=0))
    stored = [each // case.degrees.expert for _, each in case.sizes().by_block]
    again = 2 if case.mode == "full" else 1
    ways = (again, 2 if case.trains_text else 1) if case.trunk_has_graph else (1, 0)
    parts = [Part(list(shape.layer_types), dense, experts, sum(stored[:number]), *ways)]
    if shape.mtp_num_hidden_layers:
        with_mtp, of_both = products_per_token(shape)
        types = list(layer_types(shape))[number:]
        parts.append(Part(types, with_mtp - dense, of_both - experts, sum(stored[number:]), again, 2))
    return parts


@lru_cache(maxsize=8)
def products_per_token(shape: ModelConfig) -> tuple[int, int]:
    """Parameters of matrix products that a token passes: dense ones without the head's, experts'."""
    dense, experts = 0, 0
    for name, parameter in parameters(replace(shape, vision=None)).items():
        if parameter.expert_dim is not None:
            experts += prod(parameter.shape) // shape.num_experts * shape.num_experts_per_tok
        elif len(parameter.shape) == 2 and name not in ("embed_tokens.weight", "lm_head.weight"):
            dense += prod(parameter.shape)
    return dense, experts


def _attention(case: Case, part: Part, gpu: Gpu) -> float:
    """A kernel computes whole tiles; of documents of several lengths FlashAttention 2 does it, not cuDNN."""
    shape, tile = case.shape, hardware.ATTENTION_TILE
    pairs = sum(number * (-(-length // tile) * tile) ** 2 for length, number in case.documents) / case.degrees.context
    operations = 2 * pairs * shape.num_attention_heads * shape.head_dim * part.types.count(FULL) * case.accumulation
    forward, backward = (1.0, 1.0) if len(case.documents) == 1 else hardware.RAGGED
    seconds = part.forwards / gpu.attention_forward / forward
    return operations * (seconds + (2.5 / gpu.attention_backward / backward if part.backward else 0.0))


def _ways(part: Part) -> float:
    """Forward and backward passes over the elements, in thirds of one forward and one backward pass."""
    return (1 + (2 if part.backward else 0)) / 3


def step_time(case: Case, gpu_name: str, gpus_per_node: int) -> StepTime:
    """The step of `case` on GPUs of this kind, so many of which a node has."""
    gpu, shape, c, degrees = GPUS[gpu_name], case.shape, case.c, case.degrees
    tokens, parts = case.num_tokens * case.accumulation, parts_of(case)
    is_full = case.mode == "full"
    head = shape.vocab_size * shape.hidden_size
    # The module's head is the trunk's: with the module alone it has no gradient, and the trunk's loss none at all.
    of_head = sum(head * (1 + (2 if case.trains_text else 1)) if part.backward else head for part in parts)
    of_blocks = sum(part.dense * (part.forwards + part.backward) for part in parts)
    kinds = {"dense products": 2 * tokens * (of_blocks + of_head) / gpu.dense}
    ways = [part.forwards + part.backward for part in parts]
    kinds["experts' products"] = (
        2 * tokens * case.imbalance * sum(part.experts * n for part, n in zip(parts, ways)) / gpu.experts
        + case.accumulation * c * sum(part.stored * n for part, n in zip(parts, ways)) / gpu.memory
    )
    kinds["attention"] = sum(_attention(case, part, gpu) for part in parts)
    # Chunks of a document, whole ones in time; with shared tokens all of them, of a part of the heads.
    chunks = case.num_chunks() * CHUNK * case.accumulation * shape.linear_num_value_heads / 32 / degrees.context
    channels = tokens * (2 * shape.key_dim + shape.value_dim) / 8192
    forward, backward = hardware.DELTA_RULE
    for part in parts:
        linear, has_graph = part.types.count(LINEAR), part.backward > 0
        of_rule = chunks * linear * (part.forwards * forward + backward * has_graph)
        again = 2 if case.mode != "none" and has_graph else 1
        of_convolution = again * hardware.CONVOLUTION[0] + hardware.CONVOLUTION[1] * has_graph
        kinds["delta rule"] = kinds.get("delta rule", 0.0) + of_rule
        kinds["convolution"] = kinds.get("convolution", 0.0) + channels * linear * of_convolution
    alone = degrees._replace(expert=1, context=1)
    of_passes = [sum(kept_by_layer(shape, kind, "none", alone) for kind in part.types) * _ways(part) for part in parts]
    passes = hardware.PASSES if degrees.expert == 1 else hardware.PASSES_IN_PARTS
    again_too = hardware.RECOMPUTED if is_full and case.trunk_has_graph else 1
    kinds["norms, routing, copies"] = tokens * sum(of_passes) * passes * again_too / gpu.memory
    # 3 passes over the logits; without a gradient 1.
    logits = [(3 if part.backward else 1) * c / hardware.SOFTMAX_SHARE for part in parts]
    kinds["softmax of the loss"] = tokens * shape.vocab_size * sum(logits) / gpu.memory
    trained = case.sizes(trains=True)
    on_rank = trained.sharded / degrees.shard + trained.outside
    dense_of, experts_of = gathered_sizes(case)
    kept = dense_of.dense * case.kept.dense, experts_of.experts / degrees.expert * case.kept.experts
    of_dense, all_dense = (of.dense + of.root + of.head for of in (trained, dense_of))
    moved = _moved(case, of_dense, all_dense, kept[0], degrees.shard)
    of_rank = trained.experts / degrees.expert, experts_of.experts / degrees.expert, kept[1]
    moved += _moved(case, *of_rank, degrees.shard // degrees.expert)
    kinds["weights cast and gathered"] = case.accumulation * moved / gpu.memory
    # Weights and moments are read and written; gradients read for their norm and again.
    kinds["optimizer, clipping"] = (4 * case.master_bytes + 4 * case.state_bytes) * on_rank / gpu.optimizer
    if case.lora.rank:
        of_adapters = adapter_parameters_per_token(shape, case.lora.rank, case.lora.targets)
        # r * (in + out) parameters each: so thin a product takes as long as its rows are read and written, in each
        # forward pass and for the gradients of rows and of adapters.
        rows = tokens * c * of_adapters / case.lora.rank
        kinds["adapters' products"] = (3 + is_full) * rows / gpu.memory / hardware.THIN_SHARE
    if shape.vision is not None and case.frames:
        kinds["vision"] = _tower(case, shape.vision, gpu)

    asks = degrees.expert > 1 and not case.room
    if asks:
        kinds["numbers of copies"] = hardware.WAIT_AT_EP * len(list(layer_types(shape))) * case.accumulation
    bytes_of_gradient = _bytes_of_gradient(case, gpus_per_node)
    links = _links(case, gpus_per_node, bytes_of_gradient)
    compute = sum(kinds.values()) - kinds["optimizer, clipping"]
    if degrees.expert == 1 and degrees.shard > 1:
        links = _hidden_by_blocks(case, links, 0.9 * compute, bytes_of_gradient)
    kinds["communication, not hidden"] = sum(link.seconds - link.hidden for link in links)
    name = "ep, asks" if asks else "ep" if degrees.expert > 1 else "units" if dense_of.total else "no units"
    share, blocks = hardware.HOST_FORWARD, [(len(part.types), part) for part in parts]
    launched = sum(n * (share * part.forwards + (1 - share) * (part.backward > 0)) for n, part in blocks)
    gaps = sum(n * _ways(part) for n, part in blocks)
    if shape.vision is not None and case.frames:
        gaps += shape.vision.depth * (1 if "vision" in case.trained else 1 / 3)
    late = hardware.HOST[name] * launched * case.accumulation - compute - kinds["communication, not hidden"]
    between = hardware.GAPS * gaps * case.accumulation
    kinds["the GPU waits for the host"] = max(late, between) + hardware.STEP
    flops = flops_per_token(shape, round(case.mean_document), case.lora, case.trunk_has_graph)
    return StepTime({kind: seconds for kind, seconds in kinds.items() if seconds}, links, flops)


def _moved(case: Case, trained: float, gathered: float, kept: float, shard: int) -> float:
    """Bytes, at the memory's rate, for the weights of a micro-batch of which so many are in units of FSDP, and so many
    of these not gathered again."""
    # In the forward pass cast and copied into place, 4 + 2 + 2 + 2 bytes; gradients 2 + 4, and back to bfloat16 (within
    # a host 2 + 2, and 2 + 4 / ranks as they are added up). What is sharded is copied into place twice, and its
    # gradients out of it; what is frozen, twice.
    of_a_weight = 16 if case.master_bytes == 4 and shard == 1 else 20
    cast = trained if gathered else 0.0
    moved = of_a_weight * cast + 4 * case.c * (gathered - cast)
    return moved if shard == 1 else (moved - 2 * case.c * kept) / hardware.LAID_OUT_SHARE


def _bytes_of_gradient(case: Case, gpus_per_node: int) -> int:
    """On its way to be added up: see parallelisms/reduction.py."""
    fits = case.degrees.shard * case.degrees.replicate <= gpus_per_node or gpus_per_node % case.degrees.shard == 0
    return case.c if fits else 4


def _hidden_by_blocks(case: Case, links: list[Link], seconds: float, bytes_of_gradient: int) -> list[Link]:
    """FSDP at ep 1, in its own order: the block before hides what is gathered, the next one what is reduced, as long as
    they last. Nothing hides the root's, which is gathered before the first block and reduced after the last one."""
    reduced = bytes_of_gradient * case.sizes(trains=True).root
    root = {"all-gather": case.c * case.sizes().root, "reduce-scatter": reduced}
    over = sum(link.seconds for link in links if link.traffic.axis == "fsdp")
    found = []
    for link in links:
        if link.traffic.axis == "fsdp":
            apart = case.accumulation * root.get(link.traffic.kind, link.traffic.num_bytes) / link.traffic.num_bytes
            share = min(max(1 - apart, 0.0), seconds / over)
            link = replace(link, hidden=link.seconds * share)
        found.append(link)
    return found


def _tower(case: Case, vision: VisionConfig, gpu: Gpu) -> float:
    """Products, attention of each frame to itself, and elementwise passes. What is frozen runs forward alone."""
    trains, trains_merger = "vision" in case.trained, "merger" in case.trained
    ways = 3 if trains else 1
    products = sum(number * vision_flops(vision, (size,), trains, trains_merger) for size, number in case.frames)
    attending = vision.depth * 4 * vision.hidden_size * sum(number * size**2 for size, number in case.frames)
    products -= ways * attending
    forward, backward = hardware.VISION_ATTENTION
    patches = sum(number * size for size, number in case.frames)
    kept = patches * vision.depth * kept_by_vision_block(vision, "none", case.c)
    return (
        products / gpu.dense
        + attending * (1 / forward + (2.5 / backward if trains else 0))
        + kept * hardware.PASSES * ways / 3 / gpu.memory
    )


def _links(case: Case, gpus_per_node: int, bytes_of_gradient: int) -> list[Link]:
    """The collectives of a step. Those of weights go round a ring, which passes a node's border on the cards of all its
    GPUs that belong to the group."""
    degrees = case.degrees
    trained, whole = case.sizes(trains=True), case.sizes()
    copies = case.num_tokens * case.accumulation * len(whole.by_block) * case.buffers.copies
    rows = traffic(
        case.shape,
        degrees,
        case.num_tokens,
        case.accumulation,
        case.mode,
        copies,
        whole,
        trained,
        case.c,
        case.trunk_has_graph,
        asks=not case.room,
        kept=case.kept,
        g=bytes_of_gradient,
    )
    # axis -> its ranks, and the distance from one to the next
    strides = {
        "fsdp": (degrees.shard, 1),
        "ep": (degrees.expert, 1),
        "efsdp": (degrees.shard // degrees.expert, degrees.expert),
        "cp": (degrees.context, 1),
        "replicate": (degrees.replicate, degrees.shard),
        "data_parallel": (degrees.shard * degrees.replicate, 1),
    }
    found = []
    for row in rows:
        ranks, stride = strides[row.axis]
        if ranks == 1:
            continue
        # How many of a group a node has at least; a node's border may cut through groups.
        in_node = max(1, math.gcd(ranks * stride, gpus_per_node) // stride)
        crosses = degrees.replicate * degrees.shard > gpus_per_node and gpus_per_node % (ranks * stride) > 0
        is_exchange = row.kind == "all-to-all" or (row.kind == "reduce-scatter" and bytes_of_gradient < 4)
        rate = LINKS.all_to_all if is_exchange else LINKS.ring
        if crosses:
            rate = min(rate, LINKS.network * (1 if row.kind == "all-to-all" else in_node))
        ways = 2 if row.kind == "all-reduce" else 1
        seconds = ways * row.num_bytes * (ranks - 1) / ranks / rate
        hidden = seconds * (0.0 if row.axis == "cp" else HIDDEN[row.kind])
        over = f"network, {in_node} of a node" if crosses else "NVLink"
        found.append(Link(row, over, seconds, hidden))
    return found
