"""What a directory holds beside the weights: one tokenizer's files, and every token that ends generation."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from checkpoint.hf_assets import (
    check_tokenizer,
    read_assets,
    read_checkpoint_assets,
    write_files,
    write_generation_config,
)
from errors import UserError

TINY = Path(__file__).resolve().parents[2] / "data/tiny/tokenizer"


def folder_of(path: Path, **files: str) -> Path:
    """A directory of files; "__" in a name stands for a folder, "_json" and "_jinja" for the endings."""
    for name, content in files.items():
        file = path / name.replace("__", "/").replace("_json", ".json").replace("_jinja", ".jinja")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return path


def tokenizer_files(eos: str = "<a>") -> dict[str, str]:
    tokens = [{"content": "<a>", "id": 7}, {"content": "<b>", "id": 8}]
    settings = {"eos_token": eos, "pad_token": "<b>"}
    return {"tokenizer_json": json.dumps({"added_tokens": tokens}), "tokenizer_config_json": json.dumps(settings)}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


LEFT_OVER = (
    "chat_template_jinja",
    "special_tokens_map_json",
    "added_tokens_json",
    "vocab_json",
    "merges.txt",
    "additional_chat_templates__tool_jinja",
)


@pytest.mark.parametrize("leftover", LEFT_OVER)
def test_no_file_of_another_tokenizer_stands_beside_the_trained_one(tmp_path: Path, leftover: str) -> None:
    trained = folder_of(tmp_path / "trained", **tokenizer_files())
    base = folder_of(
        tmp_path / "base", **tokenizer_files("<b>"), **{leftover: "{}"}, generation_config_json='{"top_k": 20}'
    )
    (tmp_path / "out").mkdir()
    write_files(tmp_path / "out", read_assets(trained, base))
    names = {path.name for path in (tmp_path / "out").rglob("*")}
    assert names == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert read(tmp_path / "out/tokenizer_config.json")["eos_token"] == "<a>"


def test_a_tokenizer_is_taken_whole_from_the_first_that_is_one(tmp_path: Path) -> None:
    template = {"chat_template_jinja": "x", "additional_chat_templates__tool_jinja": "y"}
    base = folder_of(tmp_path / "base", **tokenizer_files(), **template)
    without = folder_of(tmp_path / "without", config_json="{}", chat_template_jinja="z")
    (tmp_path / "out").mkdir()
    write_files(tmp_path / "out", read_assets(without, base))
    assert (tmp_path / "out/chat_template.jinja").read_text() == "x"
    assert (tmp_path / "out/additional_chat_templates/tool.jinja").read_text() == "y"


@pytest.mark.parametrize("lacking", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_is_named_is_there_or_told(tmp_path: Path, lacking: str) -> None:
    """No other's is taken in its place."""
    named = folder_of(tmp_path / "named", **tokenizer_files("<b>"))
    base = folder_of(tmp_path / "base", **tokenizer_files())
    assert b'"<b>"' in read_assets(base, named, tokenizer=named)["tokenizer_config.json"]
    (named / lacking).unlink()
    with pytest.raises(UserError, match=f"data.tokenizer = '{named}': expected a directory with {lacking}"):
        read_assets(named, base, tokenizer=named)


@pytest.mark.parametrize("processor", [None, "base"])
def test_a_processors_files_are_of_one_folder(tmp_path: Path, processor: str | None) -> None:
    """Of the first that has some, or of the one by which images were read; transformers would let a file of another
    folder come before it."""
    trained = folder_of(tmp_path / "trained", **tokenizer_files(), preprocessor_config_json='{"min_pixels": 1}')
    others = {"processor_config_json": "{}", "video_preprocessor_config_json": "{}"}
    base = folder_of(tmp_path / "base", **others)
    (tmp_path / "out").mkdir()
    write_files(
        tmp_path / "out", read_assets(folder_of(tmp_path / "none"), trained, base, processor=processor and base)
    )
    expected = {path.name for path in (base if processor else trained).iterdir() if "processor" in path.name}
    assert {path.name for path in (tmp_path / "out").iterdir() if "processor" in path.name} == expected


@pytest.mark.parametrize(
    ("files", "beside", "expected"),
    [
        ({}, False, True),
        ({"chat_template_jinja": "x"}, False, False),
        ({"additional_chat_templates__tool_jinja": "x"}, False, False),
        ({"tokenizer_config_json": '{"chat_template": "x"}'}, False, False),
        ({"chat_template_jinja": "x"}, True, True),
    ],
)
def test_a_processors_template_comes_along_and_before_no_other_tokenizers(
    tmp_path: Path, files: dict[str, str], beside: bool, expected: bool
) -> None:
    processor = {"preprocessor_config_json": "{}", "chat_template_json": '{"chat_template": "z"}'}
    trained = folder_of(tmp_path / "trained", **(tokenizer_files() | files | (processor if beside else {})))
    base = folder_of(tmp_path / "base", **tokenizer_files(), **processor)
    assert ("chat_template.json" in read_assets(trained, base)) == expected
    assert "chat_template.json" not in read_assets(trained, base, vision=False)


