"""Small random models for tests: configurations, weights that exercise every parameter, packed streams."""

from types import SimpleNamespace
from typing import NamedTuple

import torch

from models.ops.documents import Documents
from models.ops.kernels import Kernels
from models.qwen35_moe.config import FULL, LINEAR, ModelConfig
from models.qwen35_moe.init import init_weights
from models.qwen35_moe.model import Qwen35Moe
from models.qwen35_moe.moe import COUNTS_OF_ALL, Measure, RouterStatistics

TINY = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "layer_types": (LINEAR, LINEAR, LINEAR, FULL),
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 32,
    "mrope_section": (1, 1, 0),
}


def tiny_config(**changes) -> ModelConfig:
    """The tiny model, with some numbers changed."""
    return ModelConfig(**{**TINY, **changes})


def random_model(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Qwen35Moe:
    """Initial weights, but norms and decay biases moved off their constants, so that a swapped one would show."""
    model = Qwen35Moe(config, Kernels(attention="sdpa"))
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "dt_bias")) or "pre_fc_norm" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype)


class Stream(NamedTuple):
    """A packed stream; see `run_model`."""

    tokens: torch.Tensor
    positions: torch.Tensor
    documents: Documents
    labels: torch.Tensor


def run_model(
    model: Qwen35Moe,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    documents: Documents,
    labels: torch.Tensor | None = None,
    measure: Measure = COUNTS_OF_ALL,
) -> tuple[torch.Tensor, RouterStatistics]:
    """The model on a packed stream: with labels the loss, else logits; and what the routers did."""
    batch = SimpleNamespace(tokens=tokens, positions=positions, documents=documents, labels=labels)
    return model(batch, measure)[:2]


def random_stream(config: ModelConfig, lengths: list[int], seed: int = 0) -> Stream:
    """A packed stream whose documents have these lengths."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (sum(lengths),), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])
    labels = torch.full_like(tokens, -100)
    start = 0
    for length in lengths:
        labels[start : start + length - 1] = tokens[start + 1 : start + length]
        start += length
    return Stream(tokens, positions, Documents.from_lengths(lengths), labels)


def initial_weights(config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """What init_weights makes of every parameter; NaN where it makes nothing."""
    with torch.device("meta"):
        model = Qwen35Moe(config, Kernels(attention="sdpa"))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    init_weights(model, seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
