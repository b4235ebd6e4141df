"""What a step's memory and communication are made of, as formulas: read by the planner, and by the tests that compare
them with recorded collectives, with docs/communication.md, and with what the compiler keeps of each kind of layer.

Letters are those of docs/communication.md. Sizes are in numbers of elements or, where said, in bytes.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

from config.options import Lora
from models.qwen35_moe.config import FULL, LINEAR, ModelConfig
from models.qwen35_moe.parameters import adapter_shapes, parameters
from models.qwen35_moe.parts import part_of
from models.qwen35_moe.vision_config import VisionConfig
from parallelisms.degrees import Degrees
from parallelisms.units import FREED, Kept, dense_units, head_is_unit

NO_LORA = Lora()
_LAYER = re.compile(r"(?:mtp\.)?layers\.\d+\.")
_UNIT_OF_TOWER = re.compile(r"visual\.(?:blocks\.\d+\.)?")


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters, as FSDP pads them."""

    by_block: tuple[tuple[int, int], ...]
    """Of each block: without experts and what stays outside FSDP (of D), experts (of X)."""
    root: int
    """R: embedding, final norm, a head that is no unit, and what of MTP is in no block."""
    head: int
    """Y: a head that is a unit."""
    outside: int
    """F: outside FSDP, float32."""
    visual: int
    """Of the vision tower, the parts that train."""
    whole: int
    """Of the vision tower, the parts that do not: whole on each rank."""
    units_of_tower: int
    """Of FSDP: each block that trains, and the rest that does."""

    @property
    def dense(self) -> int:
        """D."""
        return sum(dense for dense, _ in self.by_block)

    @property
    def experts(self) -> int:
        """X."""
        return sum(experts for _, experts in self.by_block)

    def units(self, shape: ModelConfig, expert_degree: int, is_kept: bool) -> list[int]:
        """Of each unit of dense weights, which are kept or not (Kept.dense); at ep 1 its experts are in it."""
        sizes = [dense + (experts if expert_degree == 1 else 0) for dense, experts in self.by_block]
        return [sum(sizes[index] for index in indices) for indices in dense_units(shape, expert_degree, is_kept)]

    @property
    def sharded(self) -> int:
        return self.dense + self.experts + self.root + self.head + self.visual

    @property
    def total(self) -> int:
        return self.sharded + self.outside + self.whole