def test_a_processors_template_alone_makes_no_processor(tmp_path: Path) -> None:
    trained = folder_of(tmp_path / "trained", **tokenizer_files(), chat_template_json="{}")
    base = folder_of(tmp_path / "base", preprocessor_config_json="{}")
    assert "preprocessor_config.json" in read_assets(trained, base)


@pytest.mark.parametrize(
    ("config", "settings", "expected"),
    [
        ({}, None, [7, 9]),  # the tokenizer's own, and that of the trained turns
        ({"eos_token_id": 5}, None, [5, 7, 9]),
        ({"eos_token_id": [5, 9]}, {"eos_token_id": 6, "top_k": 20}, [5, 9, 6, 7]),
        ({"eos_token_id": None}, {"eos_token_id": [9, 7]}, [9, 7]),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_chats_end_of_turn_ends_generation(
    tmp_path: Path, config: dict[str, Any], settings: dict[str, Any] | None, expected: list[int], nested: bool
) -> None:
    source = folder_of(tmp_path / "source", **tokenizer_files())
    if settings is not None:
        folder_of(source, generation_config_json=json.dumps(settings))
    given = {"text_config": config} if nested else config
    before = json.dumps(given)
    (tmp_path / "hf").mkdir()
    write_files(tmp_path / "hf", read_checkpoint_assets(given, source, end_of_turn=9))
    written = read(tmp_path / "hf/config.json")
    assert written.get("text_config", written)["eos_token_id"] == expected
    assert ("eos_token_id" in written) != nested
    assert read(tmp_path / "hf/generation_config.json") == (settings or {}) | {"eos_token_id": expected}
    assert json.dumps(given) == before


def test_without_chats_nothing_is_added(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "source", **tokenizer_files(), generation_config_json='{"eos_token_id": 5}')
    (tmp_path / "hf").mkdir()
    write_files(tmp_path / "hf", read_checkpoint_assets({"eos_token_id": 3}, source))
    assert read(tmp_path / "hf/config.json") == {"eos_token_id": 3}
    assert read(tmp_path / "hf/generation_config.json") == {"eos_token_id": 5}


@pytest.mark.parametrize("nested", [False, True])
def test_an_exports_generation_config_has_every_end_token(tmp_path: Path, nested: bool) -> None:
    text = {"eos_token_id": [5, 9], "pad_token_id": 5, "bos_token_id": None}
    config = {"text_config": text} if nested else text
    write_generation_config(tmp_path, config)
    assert read(tmp_path / "generation_config.json") == {"eos_token_id": [5, 9], "pad_token_id": 5}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 6, "pad_token_id": 1, "top_k": 20}')
    write_generation_config(tmp_path, config)
    expected = {"eos_token_id": [5, 9, 6], "pad_token_id": 1, "top_k": 20}
    assert read(tmp_path / "generation_config.json") == expected


def test_nothing_known_of_ends_writes_nothing(tmp_path: Path) -> None:
    write_generation_config(tmp_path, {"eos_token_id": None})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["5", True, [5, None], {"a": 1}, -1, 1.5, [[5]]])
def test_an_end_token_that_is_no_number_is_refused(tmp_path: Path, value: object) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(UserError, match=r"eos_token_id = .*: expected a token's number"):
        write_generation_config(tmp_path, {})


@pytest.mark.parametrize("sample", [None, [], ["plain text"], ["I've  read", 3, None]])
def test_an_export_whose_tokenizer_is_read_as_another_is_refused(tmp_path: Path, sample: list | None) -> None:
    """One that splits words elsewhere than the family's class, which AutoTokenizer takes because of config.json."""
    source, folder = tmp_path / "source", tmp_path / "out"
    shutil.copytree(TINY, source)
    if sample is not None:
        (source / "tokenizer_sample.json").write_text(json.dumps(sample))
    folder.mkdir()
    write_files(folder, read_assets(source))
    (folder / "config.json").write_text('{"model_type": "qwen3_5_moe_text"}')
    check_tokenizer(folder, [source])
    assert not (folder / "tokenizer_sample.json").exists()
    for place in (source, folder):
        tokenizer = json.loads((place / "tokenizer.json").read_text())
        tokenizer["normalizer"] = None
        (place / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="AutoTokenizer makes"):
        check_tokenizer(folder, [source])
