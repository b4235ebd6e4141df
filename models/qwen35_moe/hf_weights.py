"""The rules between native parameters and Hugging Face's: one table that training, export, import and tests share.

Names and stored layouts are the same on both sides but for a prefix. What differs is what may be read: experts stacked,
as published checkpoints have them, or one tensor an expert, as transformers' `save_pretrained` writes them.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from errors import UserError
from models.qwen35_moe.config import FULL, ModelConfig

Shape = tuple[int, ...]
Region = tuple[tuple[int, int], ...]
"""(start, stop) of a parameter's first dimensions; those not named are whole."""

PREFIXES = {"image_text_to_text": "model.language_model.", "causal_lm": "model."}
"""Before every name but `lm_head.weight`, for each of the two classes that share the text model."""
VISION, MTP = "model.visual.", "mtp."
NOT_TEXT = (VISION, MTP)
"""Tensors of a Hugging Face model that are no part of the text model: vision tower, multi-token prediction."""


class Piece(NamedTuple):
    """A Hugging Face tensor, and the part of a native parameter that it fills."""

    key: str
    region: Region = ()
    """(): all of it. Of one expert's tensor, which has no dimension for experts: the expert, maybe some of its rows."""


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every native parameter with its shape, in the order of the model. THE table."""
    hidden, head = config.hidden_size, config.head_dim
    query, key_value = config.num_attention_heads * head, config.num_key_value_heads * head
    value_heads, value, channels = (
        config.linear_num_value_heads,
        config.value_dim,
        2 * config.key_dim + config.value_dim,
    )
    experts, inner, shared = config.num_experts, config.moe_intermediate_size, config.shared_expert_intermediate_size
    full: dict[str, Shape] = {
        "self_attn.q_proj.weight": (2 * query, hidden),  # rows, for each head: its query, then its gate
        "self_attn.k_proj.weight": (key_value, hidden),
        "self_attn.v_proj.weight": (key_value, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,),
    }
    linear: dict[str, Shape] = {
        "linear_attn.A_log": (value_heads,),
        "linear_attn.dt_bias": (value_heads,),
        "linear_attn.in_proj_qkv.weight": (channels, hidden),
        "linear_attn.in_proj_z.weight": (value, hidden),
        "linear_attn.in_proj_b.weight": (value_heads, hidden),
        "linear_attn.in_proj_a.weight": (value_heads, hidden),
        "linear_attn.conv1d.weight": (channels, 1, config.linear_conv_kernel_dim),
        "linear_attn.norm.weight": (config.linear_value_head_dim,),
        "linear_attn.out_proj.weight": (hidden, value),
    }
    common: dict[str, Shape] = {
        "mlp.gate.weight": (experts, hidden),
        "mlp.experts.gate_up_proj": (experts, 2 * inner, hidden),  # rows: gate, then up
        "mlp.experts.down_proj": (experts, hidden, inner),
        "mlp.shared_expert.gate_proj.weight": (shared, hidden),
        "mlp.shared_expert.up_proj.weight": (shared, hidden),
        "mlp.shared_expert.down_proj.weight": (hidden, shared),
        "mlp.shared_expert_gate.weight": (1, hidden),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    shapes: dict[str, Shape] = {"embed_tokens.weight": (config.vocab_size, hidden)}
    for layer, layer_type in enumerate(config.layer_types):
        mixer = full if layer_type == FULL else linear
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in (mixer | common).items()}
    shapes["norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def mtp_shapes(config: ModelConfig, num_layers: int) -> dict[str, Shape]:
    """The tensors of multi-token prediction by their Hugging Face names, experts stacked; a run does not train them."""
    hidden = config.hidden_size
    one_block = dataclasses.replace(config, num_hidden_layers=num_layers, layer_types=(FULL,) * num_layers)
    blocks = {name: shape for name, shape in parameter_shapes(one_block).items() if name.startswith("layers.")}
    norms = ("pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight", "norm.weight")
    return {
        MTP + name: shape
        for name, shape in {"fc.weight": (hidden, 2 * hidden), **dict.fromkeys(norms, (hidden,)), **blocks}.items()
    }


def hf_name(name: str, architecture: str = "causal_lm") -> str:
    """A native parameter's name in a Hugging Face checkpoint with stacked experts."""
    return name if name.startswith("lm_head.") else PREFIXES[architecture] + name


