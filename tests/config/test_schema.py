"""The schema: made of the options' dataclasses, told in words, and with every docstring in --help."""

import dataclasses
import tomllib
from typing import Any, Literal

import pytest

from config.options import Config, Data
from config.schema import SCHEMA, SECTIONS, default_of, field_docs, help_text, in_words
from models.qwen35_moe.config import ModelConfig


def test_every_option_is_in_the_schema_under_the_name_that_users_write():
    assert SCHEMA.keys() == {field.name for field in dataclasses.fields(Config)}
    for section, cls in SECTIONS.items():
        assert SCHEMA[section].keys() == {field.name.rstrip("_") for field in dataclasses.fields(cls)}
        assert not any(key.endswith("_") for key in SCHEMA[section])


def test_what_may_be_left_out_has_the_type_of_what_is_given():
    assert in_words(SCHEMA["training"]["steps"]) == "a positive integer below 2**31"
    assert in_words(SCHEMA["model"]["config"]["head_dim"]) == "an integer"


def test_an_inline_model_has_the_keys_of_a_file_and_no_others():
    shape = SCHEMA["model"]["config"]
    own = {field.name for field in dataclasses.fields(ModelConfig)}
    assert {"num_experts", "hidden_size", "rope_theta", "model_type", "vision_config", "image_token_id"} <= shape.keys()
    assert {"rope_theta", "rope_type", "mrope_section"} <= shape["rope_parameters"].keys()
    assert "vision" not in shape  # of the class: files say it otherwise
    assert "vision" in own
    assert "hiden_size" not in shape


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("code", True), ("held-out_2", True), ("a" * 64, True), ("a" * 65, False), ("", False), ("a b", False)],
)
def test_sets_of_validation_have_names_that_metrics_may_have(name, is_one):
    sets = SCHEMA["validation"]["sets"]
    assert (name in sets) == is_one
    if is_one:
        assert in_words(sets[name]) == "a list of any length, each a string that can be a path"
    assert in_words(sets) == "a table"


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (bool, "true or false"),
        (int, "an integer"),
        (float, "a number"),
        (Literal["a"], "'a'"),
        (Literal["a", "b", "c"], "'a', 'b' or 'c'"),
        (tuple[float, float], "a list of 2, each a number"),
        (tuple[str, ...], "a list of any length, each a string that can be a path"),
        (dict[str, Any], "a table of strings, numbers, booleans, lists and tables"),
        ({"a": int}, "a table"),
        (SCHEMA["data"]["layout"], "'auto', 'messages', 'sharegpt', 'alpaca' or 'prompt_completion'"),
    ],
)
def test_what_is_accepted_in_words(hint, words):
    assert in_words(hint) == words


def test_every_option_has_words_a_default_and_a_docstring_in_the_help():
    text = " ".join(help_text().split())
    for section, cls in SECTIONS.items():
        docs = field_docs(cls)
        for field in dataclasses.fields(cls):
            key = field.name.rstrip("_")
            assert f"--{section}.{key}: {in_words(SCHEMA[section][key])}; " in text
            assert " ".join(docs[field.name].split()) in text
    assert max(map(len, help_text().splitlines())) <= 160


def test_defaults_are_told_as_toml():
    for cls in SECTIONS.values():
        for field in dataclasses.fields(cls):
            told = default_of(field)
            if told and told != "none":
                value = tomllib.loads(f"a = {told}")["a"]
                default = {} if field.default is dataclasses.MISSING else field.default
                assert (tuple(value) if isinstance(default, tuple) else value) == default
            assert (told == "none") == (field.default is None)


def test_the_docstring_under_a_field_and_no_other():
    class_docs = field_docs(Data)
    assert class_docs["text_key"] == "Name of the field that holds a document's text."
    assert class_docs.keys() == {field.name for field in dataclasses.fields(Data)}
