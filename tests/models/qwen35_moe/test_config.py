"""What a config.json means: as transformers reads it, on all logits, or a refusal that names the key."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from errors import UserError
from models.ops.documents import Documents
from models.qwen35_moe.config import FULL, LINEAR, ModelConfig, read_config
from tests.models.qwen35_moe.shapes import random_model, run_model, tiny_config

TEXT: dict[str, Any] = {
    "model_type": "qwen3_5_moe_text",
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "layer_types": [LINEAR, FULL],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
}
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
LENGTH = 40
ABSENT = object()


def nested(text: dict[str, Any], **top: object) -> dict[str, Any]:
    """The image-text form."""
    return {"model_type": "qwen3_5_moe", "text_config": text, "vision_config": dict(VISION), **top}


def reference(config: dict[str, Any]) -> torch.nn.Module:
    """transformers' model of this config.json, of the class that its form is for."""
    config = copy.deepcopy(config)
    if config["model_type"] == "qwen3_5_moe":
        hf = transformers.Qwen3_5MoeConfig(**config)
        hf.text_config._attn_implementation, hf.text_config._experts_implementation = "sdpa", "eager"
        return transformers.Qwen3_5MoeForConditionalGeneration(hf).eval()
    hf = transformers.Qwen3_5MoeTextConfig(**config)
    hf._attn_implementation, hf._experts_implementation = "sdpa", "eager"
    return transformers.Qwen3_5MoeForCausalLM(hf).eval()


@torch.no_grad()
def assert_same_logits(config: dict[str, Any]) -> None:
    """Our reading of `config` gives transformers' float32 logits at all positions, with the same weights."""
    shape = ModelConfig.from_dict(copy.deepcopy(config))
    model, expected = random_model(shape), reference(config)
    prefix = "model.language_model." if config["model_type"] == "qwen3_5_moe" else "model."
    state = {k if k.startswith("lm_head") else prefix + k: v for k, v in model.state_dict().items()}
    missing, unexpected = expected.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    tied = expected.lm_head.weight is expected.get_input_embeddings().weight
    assert tied == shape.tie_word_embeddings
    assert {k for k in missing if "visual" not in k} <= ({"lm_head.weight"} if tied else set())
    tokens = torch.arange(LENGTH) * 7 % shape.vocab_size
    logits, _ = run_model(model, tokens, torch.arange(LENGTH), Documents.from_lengths([LENGTH]))
    wanted = expected(tokens[None], use_cache=False).logits[0]
    assert (logits - wanted).abs().max() <= 2e-5 * wanted.abs().max()


