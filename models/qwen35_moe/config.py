"""The model's shape: ModelConfig, and what a Hugging Face config.json means."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from errors import UserError, reading
from models.qwen35_moe.config_values import integer, listed, same, short
from models.qwen35_moe.vision_config import TOKEN_IDS, VisionConfig

FULL, LINEAR = "full_attention", "linear_attention"
TEXT, IMAGE_TEXT = "qwen3_5_moe_text", "qwen3_5_moe"
MTP_LAYERS = "mtp_num_hidden_layers"

# Which keys count. Those that transformers' class of this model reads are used, or may have only the values below that
# the model computes. Keys that it does not read, but that another consumer or a relative of this model reads as other
# arithmetic, may have only their neutral values below. Every other key changes nothing in transformers, and so here.
_ACCEPTED: dict[str, tuple[object, ...]] = {
    # read by transformers' class
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "per_layer_config": (None,),
    "is_causal": (True,),
    "attribute_map": ({},),
    # read by other consumers, or by this model's relatives
    "output_gate_type": ("swish", "silu", None),
    "attn_output_gate": (True, None),
    "mlp_only_layers": ([], None),
    "decoder_sparse_step": (1, None),
    "first_k_dense_replace": (0, None),
    "norm_topk_prob": (True, None),
    "scoring_func": ("softmax", None),
    "routed_scaling_factor": (1.0, None),
    "n_group": (1, None),
    "topk_group": (1, None),
    "n_shared_experts": (1, None),
    "use_sliding_window": (False, None),
    "use_qk_norm": (True, None),
    "qkv_bias": (False, None),
    "mlp_bias": (False, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (1.0, None),
    "layer_scale": (False, None),
    "dual_chunk_attention_config": (None,),
    "swiglu_limit": (None,),
    "hc_count": (None,),
    "ple_layer_ids": (None,),
    "indexer_n_heads": (None,),
}
_ROPE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")

# Far above any model; so small that a product of four stays a size that can be computed.
_LARGEST = {"num_hidden_layers": 1000, "num_experts": 2**16, "vocab_size": 2**24}
_LARGEST_DIM = 2**18


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Qwen3.5-MoE. Field names are those of Hugging Face's `text_config`; the defaults are 35B-A3B's.

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
    vision: VisionConfig | None = None
    """The tower for images and videos; None: the text model alone."""
    mtp_num_hidden_layers: int = 0
    """Layers of multi-token prediction: 1, or 0 where it is no part of the model."""

    def __post_init__(self) -> None:
        def require(condition: bool, message: str) -> None:
            if not condition:
                raise UserError(f"model config: {message}")

        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and field.name != MTP_LAYERS:
                largest = _LARGEST.get(field.name, _LARGEST_DIM)
                integer(field.name, value, largest)
            if field.type is float:
                # NaN, infinity and integers beyond every float fail the comparison
                require(
                    type(value) in (int, float) and 0 < value < 1e30,
                    f"{field.name} = {short(value)} must be a positive number",
                )
            if field.type is bool:
                require(type(value) is bool, f"{field.name} = {short(value)} must be true or false")
        require(
            type(self.layer_types) is tuple
            and len(self.layer_types) == self.num_hidden_layers
            and all(layer_type in (FULL, LINEAR) for layer_type in self.layer_types),
            f"layer_types must name {FULL!r} or {LINEAR!r} once for each of num_hidden_layers = "
            f"{self.num_hidden_layers} layers, got {short(self.layer_types)}",
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
            0 < self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0,
            f"head_dim * partial_rotary_factor = {self.rotary_dim} must be even, positive and at most head_dim",
        )
        require(
            type(self.mrope_section) is tuple
            and len(self.mrope_section) == 3
            and all(type(pairs) is int and 0 <= pairs <= _LARGEST_DIM for pairs in self.mrope_section)
            and sum(self.mrope_section) >= self.rotary_dim // 2,
            f"mrope_section = {short(self.mrope_section)} must be three numbers that sum to "
            f"head_dim * partial_rotary_factor / 2 = {self.rotary_dim // 2}",
        )
        require(self.mtp_num_hidden_layers in (0, 1), f"{MTP_LAYERS} = {self.mtp_num_hidden_layers} must be 0 or 1")
        if self.vision is not None:
            width, largest = self.vision.out_hidden_size, max(getattr(self.vision, name) for name in TOKEN_IDS)
            require(
                width == self.hidden_size,
                f"vision_config.out_hidden_size = {width} must be hidden_size = {self.hidden_size}",
            )
            require(
                largest < self.vocab_size,
                f"the tokens of images and videos, up to {largest}, must be below vocab_size = {self.vocab_size}",
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

    @property
    def kernel_sizes(self) -> tuple[tuple[int, int], int, int]:
        """What decides which kernels can run: the delta rule's (K, Kv), the convolution's taps, attention's K."""
        head_dims = (self.linear_key_head_dim, self.linear_value_head_dim)
        return head_dims, self.linear_conv_kernel_dim, self.head_dim

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> "ModelConfig":
        """Reads the inline table `[model.config]`: what is left out is as in 35B-A3B, the defaults above. With a
        `vision_config` the tower is part of the model. Raises UserError for what two keys say differently."""
        _check_said_once(table)
        table = {"rope_theta": cls.rope_theta, **table}
        rope = table.get("rope_parameters") or {}
        if "mrope_section" in table and isinstance(rope, Mapping):
            table["rope_parameters"] = {"mrope_section": table["mrope_section"], **rope}
        if "vision_config" not in table:
            return cls.from_dict(table)
        vision = table.pop("vision_config")
        ids = {name: table.pop(name) for name in TOKEN_IDS if name in table}
        hidden_size = table.get("hidden_size", cls.hidden_size)
        outer = {
            "model_type": IMAGE_TEXT,
            "text_config": {**table, "model_type": table.pop("model_type", TEXT)},
            "vision_config": {"out_hidden_size": hidden_size, **vision} if isinstance(vision, Mapping) else vision,
            "tie_word_embeddings": table.get("tie_word_embeddings", False),
        }
        return cls.from_dict(outer | ids, with_vision=True)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], with_vision: bool = False, with_mtp: bool = False) -> "ModelConfig":
        """What a parsed config.json means to transformers: the image-text form (the text model under `text_config`) or
        the text-only form. What is left out has the default of transformers' class. `with_vision`: its tower too;
        `with_mtp`: multi-token prediction too, whether the file tells of any or not.

        Raises UserError naming the key for another model, for arithmetic that the model does not have, and for
        impossible values.
        """
        text = _text_config(config)
        if not same(config.get("attribute_map", {}), {}):  # it gives keys other names, at either level
            raise UserError("model config: attribute_map is not supported, only {}")
        for key, accepted in _ACCEPTED.items():
            if key in text and not any(same(text[key], value) for value in accepted):
                raise UserError(f"model config: {key} = {short(text[key])} is not supported, only {listed(accepted)}")
        values: dict[str, Any] = {f.name: text[f.name] for f in dataclasses.fields(cls) if f.name in text}
        values[MTP_LAYERS] = _mtp_layers(text) if with_mtp else 0
        values["vision"] = VisionConfig.from_dict(config) if with_vision else None
        values |= {"mrope_section": cls.mrope_section} | _rope(text)
        if text.get("layer_types") is None:
            interval = integer("full_attention_interval", text.get("full_attention_interval", 4), _LARGEST_DIM)
            layers = text.get("num_hidden_layers", cls.num_hidden_layers)
            layers = integer("num_hidden_layers", layers, _LARGEST["num_hidden_layers"])
            values["layer_types"] = regular_layer_types(layers, interval)
        values["tie_word_embeddings"] = _tied(config, text)
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        return cls(**values)

    @classmethod
    def from_pretrained(cls, directory: str | Path, with_vision: bool = False, with_mtp: bool = False) -> "ModelConfig":
        """Reads `directory/config.json`. Raises UserError naming the file."""
        path = Path(directory) / "config.json"
        config = read_config(path)
        try:
            return cls.from_dict(config, with_vision, with_mtp)
        except UserError as error:
            raise UserError(f"{path}: {str(error).removeprefix('model config: ')}") from None

    def to_dict(self) -> dict[str, Any]:
        """The config.json that transformers reads, text-only without a tower: the inverse of `from_dict`."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        del values["vision"]
        if not self.mtp_num_hidden_layers:
            del values[MTP_LAYERS]
        rope = {key: values.pop(key) for key in ("rope_theta", "partial_rotary_factor", "mrope_section")}
        values |= {
            "model_type": TEXT,
            "rope_parameters": {"rope_type": "default", "mrope_interleaved": True, **rope},
        }
        if self.vision is None:
            return {"architectures": ["Qwen3_5MoeForCausalLM"], **values}
        vision, ids = self.vision.to_dict()
        return {
            "architectures": ["Qwen3_5MoeForConditionalGeneration"],
            "model_type": IMAGE_TEXT,
            "text_config": values,
            "vision_config": vision,
            "tie_word_embeddings": self.tie_word_embeddings,
            **ids,
        }


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in a config.json, as it stands there. Raises UserError naming the file.

    transformers tells the model by `model_type` alone, so a file without it is nobody's.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file: expected a directory with a config.json")
    with reading(path):
        config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise UserError(f"{path}: a JSON object was expected, not {short(config)}")
    if "model_type" not in config:
        raise UserError(f"{path}: model_type is missing: expected {TEXT!r} or {IMAGE_TEXT!r}")
    return config


def regular_layer_types(num_layers: int, interval: int) -> tuple[str, ...]:
    """Every `interval`-th layer is full attention."""
    return tuple(LINEAR if layer % interval else FULL for layer in range(1, num_layers + 1))


def _check_said_once(table: Mapping[str, Any]) -> None:
    """In a config.json the first of two keys is not read where they differ; whoever writes a table means both."""
    for name, level in (("", table), ("vision_config.", table.get("vision_config"))):
        if not isinstance(level, Mapping) or not isinstance(rope := level.get("rope_parameters"), Mapping):
            continue
        for key in level.keys() & rope.keys():
            if not same(level[key], rope[key]):
                raise UserError(
                    f"model config: {name}{key} = {short(level[key])} and {name}rope_parameters.{key} = "
                    f"{short(rope[key])}: expected one of them"
                )
    interval, layers = table.get("full_attention_interval"), table.get("layer_types")
    if interval is not None and isinstance(layers, list | tuple):
        interval = integer("full_attention_interval", interval, _LARGEST_DIM)
        if tuple(layers) != regular_layer_types(len(layers), interval):
            raise UserError(
                f"model config: full_attention_interval = {interval} and layer_types = {short(layers)}: expected one "
                "of them"
            )


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part that tells of the text model. Raises UserError for another model, or for parts of another kind."""
    if not isinstance(config, Mapping):
        raise UserError(f"model config: a table was expected, not {short(config)}")
    nested = "text_config" in config
    model_type = config.get("model_type", IMAGE_TEXT if nested else TEXT)
    if not same(model_type, TEXT) and not same(model_type, IMAGE_TEXT):
        raise UserError(
            f"model config: model_type = {short(model_type)} is not Qwen3.5-MoE: expected {TEXT!r} or {IMAGE_TEXT!r}"
        )
    if nested != (model_type == IMAGE_TEXT):
        raise UserError(
            f"model config: text_config is {'unknown to' if nested else 'missing for'} model_type = {model_type!r}"
        )
    if not nested:
        return config
    text, vision = config["text_config"], config.get("vision_config")
    for key, part in (("text_config", text), ("vision_config", vision or {})):
        if not isinstance(part, Mapping):
            raise UserError(f"model config: {key} = {short(part)} must be a table")
    if not same(text.get("model_type", TEXT), TEXT):
        raise UserError(f"model config: text_config.model_type = {short(text['model_type'])}: expected {TEXT!r}")
    return text


