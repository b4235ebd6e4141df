"""What a run's checkpoints hold beside the weights is what it began with, whatever becomes of its sources."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from checkpoint.checkpointer import Checkpointer
from checkpoint.directories import find_checkpoint
from config.options import Data, Model
from errors import UserError
from tests.checkpoint.runs import ROOT
from tests.checkpoint.test_checkpointer import CONFIG, CURSORS, TOKENIZER, build, save


@pytest.mark.usefixtures("one_rank")
def test_a_model_from_random_weights_declares_the_positions_it_was_trained_on(tmp_path: Path) -> None:
    checkpointer = build(str(tmp_path / "run"), 1, 1, seed=0)[2]
    checkpointer.save(1, 1, CURSORS)
    assert checkpointer.wait()
    config = json.loads((find_checkpoint(tmp_path / "run") / "hf/config.json").read_text())
    assert config["max_position_embeddings"] == 8


def started_from_files(folder: Path) -> Checkpointer:
    """That of a run on chats whose model, tokenizer, template and data lie in `folder`."""
    for name in ("tokenizer", "base"):
        shutil.copytree(TOKENIZER, folder / name)
    (folder / "tokenizer/additional_chat_templates").mkdir()
    (folder / "tokenizer/additional_chat_templates/tool.jinja").write_text("x")
    (folder / "base/config.json").write_text(json.dumps(CONFIG.to_dict() | {"note": 1, "max_position_embeddings": 64}))
    (folder / "base/generation_config.json").write_text('{"top_k": 20}')
    (folder / "tokenizer/preprocessor_config.json").write_text("{}")
    (folder / "tokenizer/chat_template.json").write_text('{"chat_template": "another"}')
    shutil.copy(TOKENIZER / "chat_template.jinja", folder / "own.jinja")
    turns = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Tiny."}]
    (folder / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    _, _, checkpointer = build(str(folder / "run"), 1, 1, seed=0, export_hf="all")
    data = Data(
        path=(str(folder / "chats.jsonl"),),
        format="chat",
        tokenizer=str(folder / "tokenizer"),
        chat_template=str(folder / "own.jinja"),
    )
    checkpointer._config = dataclasses.replace(checkpointer._config, data=data, model=Model(path=str(folder / "base")))
    return checkpointer


SOURCES = ("base", "tokenizer", "own.jinja", "chats.jsonl")


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("change", ["vanish", "change"])
def test_what_accompanies_the_weights_is_that_of_the_start(tmp_path: Path, change: str) -> None:
    checkpointer = started_from_files(tmp_path)
    assert checkpointer.resume() is None
    checkpointer._base = tmp_path / "base"  # as if it had been loaded from there
    for name in SOURCES:
        (tmp_path / name).rename(tmp_path / f"{name}.before")
    if change == "change":
        shutil.copytree(tmp_path / "tokenizer.before", tmp_path / "base")
        (tmp_path / "base/config.json").write_text(json.dumps(CONFIG.to_dict() | {"num_experts_per_tok": 1}))
        (tmp_path / "base/generation_config.json").write_text('{"top_k": 1}')
        shutil.copytree(tmp_path / "base.before", tmp_path / "tokenizer")
        (tmp_path / "tokenizer/tokenizer_config.json").write_text("{}")
        (tmp_path / "own.jinja").write_text("another")
    save(checkpointer, 1)
    for folder in (find_checkpoint(tmp_path / "run") / "hf", tmp_path / "run/hf/step-00000001"):
        config = json.loads((folder / "config.json").read_text())
        assert config["num_experts_per_tok"] == CONFIG.num_experts_per_tok
        assert (config["note"], config["max_position_embeddings"]) == (1, 64)
        assert json.loads((folder / "generation_config.json").read_text())["top_k"] == 20
        assert not (folder / "chat_template.json").exists()  # transformers' processor would take it
        assert (folder / "chat_template.jinja").read_bytes() == (tmp_path / "own.jinja.before").read_bytes()
        for name in ("tokenizer.json", "tokenizer_config.json", "additional_chat_templates/tool.jinja"):
            assert (folder / name).read_bytes() == (tmp_path / "tokenizer.before" / name).read_bytes()
    assert "I am Tiny." in json.loads((find_checkpoint(tmp_path / "run") / "hf/tokenizer_sample.json").read_text())
    save(checkpointer, 2)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("lacking", [*SOURCES, "tokenizer/tokenizer.json", "base/config.json"])
def test_a_source_that_is_not_there_is_told_at_the_start(tmp_path: Path, lacking: str) -> None:
    checkpointer = started_from_files(tmp_path)
    (tmp_path / lacking).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=lacking) as raised:
        checkpointer.resume()
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("lacking", ["tokenizer.json", "tokenizer_config.json"])
def test_no_other_tokenizer_takes_the_place_of_the_one_that_is_named(tmp_path: Path, lacking: str) -> None:
    """That of the base has all files, and texts need no template."""
    checkpointer = started_from_files(tmp_path)
    data = Data(path=(str(ROOT / "data/tiny/python_reference.jsonl"),), tokenizer=str(tmp_path / "tokenizer"))
    checkpointer._config = dataclasses.replace(checkpointer._config, data=data)
    checkpointer._assets  # noqa: B018 (it can be read)
    del checkpointer._assets
    (tmp_path / "tokenizer" / lacking).unlink()
    with pytest.raises(UserError, match=lacking):
        checkpointer._assets  # noqa: B018


@pytest.mark.usefixtures("one_rank")
def test_another_config_than_the_run_began_with_is_refused(tmp_path: Path) -> None:
    checkpointer = started_from_files(tmp_path)
    (tmp_path / "base/config.json").write_text(json.dumps(CONFIG.to_dict() | {"num_experts_per_tok": 1}))
    with pytest.raises(UserError, match=r"base/config\.json has changed since the run began"):
        checkpointer.resume()
