"""What a Hugging Face directory holds beside the weights: config.json, generation_config.json, the tokenizer."""

import json
import os
from pathlib import Path
from typing import Any

from checkpoint.tensors.stored import file_size, read_json
from errors import UserError, reading
from models.qwen35_moe.config import ModelConfig

_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
_COPIED_WITH_VISION = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def copy_assets(folder: Path, *sources: Path, vision: bool = True) -> None:
    """Copies the files other than config.json. One that several of `sources` have is taken from the first."""
    for source in reversed(sources):
        for name in _COPIED + (_COPIED_WITH_VISION if vision else ()):
            if os.path.lexists(source / name):
                (folder / name).write_bytes(_without_code(source / name))


def _without_code(path: Path) -> bytes:
    """A file's bytes; of a configuration, without `auto_map`, which names code to be run."""
    if path.name.endswith("_config.json") and "auto_map" in (values := read_json(path)):
        return _as_json({key: value for key, value in values.items() if key != "auto_map"})
    file_size(path)
    with reading(path):
        return path.read_bytes()


def _as_json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def write_checkpoint_assets(folder: Path, config: dict[str, Any], base: Path | None, *sources: Path) -> None:
    """Writes a checkpoint's `hf/`: `config` as it is, the other files, and where the model's weights came from."""
    copy_assets(folder, *sources)
    config = {key: value for key, value in config.items() if key != "auto_map"}
    (folder / "config.json").write_bytes(_as_json(config))
    if base:
        (folder / "base.json").write_text(json.dumps({"path": str(base.resolve())}) + "\n", encoding="utf-8")


def read_base(checkpoint: Path) -> Path | None:
    """The Hugging Face directory that a checkpoint's weights came from, if they came from one."""
    path = checkpoint / "hf" / "base.json"
    if not os.path.lexists(path):
        return None
    values = read_json(path)
    with reading(path):
        base = Path(values["path"])
        base.exists()  # or it is no path: too long, for one
        return base


def read_config(path: Path) -> tuple[dict[str, Any], ModelConfig]:
    """A config.json, without the code that it may name, and the text model that it tells."""
    config = read_json(path)
    config.pop("auto_map", None)
    with reading(path):
        return config, ModelConfig.from_dict(config)


def class_config(
    config: dict[str, Any], architecture: str, num_mtp_layers: int, dtype: str, tokenizer: Path
) -> dict[str, Any]:
    """The config.json of one of the two classes, from a config.json of either form.

    MTP layers are declared as many as there are. Ids of special tokens that `config` does not tell come from the
    tokenizer's files in `tokenizer`. Raises UserError if the image-text class is asked for without a vision_config.
    """
    text = config.get("text_config", config) | ModelConfig.from_dict(config).to_dict()
    if num_mtp_layers or "mtp_num_hidden_layers" in text:
        text["mtp_num_hidden_layers"] = num_mtp_layers
    if (tokenizer / "tokenizer_config.json").exists() and (tokenizer / "tokenizer.json").exists():
        text = _special_token_ids(tokenizer) | {key: value for key, value in text.items() if value is not None}
    if architecture == "causal_lm":
        return text | {"dtype": dtype}
    if "vision_config" not in config:
        raise UserError("image_text_to_text: config.json has no vision_config: expected --base with a model that has")
    del text["architectures"]
    return config | {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "text_config": text | {"dtype": dtype},
        "tie_word_embeddings": text["tie_word_embeddings"],
        "dtype": dtype,
    }


def _special_token_ids(tokenizer: Path) -> dict[str, int]:
    """`eos_token_id` and the like, as config.json has them, from a tokenizer's files."""
    names, tokens = read_json(tokenizer / "tokenizer_config.json"), read_json(tokenizer / "tokenizer.json")
    with reading(tokenizer / "tokenizer.json"):
        ids = {token["content"]: int(token["id"]) for token in tokens.get("added_tokens") or []}
    with reading(tokenizer / "tokenizer_config.json"):
        contents = {kind: names.get(f"{kind}_token") for kind in ("bos", "eos", "pad")}
        text = {kind: value["content"] if isinstance(value, dict) else value for kind, value in contents.items()}
        return {f"{kind}_token_id": ids[content] for kind, content in text.items() if content in ids}
