"""`python -m data.tokenize`: shards hold the texts' tokens; what is wrong with them is told."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from config.options import Data, Training
from data import tokenize
from data.loader import TokenLoader
from data.sources import open_sources
from errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "data" / "tiny" / "tokenizer"
TRAINING = Training(steps=1, sequence_length=64, global_batch_size=1)
TEXTS = ["one", "", "zwei\n\n", "três 🙂", "x" * 5000, "last"]


@pytest.fixture
def arguments(tmp_path):
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{broken", '{"text": 3}']))
    base = ["--config", "qwen35moe_tiny.toml", "--data.path", str(tmp_path / "a.jsonl")]
    return ["--out", str(tmp_path / "tokens"), "--workers", "2", *base]


def open_corpus(folder, tokenizer=TOKENIZER):
    (source,) = open_sources(Data(path=(str(folder),), tokenizer=str(tokenizer)))
    return source


def test_shards_hold_the_tokens_in_order_and_skipped_documents_are_told(tmp_path, arguments, monkeypatch, capsys):
    monkeypatch.setattr(tokenize, "_SHARD", 2)
    # In this process, where the smaller shards are known.
    monkeypatch.setattr(tokenize, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(1))
    tokenize.main(arguments)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    expected = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS if text]
    corpus = open_corpus(tmp_path / "tokens")
    assert [corpus[index].tolist() for index in range(len(corpus))] == expected
    assert corpus.where(3) == f"{tmp_path}/tokens, document 4"
    assert len(list((tmp_path / "tokens").glob("*.ends"))) == 4  # the last of them empty
    path = tmp_path / "a.jsonl"
    *skipped, summary = capsys.readouterr().out.splitlines()
    assert skipped[0] == f"skipped (empty): {path}, line 2: has no text"
    assert skipped[1].startswith(f"skipped (not_json): {path}, line 7: is not JSON")
    assert skipped[2].startswith(f"skipped (wrong_type): {path}, line 8: data.text_key = 'text' is 3")
    num_tokens = sum(map(len, expected))
    counts = "1 skipped: empty, 1 skipped: not_json, 1 skipped: wrong_type"
    assert summary == f"{tmp_path}/tokens: {num_tokens:,} tokens of 5 documents, {counts}"


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def tokenise_chats(tmp_path, chats, *options):
    """Their file, and the folder of their tokens."""
    path, out = tmp_path / "chats.jsonl", tmp_path / "tokens"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    source = ["--config=qwen35moe_tiny.toml", f"--data.path={path}", "--data.format=chat"]
    tokenize.main(["--out", str(out), "--workers=1", *source, *options])
    return path, out


@pytest.mark.parametrize("too_long", ["drop", "truncate", "truncate_left"])
def test_chats_ahead_of_time_are_what_they_are_when_read(tmp_path, too_long):
    chats = [
        {"messages": [{"role": role, "content": f"{role} {turn} of {number}" * length} for turn in range(turns)
                      for role in ("user", "assistant")]}
        for number, (turns, length) in enumerate([(1, 1), (3, 1), (1, 20), (6, 3), (2, 2)])
    ]  # fmt: skip
    path, out = tokenise_chats(tmp_path, chats, f"--data.too_long={too_long}", "--training.sequence_length=64")
    data = Data(format="chat", path=(str(path),), tokenizer=str(TOKENIZER), too_long=too_long, shuffle=False)
    ahead = replace(data, path=(str(out),))

    def rows(data, training=TRAINING):
        loader = TokenLoader(replace(data, num_workers=0), training, 0, 1, 0, one_epoch=True)
        batches = [next(loader) for _ in range(4)]
        return [(batch.tokens.tolist(), batch.labels.tolist()) for batch in batches]

    assert rows(ahead) == rows(data)
    whole, other_length = too_long != "truncate_left", replace(TRAINING, sequence_length=128)
    if whole:
        assert rows(ahead, other_length) == rows(data, other_length)
    else:
        with pytest.raises(UserError, match=r"training\.sequence_length = 128: expected 64, to which"):
            rows(ahead, other_length)
    for other in {"drop", "truncate", "truncate_left"} - {too_long}:
        if whole and other != "truncate_left":
            assert rows(replace(ahead, too_long=other)) == rows(replace(data, too_long=other))
        else:
            with pytest.raises(UserError, match=rf"data\.too_long = '{other}': expected .*tokens' (was )?tokenised"):
                open_sources(replace(ahead, too_long=other))
    for other, message in (
        ({"train_on": "last"}, r"data\.train_on = 'last': expected 'all', with which .*tokens' was tokenised"),
        ({"train_empty_thinking": True}, r"data\.train_empty_thinking = True: expected False"),
        ({"format": "text"}, r"holds the tokens of conversations: expected data\.format = 'chat'"),
        (
            {"chat_template": str(ROOT / "tests/data/templates/qwen35_style.jinja")},
            "another tokenizer or chat template",
        ),
    ):
        with pytest.raises(UserError, match=message):
            open_sources(replace(ahead, **other))
    (out / "00000.trained").write_bytes(b"\2" * (out / "00000.trained").stat().st_size)
    with pytest.raises(UserError, match="is damaged: shard 0 has other than 0 and 1 for what is trained on"):
        open_sources(ahead)
    (out / "00000.trained").unlink()
    with pytest.raises(UserError, match=r"is damaged: 00000\.trained is missing"):
        open_sources(ahead)


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_conversations_that_are_all_longer_than_a_row_are_stored_whole(tmp_path, capsys, too_long):
    options = ["--training.sequence_length=4", f"--data.too_long={too_long}", "--data.on_bad_sample=error"]
    tokenise_chats(tmp_path, [chat("One?", "Two.")] * 3, *options)
    assert "tokens of 3 documents\n" in capsys.readouterr().out


def test_documents_that_are_used_are_not_counted_as_skipped(tmp_path, capsys):
    long = chat("One?", "Two.")["messages"] * 9
    long[0] = {**long[0], "id": "x"}
    chats = [{"messages": long}, {"messages": long[:2]}, chat("Three?", "")]
    tokenise_chats(tmp_path, chats, "--data.too_long=truncate_left", "--training.sequence_length=64")
    *_, summary = capsys.readouterr().out.splitlines()
    counts = "1 skipped: empty, 1 used, but ignored_field, 1 used, but truncated"
    assert summary.endswith(f" tokens of 2 documents, {counts}")
    texts = ["--config=qwen35moe_tiny.toml", f"--data.path={tmp_path / 'a.jsonl'}", "--workers=1"]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x<|im_end|>"}) + "\n")
    tokenize.main(["--out", str(tmp_path / "texts"), *texts])
    assert capsys.readouterr().out.endswith(" tokens of 1 documents, 1 used, but special_in_text\n")


def test_mistakes(tmp_path, arguments):
    run = [sys.executable, "-m", "data.tokenize", *arguments]

    def mistake(*options):
        done = subprocess.run([*run, *options], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert not (tmp_path / "tokens").exists()
        return done.stderr

    assert "data.weights = [1.0]: expected none" in mistake("--data.weights=1")
    assert "line 2: has no text" in mistake("--data.on_bad_sample=error")
    (tmp_path / "tokens").mkdir()
    with pytest.raises(ValueError, match="tokens' exists: expected a folder that does not"):
        tokenize.main(arguments)