# Keys, and values that real and damaged files have for them; tiny where a number makes the size.
ODD = [None, "false", "1", True, 0, -1, 1.5, float("nan"), float("inf"), 10**400, [], {}, [None], {"a": None}]
VALUES: dict[str, list[object]] = {
    "hidden_act": ["silu", "swish", "gelu", "relu"],
    "attention_bias": [False, True],
    "attention_dropout": [0.0, 0, 0.1],
    "output_gate_type": ["swish", "silu", "sigmoid"],
    "attn_output_gate": [True, False],
    "mlp_only_layers": [[], [0]],
    "decoder_sparse_step": [1, 2],
    "norm_topk_prob": [True, False],
    "is_causal": [True, False],
    "per_layer_config": [None, {"0": {"num_experts_per_tok": 1}}],
    "full_attention_interval": [1, 2, 3, 4, 10**9],
    "layer_types": [ABSENT, None, [FULL, LINEAR], [FULL, FULL], [LINEAR], ["sliding_attention", FULL]],
    "num_hidden_layers": [1, 2, 3, 10**9],
    "num_attention_heads": [1, 2, 4, 10**12],
    "num_key_value_heads": [1, 2, 3],
    "linear_num_value_heads": [1, 2, 3],
    "linear_conv_kernel_dim": [2, 4],
    "head_dim": [16, 32, 30, 10**7],
    "hidden_size": [8, 16, 10**9],
    "vocab_size": [61, 100, 10**10],
    "linear_key_head_dim": [4, 8],
    "linear_value_head_dim": [4, 12],
    "linear_num_key_heads": [1, 2, 3],
    "moe_intermediate_size": [4, 10**7],
    "shared_expert_intermediate_size": [5, 10**7],
    "num_experts": [4, 5, 10**9],
    "num_experts_per_tok": [1, 3, 5],
    "tie_word_embeddings": [True, False, ABSENT],
    "rms_norm_eps": [1e-6, 1e-2, ABSENT],
    "rope_theta": [1e4, 5e5, 10000, ABSENT],
    "partial_rotary_factor": [0.25, 0.5, 1.0, 2.0, ABSENT],
    "mrope_section": [[1, 1, 2], [11, 11, 10]],
    "rope_parameters": [
        ABSENT,
        None,
        {},
        {"rope_theta": 1e5},
        {"partial_rotary_factor": 0.5, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
        {"type": "default", "rope_theta": 5e5},
        {"type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": None},
        {"rope_theta": "1e7"},
        {"rope_theta": None},
        {"mrope_section": [1, None, 2]},
        {"full_attention": {"rope_type": "default", "rope_theta": 1e6}},
    ],
    "rope_scaling": [
        None,
        {},
        {"type": "default"},
        {"rope_type": "default", "rope_theta": 2e5, "partial_rotary_factor": 0.5},
        {"type": "linear", "factor": 4.0},
        {"rope_type": "default", "type": "linear", "factor": 4.0},
        {"type": "mrope", "mrope_section": [1, 1, 2]},
        {"rope_type": "dynamic", "factor": 2.0},
    ],
}
# What changes nothing. An odd value of these is refused by transformers, and of no interest to a trainer.
HARMLESS: dict[str, list[object]] = {
    "mamba_ssm_dtype": ["float32"],
    "router_aux_loss_coef": [0.01],
    "use_cache": [False],
    "some_new_key": [1, {"a": [None]}],
}


@st.composite
def configs(draw: st.DrawFn) -> tuple[dict[str, Any], list[str]]:
    """A config.json of either form with a few keys changed, and their names."""
    text = copy.deepcopy(TEXT)
    keys = draw(st.lists(st.sampled_from([*VALUES, *HARMLESS]), min_size=1, max_size=3, unique=True))
    for key in keys:
        usual = st.sampled_from((VALUES | HARMLESS)[key])
        value = draw(st.one_of(usual, usual, st.sampled_from(ODD)) if key in VALUES else usual)
        text.pop(key, None)
        if value is not ABSENT:
            text[key] = copy.deepcopy(value)
    if draw(st.booleans()):
        return text, keys
    config = nested(text)
    if draw(st.booleans()):
        config["tie_word_embeddings"] = draw(st.sampled_from([True, False, "false", 1, None]))
        keys = [*keys, "tie_word_embeddings"]
    return config, keys


def check(config: dict[str, Any], keys: list[str]) -> None:
    """Equal logits, or one line that names a key that was changed."""
    before = repr(config)
    try:
        ModelConfig.from_dict(config)
    except UserError as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) < 600
        text = config.get("text_config", config)
        inner = [name for key in keys if isinstance(text.get(key), dict) for name in text[key]]
        assert any(str(key) in message for key in (*keys, *inner)), (keys, message)
    else:
        assert_same_logits(config)
    assert repr(config) == before  # not changed in place


@settings(max_examples=300, derandomize=True, suppress_health_check=list(HealthCheck))
@given(configs())
def test_a_changed_config_means_what_transformers_makes_of_it(case: tuple[dict[str, Any], list[str]]) -> None:
    check(*case)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["text", "image-text"])
@pytest.mark.parametrize("key", VALUES)
def test_every_value_of_every_key(key: str, form: str) -> None:
    for value in (*VALUES[key], *ODD):
        text = {k: v for k, v in TEXT.items() if k != key} | ({} if value is ABSENT else {key: value})
        check(text if form == "text" else nested(text), [key])


def without(*keys: str, **changes: object) -> dict[str, Any]:
    return {k: v for k, v in TEXT.items() if k not in keys} | changes