@lru_cache(maxsize=64)
def sizes(
    shape: ModelConfig,
    shard: int,
    expert: int = 1,
    lora: Lora = NO_LORA,
    frozen: frozenset[str] = frozenset(),
    trains: bool | None = None,
) -> Sizes:
    """Of the model and its adapters for these degrees. trains: of those alone that train, or that do not; `frozen` are
    parts that do not, single ones (parts.py)."""
    adapters = adapter_shapes(shape, lora.rank, lora.targets) if lora.rank else {}
    others = {"root": 0, "head": 0, "outside": 0, "visual": 0, "whole": 0}
    head = ("lm_head.",) if head_is_unit(shape, shard) else ()
    blocks: dict[str, list[int]] = {}
    units_of_tower = set[str]()
    table = {name: (parameter.shape, parameter.is_float32) for name, parameter in parameters(shape).items()}
    for name, (of_one, is_float32) in (table | {name: (each, False) for name, each in adapters.items()}).items():
        block = _LAYER.match(name)
        of_block = blocks.setdefault(block[0], [0, 0]) if block else [0, 0]
        is_trained = name in adapters if lora.rank else part_of(name) not in frozen
        if trains is not None and is_trained != trains:
            continue
        of_tower, is_of_experts = _UNIT_OF_TOWER.match(name), ".experts." in name
        if is_float32 or (of_tower and not is_trained):
            others["outside" if is_float32 else "whole"] += prod(of_one)
            continue
        # FSDP pads dimension 0; but at ep > 1 that of experts is cut by ep, and another one by FSDP, both evenly.
        rows = of_one[0] if is_of_experts and expert > 1 else -(-of_one[0] // shard) * shard
        size = rows * prod(of_one[1:])
        if block:
            of_block[is_of_experts] += size
        else:
            others["visual" if of_tower else "head" if name.startswith(head) else "root"] += size
        if of_tower:
            units_of_tower.add(of_tower[0])
    by_block = tuple((dense, experts) for dense, experts in blocks.values())
    return Sizes(by_block, **others, units_of_tower=len(units_of_tower))


def copies_of_a_token(shape: ModelConfig, expert_degree: int) -> float:
    """To how many ranks of `ep` a token goes if experts are chosen at random."""
    return expert_degree * (1 - (1 - 1 / expert_degree) ** shape.num_experts_per_tok)


class Traffic(NamedTuple):
    """Collectives of one kind over one axis in a step."""

    kind: str
    axis: str
    calls: int
    num_bytes: float
    """Of the whole tensor that an all-gather makes or a reduce-scatter takes, and of the input of the others."""


def traffic(
    shape: ModelConfig,
    degrees: Degrees,
    num_tokens: int,
    accumulation: int,
    mode: str,
    num_copies: float,
    of: Sizes,
    trained: Sizes,
    c: int = 2,
    trunk_has_graph: bool = True,
    asks: bool = True,
    kept: Kept = FREED,
    g: int = 4,
) -> list[Traffic]:
    """The collectives of a step: the tables of docs/communication.md, which are of a text model that trains whole; but
    of a tower's features and of the embeddings that multi-token prediction sends.

    num_tokens: of a rank in a micro-batch; num_copies: C, that a rank sends in a step; of, trained: sizes of all that
    is in units of FSDP, and of what trains; c: bytes of the compute dtype; trunk_has_graph: false where multi-token
    prediction alone trains; asks: whether the host asks for the number of copies; kept: what is not gathered again for
    the backward pass; g: bytes of a gradient on its way, c within a host.
    """
    A, L, P, ep = accumulation, len(of.by_block), degrees.context, degrees.expert
    k, H, t = shape.num_experts_per_tok, shape.hidden_size, num_tokens
    once = 0 if trunk_has_graph else len(shape.layer_types)  # blocks that run forward alone
    dense, dense_trained = of.units(shape, ep, kept.dense), trained.units(shape, ep, kept.dense)
    experts, experts_trained = [x for _, x in of.by_block], [x for _, x in trained.by_block]
    units = [*dense_trained, trained.head, trained.root]  # with gradients to be reduced
    units_once = len(dense) - (L - once) if once else 0

    def gathered(sizes: list[int], once: int, is_kept: bool) -> list[int]:
        """The first `once` units, the last one and what is kept once, the others twice."""
        return sizes if is_kept else [*sizes, *sizes[once:-1]]

    of_dense = gathered(dense, units_once, kept.dense)
    of_experts = gathered(experts, once, kept.experts)
    num_gathered = 1 + bool(of.head) + len(of_dense) + 2 * of.units_of_tower
    calls = A * num_gathered, A * (sum(map(bool, units)) + trained.units_of_tower)
    rows = [
        Traffic("all-gather", "fsdp", calls[0], A * c * (of.root + of.head + sum(of_dense) + 2 * of.visual)),
        Traffic("reduce-scatter", "fsdp", calls[1], A * g * (sum(units) + trained.visual)),
        Traffic("all-reduce", "fsdp" if degrees.replicate == 1 else "data_parallel", 1, 4 * (trained.outside + 2)),
    ]
    num_reduced = calls[1] // A
    if ep > 1:
        again = 1 if mode == "full" else 0  # the copies and their weights
        both_ways, forward = 6 + asks + 2 * again, 3 + asks
        sent = (4 + again) * c * H + (16 + 8 * again) * k, 2 * c * H + 8 * k  # of a copy; in the forward pass alone
        units += experts_trained
        num_reduced += sum(map(bool, experts_trained))
        rows += [
            Traffic("all-gather", "efsdp", A * len(of_experts), A * c * sum(of_experts) // ep),
            Traffic("reduce-scatter", "efsdp", A * sum(map(bool, experts_trained)), A * g * trained.experts // ep),
            Traffic(
                "all-to-all",
                "ep",
                A * (both_ways * (L - once) + forward * once),
                A * L * 8 * ep * asks + num_copies / L * (sent[0] * (L - once) + sent[1] * once),
            ),
        ]
    if P > 1:
        types = list(layer_types(shape))
        Nk, Kk, Nv, Kv = (
            shape.linear_num_key_heads,
            shape.linear_key_head_dim,
            shape.linear_num_value_heads,
            shape.linear_value_head_dim,
        )
        N, Nkv, K = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
        of_linear = c * (2 * Nk * Kk + 2 * Nv * Kv) + 8 * Nv
        of_full = c * K * (2 * N + 2 * max(Nkv, P))
        ways = 3 if mode == "full" else 2  # forward, backward, and forward again
        calls_of_cp = bytes_of_cp = 0
        for blocks, times in ((types[:once], 1), (types[once:], ways)):
            Ll, Lf = blocks.count(LINEAR), blocks.count(FULL)
            calls_of_cp += times * (3 * Ll + 2 * Lf)
            bytes_of_cp += times * t * (Ll * of_linear + Lf * of_full)
        rows.append(Traffic("all-to-all", "cp", A * calls_of_cp, A * bytes_of_cp))
    if degrees.replicate > 1:
        rows.append(Traffic("all-reduce", "replicate", num_reduced, 4 * (sum(units) + trained.visual) / degrees.shard))
    return [row for row in rows if row.calls and (row.axis != "efsdp" or degrees.shard > ep)]


class Buffers(NamedTuple):
    """What a rank holds of tokens that travel to its experts."""

    copies: float
    """For each of its own tokens; 0 at ep 1."""
    rows: float
    """Of its experts, over an even share of rows."""


OF_OWN_TOKENS = Buffers(0.0, 1.0)  # ep 1


def kept_by_layer(
    shape: ModelConfig, layer_type: str, mode: str, degrees: Degrees, buffers: Buffers = OF_OWN_TOKENS, c: int = 2
) -> float:
    """Bytes that a compiled block of this kind keeps for the backward pass, for each of the rank's tokens."""
    H, k, I, S = (  # noqa: E741
        shape.hidden_size,
        shape.num_experts_per_tok,
        shape.moe_intermediate_size,
        shape.shared_expert_intermediate_size,
    )
    rows = k * buffers.rows  # of experts
    order = 22 * k  # weights, which experts, and the order of their rows: float32, int64, int16 and int64
    product = 2 * I if 2 * I <= H else 0  # activation_checkpoint.py takes a wider one for down_proj's
    experts: float
    mixer: float
    if mode == "full":
        experts, mixer = order, c * H
    elif mode == "selective":
        experts = c * (rows * product + H + 2 * S) + 4 * shape.num_experts + order
        mixer = c * H + _kept_by_mixer(shape, layer_type, mode, degrees, c)
    else:
        # What experts read, also in float32 for the router; the rows, their products before and after SwiGLU.
        experts = c * (rows * (H + 3 * I) + 2 * H + 3 * S) + 4 * H + 4 * shape.num_experts + 32 * k
        mixer = 2 * c * H + _kept_by_mixer(shape, layer_type, mode, degrees, c)
    if degrees.expert > 1:
        # What experts read is handed from part to part; the copies received are kept, or with "full" sent again.
        experts += 0 if mode == "none" else c * H
        experts += 0 if mode == "full" else buffers.copies * (12 * k + (c * H if mode == "selective" else 0))
    return experts + mixer


def _kept_by_mixer(shape: ModelConfig, layer_type: str, mode: str, degrees: Degrees, c: int) -> float:
    """Of attention of either kind and the product behind it, without what the block reads."""
    H, keeps_all, P = shape.hidden_size, mode == "none", degrees.context
    if layer_type == FULL:
        query, key = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        # Queries with gates, keys and values as projected; the result with its normalisers; the product behind.
        kept = c * (3 * query + 2 * key + H) + 4 * shape.num_attention_heads
        if keeps_all:  # rotated queries and keys, the gated result
            kept += c * (2 * query + key)
        if P > 1:  # what came: queries, keys, values, results
            kept += c * (query + query + 2 * max(key, P * shape.head_dim))
        return kept
    heads, value, keys = shape.linear_num_value_heads, shape.value_dim, 2 * shape.key_dim
    # q, k and v before their convolution; the gate z; the result with the inverse of each chunk's system; behind.
    kept = c * (keys + value + 2 * value + 64 * heads + H) + (2 * c + 4) * heads
    if keeps_all:  # q, k, v behind the convolution, q and k normalised; the result normalised and gated
        kept += c * (keys + value + keys + value) + 8 * heads + 8 * shape.linear_num_key_heads
    if P > 1:  # the results that came back, decays and betas
        kept += c * value + 8 * heads
    return kept


def backward_of_layer(
    shape: ModelConfig, layer_type: str, mode: str, degrees: Degrees, buffers: Buffers = OF_OWN_TOKENS, c: int = 2
) -> float:
    """Bytes a token that are alive at the worst moment of a block's backward pass, what it kept included: what is
    recomputed, and the gradients of the experts' rows: where SwiGLU is computed again, that is in one kernel with its
    gradient."""
    H, I, S = shape.hidden_size, shape.moe_intermediate_size, shape.shared_expert_intermediate_size  # noqa: E741
    rows = shape.num_experts_per_tok * buffers.rows
    # That is when the gradients of the experts' rows are there, and the shared expert's activations are gone.
    if mode == "selective":
        return kept_by_layer(shape, layer_type, mode, degrees, buffers, c) + c * (rows * (H + 4 * I) + 3 * H - 2 * S)
    again = 3 * rows * I - H if mode == "full" else 0  # the router's input is made again too, and is gone
    return kept_by_layer(shape, layer_type, "none", degrees, buffers, c) + c * (rows * H + H - 3 * S + again)


def held_at_delta_rule(shape: ModelConfig, mode: str, c: int = 2) -> float:
    """Bytes a token that a block's graph holds when the delta rule's gradients are there."""
    heads, value, keys = shape.linear_num_value_heads, shape.value_dim, 2 * shape.key_dim
    # Their product, behind the convolution, and these gradients; its gradient; q and k normalised; each chunk's system.
    held = 3 * (keys + value) + value + keys + 64 * heads + 4 * shape.hidden_size
    held += value if mode == "full" else 0  # the result, made again together with the systems
    return c * held + (3 * c + 8) * heads + 8 * shape.linear_num_key_heads


def backward_of_delta_rule(
    shape: ModelConfig, mode: str, degrees: Degrees, num_tokens: int, num_chunks: int, num_documents: int, c: int = 2
) -> float:
    """Bytes that are alive then at the worst moment, with what flash-qla's kernels allocate for themselves: a state for
    each chunk, and, read or not, two or three in float32 for each document."""
    state = shape.linear_num_value_heads // degrees.context * shape.linear_key_head_dim * shape.linear_value_head_dim
    value, gradients = c * shape.value_dim * num_tokens, c * (2 * shape.key_dim + shape.value_dim) * num_tokens
    states, of_documents = c * state * num_chunks, 4 * state * num_documents
    # While states are made; while gradients are, q's and k's for each value head; while these are added up.
    most = max(3 * of_documents - gradients, 2 * of_documents + 3 * value - gradients, 2 * value)
    return num_tokens * held_at_delta_rule(shape, mode, c) + value + states + most  # v is copied


def kept_by_vision_block(vision: VisionConfig, mode: str, c: int = 2) -> float:
    """Bytes a patch that a block of a tower that trains keeps: its input, q k v, attention's result, the product behind
    it, and the MLP's first; without recomputation also both norms and what goes into the second product."""
    width = vision.hidden_size
    if mode == "full":
        return c * width
    kept = c * (6 * width + vision.intermediate_size) + 4 * vision.num_heads
    return kept if mode == "selective" else kept + c * (4 * width + vision.intermediate_size)


def layer_types(shape: ModelConfig) -> Iterable[str]:
    """Of all blocks, that of multi-token prediction last."""
    return (*shape.layer_types, *[FULL] * shape.mtp_num_hidden_layers)
