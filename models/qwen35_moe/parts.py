"""The model's parts, by the names of their parameters: what `model.freeze` and the learning rates speak of.

A parameter trains if it requires a gradient, and nothing else decides it: what does not has no gradient, no optimizer
state and, if nothing before it trains, no graph. `freeze` is called on the model without memory, before it is
parallelised; whatever adds parameters later may set `requires_grad` itself. Without torch: also read before a run.
"""

import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from errors import UserError
from models.qwen35_moe.config import FULL, LINEAR, ModelConfig

if TYPE_CHECKING:
    from torch import nn

_LAYER = r"layers\.\d+\."
PARTS: dict[str, str] = {
    "vision": r"visual\.(?!merger\.)",
    "merger": r"visual\.merger\.",
    "embeddings": r"embed_tokens\.",
    "head": r"lm_head\.",
    "router": rf"{_LAYER}mlp\.gate\.",
    "experts": rf"{_LAYER}mlp\.experts\.",
    "shared_expert": rf"{_LAYER}mlp\.shared_expert(_gate)?\.",
    "attention": rf"{_LAYER}self_attn\.",
    "linear_attention": rf"{_LAYER}linear_attn\.",
    "norms": rf"({_LAYER}(input|post_attention)_layernorm|norm)\.",
    "mtp": r"mtp\.",
}
"""Part -> how its parameters' names begin. Every parameter is of one part."""

TEXT = "text"
OF_TEXT = tuple(part for part in PARTS if part not in ("vision", "merger", "mtp"))
"""What "text" stands for."""
NAMES = (TEXT, *PARTS)
ADAPTABLE = ("attention", "linear_attention", "shared_expert", "experts", "head")
"""What can have low-rank adapters: lora.py."""


def part_of(name: str) -> str:
    """The part that a parameter is of."""
    return next(part for part, beginning in PARTS.items() if re.match(beginning, name))


def parts_of_model(config: ModelConfig) -> list[str]:
    """The parts that a model of this shape has."""
    lacking = {
        "vision": config.vision is None,
        "merger": config.vision is None,
        "head": config.tie_word_embeddings,
        "mtp": not config.mtp_num_hidden_layers,
        "attention": FULL not in config.layer_types,
        "linear_attention": LINEAR not in config.layer_types,
    }
    return [part for part in PARTS if not lacking.get(part)]


def check_frozen(frozen: Collection[str], config: ModelConfig) -> None:
    """Raises UserError for parts that the model lacks, and where nothing is left to train."""
    present = parts_of_model(config)
    check_present("model.freeze", frozen, (TEXT, *present))
    if not set(present) - single_parts(frozen):
        raise UserError(f"model.freeze = {list(frozen)}: nothing is left to train: expected fewer parts")


def check_present(key: str, named: Collection[str], present: Collection[str]) -> None:
    """Raises UserError for a part that is `named` as the value of `key` and not `present` in the model."""
    reasons = {"head": ": its head is its embeddings", "mtp": " (mtp.train = 'off')"}
    for part in named:
        if part not in present:
            raise UserError(
                f"{key} = {list(named)}: the model has no part {part!r}{reasons.get(part, '')}: expected some of "
                f"{', '.join(present)}"
            )


def freeze(model: "nn.Module", frozen: Iterable[str]) -> None:
    """Has all parameters of these parts, and no others, require no gradient."""
    single = single_parts(frozen)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) not in single)


def frozen_parts(frozen: Collection[str], mtp_train: str) -> Collection[str]:
    """What `model.freeze` and `mtp.train` freeze together. With "head" that is all but multi-token prediction: the
    trunk keeps no graph then, so what it hands over is detached."""
    return set(PARTS) - {"mtp"} | set(frozen) if mtp_train == "head" else frozen


def single_parts(parts: Iterable[str]) -> set[str]:
    """Those that "text" stands for in its place."""
    return {single for part in parts for single in (OF_TEXT if part == TEXT else (part,))}