@pytest.mark.parametrize(
    ("config", "changed"),
    [
        (without("rope_parameters"), {"rope_theta": 1e4}),  # the default of transformers' class, not of 35B-A3B
        (without("rope_parameters", rope_theta=5e5), {"rope_theta": 5e5}),
        (without(rope_theta=5e5), {"rope_theta": 1e7}),  # the new place counts
        (without(rope_scaling={"type": "default", "rope_theta": 3e4}), {"rope_theta": 3e4}),
        (without("rope_parameters", partial_rotary_factor=0.5), {"partial_rotary_factor": 0.5}),
        (nested(dict(TEXT), tie_word_embeddings=True), {"tie_word_embeddings": True}),
        (nested(without(tie_word_embeddings=True)), {"tie_word_embeddings": False}),
        (without(output_gate_type="swish"), {}),
        (without(hidden_act="swish"), {}),
        (without("layer_types", full_attention_interval=1), {"layer_types": (FULL, FULL)}),
        (without(full_attention_interval=1), {"layer_types": (LINEAR, FULL)}),
    ],
)
def test_accepted_as_transformers_reads_it(config: dict[str, Any], changed: dict[str, object]) -> None:
    shape = ModelConfig.from_dict(config)
    assert {key: getattr(shape, key) for key in changed} == changed
    assert_same_logits(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: type = 'linear' is not supported, only 'default'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type = 'yarn'"),
        ({"rope_parameters": {"mrope_interleaved": False}}, "mrope_interleaved = False"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false' must be true or false"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings = 0 must be true or false"),
        ({"attention_bias": "false"}, "attention_bias = 'false' is not supported, only False"),
        ({"attention_bias": 0}, "attention_bias = 0"),
        ({"output_gate_type": "sigmoid"}, "output_gate_type = 'sigmoid' is not supported, only 'swish' or 'silu'"),
        ({"mlp_only_layers": [1]}, r"mlp_only_layers = \[1\]"),
        ({"norm_topk_prob": False}, "norm_topk_prob = False"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        ({"per_layer_config": {"0": {}}}, "per_layer_config"),
        ({"num_experts": "4"}, "num_experts = '4' must be a positive integer"),
        ({"num_experts": None}, "num_experts = None"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000 must be a positive integer, at most 1000"),
        ({"num_hidden_layers": 10**9, "layer_types": None}, "num_hidden_layers = 1000000000"),
        ({"hidden_size": 10**5000}, "hidden_size = a int must be"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan"),
        ({"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta = inf"),
        ({"rope_parameters": {"rope_theta": 10**400}}, "rope_theta = 1000"),
        ({"model_type": "qwen4_exp_text"}, "model_type = 'qwen4_exp_text' is not Qwen3.5-MoE"),
        ({"model_type": "qwen3_5_text"}, "model_type = 'qwen3_5_text'"),
        ({"model_type": ["qwen3_5_moe"]}, "model_type"),
        ({"text_config": {}}, "text_config"),
        ({"attribute_map": {"num_experts_per_tok": "num_experts"}}, "attribute_map"),
    ],
)
def test_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelConfig.from_dict(TEXT | changes)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "qwen4_exp", "text_config": TEXT}, "model_type = 'qwen4_exp'"),
        (nested({**TEXT, "model_type": "qwen4_exp_text"}), "text_config.model_type = 'qwen4_exp_text'"),
        ({"model_type": "qwen3_5_moe", **{k: v for k, v in TEXT.items() if k != "model_type"}}, "text_config"),
        ({"model_type": "qwen3_5_moe", "text_config": None}, "text_config = None"),
        (nested(TEXT, vision_config=[1]), "vision_config"),
        (nested(TEXT, attribute_map={"tie_word_embeddings": "x"}), "attribute_map"),
        (nested({**TEXT, "attribute_map": {"num_experts_per_tok": "num_experts"}}), "attribute_map"),
        (nested(TEXT, tie_word_embeddings="true"), "tie_word_embeddings = 'true'"),
    ],
)
def test_the_image_text_form_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelConfig.from_dict(config)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1, 2]", r"a JSON object was expected, not \[1, 2\]"),
        (b"null", "a JSON object was expected, not None"),
        (b"{", "cannot be read"),
        (b"\xff\xfe{}", "cannot be read"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"{}", "model_type is missing"),
        (json.dumps({**TEXT, "num_experts": None}).encode(), "num_experts = None"),
        (b'{"model_type": "qwen3_5_moe_text", "hidden_size": ' + b"1" * 5000 + b"}", "cannot be read"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=f"config.json.*{message}") as caught:
        ModelConfig.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_is_read_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TEXT))
    assert read_config(tmp_path / "config.json") == TEXT
    with pytest.raises(UserError, match=r"config\.json is no file"):
        read_config(tmp_path / "none" / "config.json")


