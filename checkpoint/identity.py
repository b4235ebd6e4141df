"""What a checkpoint's cursors point into and which model it trains: `run.json`, compared when a run resumes.

    options    every option of the data, sequence length, global batch size, seed: {"data.shuffle": true, ...}
    sources    of each entry of data.path its kind and number of documents, of each file its size and a hash; the share
               of them that is held out for validation
    model      config.json's keys

Files are known by name and contents, not by folder: data may be moved. The hash is of a file's first and last 64 KiB.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from checkpoint.files import read_json
from config.options import Config
from data.files import files_of, is_dataset
from data.media import media_settings
from data.sources import declared_sources
from data.tokenizer import tokenizer_identity
from errors import UserError, reading
from models.qwen35_moe.config import ModelConfig

RUN = "run.json"
Run = dict[str, dict[str, Any]]

_PIXELS = {"min_pixels", "max_pixels", "max_video_pixels", "video_fps", "max_video_frames"}
_INDIFFERENT = {"path", "image_folder", "tokenizer", "chat_template", "num_workers", "on_bad_sample", *_PIXELS}
"""Options of the data that are told in other ways, or that change no sample's place."""
_ENDS = 2**16


def describe_run(config: Config, shape: ModelConfig) -> Run:
    """The contents of `run.json`. Opens the data."""
    names = {field.name for field in dataclasses.fields(config.data)} - _INDIFFERENT
    options = {f"data.{name}": getattr(config.data, name) for name in sorted(names)}
    options |= {
        "data.tokenizer": tokenizer_identity(config.data.tokenizer, config.data.format, config.data.chat_template),
        "training.sequence_length": config.training.sequence_length,
        "training.global_batch_size": config.training.global_batch_size,
        "job.seed": config.job.seed,
    }
    if media := media_settings(config, shape.vision):
        # They decide how many tokens an image has, and may stand in the processor's files.
        options |= {f"pixels.{name}": value for name, value in media.rules._asdict().items()}
    sources: dict[str, Any] = {}
    for number, (entry, source) in enumerate(declared_sources(config.data), 1):
        kind, num_documents = type(source).__name__.strip("_"), len(source)
        sources[f"entry {number} of data.path"] = f"{kind} of {num_documents} documents"
        for path in files_of(entry, config.data.split):
            sources[f"{path.name} in entry {number} of data.path"] = f"{path.stat().st_size} bytes, {_hash(path)}"
        if not os.path.exists(entry) and is_dataset(entry):
            sources[f"name of entry {number} of data.path"] = entry
    if config.validation.enable and config.validation.share:
        sources["validation.share"] = config.validation.share
        if config.data.format == "chat":
            sources["what decides of validation.share"] = "what is read of a conversation"
    if config.training.epochs:
        sources["order"] = "epochs, dealt by length"
    model = dict(_flat(shape.to_dict()))
    return json.loads(json.dumps({"options": options, "sources": sources, "model": model}))


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of tables in tables, by their keys one after the other."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _hash(path: Path) -> str:
    with reading(path), path.open("rb") as file:
        first = file.read(_ENDS)
        file.seek(max(path.stat().st_size - _ENDS, 0))
        return hashlib.sha256(first + file.read(_ENDS)).hexdigest()[:16]


def read_run(checkpoint: Path) -> Run | None:
    """What the run that saved `checkpoint` recorded; None if it was saved before there was a record."""
    path = checkpoint / RUN
    if not os.path.lexists(path):
        return None
    run = read_json(path)
    if not all(isinstance(run.get(part), dict) for part in ("options", "sources", "model")):
        raise UserError(f"{path}: expected options, sources and model")
    return run


def difference(before: Run, now: Run, part: str) -> str | None:
    """What is another than it was, in words, or None. An option or key that one of them does not know is no difference:
    it came with another version."""
    old, new = before[part], now[part]
    for key in sorted(old.keys() | new.keys()) if part == "sources" else sorted(old.keys() & new.keys()):
        if old.get(key) != new.get(key):
            return f"{key}: {_short(old.get(key))} when it was saved, {_short(new.get(key))} now"
    return None


def _short(value: object) -> str:
    text = "absent" if value is None else json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
