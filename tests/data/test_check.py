"""The check before a run: what the readers would say, from the first records, in a process without torch."""

import errno
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from config.options import Config, Data, Job, LRScheduler, Model, Optimizer, Training, Validation
from data import files, pieces, sources, tokenize
from data.check import check_data
from data.loader import TokenLoader
from data.packing import REASONS
from data.tokenizer import read_tokenizer
from errors import UserError
from tests.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = str(ROOT / "data" / "tiny" / "tokenizer")
BOM = "\ufeff".encode()


def config(*paths, validation=(), **data):
    return Config(
        job=Job(),
        model=Model(),
        data=Data(path=tuple(map(str, paths)), tokenizer=TOKENIZER, **data),
        training=Training(steps=1, sequence_length=64, global_batch_size=1),
        optimizer=Optimizer(lr=1e-3),
        lr_scheduler=LRScheduler(),
        validation=Validation(enable=bool(validation), path=tuple(map(str, validation))),
    )


def texts_of(path, **data):
    """The texts that a loader meets in one epoch, and what it counts."""
    one = Training(steps=1, sequence_length=4096, global_batch_size=1)
    loader = TokenLoader(config(path, shuffle=False, num_workers=0, **data).data, one, 0, 1, 0, one_epoch=True)
    batch = next(loader)
    tokens = batch.tokens[: loader.counts["real_tokens"]].tolist()
    text = read_tokenizer(TOKENIZER).decode(tokens, skip_special_tokens=False)
    return text.split("<|endoftext|>")[:-1], {
        reason: loader.counts[reason] for reason in REASONS if loader.counts[reason]
    }


