"""What a TOML file may hold: the schema, made of the dataclasses of options.py, and its text for --help."""

import ast
import dataclasses
import inspect
import itertools
import json
import re
import textwrap
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from config.options import Config
from models.qwen35_moe.config import MTP_LAYERS, ModelConfig
from models.qwen35_moe.vision_config import TOKEN_IDS, VisionConfig

_NAME = re.compile("[A-Za-z0-9_-]{1,64}")  # what the names of metrics may end in

# The schema of a TOML file: a table is a dict from its keys to schemas, everything else a type as `typing` writes it.
# An inline model may have the keys that ModelConfig reads and no others, so that a typo there is found too.
SECTIONS: dict[str, type] = get_type_hints(Config)
_SHAPE = {key: hint for key, hint in get_type_hints(ModelConfig).items() if key not in ("vision", MTP_LAYERS)}
_ROPE = {key: _SHAPE[key] for key in ("rope_theta", "partial_rotary_factor", "mrope_section")}
_HF_FORM = {"model_type": str, "full_attention_interval": int, "hidden_act": str, "attention_bias": bool}
_ROPE_PARAMETERS = {"rope_type": str, "mrope_interleaved": bool, **_ROPE}
_TOWER = get_type_hints(VisionConfig)
_VISION = {key: _TOWER.pop(key) for key in TOKEN_IDS} | {
    "vision_config": _TOWER
    | {"model_type": str, "hidden_act": str, "rope_parameters": {"rope_type": str, "rope_theta": float}}
}


def _given(hint: Any) -> Any:
    """The type of a value that is given, where it may also be left out."""
    return get_args(hint)[0] if get_origin(hint) is types.UnionType or get_origin(hint) is Union else hint


class Named(dict[str, Any]):
    """The schema of a table whose keys are names that the user gives, with values of one type."""

    accepted = "a name of 1 to 64 letters, digits, _ and -"

    def __init__(self, hint: Any) -> None:
        super().__init__()
        self._hint = hint

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(_NAME.fullmatch(name))

    def __missing__(self, name: str) -> Any:
        return self._hint


SCHEMA: dict[str, Any] = {
    name: {field.rstrip("_"): _given(hint) for field, hint in get_type_hints(cls, include_extras=True).items()}
    for name, cls in SECTIONS.items()
}
SCHEMA["validation"]["sets"] = Named(get_args(SCHEMA["validation"]["sets"])[1])
SCHEMA["model"]["config"] = _SHAPE | _HF_FORM | _VISION
SCHEMA["model"]["config"] |= {"attention_dropout": float, "rope_parameters": _ROPE_PARAMETERS}


def in_words(hint: Any) -> str:
    """What a schema accepts, in words."""
    arguments = get_args(hint)
    if isinstance(hint, Mapping):
        return "a table"
    if get_origin(hint) is Annotated:
        return str(arguments[1].text)
    if get_origin(hint) is Literal:
        *others, last = map(repr, arguments)
        return f"{', '.join(others)} or {last}" if others else last
    if get_origin(hint) is dict:
        return "a table of strings, numbers, booleans, lists and tables"
    if get_origin(hint) is tuple:
        return f"a list of {'any length' if arguments[-1] is ... else len(arguments)}, each {in_words(arguments[0])}"
    return {
        object: "a value",
        str: "a string that can be a path",
        bool: "true or false",
        int: "an integer",
        float: "a number",
    }[hint]


def help_text() -> str:
    """Every key with its type, default and docstring."""
    lines = ["usage: ./run_train.sh --config FILE [--section.key value | --section.key=value ...]", ""]
    lines += ['FILE is a path or a name in train_configs/. Lists: \'["a", "b"]\' or a,b. --help shows this and ends.']
    for section, cls in SECTIONS.items():
        lines += ["", f"[{section}] {inspect.getdoc(cls)}"]
        docs = field_docs(cls)
        for item in dataclasses.fields(cls):
            default = f"default {default_of(item)}" if default_of(item) else "required"
            key = item.name.rstrip("_")
            lines.append(f"  --{section}.{key}: {in_words(SCHEMA[section][key])}; {default}")
            lines += textwrap.wrap(docs[item.name], 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def default_of(item: "dataclasses.Field[Any]") -> str:
    """A field's default as TOML, empty if it has none."""
    if item.default is dataclasses.MISSING:
        return "" if item.default_factory is dataclasses.MISSING else "{}"
    return "none" if item.default is None else json.dumps(item.default)


def field_docs(cls: type) -> dict[str, str]:
    """The string literal under each field of a class."""
    docs = {}
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    for pair in itertools.pairwise(definition.body):
        match pair:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                docs[name] = inspect.cleandoc(doc)
    return docs
