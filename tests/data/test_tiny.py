"""The shipped text and tokenizer, and the script that makes them."""

import json
import shutil
import socket
import unicodedata
from pathlib import Path

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data.tokenizer import PROBES, verify_tokenizer
from scripts.make_tiny import module_documentation, python_documents, train_tokenizer

TINY = Path(__file__).resolve().parents[2] / "data" / "tiny"


@pytest.fixture(scope="module")
def documents():
    return [json.loads(line) for line in (TINY / "python_reference.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was asked"))
        return AutoTokenizer.from_pretrained(TINY / "tokenizer")


def test_the_text_is_about_a_megabyte_of_documents(documents):
    assert all(document.keys() == {"text"} and document["text"].strip() for document in documents)
    assert 150 < len(documents) < 300
    assert 0.9e6 < (TINY / "python_reference.jsonl").stat().st_size < 1.3e6


def test_the_licence_is_shipped():
    text = (TINY / "LICENSE.txt").read_text(encoding="utf-8")
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in text
    assert "Python Software Foundation License Version 2" in " ".join((TINY / "README.md").read_text().split())


def test_the_script_trains_the_same_tokenizer_each_time(documents):
    """Not compared with the shipped one: another version of tokenizers may merge in another order."""
    texts = [document["text"] for document in documents]
    assert train_tokenizer(texts).to_str() == train_tokenizer(texts).to_str()


def test_the_script_takes_topics_and_public_modules_without_a_licence_of_their_own(tmp_path):
    (tmp_path / "plain.py").write_text('"""Plain."""\n')
    (tmp_path / "_private.py").write_text('"""Private."""\n')
    (tmp_path / "other.py").write_text('"""Somebody\'s. Copyright 1999 Somebody."""\n')
    (tmp_path / "silent.py").write_text("x = 1\n")
    *topics, module = python_documents(tmp_path)
    assert module == "module plain\n\n    Plain.\n"
    assert len(topics) > 70


def test_module_documentation_is_docstrings_below_signatures():
    source = '''"""About m."""
class A(B):
    """About A."""
    def f(self, x: int = 1) -> str:
        """About f.

        More."""
        def inner():
            """Hidden."""
    def undocumented(self): ...
    def _private(self):
        """Hidden."""
async def g(*, y): "About g."
'''
    assert module_documentation("m", source) == (
        "module m\n\n    About m.\n\nclass m.A(B)\n\n    About A.\n\nm.A.f(self, x: int=1)\n\n    About f.\n\n    More."
        "\n\nm.g(*, y)\n\n    About g.\n"
    )


def test_vocabulary_and_special_tokens(tokenizer):
    assert len(tokenizer) == 4096 == 1 + max(tokenizer.get_vocab().values())
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|endoftext|>")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids(special) == [4093, 4094, 4095]
    assert tokenizer("".join(special), add_special_tokens=False).input_ids == [4093, 4094, 4095]
    assert set(tokenizer.all_special_ids) == {4093, 4094, 4095}


def test_the_text_takes_few_tokens(tokenizer, documents):
    text = "".join(document["text"] for document in documents)
    num_tokens = len(tokenizer(text, add_special_tokens=False).input_ids)
    assert len(text.encode()) / num_tokens > 3.5  # 3.88 when made; single bytes would give 1


@given(st.text())
def test_any_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    "text", ["héllo 世界 🙂\u200d", "e\u0301 is not \u00e9", " a  b\t\n\r\n ", "\x00\x7f", "1234 don't"]
)
def test_awkward_texts_survive_the_round_trip(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == unicodedata.normalize("NFC", text)


def test_any_consumer_tokenises_it_the_same(tmp_path):
    """With a config.json of the family beside it, AutoTokenizer builds the family's own class."""
    shutil.copytree(TINY / "tokenizer", tmp_path / "export")
    (tmp_path / "export/config.json").write_text('{"model_type": "qwen3_5_moe_text"}')
    assert type(AutoTokenizer.from_pretrained(tmp_path / "export")).__name__.startswith("Qwen3_5")
    texts = [json.loads(line)["text"] for line in (TINY / "python_reference.jsonl").read_text().splitlines()]
    verify_tokenizer(str(TINY / "tokenizer"), str(tmp_path / "export"), [*PROBES, *texts])


def test_the_chat_template_writes_chatml(tokenizer):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi {{ x }}"},
        {"role": "assistant", "content": "Ho\n"},
    ]
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi {{ x }}<|im_end|>\n"
        "<|im_start|>assistant\nHo\n<|im_end|>\n"
    )
    render = tokenizer.apply_chat_template
    assert render(turns, tokenize=False) == expected
    assert render(turns, tokenize=False, add_generation_prompt=True) == expected + "<|im_start|>assistant\n"
    with pytest.raises(jinja2.TemplateError, match="not judge"):
        render([{"role": "judge", "content": "x"}], tokenize=False)
