"""What vision_config means: as transformers reads it, on all features of a tower, or a refusal that names the key."""

import copy
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe

from errors import UserError
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.vision_config import TOKEN_IDS, VisionConfig
from tests.models.qwen35_moe.test_config import ABSENT, ODD, TEXT
from tests.models.qwen35_moe.test_vision import error, make_tower
from tests.models.qwen35_moe.vision_shapes import random_patches

VISION: dict[str, Any] = {
    "model_type": "qwen3_5_moe_vision",
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 16,
    "num_position_embeddings": 36,
    "hidden_act": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "deepstack_visual_indexes": [],
    "rope_parameters": {"rope_type": "axial", "rope_theta": 1e4},
}
IDS = {"image_token_id": 50, "video_token_id": 51, "vision_start_token_id": 52, "vision_end_token_id": 53}

# Keys, and values that real and damaged files have for them; tiny where a number makes the size.
VALUES: dict[str, list[object]] = {
    "depth": [1, 2, 10**9],
    "hidden_size": [8, 16, 24, 17, 10**9],
    "intermediate_size": [1, 7, 10**9],
    "num_heads": [1, 2, 4, 8, 3, 10**9],
    "in_channels": [3, 1, 4],
    "patch_size": [4, 2, 3, [4, 4], [4], [4, 2], (4, 4), 10**9],
    "temporal_patch_size": [1, 2, 3, [2, 2], [2], [1, 2], 10**9],
    "spatial_merge_size": [1, 2, 3, 10**9],
    "out_hidden_size": [16, 32, ABSENT],
    "num_position_embeddings": [1, 4, 36, 100, 35, 10**9],
    "initializer_range": [0.01],
    "hidden_act": ["gelu_pytorch_tanh", "gelu", "silu", "gelu_new", "quick_gelu"],
    "deepstack_visual_indexes": [[], [0], None],
    "window_size": [112],
    "fullatt_block_indexes": [[7, 15], []],
    "attribute_map": [{}, {"depth": "num_heads"}, {"num_attention_heads": "num_heads", "num_hidden_layers": "depth"}],
    "head_dim": [8, 16, 4, None],
    "num_attention_heads": [2, 4],
    "num_hidden_layers": [1, 2],
    "rope_theta": [1e4, 100.0],
    "rope_parameters": [
        ABSENT,
        None,
        {},
        {"rope_theta": 100.0},
        {"rope_type": "axial", "rope_theta": 100},
        {"rope_type": "axial"},
        {"rope_type": "default", "rope_theta": 100.0},
        {"type": "axial", "rope_theta": 100.0},
        {"type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0},
        {"rope_type": "axial", "type": "linear", "rope_theta": 100.0},
        {"rope_type": None},
        {"rope_theta": None},
        {"rope_theta": "1e4"},
        {"rope_type": "axial", "partial_rotary_factor": 0.5},
        {"axial": {"rope_type": "axial", "rope_theta": 100.0}},
    ],
    "rope_scaling": [None, {}, {"type": "linear", "factor": 2.0}, {"rope_type": "axial", "rope_theta": 100.0}],
    "model_type": ["qwen3_5_moe", "qwen3_5_moe_vision", "qwen2_5_vl", "qwen3_vl_moe", ABSENT],
}
HARMLESS: dict[str, list[object]] = {
    "some_new_key": [1, {"a": [None]}],
    "torch_dtype": ["bfloat16"],
    "tokens_per_second": [2],
    "attention_dropout": [0.0],
}


def nested(vision: dict[str, Any], **outer: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen3_5_moe",
        "text_config": {**TEXT, "vocab_size": 61},
        "vision_config": vision,
        **IDS,
        **outer,
    }


@torch.no_grad()
def assert_same_features(config: dict[str, Any]) -> None:
    """Our reading of `config` gives transformers' float32 features of pictures, with the same weights."""
    shape = ModelConfig.from_dict(copy.deepcopy(config), with_vision=True).vision
    assert shape is not None
    hf = transformers.Qwen3_5MoeConfig(**copy.deepcopy(config))
    assert {name: getattr(hf, name) for name in TOKEN_IDS} == {name: getattr(shape, name) for name in TOKEN_IDS}
    hf.vision_config._attn_implementation = "sdpa"
    expected = modeling_qwen3_5_moe.Qwen3_5MoeVisionModel(hf.vision_config)
    tower = make_tower(shape)
    expected.load_state_dict(tower.state_dict(), strict=True)
    merge = shape.spatial_merge_size
    grids = [(merge, merge), (2 * merge, 5 * merge)]
    patches = random_patches(shape, grids)
    values = (patches.pixels.float() - 127.5) / 127.5
    wanted = expected(values, grid_thw=torch.tensor([(1, *grid) for grid in grids])).pooler_output
    assert error(tower(patches), wanted) < 2e-5


def check(config: dict[str, Any], keys: list[str]) -> None:
    """Equal features, or one line that names a key that was changed."""
    before = repr(config)
    try:
        ModelConfig.from_dict(config, with_vision=True)
    except UserError as refusal:
        message = str(refusal)
        assert "\n" not in message
        assert len(message) < 600
        vision = config["vision_config"]
        inner = [name for key in keys if isinstance(vision.get(key), dict) for name in vision[key]]
        assert any(str(key) in message for key in (*keys, *inner)), (keys, message)
    else:
        assert_same_features(config)
    assert repr(config) == before  # not changed in place


def changed(key: str, value: object) -> dict[str, Any]:
    return {k: v for k, v in VISION.items() if k != key} | ({} if value is ABSENT else {key: copy.deepcopy(value)})


@pytest.mark.parametrize("key", VALUES)
def test_every_value_of_every_key(key: str) -> None:
    for value in (*VALUES[key], *ODD):
        check(nested(changed(key, value)), [key])


@pytest.mark.parametrize("key", TOKEN_IDS)
def test_the_tokens_stand_outside(key: str) -> None:
    for value in (54, 60, 61, 10**9, *ODD):
        check(nested(dict(VISION), **{key: value}), [key, "four tokens", "vocab_size"])
    without = nested(dict(VISION))
    del without[key]  # transformers' defaults, which are the published models'
    with pytest.raises(UserError, match="vocab_size"):
        ModelConfig.from_dict(without, with_vision=True)
    inside = nested({**VISION, key: 59})  # is no key of the tower's, and read by nobody
    assert_same_features(inside)


@settings(max_examples=300, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_changes_together(data: st.DataObject) -> None:
    keys = data.draw(st.lists(st.sampled_from([*VALUES, *HARMLESS]), min_size=2, max_size=3, unique=True))
    vision = dict(VISION)
    for key in keys:
        value = data.draw(st.sampled_from((VALUES | HARMLESS)[key]))
        vision.pop(key, None)
        if value is not ABSENT:
            vision[key] = copy.deepcopy(value)
    check(nested(vision), keys)


@pytest.mark.parametrize("value", [None, [], 3, "x", [1], float("nan")])
def test_a_vision_config_that_is_no_table(value: object) -> None:
    with pytest.raises(UserError, match="vision_config"):
        ModelConfig.from_dict(nested(VISION) | {"vision_config": value}, with_vision=True)


def test_what_is_left_out_has_transformers_defaults() -> None:
    theirs = transformers.Qwen3_5MoeConfig().vision_config
    ours = VisionConfig.from_dict({"vision_config": {}})
    for name in VISION.keys() - {"model_type", "hidden_act", "deepstack_visual_indexes", "rope_parameters"}:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    hf = transformers.Qwen3_5MoeConfig()
    assert {name: getattr(hf, name) for name in TOKEN_IDS} == {name: getattr(ours, name) for name in TOKEN_IDS}


def test_to_dict_is_the_inverse() -> None:
    shape = ModelConfig.from_dict(nested(dict(VISION)), with_vision=True)
    assert ModelConfig.from_dict(shape.to_dict(), with_vision=True) == shape
    assert_same_features(shape.to_dict())
