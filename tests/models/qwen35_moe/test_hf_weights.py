"""The table of parameters against the native model and transformers, and what an import refuses."""

import pytest
import torch
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

from models.ops.kernels import Kernels
from models.qwen35_moe.config import FULL, LINEAR
from models.qwen35_moe.hf_weights import find_pieces, hf_name, is_float32, parameter_shapes
from models.qwen35_moe.model import Qwen35Moe
from tests.models.qwen35_moe.shapes import tiny_config

CONFIGS = {
    "tiny": tiny_config(),
    "tied": tiny_config(tie_word_embeddings=True),
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
def test_table_is_the_model_and_transformers(name: str) -> None:
    config = CONFIGS[name]
    table = parameter_shapes(config)
    with torch.device("meta"):
        native = Qwen35Moe(config, Kernels(attention="sdpa"))
        reference = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**config.to_dict()))
    assert table == {n: tuple(p.shape) for n, p in native.named_parameters()}
    assert {hf_name(n): shape for n, shape in table.items()} == {
        n: tuple(p.shape) for n, p in reference.named_parameters()
    }
    float32 = {id(parameter) for parameter in native.float32_parameters()}
    assert {n for n in table if is_float32(n)} == {n for n, p in native.named_parameters() if id(p) in float32}


def stacked(config) -> dict[str, tuple[int, ...]]:
    return {hf_name(name): shape for name, shape in parameter_shapes(config).items()}


def test_image_text_prefix_and_parts_that_are_not_text() -> None:
    available = {k.replace("model.", "model.language_model.", 1): v for k, v in stacked(tiny_config()).items()}
    available |= {"model.visual.blocks.0.weight": (3,), "mtp.fc.weight": (4, 8)}
    pieces = find_pieces(tiny_config(), available)
    assert pieces.keys() == parameter_shapes(tiny_config()).keys()
    assert pieces["norm.weight"][0].key == "model.language_model.norm.weight"


def test_tied_model_may_carry_a_copy_of_the_head() -> None:
    config = CONFIGS["tied"]
    find_pieces(config, stacked(config) | {"lm_head.weight": (config.vocab_size, config.hidden_size)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, "'model.norm.weight' is missing"),
        ({"lm_head.weight": None}, "'lm_head.weight' is missing"),
        ({"model.layers.1.mlp.experts.down_proj": None}, "experts.0.down_proj.weight' is missing"),
        (
            {"model.layers.0.mlp.experts.gate_up_proj": (8, 48, 47)},
            r"gate_up_proj' has shape \[8, 48, 47\], not \[8, 48, 48\]",
        ),
        ({"model.layers.9.input_layernorm.weight": (48,)}, "'model.layers.9.input_layernorm.weight'"),
    ],
)
def test_wrong_sets_of_tensors_are_named(change: dict, message: str) -> None:
    available = {key: shape for key, shape in (stacked(tiny_config()) | change).items() if shape is not None}
    with pytest.raises(ValueError, match=message):
        find_pieces(tiny_config(), available)
