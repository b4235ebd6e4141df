"""A small configuration that is right, for tests that make mistakes in it."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from config.checks import check_config
from config.options import Config
from config.reading import load_config
from errors import UserError

MINIMAL = """
[job]
output_dir = "out"
[model.config]
num_hidden_layers = 4
vocab_size = 4096
num_experts = 8
num_experts_per_tok = 2
[data]
path = "text/*.jsonl"
tokenizer = "tokenizer"
[training]
steps = 10
sequence_length = 64
global_batch_size = 8
[optimizer]
lr = 1e-3
"""


def write_folder(tmp_path: Path) -> None:
    """base.toml (MINIMAL) and what it names."""
    (tmp_path / "base.toml").write_text(MINIMAL)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text('{"text": "a", "id": 3}\n')
    write_tokenizer(tmp_path / "tokenizer", {"a": 0, "b": 4094}, 4095)


def write_tokenizer(folder: Path, vocabulary: dict[str, int], added: int) -> None:
    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer(models.BPE({**vocabulary, "<|im_end|>": added}, []))
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')


def load(*options: str) -> Config:
    return load_config(["--config", "base.toml", *options])


def error_of(*options: str, world_size: int = 2, toml: str | None = None) -> str:
    """The one line that a mistake gives."""
    if toml is not None:
        Path("mistake.toml").write_text(toml)
        options = ("--config", "mistake.toml", *options)
    elif "--config" not in options:
        options = ("--config", "base.toml", *options)
    with pytest.raises(UserError) as caught:
        check_config(load_config(list(options)), world_size)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message
