"""The config.json of an export: what comes out as it went in, what is left behind, and what is added for serving."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from errors import UserError
from models.qwen35_moe.config import FULL, LINEAR, ModelConfig
from models.qwen35_moe.hf_config import class_config, full_attention_interval
from tests.models.qwen35_moe.test_config import TEXT, VISION, nested, without

STORAGE: dict[str, object] = {
    "quantization_config": {"quant_method": "fp8"},
    "compression_config": {"format": "pack-quantized"},
    "torch_dtype": "float8_e4m3fn",
    "transformers_version": "4.57.0",
    "_name_or_path": "somewhere/model",
    "auto_map": {"AutoConfig": "configuration_odd.OddConfig"},
    "_attn_implementation": "odd",
    "attn_implementation": "odd",
}
KEPT: dict[str, object] = {
    "mtp_num_hidden_layers": 0,
    "mtp_use_dedicated_embeddings": False,
    "mamba_ssm_dtype": "float32",
    "attn_output_gate": True,
    "eos_token_id": [3, 5],
    "max_position_embeddings": 262144,
    "router_aux_loss_coef": 0.002,
    "output_router_logits": False,
    "use_cache": True,
    "pad_token_id": None,
    "rope_scaling": None,
    "odd": {"a": [1, None]},
}
ARCHITECTURES = ("causal_lm", "image_text_to_text")


def source(**changes: object) -> dict[str, Any]:
    """An image-text config.json with everything in it that an export meets, the storage's keys at every level."""
    vision = {**VISION, **STORAGE, "deepstack_visual_indexes": [], "model_type": "qwen3_5_moe"}
    text = {**TEXT, **STORAGE, **KEPT, **changes}
    return {**nested(text), **STORAGE, "vision_config": vision, "image_token_id": 7, "odd_top": [1]}


def written(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    return class_config(config, architecture, 0, "bfloat16", {})


def keys_of(value: object) -> set[str]:
    """Every key at every depth."""
    if isinstance(value, list):
        return set().union(*map(keys_of, value))
    return set(value).union(*map(keys_of, value.values())) if isinstance(value, dict) else set()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_tells_of_the_storage_stays_behind_and_all_else_comes_out(architecture: str) -> None:
    config = source()
    before = copy.deepcopy(config)
    out = written(config, architecture)
    assert config == before
    assert keys_of(out) & STORAGE.keys() == set()
    text = out if architecture == "causal_lm" else out["text_config"]
    for key, value in config["text_config"].items():
        if key == "rope_parameters":
            assert value.items() <= text[key].items()
        elif key not in STORAGE:
            assert text[key] == value, key
    if architecture == "image_text_to_text":
        assert out["image_token_id"] == 7
        assert out["odd_top"] == [1]
        vision = {k: v for k, v in config["vision_config"].items() if k not in STORAGE}
        assert out["vision_config"] == vision
    assert ModelConfig.from_dict(out) == ModelConfig.from_dict(config)
    text["odd"]["a"].append(2)  # whoever changes the export's does not change the source's
    assert config == before


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_saves_the_same_values(tmp_path: Path, architecture: str) -> None:
    """Every key that transformers' own save of the same config has is there, with its value."""
    config = source()
    cls = transformers.Qwen3_5MoeConfig if architecture == "image_text_to_text" else transformers.Qwen3_5MoeTextConfig
    plain = {k: v for k, v in config.items() if k not in STORAGE} | {"text_config": without() | KEPT}
    plain["vision_config"] = {k: v for k, v in config["vision_config"].items() if k not in STORAGE}
    out = written(plain, architecture)
    cls(**copy.deepcopy(plain if architecture == "image_text_to_text" else plain["text_config"])).save_pretrained(
        tmp_path
    )
    saved = json.loads((tmp_path / "config.json").read_text())
    levels = [(saved, out)]
    if architecture == "image_text_to_text":
        levels += [(saved["text_config"], out["text_config"])]
    for theirs, ours in levels:
        for key, value in theirs.items():
            if key in ("transformers_version", "text_config", "vision_config", "architectures", "dtype"):
                continue
            if key == "rope_parameters":
                assert value.items() <= ours[key].items()
            elif value is not None and key in ours:
                assert ours[key] == value, key
            else:  # a default of the class that shapes nothing
                assert key not in ModelConfig.__dataclass_fields__, key


@pytest.mark.parametrize(
    ("layer_types", "interval"),
    [
        ((LINEAR, LINEAR, LINEAR, FULL) * 2, 4),
        ((LINEAR, FULL, LINEAR), 2),
        ((FULL, FULL), 1),
        ((LINEAR, LINEAR), 3),
        ((FULL, LINEAR), None),
        ((LINEAR, FULL, FULL), None),
        ((LINEAR, FULL, LINEAR, LINEAR), None),
    ],
)
def test_the_interval_says_the_same_as_the_layer_types(layer_types: tuple[str, ...], interval: int | None) -> None:
    assert full_attention_interval(layer_types) == interval
    config = without(num_hidden_layers=len(layer_types), layer_types=list(layer_types), full_attention_interval=7)
    out = written(config, "causal_lm")
    assert out.get("full_attention_interval") == interval  # a stale one of the source does not stay
    assert out["layer_types"] == list(layer_types)


def test_positions_are_the_sources_or_those_of_transformers() -> None:
    assert written(source(), "causal_lm")["max_position_embeddings"] == 262144
    default = transformers.Qwen3_5MoeTextConfig().max_position_embeddings
    assert written(dict(TEXT), "causal_lm")["max_position_embeddings"] == default


def test_old_rope_spellings_come_out_in_the_new_place_with_the_same_meaning() -> None:
    config = without(rope_scaling={"type": "default", "rope_theta": 3e4}, partial_rotary_factor=0.5)
    out = written(config, "causal_lm")
    assert ModelConfig.from_dict(out) == ModelConfig.from_dict(config)
    assert "rope_scaling" not in out
    assert out["rope_parameters"]["rope_theta"] == out["rope_theta"] == 3e4
    assert out["rope_parameters"]["partial_rotary_factor"] == out["partial_rotary_factor"] == 0.5


def test_special_tokens_are_told_where_the_source_is_silent() -> None:
    ids = {"eos_token_id": 9, "pad_token_id": 8, "bos_token_id": 7}
    out = class_config(source(), "causal_lm", 0, "bfloat16", ids)
    assert (out["eos_token_id"], out["pad_token_id"], out["bos_token_id"]) == ([3, 5], 8, 7)


def test_both_levels_say_whether_the_head_is_tied() -> None:
    config = {**source(), "tie_word_embeddings": True}
    out = written(config, "image_text_to_text")
    assert out["tie_word_embeddings"] is out["text_config"]["tie_word_embeddings"] is True
    assert written(config, "causal_lm")["tie_word_embeddings"] is True


def test_the_image_text_class_needs_a_vision_config() -> None:
    with pytest.raises(UserError, match="has no vision_config"):
        written(dict(TEXT), "image_text_to_text")
