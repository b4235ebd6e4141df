"""The table of parameters against transformers, against what a bfloat16 model keeps, and against a formula by hand."""

import dataclasses

import pytest
import torch
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

from models.ops.kernels import Kernels
from models.qwen35_moe.config import FULL, LINEAR, ModelConfig
from models.qwen35_moe.hf_weights import hf_name
from models.qwen35_moe.model import Qwen35Moe
from models.qwen35_moe.parameters import matmul_parameters_per_token, mtp_parameters, parameters
from tests.models.qwen35_moe.shapes import tiny_config

CONFIGS = {
    "tiny": tiny_config(),
    "tied": tiny_config(tie_word_embeddings=True),
    "35b": ModelConfig.from_dict({}),
    "odd": tiny_config(
        num_hidden_layers=3,
        layer_types=(FULL, LINEAR, FULL),
        num_attention_heads=6,
        num_key_value_heads=3,
        linear_num_key_heads=3,
        linear_value_head_dim=24,
        linear_num_value_heads=9,
        linear_conv_kernel_dim=3,
        num_experts=5,
        shared_expert_intermediate_size=20,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_names_shapes_and_order_are_those_of_transformers(name: str) -> None:
    config = CONFIGS[name]
    with torch.device("meta"):
        reference = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**config.to_dict()))
    table = {hf_name(name): parameter.shape for name, parameter in parameters(config).items()}
    assert table == {n: tuple(p.shape) for n, p in reference.named_parameters()}


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_is_what_a_bfloat16_model_keeps_so_and_experts_are_their_number(name: str) -> None:
    config = CONFIGS[name]
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = Qwen35Moe(config, Kernels())
    finally:
        torch.set_default_dtype(torch.float32)
    table = parameters(config)
    assert {n for n, p in table.items() if p.is_float32} == {
        n for n, p in model.named_parameters() if p.dtype == torch.float32
    }
    stacked = {n: p for n, p in table.items() if p.expert_dim is not None}
    assert {n.rpartition(".")[2] for n in stacked} == {"gate_up_proj", "down_proj"}
    assert len(stacked) == 2 * config.num_hidden_layers
    assert all(p.shape[p.expert_dim] == config.num_experts for p in stacked.values())


def test_mtp_is_a_projection_norms_and_blocks_of_full_attention() -> None:
    config = CONFIGS["odd"]
    table = mtp_parameters(config, 2)
    block = {n.removeprefix("layers.2."): p for n, p in parameters(config).items() if n.startswith("layers.2.")}
    for layer in range(2):
        prefix = f"layers.{layer}."
        assert {n.removeprefix(prefix): p for n, p in table.items() if n.startswith(prefix)} == block
    beside = {n: p.shape for n, p in table.items() if not n.startswith("layers.")}
    assert beside.pop("fc.weight") == (48, 96)
    assert beside == dict.fromkeys(("pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight", "norm.weight"), (48,))


@pytest.mark.parametrize("name", CONFIGS)
def test_matrices_that_a_token_passes_by_hand(name: str) -> None:
    c = CONFIGS[name]
    query, key_value = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    full = c.hidden_size * (3 * query + 2 * key_value)
    key, value = c.linear_num_key_heads * c.linear_key_head_dim, c.linear_num_value_heads * c.linear_value_head_dim
    linear = c.hidden_size * (2 * key + 3 * value + 2 * c.linear_num_value_heads)
    inner = c.num_experts_per_tok * c.moe_intermediate_size + c.shared_expert_intermediate_size
    mixture = c.hidden_size * (3 * inner + c.num_experts + 1)
    num_full = c.layer_types.count(FULL)
    layers = num_full * full + (c.num_hidden_layers - num_full) * linear + c.num_hidden_layers * mixture
    assert matmul_parameters_per_token(c) == layers + c.hidden_size * c.vocab_size


def test_making_a_table_draws_no_random_numbers() -> None:
    """It is made in the middle of runs, whose random numbers must not depend on it."""
    before = torch.get_rng_state()
    parameters(dataclasses.replace(CONFIGS["tiny"], vocab_size=131))
    assert torch.equal(torch.get_rng_state(), before)
