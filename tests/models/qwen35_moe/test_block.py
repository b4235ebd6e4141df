"""A block is two residual steps in order, each behind its own norm; its layer type decides which attention it has."""

import pytest
import torch

from models.ops.documents import Documents
from models.ops.kernels import Kernels
from models.qwen35_moe.attention import GatedAttention
from models.qwen35_moe.block import Block
from models.qwen35_moe.config import FULL, LINEAR
from models.qwen35_moe.gated_delta_net import GatedDeltaNet
from models.qwen35_moe.moe import COUNTS_OF_ALL
from models.qwen35_moe.rotary import rotary_embedding
from tests.models.qwen35_moe.shapes import tiny_config

LENGTHS = [5, 1, 9]


@pytest.mark.parametrize("layer_type", [FULL, LINEAR])
def test_two_residual_steps_each_behind_its_own_norm(layer_type: str) -> None:
    config = tiny_config()
    block = Block(config, layer_type, Kernels(attention="sdpa"))
    for number, parameter in enumerate(block.parameters()):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(number))
    block = block.double()
    x = torch.randn(sum(LENGTHS), 48, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    rotary, documents = rotary_embedding(config, positions), Documents.from_lengths(LENGTHS)
    out, statistics = block(x, rotary, documents)

    def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weight)

    inner = normed(x, block.input_layernorm.weight)
    if layer_type == FULL:
        assert isinstance(block.self_attn, GatedAttention)
        attended = block.self_attn(inner, rotary, documents)
    else:
        assert isinstance(block.linear_attn, GatedDeltaNet)
        attended = block.linear_attn(inner, documents)
    middle = x + attended
    mixed, expected = block.mlp(normed(middle, block.post_attention_layernorm.weight), COUNTS_OF_ALL)
    wanted = middle + mixed
    assert (out - wanted).abs().max() < 1e-11 * wanted.abs().max()
    assert torch.equal(statistics.expert_counts, expected.expert_counts)
    assert {name.partition(".")[0] for name, _ in block.named_parameters()} == {
        "self_attn" if layer_type == FULL else "linear_attn",
        "mlp",
        "input_layernorm",
        "post_attention_layernorm",
    }
