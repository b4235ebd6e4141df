"""Files and globs as one sequence of documents, and the lines that a user's mistakes end in."""

import gzip
import json
import multiprocessing
import os
import pickle
import shutil
import socket
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config.options import Data
from data import pieces
from data.files import find_files, suffix_of
from data.packing import BadSample
from data.samples import sample_texts
from data.sources import open_sources


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    def fail(*arguments, **_):
        pytest.fail(f"the network was asked: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", fail)


def write_jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def open_source(*patterns, **data):
    (source,) = open_sources(Data(path=tuple(map(str, patterns)), **data))
    return source


def documents_of(*patterns, text_key="text"):
    sources = open_sources(Data(path=tuple(map(str, patterns)), text_key=text_key))
    return [source[index][text_key] for source in sources for index in range(len(source))]


def test_jsonl(tmp_path):
    texts = ["one", "", "zwei\n\n", "três 🙂", "x" * 200_000]
    assert documents_of(write_jsonl(tmp_path / "a.jsonl", texts)) == texts


def test_parquet_with_other_columns(tmp_path):
    table = pa.table({"id": [1, 2], "body": ["one", "two"], "nested": [{"a": 1}, None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert documents_of(tmp_path / "a.parquet", text_key="body") == ["one", "two"]


def test_parquet_files_of_which_some_are_empty(tmp_path):
    for name, texts in (("a", []), ("b", ["one", "two"]), ("c", []), ("d", ["three"])):
        table = pa.table({"text": pa.array(texts, pa.string())})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    pattern = tmp_path / "*.parquet"
    assert documents_of(pattern) == ["one", "two", "three"]
    (source,) = open_sources(Data(path=(str(pattern),)))
    assert [Path(source.where(index).split(",")[0]).name for index in range(3)] == ["b.parquet"] * 2 + ["d.parquet"]


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
    assert find_files(str(tmp_path / "**" / "*.jsonl")) == [str(tmp_path / "deep" / "er" / "a.jsonl")]


def test_a_changed_file_is_read_again(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["before"])
    assert documents_of(path) == ["before"]
    write_jsonl(tmp_path / "a.jsonl", ["after", "wards"])
    assert documents_of(path) == ["after", "wards"]


def test_travels_to_workers_as_file_names(tmp_path):
    for path in (write_jsonl(tmp_path / "a.jsonl", ["word " * 100] * 1000), write_parquet(tmp_path, 1000)):
        source = open_source(path)
        assert len(source) == 1000
        pickled = pickle.dumps(source)
        assert len(pickled) < 5000
        assert pickle.loads(pickled)[999]["text"] == "word " * 100


def write_parquet(folder, num_rows):
    pyarrow.parquet.write_table(pa.table({"text": ["word " * 100] * num_rows}), folder / f"{num_rows}.parquet")
    return folder / f"{num_rows}.parquet"


def test_no_progress_bars(tmp_path, capfd):
    open_source(write_parquet(tmp_path, 1))
    assert capfd.readouterr() == ("", "")


def _open(cache, path):
    os.environ["HF_DATASETS_CACHE"] = str(cache)
    source = open_source(path)
    return len(source), source[len(source) - 1]["text"]


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
        ({}, [], r"data\.path: no document in \[\]"),
        ({}, ["none*.jsonl"], r"data\.path = '.*none\*\.jsonl' matches no file"),
        ({"a_jsonl": '{"text": "x"}\n'}, ["a.jsonl", "b.jsonl"], r"data\.path = '.*b\.jsonl' matches no file"),
        ({"a_xml": "<x/>"}, ["a.xml"], r"'.*a\.xml' ends in '\.xml': expected \.jsonl, .*\.parquet, \.txt"),
        ({"a_jsonl": "{}\n", "b": "x"}, ["*"], r"'.*b' ends in '': expected \.jsonl"),
        ({"a_jsonl": "{}\n", "b_txt": "x"}, ["*"], r"\.jsonl and \.txt files in one entry: expected one kind"),
        ({"a_jsonl": ""}, ["a.jsonl"], r"no document in '.*a\.jsonl'"),
        ({"a_jsonl": "\n\n", "b_jsonl": ""}, ["*.jsonl"], r"no document in '.*\*\.jsonl'"),
        ({"a_parquet": "not parquet"}, ["a.parquet"], r"a\.parquet cannot be read: "),
        ({"a_jsonl_gz": "not packed"}, ["a.jsonl.gz"], r"a\.jsonl\.gz cannot be read: "),
        ({"a_jsonl_gz": b""}, ["a.jsonl.gz"], r"a\.jsonl\.gz is empty: expected what gzip packs"),
        ({"a_jsonl_zst": b""}, ["a.jsonl.zst"], r"a\.jsonl\.zst is empty: expected what zstd packs"),
        ({"a_jsonl_zst": "not packed"}, ["a.jsonl.zst"], r"a\.jsonl\.zst cannot be read: "),
        ({"a_jsonl_gz": gzip.compress(b'{"text": "x"}')[:-9]}, ["a.jsonl.gz"], r"a\.jsonl\.gz cannot be read: "),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, files, patterns, message):
    make(tmp_path, **files)
    with pytest.raises(ValueError, match=message) as raised:
        open_source(*(tmp_path / pattern for pattern in patterns))
    assert "\n" not in str(raised.value)


def test_an_empty_source_among_others_is_told_where_it_has_a_weight(tmp_path):
    paths = (write_jsonl(tmp_path / "a.jsonl", []), write_jsonl(tmp_path / "b.jsonl", ["b"]))
    assert documents_of(*paths) == ["b"]
    with pytest.raises(ValueError, match=r"no document in '.*a\.jsonl'"):
        open_sources(Data(path=paths, weights=(1, 2)))


def test_a_table_without_the_column(tmp_path):
    with pytest.raises(ValueError, match=r"data\.text_key = 'body': expected one of text, as in .*3\.parquet"):
        open_source(write_parquet(tmp_path, 3), text_key="body")


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        (b'{"text": "caf\xe9"}', "undecodable", "is not UTF-8"),
        (b'{"text": "x"', "not_json", "is not JSON"),
        (b"[" * 100_000, "not_json", "is not JSON"),
        (b'["text"]', "not_json", r"is \['text'\], expected a JSON object"),
    ],
)
def test_bad_lines_are_told_by_file_and_line(tmp_path, line, reason, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n\n' + line + b'\n{"text": "y"}')
    source = open_source(tmp_path / "a.jsonl")
    assert [source[index]["text"] for index in (0, 2)] == ["x", "y"]
    with pytest.raises(BadSample, match=message) as raised:
        source[1]
    assert raised.value.reason == reason
    assert pickle.loads(pickle.dumps(raised.value)).reason == reason
    assert "\n" not in str(raised.value)
    assert [source.where(index) for index in range(3)] == [f"{tmp_path}/a.jsonl, line {line}" for line in (1, 3, 4)]


@given(
    st.lists(st.sampled_from([b"", b"\r", b'{"n": 1}', b'{"n": 22}', b'{"n": 333333333333}\r']), max_size=9),
    st.booleans(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_lines_are_found_by_offset_and_number(tmp_path, lines, is_ended):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * is_ended)
    shutil.rmtree(Path(datasets.config.HF_DATASETS_CACHE, "json_lines"), ignore_errors=True)
    source = pieces.JsonLines([str(path)])
    expected = [(json.loads(line), number) for number, line in enumerate(lines, 1) if line.strip()]
    assert [source[index] for index in range(len(source))] == [record for record, _ in expected]
    assert [source.where(index) for index in range(len(source))] == [f"{path}, line {number}" for _, number in expected]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_packed_lines(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    content = b"".join(json.dumps({"text": f"text {number}"}).encode() + b"\n" for number in range(5000))
    with pa.output_stream(str(path), compression={".gz": "gzip", ".zst": "zstd"}[path.suffix]) as packed:
        packed.write(content)
    if suffix == ".jsonl.gz":  # several members, as gzip's own concatenation makes them
        path.write_bytes(gzip.compress(content[:1000]) + gzip.compress(content[1000:]))
    assert suffix_of(str(path)) == suffix
    assert documents_of(path) == [f"text {number}" for number in range(5000)]
    assert open_source(path).where(4999) == f"{path}, line 5000"


def test_entries_of_different_kinds_follow_each_other(tmp_path):
    (tmp_path / "b.txt").write_text("b")
    paths = (write_jsonl(tmp_path / "a.jsonl", ["a0", "a1"]), tmp_path / "b.txt", write_parquet(tmp_path, 2))
    assert documents_of(*paths) == ["a0", "a1", "b", *["word " * 100] * 2]


def test_rows_of_several_tables_are_told_by_file(tmp_path):
    write_parquet(tmp_path, 2), write_parquet(tmp_path, 3)
    source = open_source(tmp_path / "*.parquet")
    assert source.where(1) == f"{tmp_path}/2.parquet, row 2"
    assert source.where(2) == f"{tmp_path}/3.parquet, row 1"


def test_a_directory_that_datasets_saved(tmp_path):
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "id": [1, 2]})
    table.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict(train=table, test=table.select([1])).save_to_disk(tmp_path / "split")
    assert documents_of(tmp_path / "plain") == documents_of(tmp_path / "split") == ["a", "b"]
    source = open_source(tmp_path / "split", split="test")
    assert (len(source), source[0], source.where(0)) == (1, {"text": "b"}, f"{tmp_path}/split, row 1")
    with pytest.raises(ValueError, match=r"data\.split = 'dev': expected one of train, test, as in '.*split'"):
        open_source(tmp_path / "split", split="dev")


def test_a_dataset_by_name(tmp_path, monkeypatch):
    def load(name, subset):
        if (name, subset) != ("owner/name", "small"):
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset {name!r} doesn't exist on the Hub")
        return datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a", "b"]}))

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = open_source("owner/name:small")
    assert (source[1], source.where(1)) == ({"text": "b"}, "owner/name:small, row 2")
    with pytest.raises(ValueError, match=r"^data\.path: owner/nam cannot be read: Dataset 'owner/nam' doesn't exist"):
        open_source("owner/nam")


def test_a_sample_of_the_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"number {number}"}) for number in range(50)]
    path.write_text("\n".join(["{damaged", json.dumps({"text": "x" * 5000}), *lines]))
    texts = sample_texts(Data(path=(str(path),), tokenizer="none"))
    assert texts[:4] == ["text", "x" * 2000, "text", "number 0"]
    assert len(texts) == 2 * 19  # of 20 records one is damaged