def _rope(text: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings from their old and new places. A `rope_scaling` that is not empty stands for all of
    `rope_parameters`; what they leave out is taken from beside them."""
    for key in ("rope_scaling", "rope_parameters"):
        if text.get(key) is not None and not isinstance(text[key], Mapping):
            raise UserError(f"model config: {key} = {short(text[key])} must be a table")
    source = "rope_scaling" if text.get("rope_scaling") else "rope_parameters"
    rope = text.get(source) or {}
    for key in rope:
        if key not in _ROPE_KEYS:
            raise UserError(f"model config: {source}.{key} is not supported, only {listed(_ROPE_KEYS)}")
    for key in ("rope_type", "type"):  # a wrong one behind a right one: other consumers may prefer either
        if key in rope and not same(rope[key], "default"):
            raise UserError(
                f"model config: {source}: {key} = {short(rope[key])} is not supported, only 'default' "
                "(no scaling of positions)"
            )
    if not same(rope.get("mrope_interleaved", True), True):
        raise UserError(
            f"model config: {source}: mrope_interleaved = {short(rope['mrope_interleaved'])} is not supported, "
            "only True"
        )
    values = {
        "rope_theta": rope.get("rope_theta", text.get("rope_theta", 1e4)),
        "partial_rotary_factor": rope.get("partial_rotary_factor", text.get("partial_rotary_factor", 0.25)),
    }
    return values | ({"mrope_section": rope["mrope_section"]} if "mrope_section" in rope else {})


def _mtp_layers(text: Mapping[str, Any]) -> int:
    """How many layers of multi-token prediction are trained: one, also where a file has none."""
    for key, accepted in {MTP_LAYERS: (1, 0, None), "mtp_use_dedicated_embeddings": (False, None)}.items():
        if not any(same(text.get(key), value) for value in accepted):
            raise UserError(
                f"model config: {key} = {short(text[key])} cannot be trained: expected {listed(accepted[:1])}, or "
                "mtp.train = 'off'"
            )
    return 1


def _tied(config: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding. Of the image-text class the outer level tells, whatever `text_config` says."""
    for level in (text, config):
        tied = level.get("tie_word_embeddings", False)
        if type(tied) is not bool:
            raise UserError(f"model config: tie_word_embeddings = {short(tied)} must be true or false")
    return tied
