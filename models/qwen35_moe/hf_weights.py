"""What differs between the model's parameters and a Hugging Face checkpoint's tensors: prefixes, and experts' pieces.

Names and stored layouts are the same on both sides but for a prefix (parameters.py has the table). What differs is what
may be read: experts stacked, as published checkpoints have them, or one tensor an expert, as transformers'
`save_pretrained` writes them.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from errors import UserError
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.parameters import Box, Shape, mtp_parameters, parameters

PREFIXES = {"image_text_to_text": "model.language_model.", "causal_lm": "model."}
"""Before every name but `lm_head.weight`, for each of the two classes that share the text model."""
TOWER = "visual."
"""Before the native names of the vision tower."""
VISION, MTP = "model." + TOWER, "mtp."
NOT_TEXT = (VISION, MTP)
"""Tensors of a Hugging Face model that are no part of the text model: vision tower, multi-token prediction."""


def left_out(config: ModelConfig) -> tuple[str, ...]:
    """Those of NOT_TEXT that are no part of this model."""
    return (() if config.vision else (VISION,)) + (() if config.mtp_num_hidden_layers else (MTP,))


class Piece(NamedTuple):
    """A Hugging Face tensor, and the part of a native parameter that it fills."""

    key: str
    box: Box = ()
    """(): all of it. Of one expert's tensor, which has no dimension for experts: the expert, maybe some of its rows."""


def mtp_shapes(config: ModelConfig, num_layers: int) -> dict[str, Shape]:
    """The tensors of multi-token prediction by their Hugging Face names, experts stacked."""
    return {MTP + name: parameter.shape for name, parameter in mtp_parameters(config, num_layers).items()}


def hf_name(name: str, architecture: str = "causal_lm") -> str:
    """A native parameter's name in a Hugging Face checkpoint with stacked experts."""
    if name.startswith(TOWER):
        return "model." + name
    return name if name.startswith(("lm_head.", MTP)) else PREFIXES[architecture] + name


def is_published_in_float32(name: str) -> bool:
    """Whether the published checkpoints, bfloat16 otherwise, keep this parameter in float32, as serving does."""
    return name.endswith(("linear_attn.A_log", "linear_attn.norm.weight"))


def find_pieces(config: ModelConfig, available: Mapping[str, Shape]) -> dict[str, list[Piece]]:
    """Which tensors of a Hugging Face checkpoint make up each native parameter.

    `available`: the checkpoint's tensors and their shapes. Raises UserError naming what is missing, of a wrong shape,
    or unknown; what is no part of the model is passed over (the tower, multi-token prediction), and so is a tied
    model's copy of the head.
    """
    architecture = find_architecture(available)
    if config.vision and not any(key.startswith(VISION) for key in available):
        raise UserError("weights: there is no vision tower: expected weights with one, or model.vision = 'off'")
    keys = {hf_name(name, architecture): (name, entry.shape) for name, entry in parameters(config).items()}
    pieces = _find({key: shape for key, (_, shape) in keys.items()}, available)
    used = {piece.key for parts in pieces.values() for piece in parts}
    spare = {key for key in available if not key.startswith(left_out(config))} - used
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
            expected = shape_of_box(shape, piece.box)
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


def shape_of_box(shape: Shape, box: Box) -> Shape:
    """The shape of the tensor that fills `box` of a parameter: an expert's has no dimension for the experts."""
    return tuple(stop - start for start, stop in box[1:]) + shape[len(box) :]
