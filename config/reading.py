"""Reads a configuration from TOML and the command line into the dataclasses of options.py, or says what is wrong.

Precedence: their defaults < TOML (`extends = "base.toml"`, relative to the file, merges a base first) < command line
(`--section.key value` or `--section.key=value`). Tables merge key by key, also `[model.config]`; lists replace. A
`model.path` of a later source takes the place of an earlier source's `model.config`, and so do `training.steps` and
`training.epochs` of each other.

Relative paths are taken from the working directory; what is to be read and is not there, from the repository's root.
A loaded Config holds absolute paths only, so a stored `config.toml` means the same wherever it is loaded.
"""

import contextlib
import dataclasses
import difflib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tomli
import tomli_w

from config.options import Config
from config.schema import SCHEMA, SECTIONS, Named, default_of, help_text, in_words
from data.files import is_dataset, matches
from errors import UserError
from models.qwen35_moe.config import ModelConfig, read_config

_LENGTHS = {"steps", "epochs"}  # how long a run is, either way
ROOT = Path(__file__).resolve().parents[1]
_SHIPPED = ROOT / "train_configs"


def load_config(argv: list[str]) -> Config:
    """The configuration that a command line asks for. `--help` prints every key and exits with status 0.

    Raises UserError. What depends on files or on the number of processes is left to `check_config`.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text())
        raise SystemExit(0)
    options = _parse_command_line(argv)
    name = options.pop("config", None)
    file = None if name is None else _find_config(name)
    tables = options if file is None else _over(_load_toml(file), options)
    missing_in = f"{file}: " if file else f"--config is missing: {_expected_file()}; without it "
    model = tables.get("model", {})
    if model.get("path") and model.get("config"):
        raise UserError(f"model.path = {model['path']!r} and model.config exclude each other: expected one of them")
    if not model.get("path") and not model.get("config"):
        neither = "model.path = '' and model.config is empty: expected a Hugging Face directory or a table"
        raise UserError(f"{missing_in}{neither}")
    sections = {}
    for section, cls in SECTIONS.items():
        given = tables.get(section, {})
        fields = {item.name.rstrip("_"): item for item in dataclasses.fields(cls)}
        for key, item in fields.items():
            if key not in given and not default_of(item):
                raise UserError(f"{missing_in}{section}.{key} is missing: expected {in_words(SCHEMA[section][key])}")
        sections[section] = cls(**{fields[key].name: value for key, value in given.items()})
    config = Config(**sections)
    if config.training.steps is None and config.training.epochs is None:
        neither = "training.steps is missing: expected a positive integer, or training.epochs, a positive number"
        raise UserError(f"{missing_in}{neither}")
    if config.training.steps is not None and config.training.epochs is not None:
        both = f"training.steps = {config.training.steps} and training.epochs = {config.training.epochs}"
        raise UserError(f"{both}: expected one of them")
    return _with_absolute_paths(config)


def resolved_toml(config: Config) -> str:
    """The whole configuration as TOML. Loading it gives an equal Config."""

    def table(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key.rstrip("_"): value for key, value in items if value is not None}

    return tomli_w.dumps(dataclasses.asdict(config, dict_factory=table))


def model_config(config: Config) -> ModelConfig:
    """The model's shape, from `model.path` or `model.config`, with its tower and multi-token prediction if the run uses
    them. Raises UserError."""
    if config.model.path and not Path(config.model.path, "config.json").is_file():
        raise UserError(f"model.path = {config.model.path!r}: expected a directory with a config.json")
    uses_vision = bool(config.model.path) and _uses_vision(config)
    uses_mtp = config.mtp.train != "off"
    try:
        if config.model.path:
            return ModelConfig.from_pretrained(config.model.path, uses_vision, uses_mtp)
        shape = replace(ModelConfig.from_table(config.model.config), mtp_num_hidden_layers=int(uses_mtp))
        if config.model.vision == "on" and shape.vision is None:
            raise UserError("model.vision = 'on': expected a vision_config")
        return replace(shape, vision=None) if config.model.vision == "off" else shape
    except UserError as error:
        source = f"model.path = {config.model.path!r}" if config.model.path else "model.config"
        raise UserError(f"{source}: {str(error).removeprefix('model config: ')}") from error


def _uses_vision(config: Config) -> bool:
    """Whether the tower of `model.path` is part of the model."""
    if config.model.vision != "auto":
        return config.model.vision == "on"
    with contextlib.suppress(UserError):  # what is wrong with the file is told by whoever reads its text part
        has_tower = bool(read_config(Path(config.model.path, "config.json")).get("vision_config"))
        if has_tower:
            from data.samples import shows_media

            return shows_media(config)
    return False


def _with_absolute_paths(config: Config) -> Config:
    def absolute(path: str) -> str:
        return os.path.abspath(os.path.expanduser(path))

    def readable(path: str) -> str:
        if not path:
            return ""
        here, shipped = absolute(path), os.path.abspath(ROOT / path)
        return shipped if not matches(here) and matches(shipped) else here

    def entries(paths: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(path if is_dataset(path) and not matches(readable(path)) else readable(path) for path in paths)

    job, data, checkpoint = config.job, config.data, config.checkpoint
    model = replace(config.model, path=readable(config.model.path))
    resume = checkpoint.resume if checkpoint.resume in ("auto", "never") else readable(checkpoint.resume)
    return replace(
        config,
        job=replace(job, output_dir=absolute(job.output_dir)),
        model=model,
        data=replace(
            data,
            path=entries(data.path),
            tokenizer=readable(data.tokenizer) or model.path,
            chat_template=readable(data.chat_template),
            image_folder=readable(data.image_folder or "."),
        ),
        validation=replace(
            config.validation,
            path=entries(config.validation.path),
            sets={name: entries(paths) for name, paths in config.validation.sets.items()},
        ),
        checkpoint=replace(checkpoint, resume=resume, start_from=readable(checkpoint.start_from)),
        compile=replace(config.compile, cache_dir=config.compile.cache_dir and absolute(config.compile.cache_dir)),
    )


# Reading: TOML and command line -> tables of checked values


def _find_config(name: str) -> Path:
    """The TOML file that `--config NAME` means. Raises UserError."""
    for path in (Path(name), ROOT / name, _SHIPPED / name, _SHIPPED / f"{name}.toml"):
        if os.path.isfile(path):
            return path
    found = "does not exist"
    if os.path.exists(name):
        is_folder = os.path.isdir(name)
        found = "is a folder" if is_folder else "is a pipe or a device, and each process of a run has to read it"
    raise UserError(f"--config = {name!r} {found}: {_expected_file()}")


def _expected_file() -> str:
    return f"expected a file's path, or one of {', '.join(sorted(path.name for path in _SHIPPED.glob('*.toml')))}"


def _load_toml(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file's tables, merged over those of the file it extends. `below`: the files that extend this one."""
    path = path.resolve()
    if path in below:
        raise UserError(
            f"{below[-1]}: extends = {str(path)!r} is a cycle: expected a file that does not extend this one"
        )
    try:
        tables = tomli.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: expected a TOML file") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError tells line and column
        raise UserError(f"{path} is not TOML: {error}") from None
    base = tables.pop("extends", None)
    values = _convert_table("", SCHEMA, tables, f"{path}: ")
    if base is None:
        return values
    if not isinstance(base, str) or not _can_be_a_path(base) or not (path.parent / base).is_file():
        raise UserError(f"{path}: extends = {base!r}: expected a TOML file's path, relative to this file")
    return _over(_load_toml(path.parent / base, (*below, path)), values)


