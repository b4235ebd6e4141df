"""What a Hugging Face directory holds beside the weights: config.json, generation_config.json, the tokenizer."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoint.files import file_size, read_json
from data.images import PROCESSOR_FILES, find_processor
from data.tokenizer import PROBES, verify_tokenizer
from errors import UserError, reading

TEMPLATE = "chat_template.jinja"
PROCESSOR_TEMPLATE = "chat_template.json"
"""Of older processors; where it is there, transformers' processor takes it before TEMPLATE."""
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    TEMPLATE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
_GENERATION = "generation_config.json"
SAMPLE = "tokenizer_sample.json"
"""Of a checkpoint: a list of texts of its training data, by which an export's tokenizer is compared."""
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

Files = dict[str, bytes]
"""Their contents, by their names in a folder."""


def read_assets(
    *sources: Path, vision: bool = True, tokenizer: Path | None = None, processor: Path | None = None
) -> Files:
    """The files other than config.json. One that several of `sources` have is taken from the first.

    A tokenizer's files belong together: they are those in `tokenizer`, by which a run reads its texts, else those of
    `find_tokenizer`, and no other source's. So do an image processor's: those in `processor`, by which a run reads its
    images, else of the first source that has some. A processor's template is not taken where the tokenizer of another
    folder has its own.
    """
    if tokenizer is None:
        tokenizer = find_tokenizer(sources)
    elif missing := [name for name in _TOKENIZER[:2] if not (tokenizer / name).is_file()]:
        raise UserError(f"data.tokenizer = {str(tokenizer)!r}: expected a directory with {missing[0]}")
    templates = [str(path.relative_to(tokenizer)) for path in tokenizer.glob("additional_chat_templates/*.jinja")]
    names = {name: [tokenizer] for name in (*_TOKENIZER, *templates)}
    names[_GENERATION] = list(sources)
    if vision and (processor := processor or find_processor(sources)):
        names |= {name: [processor] for name in PROCESSOR_FILES}
        if processor == tokenizer or not (templates or _has_template(tokenizer)):
            names[PROCESSOR_TEMPLATE] = [processor]
    found = {}
    for name, places in names.items():
        if source := next((place for place in places if os.path.lexists(place / name)), None):
            found[name] = _without_code(source / name)
    return found


def _has_template(tokenizer: Path) -> bool:
    settings = tokenizer / _TOKENIZER[1]
    in_settings = settings.exists() and bool(read_json(settings).get("chat_template"))
    return in_settings or (tokenizer / TEMPLATE).exists()


def write_files(folder: Path, files: Files) -> None:
    """Writes them to `folder`, which is there."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def check_tokenizer(folder: Path, sources: Sequence[Path]) -> None:
    """Raises UserError if the tokenizer of a finished `folder` makes other tokens, for whoever loads it, than the files
    that it was copied from say: of awkward texts, and of the training data's sample if a checkpoint has one."""
    tokenizer = find_tokenizer(sources)
    if not (folder / _TOKENIZER[0]).exists():
        return
    texts: list[str] = list(PROBES)
    if os.path.lexists(path := tokenizer / SAMPLE):
        file_size(path)
        with reading(path):
            texts += [text for text in json.loads(path.read_text(encoding="utf-8")) if isinstance(text, str)]
    verify_tokenizer(str(tokenizer), str(folder), texts)


def find_tokenizer(sources: Sequence[Path]) -> Path:
    """The first of `sources` that has a tokenizer; the first of all if none has."""
    return next((source for source in sources if os.path.lexists(source / _TOKENIZER[0])), sources[0])


def _without_code(path: Path) -> bytes:
    """A file's bytes; of a configuration, without `auto_map`, which names code to be run."""
    if path.name.endswith("_config.json") and "auto_map" in (values := read_json(path)):
        return _as_json({key: value for key, value in values.items() if key != "auto_map"})
    file_size(path)
    with reading(path):
        return path.read_bytes()


