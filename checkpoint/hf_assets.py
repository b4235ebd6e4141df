"""What a Hugging Face directory holds beside the weights: config.json, generation_config.json, the tokenizer."""

import json
import os
from pathlib import Path
from typing import Any

from checkpoint.tensors.stored import file_size, read_json
from errors import reading
from models.qwen35_moe import hf_config

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


def class_config(
    config: dict[str, Any], architecture: str, num_mtp_layers: int, dtype: str, tokenizer: Path
) -> dict[str, Any]:
    """`hf_config.class_config`, with the ids of special tokens that the tokenizer's files in `tokenizer` tell."""
    has_files = (tokenizer / "tokenizer_config.json").exists() and (tokenizer / "tokenizer.json").exists()
    token_ids = _special_token_ids(tokenizer) if has_files else {}
    return hf_config.class_config(config, architecture, num_mtp_layers, dtype, token_ids)


def _special_token_ids(tokenizer: Path) -> dict[str, int]:
    """`eos_token_id` and the like, as config.json has them, from a tokenizer's files."""
    names, tokens = read_json(tokenizer / "tokenizer_config.json"), read_json(tokenizer / "tokenizer.json")
    with reading(tokenizer / "tokenizer.json"):
        ids = {token["content"]: int(token["id"]) for token in tokens.get("added_tokens") or []}
    with reading(tokenizer / "tokenizer_config.json"):
        contents = {kind: names.get(f"{kind}_token") for kind in ("bos", "eos", "pad")}
        text = {kind: value["content"] if isinstance(value, dict) else value for kind, value in contents.items()}
        return {f"{kind}_token_id": ids[content] for kind, content in text.items() if content in ids}
