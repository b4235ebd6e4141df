"""Parts of the model: every parameter is of one, and freezing some leaves exactly the others to train."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from errors import UserError
from models.ops.kernels import Kernels
from models.qwen35_moe.config import FULL, LINEAR, ModelConfig
from models.qwen35_moe.model import Qwen35Moe
from models.qwen35_moe.parameters import parameters
from models.qwen35_moe.parts import (
    NAMES,
    OF_TEXT,
    PARTS,
    TEXT,
    check_frozen,
    freeze,
    frozen_parts,
    part_of,
    parts_of_model,
)
from tests.models.qwen35_moe.shapes import tiny_config
from tests.models.qwen35_moe.vision_shapes import tiny_vision

SHAPES = st.builds(
    lambda layers, tied, vision, mtp: tiny_config(
        num_hidden_layers=len(layers),
        layer_types=tuple(layers),
        tie_word_embeddings=tied,
        vision=tiny_vision(depth=1) if vision else None,
        mtp_num_hidden_layers=int(mtp),
    ),
    st.lists(st.sampled_from([FULL, LINEAR]), min_size=1, max_size=3),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
CONFIG = tiny_config(vision=tiny_vision())


@given(SHAPES)
def test_every_parameter_is_of_one_part_and_the_model_has_those_parts(config: ModelConfig) -> None:
    of_names = {name: [p for p, beginning in PARTS.items() if re.match(beginning, name)] for name in parameters(config)}
    assert all(len(parts) == 1 for parts in of_names.values()), of_names
    assert {part for (part,) in of_names.values()} == set(parts_of_model(config))


@given(SHAPES, st.sets(st.sampled_from(NAMES)))
def test_what_is_frozen_and_whether_anything_is_left(config: ModelConfig, frozen: set[str]) -> None:
    with torch.device("meta"):
        model = Qwen35Moe(config, Kernels())
    freeze(model, frozen)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    def is_frozen(name: str) -> bool:
        return part_of(name) in frozen or (TEXT in frozen and not name.startswith(("visual.", "mtp.")))

    assert trained == {name for name in parameters(config) if not is_frozen(name)}
    try:
        check_frozen(frozen, config)
    except UserError:
        assert not trained or frozen - {TEXT} - set(parts_of_model(config))
    else:
        assert trained
        assert frozen - {TEXT} <= set(parts_of_model(config))


@pytest.mark.parametrize(
    ("part", "names"),
    [
        (
            "vision",
            {"patch_embed.proj.weight", "pos_embed.weight", "blocks.0.norm1.bias", "blocks.1.mlp.linear_fc2.bias"},
        ),
        ("merger", {"merger.norm.weight", "merger.linear_fc2.weight"}),
    ],
)
def test_the_towers_parts(part: str, names: set[str]) -> None:
    assert {part_of(f"visual.{name}") for name in names} == {part}


def test_the_texts_parts() -> None:
    of_layer = {
        "mlp.gate.weight": "router",
        "mlp.experts.gate_up_proj": "experts",
        "mlp.experts.down_proj": "experts",
        "mlp.shared_expert.up_proj.weight": "shared_expert",
        "mlp.shared_expert_gate.weight": "shared_expert",
        "self_attn.q_norm.weight": "attention",
        "self_attn.o_proj.weight": "attention",
        "linear_attn.A_log": "linear_attention",
        "linear_attn.norm.weight": "linear_attention",
        "input_layernorm.weight": "norms",
        "post_attention_layernorm.weight": "norms",
    }
    expected = {f"layers.{layer}.{name}": part for name, part in of_layer.items() for layer in (0, 11)}
    expected |= {"embed_tokens.weight": "embeddings", "lm_head.weight": "head", "norm.weight": "norms"}
    assert {name: part_of(name) for name in expected} == expected
    assert set(expected.values()) == set(OF_TEXT)


def test_multi_token_prediction_is_one_part_and_its_training_alone_freezes_the_others() -> None:
    names = ("fc.weight", "pre_fc_norm_hidden.weight", "norm.weight", "layers.0.mlp.gate.weight")
    assert {part_of(f"mtp.{name}") for name in names} == {"mtp"}
    assert set(frozen_parts(("vision",), "head")) == set(PARTS) - {"mtp"}
    assert frozen_parts(("vision",), "joint") == frozen_parts(("vision",), "off") == ("vision",)


@pytest.mark.parametrize(
    ("frozen", "config", "message"),
    [
        (["vision"], tiny_config(), "no part 'vision': expected some of text, embeddings, head, router"),
        (["merger"], tiny_config(), "no part 'merger'"),
        (["head"], tiny_config(tie_word_embeddings=True), "no part 'head': its head is its embeddings: expected"),
        (["mtp"], tiny_config(), "no part 'mtp' (mtp.train = 'off'): expected"),
        (["text"], tiny_config(), "nothing is left to train: expected fewer parts"),
        (["text", "vision", "merger"], CONFIG, "nothing is left to train"),
        ([*OF_TEXT, "vision", "merger"], CONFIG, "nothing is left to train"),
    ],
)
def test_what_is_refused(frozen: list[str], config: ModelConfig, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        check_frozen(frozen, config)
    assert str(caught.value).startswith(f"model.freeze = {frozen}: ")