def is_float32(name: str) -> bool:
    """Whether a parameter stays float32 in training whatever the dtype of the others: decays and routers."""
    return name.endswith(("linear_attn.A_log", "linear_attn.dt_bias", "mlp.gate.weight"))


def is_published_in_float32(name: str) -> bool:
    """Whether the published checkpoints, bfloat16 otherwise, keep this parameter in float32, as serving does."""
    return name.endswith(("linear_attn.A_log", "linear_attn.norm.weight"))


def find_pieces(config: ModelConfig, available: Mapping[str, Shape]) -> dict[str, list[Piece]]:
    """Which tensors of a Hugging Face checkpoint make up each native parameter.

    `available`: the checkpoint's tensors and their shapes. Raises UserError naming what is missing, of a wrong shape,
    or unknown; vision and multi-token-prediction tensors are passed over, and so is a tied model's copy of the head.
    """
    architecture = find_architecture(available)
    keys = {hf_name(name, architecture): (name, shape) for name, shape in parameter_shapes(config).items()}
    pieces = _find({key: shape for key, (_, shape) in keys.items()}, available)
    used = {piece.key for parts in pieces.values() for piece in parts}
    spare = {key for key in available if not key.startswith(NOT_TEXT)} - used
    spare -= {"lm_head.weight"} if config.tie_word_embeddings else set()
    if spare:
        raise UserError(f"weights: {min(spare)!r} (and {len(spare) - 1} more) belong to no parameter of this model")
    return {keys[key][0]: parts for key, parts in pieces.items()}


def find_mtp_pieces(config: ModelConfig, available: Mapping[str, Shape]) -> dict[str, list[Piece]]:
    """The same for multi-token prediction, by the names of `mtp_shapes`; nothing if the checkpoint has none of it."""
    num_layers = count_mtp_layers(available)
    found = _find(mtp_shapes(config, num_layers), available) if num_layers else {}
    used = {piece.key for parts in found.values() for piece in parts}
    if spare := {key for key in available if key.startswith(MTP)} - used:
        raise UserError(f"weights: {min(spare)!r} (and {len(spare) - 1} more) belong to no layer of the MTP module")
    return found


def count_mtp_layers(keys: Iterable[str]) -> int:
    """How many layers of multi-token prediction the tensors with these names are of."""
    return len({key.split(".")[2] for key in keys if key.startswith(MTP + "layers.")})


def find_architecture(available: Iterable[str]) -> str:
    """Of which class the tensors with these names are."""
    image_text = PREFIXES["image_text_to_text"]
    return "image_text_to_text" if any(key.startswith(image_text) for key in available) else "causal_lm"


def _find(shapes: Mapping[str, Shape], available: Mapping[str, Shape]) -> dict[str, list[Piece]]:
    """Each tensor, or the per-expert ones in its stead; all there and of the right shapes."""
    found: dict[str, list[Piece]] = {}
    for key, shape in shapes.items():
        pieces = [Piece(key)]
        if ".experts." in key and key not in available:
            pieces = pieces_of_experts(key, shape)
        for piece in pieces:
            if piece.key not in available:
                raise UserError(f"weights: {piece.key!r} is missing")
            expected = shape_of_region(shape, piece.region)
            if available[piece.key] != expected:
                raise UserError(f"weights: {piece.key!r} has shape {list(available[piece.key])}, not {list(expected)}")
        found[key] = pieces
    return found


def pieces_of_experts(key: str, shape: Shape) -> list[Piece]:
    """The tensors, one an expert, that stand for the stacked one `key` of this shape."""
    folder, _, which = key.rpartition(".")
    if which == "down_proj":
        return [Piece(f"{folder}.{expert}.down_proj.weight", ((expert, expert + 1),)) for expert in range(shape[0])]
    gate, up = (0, shape[1] // 2), (shape[1] // 2, shape[1])
    return [
        Piece(f"{folder}.{expert}.{half}_proj.weight", ((expert, expert + 1), rows))
        for expert in range(shape[0])
        for half, rows in (("gate", gate), ("up", up))
    ]


def shape_of_region(shape: Shape, region: Region) -> Shape:
    """The shape of the tensor that fills `region` of a parameter: an expert's has no dimension for the experts."""
    return tuple(stop - start for start, stop in region[1:]) + shape[len(region) :]
