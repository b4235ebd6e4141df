"""The model's shape: ModelConfig, read from a Hugging Face config.json."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from errors import UserError

FULL, LINEAR = "full_attention", "linear_attention"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Qwen3.5-MoE text model. Field names are those of Hugging Face's `text_config`; the defaults are 35B-A3B's.

    Rotary settings stand under `rope_parameters` in a config.json; here they are plain fields.
    """

    vocab_size: int = 248320
    hidden_size: int = 2048
    num_hidden_layers: int = 40
    layer_types: tuple[str, ...] = ()
    """One of "linear_attention" / "full_attention" a layer; empty: every `full_attention_interval`-th layer is full."""
    num_attention_heads: int = 16
    num_key_value_heads: int = 2
    head_dim: int = 256
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_conv_kernel_dim: int = 4
    num_experts: int = 256
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 512
    shared_expert_intermediate_size: int = 512
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    rope_theta: float = 1e7
    partial_rotary_factor: float = 0.25
    mrope_section: tuple[int, ...] = (11, 11, 10)

    def __post_init__(self) -> None:
        def require(condition: bool, message: str) -> None:
            if not condition:
                raise UserError(f"model config: {message}")

        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int:
                require(type(value) is int and value > 0, f"{field.name} = {value!r} must be a positive integer")
            if field.type is float:
                require(
                    type(value) in (int, float) and value > 0, f"{field.name} = {value!r} must be a positive number"
                )
        require(
            len(self.layer_types) == self.num_hidden_layers and set(self.layer_types) <= {FULL, LINEAR},
            f"layer_types must name {FULL!r} or {LINEAR!r} once for each of num_hidden_layers = "
            f"{self.num_hidden_layers} layers, got {list(self.layer_types)}",
        )
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads = {self.num_attention_heads} must be a multiple of "
            f"num_key_value_heads = {self.num_key_value_heads}",
        )
        require(
            self.linear_num_value_heads % self.linear_num_key_heads == 0,
            f"linear_num_value_heads = {self.linear_num_value_heads} must be a multiple of "
            f"linear_num_key_heads = {self.linear_num_key_heads}",
        )
        require(
            self.num_experts_per_tok <= self.num_experts,
            f"num_experts_per_tok = {self.num_experts_per_tok} must be at most num_experts = {self.num_experts}",
        )
        require(
            self.rotary_dim > 0 and self.rotary_dim % 2 == 0,
            f"head_dim * partial_rotary_factor = {self.rotary_dim} must be even and positive",
        )
        require(
            len(self.mrope_section) == 3 and sum(self.mrope_section) >= self.rotary_dim // 2,
            f"mrope_section = {list(self.mrope_section)} must be three numbers that sum to "
            f"head_dim * partial_rotary_factor / 2 = {self.rotary_dim // 2}",
        )

    @property
    def rotary_dim(self) -> int:
        """How many of a head's dimensions are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def key_dim(self) -> int:
        """Width of linear attention's q and of its k."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        """Width of linear attention's v."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ModelConfig":
        """Reads a parsed config.json: the image-text form (the text model under `text_config`) or the text-only form.

        Raises UserError for another model type, for an activation or bias that the model does not have, and for
        impossible numbers. Keys that do not shape the text model (dtype, token ids, vision) are left alone.
        """
        text = dict(config.get("text_config", config))
        model_type = text.get("model_type", "qwen3_5_moe_text")
        if model_type != "qwen3_5_moe_text":
            raise UserError(f"model config: model_type = {model_type!r} is not Qwen3.5-MoE ('qwen3_5_moe_text')")
        for key, supported in (("hidden_act", "silu"), ("attention_bias", False), ("attention_dropout", 0.0)):
            if text.get(key, supported) != supported:
                raise UserError(f"model config: {key} = {text[key]!r} is not supported, only {supported!r}")
        rope = text.get("rope_parameters") or {}
        if rope.get("rope_type", "default") != "default":
            raise UserError(f"model config: rope_type = {rope['rope_type']!r} is not supported, only 'default'")
        for key in ("rope_theta", "partial_rotary_factor", "mrope_section"):
            if key in rope:
                text[key] = rope[key]
        if not text.get("layer_types"):
            interval = text.get("full_attention_interval", 4)
            if type(interval) is not int or interval < 1:
                raise UserError(f"model config: full_attention_interval = {interval!r} must be a positive integer")
            num_layers = text.get("num_hidden_layers", cls.num_hidden_layers)
            text["layer_types"] = [LINEAR if (i + 1) % interval else FULL for i in range(num_layers)]
        # In the image-text form `tie_word_embeddings` may stand beside `text_config`.
        text.setdefault("tie_word_embeddings", config.get("tie_word_embeddings", False))
        names = {field.name for field in dataclasses.fields(cls)}
        given = {key: value for key, value in text.items() if key in names and value is not None}
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        return cls(**values)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "ModelConfig":
        """Reads `directory/config.json`. Raises FileNotFoundError, or UserError as `from_dict` does."""
        return cls.from_dict(json.loads((Path(directory) / "config.json").read_text()))

    def to_dict(self) -> dict[str, Any]:
        """The text-only config.json that transformers reads: the inverse of `from_dict`."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        rope = {key: values.pop(key) for key in ("rope_theta", "partial_rotary_factor", "mrope_section")}
        return {
            "architectures": ["Qwen3_5MoeForCausalLM"],
            "model_type": "qwen3_5_moe_text",
            **values,
            "rope_parameters": {"rope_type": "default", "mrope_interleaved": True, **rope},
        }
