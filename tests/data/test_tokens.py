"""Tokenised corpora: read as they were written, and refused in one line if they are not what they say."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from config.options import Data, Training
from data.loader import TokenLoader
from data.sources import open_sources
from data.tokenizer import tokenizer_identity
from data.tokens import corpus_identity
from errors import UserError

TOKENIZER = Path(__file__).resolve().parents[2] / "data" / "tiny" / "tokenizer"
TOKENS = [[5, 4095, 0, 7], [8, 9]]
ENDS = [[1, 4], [0, 2]]


def write(folder, tokens=TOKENS, ends=ENDS, dtype="<u2", meta=()):
    folder.mkdir(exist_ok=True)
    for shard, (of_tokens, of_ends) in enumerate(zip(tokens, ends)):
        np.array(of_tokens, dtype).tofile(folder / f"{shard:05}.tokens")
        np.array(of_ends, "<i8").tofile(folder / f"{shard:05}.ends")
    described = {"tokenizer": tokenizer_identity(str(TOKENIZER)), "dtype": dtype}
    described |= {"documents": list(map(len, ends)), "tokens": list(map(len, tokens))}
    (folder / "tokens.json").write_text(json.dumps(described | dict(meta)))
    return folder


def open_corpus(folder, tokenizer=TOKENIZER):
    (source,) = open_sources(Data(path=(str(folder),), tokenizer=str(tokenizer)))
    return source


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_documents(tmp_path, dtype):
    corpus = open_corpus(write(tmp_path / "a", dtype=dtype))
    assert [corpus[index].tolist() for index in range(4)] == [[5], [4095, 0, 7], [], [8, 9]]
    assert corpus.where(3) == f"{tmp_path}/a, document 4"
    assert [record().tolist() for _, record in corpus.head()] == [[5], [4095, 0, 7], [], [8, 9]]


def test_a_corpus_from_before_there_was_an_identity(tmp_path):
    folder = write(tmp_path / "a")
    meta = json.loads((folder / "tokens.json").read_text())
    del meta["tokenizer"]
    meta["tokenizer_sha256"] = hashlib.sha256((TOKENIZER / "tokenizer.json").read_bytes()).hexdigest()
    (folder / "tokens.json").write_text(json.dumps(meta))
    assert open_corpus(folder)[0].tolist() == [5]
    (folder / "tokens.json").write_text(json.dumps(meta | {"tokenizer_sha256": "0" * 64}))
    with pytest.raises(UserError, match="was made with another tokenizer"):
        open_corpus(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": [[5, 4096, 0, 7], [8, 9]]}, "shard 0 has token 4096, the tokenizer only 4096"),
        ({"tokens": [TOKENS[0], [8, 65535]]}, "shard 1 has token 65535, the tokenizer only 4096"),
        ({"dtype": "<u4", "tokens": [[5, 2**32 - 1, 0, 7], [8, 9]]}, "has token 4294967295"),
        ({"ends": [[4, 1], [0, 2]]}, "shard 0 has documents that end where they cannot"),
        ({"ends": [[-1, 4], [0, 2]]}, "shard 0 has documents that end where they cannot"),
        ({"ends": [[5, 4], [0, 2]]}, "shard 0 has documents that end where they cannot"),
        ({"ends": [[1, 3], [0, 2]]}, "shard 0 has documents that end where they cannot"),
        ({"ends": [[1, 2**40], [0, 2]]}, "shard 0 has documents that end where they cannot"),
        ({"ends": [[1, 4], []]}, "shard 1 has tokens of no document"),
    ],
)
def test_contents_that_cannot_be(tmp_path, changes, message):
    folder = write(tmp_path / "a", **changes)
    for _ in range(2):  # what was found wrong is not remembered as right
        with pytest.raises(UserError, match=message) as raised:
            open_corpus(folder)
        assert "a' is damaged: " in str(raised.value)
    assert len(open_corpus(write(tmp_path / "a"))) == 4


@pytest.mark.parametrize(
    "meta",
    [
        {"dtype": "<f4"}, {"dtype": ["<u2"]}, {"dtype": None}, {"documents": 2}, {"documents": None}, {"tokens": {}},
        {"documents": [2, -2]}, {"documents": [2, "2"]}, {"tokens": [4, 2.0]}, {"tokens": [4, True]}, {"tokens": [4]},
        {"documents": [2, 2, 0], "tokens": [4, 2, 0]}, {"documents": [2, 3]}, {"tokens": [4, 10**30]},
        {"tokenizer": 3}, {"tokenizer": "", "tokenizer_sha256": None}, {"format": "xx"}, {"format": None},
        {"format": []}, {"options": [1, 2]}, {"options": [["train_on", "all"]]}, {"options": None}, {"options": "x"},
        {"cut_to": "x"}, {"cut_to": True},
    ],
)  # fmt: skip
def test_descriptions_that_cannot_be(tmp_path, meta):
    folder = write(tmp_path / "a", meta=meta)
    with pytest.raises(UserError) as raised:
        open_corpus(folder)
    assert str(raised.value).startswith(f"data.path: {str(folder)!r} is damaged: ")
    assert "\n" not in str(raised.value)


def test_files_that_are_missing_or_cut(tmp_path):
    for name in ("00001.tokens", "00000.ends"):
        folder = write(tmp_path / name)
        (folder / name).write_bytes((folder / name).read_bytes()[:-1])
        with pytest.raises(UserError, match=rf"shard {name[4]} has not the size in tokens\.json"):
            open_corpus(folder)
        (folder / name).unlink()
        with pytest.raises(UserError, match=f"{name} is missing"):
            open_corpus(folder)
        (folder / name).mkdir()
        with pytest.raises(UserError, match=f"{name} is missing"):
            open_corpus(folder)
    for content in (b"", b"[", b"\xff", b"[" * 100_000):
        (folder / "tokens.json").write_bytes(content)
        with pytest.raises(UserError, match=r"tokens\.json cannot be read: "):
            open_corpus(folder)
    for content, message in (
        (b"[]", "is no table"),
        (b"null", "is no table"),
        (b"3", "is no table"),
        (b"{}", "names no"),
    ):
        (folder / "tokens.json").write_bytes(content)
        with pytest.raises(UserError, match=rf"is damaged: tokens\.json {message}"):
            open_corpus(folder)


def test_a_corpus_that_is_cut_after_its_check_is_checked_again(tmp_path):
    folder = write(tmp_path / "a")
    open_corpus(folder)
    np.array([5, 5000, 0, 7], "<u2").tofile(folder / "00000.tokens")
    with pytest.raises(UserError, match="has token 5000"):
        open_corpus(folder)


def test_tokens_are_no_conversations(tmp_path):
    with pytest.raises(UserError, match=r"holds the tokens of documents: expected data\.format = 'text'"):
        open_sources(Data(path=(str(write(tmp_path / "a")),), tokenizer=str(TOKENIZER), format="chat"))


def test_another_tokenizer(tmp_path):
    other = tmp_path / "other"
    shutil.copytree(TOKENIZER, other)
    contents = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(contents, indent=1))  # other bytes, the same tokens
    assert len(open_corpus(write(tmp_path / "a"), other)) == 4
    contents["normalizer"] = {"type": "NFKC"}
    (other / "tokenizer.json").write_text(json.dumps(contents))
    with pytest.raises(UserError, match=r"a' was made with another tokenizer than data\.tokenizer = '.*other'"):
        open_corpus(tmp_path / "a", other)


def chats(folder, trained, **meta):
    """The folder with TOKENS as conversations, and how they are read."""
    write(folder)
    for shard, of_shard in enumerate(trained):
        np.array(of_shard, "u1").tofile(folder / f"{shard:05}.trained")
    data = Data(path=(str(folder),), tokenizer=str(TOKENIZER), format="chat", shuffle=False, num_workers=0)
    stored = json.loads((folder / "tokens.json").read_text())
    stored |= {"format": "chat", "tokenizer": corpus_identity(data)} | meta
    (folder / "tokens.json").write_text(json.dumps(stored))
    return data


def test_conversations_of_which_nothing_can_be_used_are_skipped(tmp_path):
    """Of [5], [4095, 0, 7], [] and [8, 9], the first of which nothing predicts."""
    data = chats(tmp_path / "a", [[1, 1, 1, 1], [1, 1]])
    training = Training(steps=1, sequence_length=7, global_batch_size=1)
    loader = TokenLoader(data, training, 0, 1, 0, one_epoch=True)
    batch = next(loader)
    assert batch.documents.lengths() == [3, 2, 2]
    assert batch.labels.tolist() == [0, 7, -100, 9, -100, -100, -100]
    assert (loader.counts["empty"], loader.counts["nothing_to_train"]) == (1, 1)
    with pytest.raises(UserError, match="a, document 1: has no token that is to be trained on"):
        next(TokenLoader(replace(data, on_bad_sample="error"), training, 0, 1, 0))
    with pytest.raises(UserError, match=r"has no token that is to be trained on \(and none of the first 4 samples"):
        TokenLoader(chats(tmp_path / "b", [[1, 1, 0, 0], [1, 0]]), training, 0, 1, 0)
    mixed = TokenLoader(chats(tmp_path / "c", [[0, 0, 0, 1], [0, 0]]), training, 0, 1, 0, one_epoch=True)
    assert next(mixed).documents.lengths() == [3, 4]
    assert mixed.counts["nothing_to_train"] == 2
