"""Prefixes and pieces of Hugging Face checkpoints, and what an import refuses."""

import pytest

from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.hf_weights import find_pieces, hf_name
from models.qwen35_moe.parameters import parameters
from tests.models.qwen35_moe.shapes import tiny_config


def stacked(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {hf_name(name): parameter.shape for name, parameter in parameters(config).items()}


def test_image_text_prefix_and_parts_that_are_not_text() -> None:
    available = {k.replace("model.", "model.language_model.", 1): v for k, v in stacked(tiny_config()).items()}
    available |= {"model.visual.blocks.0.weight": (3,), "mtp.fc.weight": (4, 8)}
    pieces = find_pieces(tiny_config(), available)
    assert pieces.keys() == parameters(tiny_config()).keys()
    assert pieces["norm.weight"][0].key == "model.language_model.norm.weight"


def test_tied_model_may_carry_a_copy_of_the_head() -> None:
    config = tiny_config(tie_word_embeddings=True)
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
