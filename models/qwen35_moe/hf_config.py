"""The config.json that an export carries, for either of the two classes that share the text model."""

import copy
from collections.abc import Mapping
from typing import Any

from errors import UserError
from models.qwen35_moe.config import FULL, IMAGE_TEXT, ModelConfig, regular_layer_types

STORAGE_KEYS = {
    "architectures",
    "auto_map",
    "compression_config",
    "dtype",
    "name_or_path",
    "quantization",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
}
"""What tells how and where the source was stored, or by which code it is read, and so does what begins with `_` or ends
with `attn_implementation` or `experts_implementation`: nothing of it is about the model."""

# transformers' defaults where an engine has others. docs/serving.md has the table of who reads what.
_MAX_POSITION_EMBEDDINGS = 32768
_IMAGE_TOKENS = {
    "image_token_id": 248056,
    "video_token_id": 248057,
    "vision_start_token_id": 248053,
    "vision_end_token_id": 248054,
}
_VISION: dict[str, Any] = {"deepstack_visual_indexes": []}


def class_config(
    config: Mapping[str, Any],
    architecture: str,
    num_mtp_layers: int,
    dtype: str,
    special_token_ids: Mapping[str, int | list[int]],
) -> dict[str, Any]:
    """The config.json of one of the two classes, from a config.json of either form, which is left as it is.

    Every key comes out as it went in but for those of the storage; what shapes the model is written even where it was
    left to a default, and so is what engines read with a default of their own. MTP layers are declared as many as there
    are. `special_token_ids` are told where `config` does not tell its own. Raises UserError if the image-text class is
    asked for without a vision_config.
    """
    shape = ModelConfig.from_dict(config)
    config = copy.deepcopy(dict(config))
    source = _without_storage(config.get("text_config", config))
    written = shape.to_dict()
    rope = (source.pop("rope_scaling") if source.get("rope_scaling") else source.get("rope_parameters")) or {}
    text = source | written | {"rope_parameters": rope | written["rope_parameters"]}
    # The old places too: some engines read them there, and have a default of their own.
    text |= {key: text["rope_parameters"][key] for key in ("rope_theta", "partial_rotary_factor")}
    if num_mtp_layers or "mtp_num_hidden_layers" in text:
        text["mtp_num_hidden_layers"] = num_mtp_layers
    # Served from layer_types by some, from the interval by others. A stale one would be another model there.
    text.pop("full_attention_interval", None)
    if interval := full_attention_interval(shape.layer_types):
        text["full_attention_interval"] = interval
    if text.get("max_position_embeddings") is None:
        text["max_position_embeddings"] = _MAX_POSITION_EMBEDDINGS
    text |= {key: value for key, value in special_token_ids.items() if text.get(key) is None}
    if architecture == "causal_lm":
        return text | {"dtype": dtype}
    if config.get("vision_config") is None:
        raise UserError("image_text_to_text: config.json has no vision_config: expected --base with a model that has")
    del text["architectures"]
    return {
        **_IMAGE_TOKENS,
        **_without_storage(config),
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": IMAGE_TEXT,
        "text_config": text | {"dtype": dtype},
        "vision_config": _VISION | _without_storage(config["vision_config"]),
        "tie_word_embeddings": shape.tie_word_embeddings,
        "dtype": dtype,
    }


def full_attention_interval(layer_types: tuple[str, ...]) -> int | None:
    """n if every n-th layer is full attention and no other; None if they follow no such rule."""
    interval = layer_types.index(FULL) + 1 if FULL in layer_types else len(layer_types) + 1
    return interval if layer_types == regular_layer_types(len(layer_types), interval) else None


def _without_storage(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not _is_storage(key)}


def _is_storage(key: str) -> bool:
    return key in STORAGE_KEYS or key.startswith("_") or key.endswith(("attn_implementation", "experts_implementation"))
