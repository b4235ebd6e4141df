"""`python -m data.preview`: what it shows is what is trained on."""

import json
from pathlib import Path

from transformers import AutoTokenizer

from data import preview

TOKENIZER = Path(__file__).resolve().parents[2] / "data" / "tiny" / "tokenizer"


def turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def shown(tmp_path, capsys, *options):
    path = tmp_path / "a.jsonl"
    chats = [turns("Hi?", "Ho."), turns("So?", "So. " * 7), turns("Ah?", "x " * 300), [turns("Hm?", "")[0]]]
    chats[0][0]["id"] = "x"
    path.write_text("".join(json.dumps({"messages": chat, "text": "x y " * 10}) + "\n" for chat in chats))
    preview.main(["--config", "qwen35moe_tiny.toml", "--data.path", str(path), "--data.shuffle=false", *options])
    return capsys.readouterr().out


def test_conversations(tmp_path, capsys):
    options = ["--training.sequence_length=64", "--training.global_batch_size=1", "--training.steps=6"]
    out = shown(tmp_path, capsys, "--data.format=chat", "--rows=1", *options)
    row = out.partition("\n")[2]
    first = "|<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n«Ho.<|im_end|>»\n"
    second = f"|<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n«{'So. ' * 7}<|im_end|>»\n"
    assert row.startswith(first + second)
    assert "fillers)" in row
    assert "skipped (nothing_to_train): 1, 25.00%" in out
    assert "skipped (too_long): 1, 25.00%" in out
    assert "used, but ignored_field: 1\n" in out
    assert "4 of 4 samples measured" in out
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    chats = [turns("Hi?", "Ho."), turns("So?", "So. " * 7)]
    num_tokens = sum(len(tokenizer.apply_chat_template(chat, return_dict=False)) for chat in chats)
    assert f"an epoch has {num_tokens} tokens, " in out


def test_text_and_colours(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    out = shown(tmp_path, capsys, "--training.sequence_length=30", "--rows=2", "--samples=2")
    assert "\033[32m" in out
    assert "\033[1;31m|" in out
    assert "2 of 4 samples measured" in out
    assert "an epoch has about" in out
    assert "rows are 100.0% full" in out
