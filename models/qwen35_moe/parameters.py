"""The table of parameters (names, shapes, dtypes, experts, FLOPs), read off the model itself, built without memory."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import nn

from models.ops.kernels import Kernels
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.lora import add_adapters, is_adapter
from models.qwen35_moe.model import Qwen35Moe
from models.qwen35_moe.moe import Experts
from models.qwen35_moe.mtp import MultiTokenPrediction
from models.qwen35_moe.parts import part_of

Shape = tuple[int, ...]
Box = tuple[tuple[int, int], ...]
"""(start, stop) of a tensor's first dimensions: a part of it. Dimensions that are not named are whole."""


class Parameter(NamedTuple):
    """What the model says of one of its parameters."""

    shape: Shape
    is_float32: bool
    """Whether it stays float32, stored and computed, whatever the dtype of the others."""
    expert_dim: int | None
    """The dimension that counts the experts, of which a token passes a few; None: it passes the whole parameter."""


def full_box(box: Box, shape: Shape) -> Box:
    """`box` with all dimensions of a tensor of this shape."""
    return (*box, *((0, size) for size in shape[len(box) :]))


@lru_cache(maxsize=8)
def parameters(config: ModelConfig) -> Mapping[str, Parameter]:
    """Every parameter of the model by its name, in the model's order."""
    with torch.device("meta"):
        model = Qwen35Moe(config, Kernels())
    return _table(model, model.float32_parameters())


@lru_cache(maxsize=8)
def adapter_shapes(config: ModelConfig, rank: int, targets: tuple[str, ...]) -> Mapping[str, Shape]:
    """Every adapter of such a model by its name."""
    with torch.device("meta"):
        model = Qwen35Moe(config, Kernels())
    add_adapters(model, rank, 1.0, targets)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if is_adapter(name)}


@lru_cache(maxsize=8)
def mtp_parameters(config: ModelConfig, num_layers: int) -> Mapping[str, Parameter]:
    """The parameters of multi-token prediction, of as many layers as a file may have, by their names after `mtp.`."""
    with torch.device("meta"):
        mtp = MultiTokenPrediction(config, num_layers, Kernels())
    return _table(mtp, [block.mlp.gate.weight for block in mtp.blocks])


def matmul_parameters_per_token(config: ModelConfig) -> int:
    """How many of the text model's parameters, of matrix products, a token passes: of all experts its k; the head, not
    the look-up. Of multi-token prediction what it has of its own."""
    count = config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0
    for name, parameter in parameters(replace(config, vision=None)).items():
        if parameter.expert_dim is not None:
            count += prod(parameter.shape) // config.num_experts * config.num_experts_per_tok
        elif len(parameter.shape) == 2 and name != "embed_tokens.weight":
            count += prod(parameter.shape)
    return count


def adapter_parameters_per_token(config: ModelConfig, rank: int, targets: tuple[str, ...]) -> int:
    """How many parameters of adapters a token passes: of all experts' those of its k."""
    count = 0
    for name, shape in adapter_shapes(replace(config, vision=None), rank, targets).items():
        is_stacked = part_of(name) == "experts"
        count += prod(shape) // config.num_experts * config.num_experts_per_tok if is_stacked else prod(shape)
    return count


def _table(module: nn.Module, float32: list[nn.Parameter]) -> Mapping[str, Parameter]:
    experts = [parameter for part in module.modules() if isinstance(part, Experts) for parameter in part.parameters()]
    is_float32, is_stacked = {id(parameter) for parameter in float32}, {id(parameter) for parameter in experts}
    return {
        name: Parameter(tuple(p.shape), id(p) in is_float32, 0 if id(p) in is_stacked else None)
        for name, p in module.named_parameters()
    }