def test_the_inline_table_has_defaults_of_its_own() -> None:
    assert ModelConfig.from_table({}).rope_theta == 1e7
    assert ModelConfig.from_table({"rope_parameters": {"rope_theta": 3e4}}).rope_theta == 3e4
    assert ModelConfig.from_table({"mrope_section": [12, 10, 10]}).mrope_section == (12, 10, 10)
    assert ModelConfig.from_dict({}).rope_theta == 1e4


def test_config_is_read_from_both_forms() -> None:
    config = tiny_config(tie_word_embeddings=True)
    text_only = config.to_dict()
    nested = {"model_type": "qwen3_5_moe", "vision_config": {}, "text_config": copy.deepcopy(text_only)}
    nested["tie_word_embeddings"] = True
    assert ModelConfig.from_dict(text_only) == ModelConfig.from_dict(nested) == config
    outside = copy.deepcopy(nested)
    del outside["text_config"]["tie_word_embeddings"]
    outside["tie_word_embeddings"] = True
    assert ModelConfig.from_dict(outside) == config


def test_layer_types_follow_the_interval() -> None:
    config = ModelConfig.from_dict({"num_hidden_layers": 5, "full_attention_interval": 2})
    assert config.layer_types == (LINEAR, FULL, LINEAR, FULL, LINEAR)
    assert ModelConfig.from_dict({}).layer_types == (LINEAR, LINEAR, LINEAR, FULL) * 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3"}, "model_type = 'qwen3'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "num_attention_heads = 3"),
        ({"linear_num_value_heads": 3, "linear_num_key_heads": 2}, "linear_num_value_heads = 3"),
        ({"num_experts_per_tok": 500}, "num_experts_per_tok = 500"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type = 'yarn'"),
        ({"mrope_section": [1, 1, 1]}, "mrope_section"),
        ({"head_dim": 12}, "partial_rotary_factor"),
    ],
)
def test_impossible_configs_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_table(changes)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (
            {"mrope_section": [-1], "rope_parameters": {"mrope_section": [11, 11, 10]}},
            "model config: mrope_section = [-1] and rope_parameters.mrope_section = [11, 11, 10]: expected one of them",
        ),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}}, "rope_theta = 1000000.0 and rope_parameters."),
        (
            {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 0.25}},
            "partial_rotary_factor = 0.5 and rope_parameters.",
        ),
        (
            {"vision_config": {"rope_theta": 1.0, "rope_parameters": {"rope_theta": 1e4}}},
            "vision_config.rope_theta = 1.0 and vision_config.rope_parameters.rope_theta = 10000.0: expected one",
        ),
        ({"full_attention_interval": 1, "layer_types": [LINEAR, FULL]}, "full_attention_interval = 1 and layer_types"),
        ({"full_attention_interval": -1, "layer_types": [LINEAR, FULL]}, "full_attention_interval = -1 must be"),
    ],
)
def test_a_table_that_says_a_thing_twice(table: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        ModelConfig.from_table(table)
    assert expected in str(caught.value)


def test_a_table_may_say_the_same_twice() -> None:
    rope = {"rope_theta": 3e4, "mrope_section": [12, 10, 10]}
    layers = {"num_hidden_layers": 2, "layer_types": [LINEAR, FULL], "full_attention_interval": 2}
    config = ModelConfig.from_table(rope | layers | {"rope_parameters": rope})
    assert (config.rope_theta, config.mrope_section) == (3e4, (12, 10, 10))