def _as_json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def read_checkpoint_assets(
    config: dict[str, Any],
    *sources: Path,
    tokenizer: Path | None = None,
    processor: Path | None = None,
    end_of_turn: int | list[int] | None = None,
) -> Files:
    """A checkpoint's `hf/`: `config`, and the other files as `read_assets` has them.

    `end_of_turn`: the tokens that end the trained turns of chats. They are told as those that end generation, beside
    those that the config, the generation's settings and the tokenizer name; else they are left as they are.
    """
    files = read_assets(*sources, tokenizer=tokenizer, processor=processor)
    config = {key: value for key, value in config.items() if key != "auto_map"}
    if end_of_turn is not None:
        text = config.get("text_config", config)
        settings = json.loads(files.get(_GENERATION, b"{}"))
        special_tokens = special_token_ids(tokenizer or find_tokenizer(sources))
        ends = end_tokens(text, settings, special_tokens, {"eos_token_id": end_of_turn})
        if text is not config:
            config["text_config"] = text | ends
        if text is config or "eos_token_id" in config:
            config |= ends
        files[_GENERATION] = _as_json(settings | ends)
    return files | {"config.json": _as_json(config)}


def name_base(base: Path, parts: Mapping[str, str]) -> Files:
    """What a checkpoint's `hf/` tells of where the model's weights came from, and of the parts that were left there."""
    return {"base.json": (json.dumps({"path": str(base.resolve()), "parts": dict(parts)}) + "\n").encode()}


def write_generation_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Completes an export's generation_config.json: transformers reads that file alone, if it is there, and engines
    stop at its end tokens. What it leaves out comes from `config`, the export's config.json."""
    settings = read_json(folder / _GENERATION) if (folder / _GENERATION).exists() else {}
    text = config.get("text_config", config)
    of_config = {key: text[key] for key in _SPECIAL_IDS if text.get(key) is not None}
    if settings := of_config | settings | end_tokens(text, settings):
        (folder / _GENERATION).write_bytes(_as_json(settings))


def end_tokens(*tables: Mapping[str, Any]) -> dict[str, Any]:
    """`eos_token_id` of all the tables together, each token once; nothing if none tells of any."""
    ids: list[int] = []
    for given in (table.get("eos_token_id") for table in tables):
        for number in given if isinstance(given, list) else [] if given is None else [given]:
            if type(number) is not int or number < 0:
                raise UserError(f"eos_token_id = {given!r:.80}: expected a token's number, or a list of them")
            ids += [] if number in ids else [number]
    return {"eos_token_id": ids[0] if len(ids) == 1 else ids} if ids else {}


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


def read_base_parts(checkpoint: Path) -> dict[str, str]:
    """The hashes of the parts that were left in that directory, by the prefix of their tensors; an older checkpoint has
    none."""
    path = checkpoint / "hf" / "base.json"
    parts = read_json(path).get("parts", {}) if os.path.lexists(path) else {}
    if not isinstance(parts, dict) or not all(isinstance(value, str) for value in parts.values()):
        raise UserError(f"{path}: expected the parts' hashes")
    return parts


def special_token_ids(tokenizer: Path) -> dict[str, int]:
    """`eos_token_id` and the like, as config.json has them, from a tokenizer's files, if it has them."""
    if not all((tokenizer / name).exists() for name in _TOKENIZER[:2]):
        return {}
    names, tokens = read_json(tokenizer / "tokenizer_config.json"), read_json(tokenizer / "tokenizer.json")
    with reading(tokenizer / "tokenizer.json"):
        ids = {token["content"]: int(token["id"]) for token in tokens.get("added_tokens") or []}
    with reading(tokenizer / "tokenizer_config.json"):
        contents = {kind: names.get(f"{kind}_token") for kind in ("bos", "eos", "pad")}
        text = {kind: value["content"] if isinstance(value, dict) else value for kind, value in contents.items()}
        return {f"{kind}_token_id": ids[content] for kind, content in text.items() if content in ids}