def _parse_command_line(argv: list[str]) -> dict[str, Any]:
    """The tables of all options, and what `--config` names."""
    accepted = {"config": str, **SCHEMA}
    tables: dict[str, Any] = {}
    seen: set[str] = set()
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(f"unexpected {word!r} on the command line: expected --section.key value")
        key, equals, value = word[2:].partition("=")
        text = value if equals else words.pop(0) if words and not words[0].startswith("--") else None
        if key in seen:
            raise UserError(f"--{key} = {text!r} is given a second time: expected one value")
        seen.add(key)
        names = key.split(".")
        schema: Any = accepted
        for depth, name in enumerate(names):
            if get_origin(schema) is dict or schema is object:  # any keys
                schema = object
                continue
            if not isinstance(schema, Mapping):
                leaf = ".".join(names[:depth])
                raise UserError(f"--{key} = {text!r} is unknown: {leaf} is no table, but {in_words(schema)}")
            if name not in schema:
                raise UserError(f"--{key} = {text!r} is unknown: {_nearest(names[:depth], names[depth:], schema)}")
            schema = schema[name]
        if text is None:
            if schema is not bool:
                raise UserError(f"--{key} has no value: expected {in_words(schema)}")
            text = "true"
        try:
            table = _parse_word(schema, text)
        except (ValueError, RecursionError):
            raise UserError(f"--{key} = {text!r}: {_expected(schema, text)}") from None
        for name in reversed(names):
            table = {name: table}
        tables = _merge(tables, _convert_table("", accepted, table, "--"))
    return tables


