"""What a Hugging Face directory holds beside the weights: config.json, generation_config.json, the tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

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


def write_hf_assets(folder: Path, config: dict[str, Any], *sources: Path) -> None:
    """Writes `config` (as in a config.json, of either form) in the text-only form, and copies the other files.

    A file that several of `sources` have is taken from the first. Ids of special tokens that `config` does not tell
    come from the tokenizer.
    """
    text_config = config.get("text_config", config) | ModelConfig.from_dict(config).to_dict()
    if text_config.get("mtp_num_hidden_layers"):
        text_config["mtp_num_hidden_layers"] = 0  # a checkpoint has no weights of multi-token prediction
    for source in reversed(sources):
        for name in _COPIED:
            if (source / name).exists():
                shutil.copy(source / name, folder / name)
    if (folder / "tokenizer_config.json").exists() and (folder / "tokenizer.json").exists():
        text_config = _special_token_ids(folder) | {k: v for k, v in text_config.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(text_config, indent=2) + "\n", encoding="utf-8")


def _special_token_ids(tokenizer: Path) -> dict[str, int]:
    """`eos_token_id` and the like, as config.json has them, from a tokenizer's files."""
    names = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokens = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    ids = {token["content"]: token["id"] for token in tokens}
    contents = {kind: names.get(f"{kind}_token") for kind in ("bos", "eos", "pad")}
    text = {kind: content["content"] if isinstance(content, dict) else content for kind, content in contents.items()}
    return {f"{kind}_token_id": ids[content] for kind, content in text.items() if content in ids}