def test_it_needs_neither_torch_nor_datasets_and_does_not_read_on(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x"}\n' * 100_000)
    os.truncate(path, 2**42)  # a hole that nobody reads to its end
    program = (
        "import sys; from data.check import check_data; from config.reading import load_config\n"
        "config = load_config(['--config', 'qwen35moe_tiny.toml', '--data.path', sys.argv[1]])\n"
        "check_data(config, 4096)\n"
        "print(sorted({'torch', 'datasets', 'pandas', 'pyarrow'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=PATIENCE)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("content", "texts", "counts"),
    [
        (BOM + b'{"text": "a"}\n{"text": "b"}', ["a", "b"], {}),
        (b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n', ["a", "b"], {}),
        (b'{"text": "a"}\n{"text": "\xff"}\n{"text": "b"}\n', ["a", "b"], {"undecodable": 1}),
        (b'{"text": "a"}\n\x00\x00\x00\n{"text": "b\\u0000"}\n', ["a", "b\x00"], {"not_json": 1}),
        (b'{"text": "a"}\n{"text": "\\ud800"}\n{"text": "b"}', ["a", "b"], {"undecodable": 1}),
        (b'{"text": "a"}\n' + BOM + b'{"text": "b"}\n', ["a", "b"], {}),  # two files put together
        (b'\xff\xfe{"text": 1}\n{"text": "b"}', ["b"], {"undecodable": 1}),
        (b'{"text": "a"}\n{"x": ' + b"[" * 99_999 + b'\n{"text": "b"}', ["a", "b"], {"not_json": 1}),
        (b'{"text": "a"}\n{"text": ' + b"9" * 9_999 + b'}\n{"text": "b"}', ["a", "b"], {"not_json": 1}),
        (b'{"text": "a"}\n{"text": "' + b"x" * 5_000 + b'"}\n{"text": "b"}', ["a", "b"], {"too_long": 1}),
        (b'{"text": "a"}\n{"text": null}\n{"text": "b"}', ["a", "b"], {"wrong_type": 1}),
    ],
)
def test_lines_are_right_or_counted(tmp_path, monkeypatch, content, texts, counts):
    monkeypatch.setattr(pieces, "_MAX_LINE", 4_000)
    if b"[" * 99_999 in content or b"9" * 9_999 in content:
        monkeypatch.setattr(pieces, "_MAX_LINE", 200_000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    check_data(config(path), 4096)
    assert texts_of(path) == (texts, counts)


def test_a_text_file_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(BOM + b"one\r\ntwo")
    check_data(config(path), 4096)
    assert texts_of(path) == (["one\ntwo"], {})


def test_the_first_of_several_files_may_be_bad_in_parts_but_not_all_of_them(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl").write_bytes(b'[]\n{"text": 3}\n{"text": "x"}')
    check_data(config(tmp_path / "*.jsonl"), 4096)
    (tmp_path / "b.jsonl").write_bytes(b'[]\n{"text": 3}\n')
    with pytest.raises(
        UserError, match=r"b\.jsonl, line 1: is \[\], expected a JSON object \(and none of the first 2 "
    ):
        check_data(config(tmp_path / "*.jsonl"), 4096)
    (tmp_path / "b.jsonl").write_bytes(b"\n")
    with pytest.raises(UserError, match=r"data\.path: no document in '.*\*\.jsonl'"):
        check_data(config(tmp_path / "*.jsonl"), 4096)


@pytest.mark.parametrize("form", ["text", "chat"])
def test_what_was_tokenised_ahead(tmp_path, form):
    turns = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a b c"} if form == "text" else {"messages": turns}))
    options = ["--config", "qwen35moe_tiny.toml", f"--data.path={tmp_path}/a.jsonl", f"--data.format={form}"]
    tokenize.main([*options, "--out", str(tmp_path / "tokens"), "--workers", "1"])
    check_data(config(tmp_path / "tokens", format=form), 4096)


def test_validation_data_are_looked_at_too(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    (tmp_path / "b.jsonl").write_text('{"texts": "x"}')
    with pytest.raises(UserError, match=r"b\.jsonl, line 1: data\.text_key = 'text' is missing among texts"):
        check_data(config(tmp_path / "a.jsonl", validation=[tmp_path / "b.jsonl"]), 4096)
    with pytest.raises(UserError, match=r"^validation\.path = '.*/ab\.jsonl' matches no file: .* mean '.*b\.jsonl'"):
        check_data(config(tmp_path / "a.jsonl", validation=[tmp_path / "ab.jsonl"]), 4096)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("data/trian", "; did you mean 'data/train'?"),
        ("data/zzz", ""),
        ("daat/train", "; did you mean 'data/train'?"),
    ],
)
def test_a_slip_in_a_path_is_no_name_on_the_hub(tmp_path, monkeypatch, name, hint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "train").mkdir(parents=True)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("asked the network"))
    with pytest.raises(UserError) as raised:
        check_data(config(name), 4096)
    assert f"data.path = '{name}' does not exist: expected a path" in str(raised.value)
    assert str(raised.value).endswith(f"'{name}:default'{hint}")
    with pytest.raises(UserError, match="does not exist: expected a path"):
        sources.open_sources(Data(path=(name,)))[0]
    check_data(config("HuggingFaceFW/fineweb", f"{name}:default"), 4096)


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    message = r"^HF_DATASETS_CACHE = '.*cache': .*: expected a folder that can be written"
    with pytest.raises(UserError, match=message):
        sources.open_sources(Data(path=(str(tmp_path / "a.jsonl"),)))
    with pytest.raises(UserError, match=message):
        check_data(config(tmp_path / "a.jsonl"), 4096)
    (tmp_path / "a.txt").write_text("x")
    check_data(config(tmp_path / "a.txt"), 4096)  # needs none


def test_a_full_disk_is_no_fault_of_the_data(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"^HF_DATASETS_CACHE = '.*': No space left on device: expected a folder"):
        files.cached([], "x", ".index", full)


def test_a_file_that_is_gone_ends_the_run_in_one_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n' * 9)
    training = Training(steps=1, sequence_length=4096, global_batch_size=1)
    loader = TokenLoader(config(path, num_workers=1).data, training, 0, 1, 0)
    path.unlink()
    with pytest.raises(UserError, match=r"a\.jsonl, line \d cannot be read: No such file or directory"):
        next(loader)


class Panic(BaseException):
    """As a panic of the tokenizers library arrives."""


@pytest.mark.parametrize(
    "error", [TypeError("a"), Exception("b\nc"), RecursionError(), Panic("d"), KeyError("e"), ValueError]
)
def test_whatever_a_sample_raises_is_its_own_refusal(tmp_path, monkeypatch, error):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "bad"}\n{"text": "b"}')
    parsed = pieces._parsed

    def failing(line):
        if b"bad" in line:
            raise error
        return parsed(line)

    monkeypatch.setattr(pieces, "_parsed", failing)
    reason = "wrong_type" if isinstance(error, RecursionError) else "failed"
    assert texts_of(path) == (["a", "b"], {reason: 1})
    training = Training(steps=1, sequence_length=4096, global_batch_size=1)
    data = config(path, num_workers=0, shuffle=False).data
    loader = TokenLoader(data, training, 0, 1, 0, one_epoch=True, skipped_dir=tmp_path)
    next(loader)
    (line,) = (tmp_path / "rank-00000.jsonl").read_text().splitlines()
    assert json.loads(line)["sample"].startswith(f"{path}, line 2: ")


def test_workers_count_bad_conversations_and_go_on(tmp_path):
    def turns(text, **fields):
        return [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": text, **fields}]

    deep: object = 0
    for _ in range(400):
        deep = [deep]
    bad = [
        ("undecodable", turns("x\ud800")),
        ("wrong_type", turns("", tool_calls=[{"name": "f", "arguments": "[" * 99_999}])),
        ("wrong_type", turns("x", weight=0.5)),
        ("unused_field", turns("x", mood="sad")),
        ("unrendered", turns("x", reasoning="so")),
        ("unrendered", turns("x", tool_calls=[{"name": "f", "arguments": {"deep": deep}}])),
        ("ignored_field", turns("Good.", id="x")),
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for _, messages in bad))
    plain = str(ROOT / "tests/data/templates/chatml.jinja")  # which knows of no calls
    check_data(config(path, format="chat", chat_template=plain), 4096)
    training = Training(steps=1, sequence_length=64, global_batch_size=2)
    data = config(path, format="chat", chat_template=plain, num_workers=2, shuffle=False).data
    loader = TokenLoader(data, training, 0, 1, 0, one_epoch=True, skipped_dir=tmp_path)
    batches = [next(loader), next(loader)]
    loader.close()
    assert {reason: loader.counts[reason] for reason in REASONS if loader.counts[reason]} == Counter(
        reason for reason, _ in bad
    )
    labels = [label for batch in batches for label in batch.labels.tolist() if label >= 0]
    assert read_tokenizer(TOKENIZER).decode(labels, skip_special_tokens=False) == "Good.<|im_end|>"
    listed = (tmp_path / "rank-00000.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["sample"].partition(": ")[0] for line in listed) == [
        f"{path}, line {number}" for number in range(1, 8)
    ]


# Damaged lines


LINES = st.one_of(
    st.text(max_size=5).map(lambda text: json.dumps({"text": text}).encode()),
    st.binary(max_size=12),
    st.recursive(st.none() | st.integers() | st.text(max_size=2), lambda inner: st.lists(inner) | st.dictionaries(
        st.sampled_from(["text", "a"]), inner), max_leaves=4).map(lambda value: json.dumps(value).encode()),
)  # fmt: skip


def independent(line):
    """The text of a line, or None if it has to be refused."""
    try:
        text = json.loads(line.removeprefix(BOM).decode())["text"]
        return text if isinstance(text, str) and text and text.encode() else None
    except Exception:
        return None


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.booleans(), st.lists(LINES, min_size=1, max_size=8), st.sampled_from([b"\n", b"\r\n"]), st.booleans())
def test_random_lines_are_right_or_refused(tmp_path, marked, lines, ending, ended):
    path = tmp_path / "a.jsonl"
    content = BOM * marked + ending.join(lines) + ending * ended
    path.write_bytes(content)
    with open(path, "rb") as stream:
        assume(pieces._form(stream, "a.jsonl") == "lines")
    raw = [line for line in content.split(b"\n") if len(line.strip()) > 1]
    expected = [text for line in raw if (text := independent(line))]
    try:
        check_data(config(path), 4096)
        texts, counts = texts_of(path)
    except UserError as error:
        assert not expected
        assert "\n" not in str(error)  # noqa: PT017
        return
    assert texts == expected
    assert sum(counts.values()) == len(raw) - len(expected)
