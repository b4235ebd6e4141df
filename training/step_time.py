"""How long a step takes, by kind of work: operations and bytes over the rates of hardware.py."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

from models.qwen35_moe.config import FULL, LINEAR, ModelConfig
from models.qwen35_moe.parameters import adapter_parameters_per_token, parameters
from models.qwen35_moe.vision_config import VisionConfig
from training import hardware
from training.flops import flops_per_token, vision_flops
from training.formulas import (
    Traffic,
    copies_of_a_token,
    kept_by_layer,
    kept_by_vision_block,
    layer_types,
    traffic,
)
from training.hardware import GPUS, HIDDEN, LINKS, Gpu
from training.memory import Case, gathered_sizes


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


@lru_cache(maxsize=8)
def products_per_token(shape: ModelConfig) -> tuple[float, float, float]:
    """Parameters of matrix products that a token passes: dense ones of blocks, experts, the head."""
    dense, experts = 0, 0
    for name, parameter in parameters(replace(shape, vision=None)).items():
        if parameter.expert_dim is not None:
            experts += prod(parameter.shape) // shape.num_experts * shape.num_experts_per_tok
        elif len(parameter.shape) == 2 and name not in ("embed_tokens.weight", "lm_head.weight"):
            dense += prod(parameter.shape)
    return dense, experts, shape.vocab_size * shape.hidden_size * (1 + shape.mtp_num_hidden_layers)


def step_time(case: Case, gpu_name: str, gpus_per_node: int) -> StepTime:
    """The step of `case` on GPUs of this kind, so many of which a node has."""
    gpu, shape, c, degrees = GPUS[gpu_name], case.shape, case.c, case.degrees
    tokens = case.num_tokens * case.accumulation
    forwards = 2 if case.mode == "full" else 1
    backward = 2 if case.trains_text else 1  # gradients of activations, and of weights
    dense, experts, head = products_per_token(shape)
    types = list(layer_types(shape))
    full, linear = types.count(FULL), types.count(LINEAR)

    kinds = {
        "dense products": 2 * tokens * (dense * (forwards + backward) + head * (1 + backward)) / gpu.dense,
        "experts' products": 2 * tokens * experts * case.imbalance * (forwards + backward) / gpu.experts,
    }
    of_experts = case.sizes().experts / degrees.expert
    kinds["experts' products"] += case.accumulation * c * of_experts * (forwards + backward) / gpu.memory
    attending = 2 * tokens * case.mean_document * shape.num_attention_heads * shape.head_dim * full
    kinds["attention"] = attending * (forwards / gpu.attention_forward + 2.5 / gpu.attention_backward)
    heads = linear * shape.linear_num_value_heads / 32
    kinds["delta rule"] = tokens * heads * (forwards * hardware.DELTA_RULE[0] + hardware.DELTA_RULE[1])
    channels = linear * (2 * shape.key_dim + shape.value_dim) / 8192
    again = 1 if case.mode == "none" else 2
    kinds["convolution"] = tokens * channels * (again * hardware.CONVOLUTION[0] + hardware.CONVOLUTION[1])

    kept = sum(kept_by_layer(shape, kind, "none", degrees._replace(expert=1, context=1)) for kind in types)
    passes = hardware.PASSES if degrees.expert == 1 else hardware.PASSES_IN_PARTS
    kinds["norms, routing, copies"] = tokens * kept * passes * (hardware.RECOMPUTED if forwards > 1 else 1) / gpu.memory
    logits = tokens * shape.vocab_size * c * (1 + shape.mtp_num_hidden_layers)
    kinds["softmax of the loss"] = 3 * logits / gpu.memory / hardware.SOFTMAX_SHARE
    trained = case.sizes(trains=True)
    on_rank = trained.sharded / degrees.shard + trained.outside
    # In the forward pass cast and copied into place, 4 + 2 + 2 + 2 bytes; gradients 2 + 4, and back to bfloat16.
    of_a_weight = 16 if case.master_bytes == 4 else 20
    dense_of, experts_of = gathered_sizes(case)
    cast = (trained.dense + trained.root) * bool(dense_of.total) + trained.experts / degrees.expert * bool(
        experts_of.total
    )
    gathered = dense_of.dense + dense_of.root + experts_of.experts / degrees.expert
    # What is frozen is copied into place for the forward and for the backward pass.
    moved = of_a_weight * cast + 4 * c * (gathered - cast)
    kinds["weights cast and gathered"] = case.accumulation * moved / gpu.memory
    # Weights and moments are read and written; gradients read for their norm and again, and written back where clipped.
    kinds["optimizer, clipping"] = (5 * case.master_bytes + 4 * case.state_bytes) * on_rank / gpu.optimizer
    if case.lora.rank:
        of_adapters = adapter_parameters_per_token(shape, case.lora.rank, case.lora.targets)
        # r * (in + out) parameters each: so thin a product takes as long as its rows are read and written, thrice.
        kinds["adapters' products"] = 3 * tokens * c * of_adapters / case.lora.rank / gpu.memory
    if shape.vision is not None and case.frames:
        kinds["vision"] = _tower(case, shape.vision, gpu)

    if degrees.expert > 1:
        kinds["numbers of copies"] = hardware.WAIT_AT_EP * len(types) * case.accumulation
    links = _links(case, gpus_per_node)
    compute = sum(kinds.values()) - kinds["optimizer, clipping"]
    if degrees.expert == 1 and degrees.shard > 1:  # FSDP's own order: the block before hides it, as far as it lasts
        over = sum(link.seconds for link in links if link.traffic.axis == "fsdp")
        share = min(1.0, 0.9 * compute / over)
        links = [replace(link, hidden=link.seconds * share) if link.traffic.axis == "fsdp" else link for link in links]
    kinds["communication, not hidden"] = sum(link.seconds - link.hidden for link in links)
    name = "ep" if degrees.expert > 1 else "units" if dense_of.total else "no units"
    host = hardware.HOST[name] * len(types) * case.accumulation
    kinds["the GPU waits for the host"] = max(host - compute - kinds["communication, not hidden"], 0.0) + hardware.STEP
    flops = flops_per_token(shape, round(case.mean_document), case.lora, case.trunk_has_graph)
    return StepTime({kind: seconds for kind, seconds in kinds.items() if seconds}, links, flops)


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


def _links(case: Case, gpus_per_node: int) -> list[Link]:
    """The collectives of a step. Those of weights go round a ring, which passes a node's border on the cards of all its
    GPUs that belong to the group."""
    degrees = case.degrees
    trained, whole = case.sizes(trains=True), case.sizes()
    copies = case.num_tokens * case.accumulation * len(whole.by_block) * case.imbalance
    copies *= copies_of_a_token(case.shape, degrees.expert)
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
        rate = LINKS.all_to_all if row.kind == "all-to-all" else LINKS.ring
        if crosses:
            rate = min(rate, LINKS.network * (1 if row.kind == "all-to-all" else in_node))
        ways = 2 if row.kind == "all-reduce" else 1
        seconds = ways * row.num_bytes * (ranks - 1) / ranks / rate
        hidden = seconds * (0.0 if row.axis == "cp" else HIDDEN[row.kind])
        over = f"network, {in_node} of a node" if crosses else "NVLink"
        found.append(Link(row, over, seconds, hidden))
    return found
