"""`python -m data.tokenize`: shards hold the texts' tokens; what is wrong with them is told."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from config.options import Data
from data import tokenize
from data.sources import open_sources

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "data" / "tiny" / "tokenizer"
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


def test_mistakes(tmp_path, arguments):
    run = [sys.executable, "-m", "data.tokenize", *arguments]

    def mistake(*options):
        done = subprocess.run([*run, *options], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert not (tmp_path / "tokens").exists()
        return done.stderr

    chat = ("--data.format=chat", "--data.path", str(ROOT / "data" / "tiny" / "chat" / "conversations.jsonl"))
    run[-2:] = []
    assert "data.format = 'chat'" in mistake(*chat)
    run += ["--data.path", str(tmp_path / "a.jsonl")]
    assert "line 2: has no text" in mistake("--data.on_bad_sample=error")
    (tmp_path / "tokens").mkdir()
    with pytest.raises(ValueError, match="tokens' exists: expected a folder that does not"):
        tokenize.main(arguments)
