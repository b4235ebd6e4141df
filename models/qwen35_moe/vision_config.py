"""The vision tower's shape: VisionConfig, and what `vision_config` of a config.json means."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from errors import UserError
from models.qwen35_moe.config_values import integer, listed, same, short

_OTHER_NAMES = {"num_attention_heads": "num_heads", "num_hidden_layers": "depth"}
# As in config.py: what transformers' class reads, or another consumer would read as other arithmetic.
_ACCEPTED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("gelu_pytorch_tanh",),
    "attribute_map": (_OTHER_NAMES,),
    "deepstack_visual_indexes": ([], None),  # of Qwen3-VL: features of inner blocks, added to the text's layers
    "window_size": (None,),  # of Qwen2.5-VL
    "fullatt_block_indexes": ([], None),
}
_ROPE_KEYS = ("rope_type", "type", "rope_theta")
_LARGEST = {"depth": 1000, "num_position_embeddings": 2**24, "patch_size": 256, "temporal_patch_size": 16}
_LARGEST_DIM = 2**18


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Qwen3.5-MoE's vision tower, and the tokens that stand for what it sees. Field names are those of Hugging Face's
    `vision_config` and of the level above it; the defaults are 35B-A3B's."""

    depth: int = 27
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    out_hidden_size: int = 2048
    num_position_embeddings: int = 2304
    initializer_range: float = 0.02
    rope_theta: float = 1e4
    image_token_id: int = 248056
    video_token_id: int = 248057
    vision_start_token_id: int = 248053
    vision_end_token_id: int = 248054

    def __post_init__(self) -> None:
        def require(condition: bool, message: str) -> None:
            if not condition:
                raise UserError(f"model config: vision_config: {message}")

        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and field.name not in TOKEN_IDS:
                integer(f"vision_config.{field.name}", value, _LARGEST.get(field.name, _LARGEST_DIM))
            if field.type is float:
                require(
                    type(value) in (int, float) and 0 < value < 1e30,
                    f"{field.name} = {short(value)} must be a positive number",
                )
        require(self.in_channels == 3, f"in_channels = {self.in_channels} is not supported, only 3: pictures are RGB")
        require(
            self.hidden_size % self.num_heads == 0 and self.head_dim % 4 == 0,
            f"hidden_size / num_heads = {self.hidden_size / self.num_heads:g} must be a multiple of 4",
        )
        require(
            self.grid_side**2 == self.num_position_embeddings,
            f"num_position_embeddings = {self.num_position_embeddings} must be a square",
        )
        ids = {name: getattr(self, name) for name in TOKEN_IDS}
        for name, value in ids.items():
            if type(value) is not int or not 0 <= value < 2**24:
                raise UserError(f"model config: {name} = {short(value)} must be a token's number")
        if len(set(ids.values())) < len(ids):
            raise UserError(f"model config: {ids} must be four tokens")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads

    @property
    def grid_side(self) -> int:
        """The learned positions are a square of so many rows and columns."""
        return math.isqrt(self.num_position_embeddings)

    @property
    def patch_values(self) -> int:
        """Pixel values of one patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def patches_per_token(self) -> int:
        """How many patches the merger makes one token of."""
        return self.spatial_merge_size**2

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "VisionConfig":
        """What `vision_config` and its neighbours in a parsed config.json mean to transformers.

        Raises UserError naming the key for arithmetic that the tower does not have, and for impossible values.
        """
        vision = config.get("vision_config")
        if not isinstance(vision, Mapping):
            raise UserError(f"model config: vision_config = {short(vision)} must be a table")
        vision = dict(vision)
        for key, accepted in _ACCEPTED.items():
            if key in vision and not any(same(vision[key], value) for value in accepted):
                raise UserError(
                    f"model config: vision_config.{key} = {short(vision[key])} is not supported, only "
                    f"{listed(accepted)}"
                )
        for other, name in _OTHER_NAMES.items():
            if other in vision and not same(vision.setdefault(name, vision[other]), vision[other]):
                raise UserError(f"model config: vision_config: {other} and {name} contradict each other")
        values = {f.name: vision[f.name] for f in dataclasses.fields(cls) if f.name in vision}
        values |= {name: config[name] for name in TOKEN_IDS if name in config}
        values |= _rope(vision)
        # transformers' default, which fits no model of this family, is another.
        values.setdefault("out_hidden_size", 3584)
        found = cls(**values)
        if "head_dim" in vision and vision["head_dim"] not in (None, found.head_dim):
            raise UserError(
                f"model config: vision_config.head_dim = {short(vision['head_dim'])} is not supported, only "
                f"hidden_size / num_heads = {found.head_dim}"
            )
        return found

    def to_dict(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """`vision_config` and the tokens' numbers, as a config.json has them: the inverse of `from_dict`."""
        values = dataclasses.asdict(self)
        ids = {name: values.pop(name) for name in TOKEN_IDS}
        rope = {"rope_type": "axial", "rope_theta": values.pop("rope_theta")}
        return {
            "model_type": "qwen3_5_moe_vision",
            **values,
            "hidden_act": "gelu_pytorch_tanh",
            "deepstack_visual_indexes": [],
            "rope_parameters": rope,
        }, ids


TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def _rope(vision: Mapping[str, Any]) -> dict[str, Any]:
    """As in config.py: a `rope_scaling` that is not empty stands for all of `rope_parameters`."""
    for source in ("rope_scaling", "rope_parameters"):
        rope = vision.get(source)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise UserError(f"model config: vision_config.{source} = {short(rope)} must be a table")
        for key, value in rope.items():
            if key not in _ROPE_KEYS or (key != "rope_theta" and value not in ("axial", "default")):
                raise UserError(
                    f"model config: vision_config.{source}: {key} = {short(value)} is not supported, only "
                    "rope_type = 'axial' and rope_theta"
                )
    chosen = vision.get("rope_scaling") or vision.get("rope_parameters") or {}
    values = chosen if "rope_theta" in chosen else vision
    return {"rope_theta": values["rope_theta"]} if "rope_theta" in values else {}
