"""Files and globs as one sequence of documents, and the lines that a user's mistakes end in."""

import json
import multiprocessing
import pickle
import socket
from concurrent.futures import ProcessPoolExecutor

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from config import find_files
from data.sources import TextSource


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    def fail(*arguments, **_):
        pytest.fail(f"the network was asked: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", fail)


def write_jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def documents_of(*patterns, text_key="text"):
    source = TextSource([str(pattern) for pattern in patterns], text_key)
    return [source[index] for index in range(len(source))]


def test_jsonl(tmp_path):
    texts = ["one", "", "zwei\n\n", "três 🙂", "x" * 200_000]
    assert documents_of(write_jsonl(tmp_path / "a.jsonl", texts)) == texts


def test_parquet_with_other_columns(tmp_path):
    table = pa.table({"id": [1, 2], "body": ["one", "two"], "nested": [{"a": 1}, None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert documents_of(tmp_path / "a.parquet", text_key="body") == ["one", "two"]


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "b.txt").write_text("one\n\ntwo\n")
    (tmp_path / "a.txt").write_text("")
    assert documents_of(tmp_path / "*.txt") == ["", "one\n\ntwo\n"]


def test_order_of_the_patterns_and_then_of_the_names_each_file_once(tmp_path):
    for name in ("c", "a", "b[1]", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", [name])
    first = tmp_path / "b[1].jsonl"  # exists, so it is no pattern
    assert documents_of(first, tmp_path / "*.jsonl") == ["b[1]", "a", "b", "c"]


def test_globs_of_any_depth_and_folders_do_not_count(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "folder.jsonl").mkdir()
    write_jsonl(tmp_path / "deep" / "er" / "a.jsonl", ["a"])
    assert find_files([str(tmp_path / "**" / "*.jsonl")]) == [str(tmp_path / "deep" / "er" / "a.jsonl")]


def test_a_changed_file_is_read_again(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["before"])
    assert documents_of(path) == ["before"]
    write_jsonl(tmp_path / "a.jsonl", ["after", "wards"])
    assert documents_of(path) == ["after", "wards"]


def test_travels_to_workers_as_file_names(tmp_path):
    source = TextSource([write_jsonl(tmp_path / "a.jsonl", ["word " * 100] * 1000)], "text")
    pickled = pickle.dumps(source)
    assert len(pickled) < 5000
    assert pickle.loads(pickled)[999] == "word " * 100


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bars_are_silent_and_left_as_they_were(tmp_path, capfd, shown):
    path = write_jsonl(tmp_path / "a.jsonl", ["a"])
    (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
    try:
        TextSource([path], "text")
        assert datasets.are_progress_bars_disabled() is not shown
        assert capfd.readouterr() == ("", "")
    finally:
        datasets.enable_progress_bars()


def _open(cache, path):
    datasets.config.HF_DATASETS_CACHE = cache
    source = TextSource([path], "text")
    return len(source), source[len(source) - 1]


def test_processes_that_start_at_once_do_not_disturb_each_other(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [f"{number} " * 50 for number in range(20_000)])
    with ProcessPoolExecutor(4, multiprocessing.get_context("forkserver")) as pool:
        results = list(pool.map(_open, [tmp_path / "cache"] * 4, [path] * 4))
    assert results == [(20_000, "19999 " * 50)] * 4


def make(tmp_path, **files):
    for name, content in files.items():
        path = tmp_path / name.replace("_", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize(
    ("files", "patterns", "message"),
    [
        ({}, [], r"data\.path = \[\]: expected at least one"),
        ({}, ["none*.jsonl"], r"data\.path = '.*none\*\.jsonl' matches no file"),
        ({"a_jsonl": '{"text": "x"}\n'}, ["a.jsonl", "b.jsonl"], r"data\.path = '.*b\.jsonl' matches no file"),
        ({"a_csv": "text\nx\n"}, ["a.csv"], r"'.*a\.csv' ends in '\.csv': expected \.jsonl, \.parquet, \.txt"),
        ({"a_jsonl": "{}\n", "b": "x"}, ["*"], r"'.*b' ends in '': expected \.jsonl"),
        ({"a_jsonl": "{}\n", "b_txt": "x"}, ["*"], r"\.jsonl and \.txt files together: expected one kind"),
        (
            {"a_jsonl": '{"body": "x", "id": 1}\n'},
            ["a.jsonl"],
            r"text_key = 'text': expected one of body, id, as in .*a",
        ),
        ({"a_jsonl": ""}, ["a.jsonl"], r"no document in .*a\.jsonl"),
        ({"a_jsonl": "", "b_jsonl": ""}, ["*.jsonl"], r"no document in .*a\.jsonl and 1 more"),
        ({"a_jsonl": '{"text": 3}\n'}, ["a.jsonl"], r"text_key = 'text': expected strings in .*a\.jsonl, not .*int64"),
        (
            {"a_jsonl": '{"text": null}\n'},
            ["a.jsonl"],
            r"text_key = 'text': expected strings in .*a\.jsonl, not .*null",
        ),
        (
            {"a_jsonl": '{"text": "x"}\n{"text": 3}\n'},
            ["a.jsonl"],
            r"text_key = 'text': expected strings in .*a\.jsonl",
        ),
        ({"a_jsonl": '{"text": ["x"]}\n'}, ["a.jsonl"], r"text_key = 'text': expected strings in .*a\.jsonl"),
        ({"a_jsonl": '{"text": "x"}\n{"text\n'}, ["a.jsonl"], r"cannot read .*a\.jsonl: JSON parse error"),
        ({"a_parquet": "not parquet"}, ["a.parquet"], r"cannot read .*a\.parquet: "),
        ({"a_txt": b"caf\xe9"}, ["a.txt"], r"cannot read .*a\.txt: 'utf-8' codec"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, files, patterns, message):
    make(tmp_path, **files)
    with pytest.raises(ValueError, match=message) as raised:
        TextSource([str(tmp_path / pattern) for pattern in patterns], "text")
    assert "\n" not in str(raised.value)


def test_a_text_that_is_none_names_its_sample(tmp_path):
    source = TextSource([write_jsonl(tmp_path / "a.jsonl", ["x", None, "y"])], "text")
    assert source[2] == "y"
    with pytest.raises(ValueError, match=r"'text' of sample 1 is None, expected a string"):
        source[1]


def test_a_text_that_is_not_utf8_names_its_sample(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n{"text": "caf\xe9"}\n')
    source = TextSource([str(tmp_path / "a.jsonl")], "text")
    with pytest.raises(ValueError, match=r"sample 1 is not UTF-8"):
        source[1]