def _parse_word(schema: Any, text: str) -> Any:
    """A word of the command line as the TOML value that it means. Raises UserError."""
    hint = get_args(schema)[0] if get_origin(schema) is Annotated else schema
    if hint is object:
        try:
            return _parse_value(text)
        except ValueError:
            return text  # a word
    if hint is str or get_origin(hint) is Literal:
        return text
    if get_origin(hint) is tuple and not text.startswith("["):
        if get_args(hint)[0] is str:
            return text.split(",")
        text = f"[{text}]"
    return _parse_value(text)


def _parse_value(text: str) -> Any:
    """One TOML value. Raises ValueError, also for lines below it."""
    (value,) = tomli.loads(f"value = {text}").values()
    return value


def _over(base: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
    """A later source's tables over those of the sources before."""
    if _LENGTHS & source.get("training", {}).keys():
        training = {key: value for key, value in base.get("training", {}).items() if key not in _LENGTHS}
        base = {**base, "training": training}
    return _merge(base, source)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` upon `base`: tables key by key, anything else replaces."""
    merged = dict(base)
    if over.get("model", {}).get("path") and "model" in base:
        merged["model"] = {key: value for key, value in base["model"].items() if key != "config"}
    for key, value in over.items():
        both_tables = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_tables else value
    return merged


def _convert_table(prefix: str, schema: Mapping[str, Any], table: Any, source: str) -> dict[str, Any]:
    """A TOML table with every value as its schema wants it. Raises UserError, its line begun with `source`."""
    converted: dict[str, Any] = {}
    for name, value in table.items():
        key = prefix + name
        if name not in schema:
            raise UserError(f"{source}{key} = {value!r} is unknown: {_nearest(prefix.split('.')[:-1], [name], schema)}")
        if isinstance(schema[name], Mapping) and isinstance(value, dict):
            converted[name] = _convert_table(f"{key}.", schema[name], value, source)
            continue
        try:
            converted[name] = _convert(schema[name], value)
        except (ValueError, TypeError, OverflowError):  # a float may be written as an integer, of any size
            raise UserError(f"{source}{key} = {value!r}: {_expected(schema[name], value)}") from None
    return converted


def _can_be_a_path(text: str) -> bool:
    """Whether the system takes it as one; most strings here are paths, and none has a reason not to be."""
    try:
        return "\0" not in text and all(len(part.encode()) <= 255 for part in text.split("/")) and len(text) < 4000
    except UnicodeEncodeError:
        return False


def _convert(hint: Any, value: Any) -> Any:
    """`value` as the type `hint`: an integer may be a float, a list becomes a tuple. Raises UserError."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        value = _convert(arguments[0], value)
        accepted = arguments[1].test(value)
    elif origin is Literal:
        accepted = value in arguments
    elif origin is tuple:
        if arguments == (str, ...) and isinstance(value, str):
            value = [value]
        if accepted := isinstance(value, list):
            hints = arguments[:1] * len(value) if arguments[-1] is ... else arguments
            accepted = len(hints) == len(value)
            value = tuple(map(_convert, hints, value))
    elif origin is dict:
        accepted = isinstance(value, dict)
        json.dumps(value)  # dates have no place in it
    elif hint is float:
        accepted = type(value) in (int, float)  # bool is another type
        value = float(value) if accepted else value
    else:
        accepted = type(value) is hint and (hint is not str or _can_be_a_path(value))
    if not accepted:
        raise ValueError
    return value


# Messages


def _expected(hint: Any, value: Any) -> str:
    nearest = difflib.get_close_matches(str(value), get_args(hint), n=1) if get_origin(hint) is Literal else []
    return f"expected {in_words(hint)}" + "".join(f"; did you mean {choice!r}?" for choice in nearest)


def _nearest(above: list[str], names: list[str], table: Mapping[str, Any]) -> str:
    """What an unknown key may have been meant to be. above: the names of `table`, which is there; names: those below,
    of which the first is not. A key of that table goes before others."""
    if isinstance(table, Named):
        return f"expected {table.accepted}"

    def keys(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
        for name, inner in table.items():
            yield prefix + name
            if isinstance(inner, Mapping):
                yield from keys(inner, f"{prefix}{name}.")

    own, all_keys = list(keys(table)), list(keys(SCHEMA))
    nearest = difflib.get_close_matches(".".join(names), own, n=1)
    if not above or not nearest:
        same_name = [key for key in all_keys if key.rpartition(".")[2] == names[-1]]
        found = difflib.get_close_matches(".".join(above + names), same_name, n=1, cutoff=0.0)
        if found:
            return f"did you mean {found[0]}?"
    if nearest:
        return f"did you mean {'.'.join([*above, nearest[0]])}?"
    return f"expected one of {', '.join(table)}"
