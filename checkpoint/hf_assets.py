"""What a Hugging Face directory holds beside the weights: config.json, generation_config.json, the tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

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
            if (source / name).exists():
                shutil.copy(source / name, folder / name)


def write_checkpoint_assets(folder: Path, config: dict[str, Any], base: Path | None, *sources: Path) -> None:
    """Writes a checkpoint's `hf/`: `config` as it is, the other files, and where the model's weights came from."""
    copy_assets(folder, *sources)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if base:
        (folder / "base.json").write_text(json.dumps({"path": str(base.resolve())}) + "\n", encoding="utf-8")


def read_base(checkpoint: Path) -> Path | None:
    """The Hugging Face directory that a checkpoint's weights came from, if they came from one."""
    path = checkpoint / "hf" / "base.json"
    return Path(json.loads(path.read_text(encoding="utf-8"))["path"]) if path.exists() else None


def class_config(
    config: dict[str, Any], architecture: str, num_mtp_layers: int, dtype: str, tokenizer: Path
) -> dict[str, Any]:
    """`hf_config.class_config`, with the ids of special tokens that the tokenizer's files in `tokenizer` tell."""
    has_files = (tokenizer / "tokenizer_config.json").exists() and (tokenizer / "tokenizer.json").exists()
    token_ids = _special_token_ids(tokenizer) if has_files else {}
    return hf_config.class_config(config, architecture, num_mtp_layers, dtype, token_ids)


def _special_token_ids(tokenizer: Path) -> dict[str, int]:
    """`eos_token_id` and the like, as config.json has them, from a tokenizer's files."""
    names = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokens = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    ids = {token["content"]: token["id"] for token in tokens}
    contents = {kind: names.get(f"{kind}_token") for kind in ("bos", "eos", "pad")}
    text = {kind: content["content"] if isinstance(content, dict) else content for kind, content in contents.items()}
    return {f"{kind}_token_id": ids[content] for kind, content in text.items() if content in ids}
