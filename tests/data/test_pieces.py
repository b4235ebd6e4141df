"""JSON lists, CSV and TSV: each record as its file has it, whatever the file looks like; what is damaged is told."""

import csv
import gzip
import io
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config.options import Data, Training
from data import pieces
from data.loader import TokenLoader
from data.packing import BadSample
from data.sources import open_sources
from errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = str(ROOT / "data" / "tiny" / "tokenizer")
BOM = b"\xef\xbb\xbf"


def records_of(path, key="text"):
    """The texts of a file's records, or the reason for which one is none."""
    (source,) = open_sources(Data(path=(str(path),)))
    found = []
    for index, (where, read) in enumerate(source.head()):
        assert where == source.where(index)
        try:
            record = source[index]
            assert record == read()
            found.append(record[key])
        except BadSample as error:
            found.append(error.reason)
    assert len(found) == len(source)
    return found


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=st.lists(st.fixed_dictionaries({"text": st.text(max_size=40), "more": JSON}), min_size=1, max_size=8),
    indent=st.sampled_from([None, 0, 2]),
    escapes=st.booleans(),
    chunk=st.sampled_from([1, 2, 7, 64, 1 << 20]),
    between=st.sampled_from([None, "", "\n", " \n,\n"]),
)
def test_elements_are_read_as_the_library_reads_them(tmp_path, monkeypatch, records, indent, escapes, chunk, between):
    """A list, or objects with something `between` them."""
    monkeypatch.setattr(pieces, "_CHUNK", chunk)
    path = tmp_path / "a.json"
    texts = [json.dumps(record, indent=indent, ensure_ascii=escapes) for record in records]
    text = json.dumps(records, indent=indent, ensure_ascii=escapes) if between is None else between.join(texts)
    content = text.encode("utf-8", "surrogatepass")
    path.write_bytes(content)
    with open(path, "rb") as stream:
        found = list(pieces._elements(stream, "a.json", int(between is None)))
    assert [json.loads(piece.content.decode("utf-8", "surrogatepass")) for piece in found] == records
    for piece in found:
        assert content[piece.offset :].startswith(piece.content)
        assert piece.line == 1 + content[: piece.offset].count(b"\n")


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (BOM + b' [{"text": "a"},\r\n {"text": "b"}]\n\n', ["a", "b"]),
        (b'[{"text": "a"}, 3, null, "x", [], {"text": "b"}]', ["a", *["not_json"] * 4, "b"]),
        (b'[{"text": "a"}, {"text": "\xff"}, {"text" "b"}, {"text": "c"},]', ["a", "undecodable", "not_json", "c"]),
        (b'[{"text": "]}\\\\\\"[{,"}]', [']}\\"[{,']),
        (b'{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),  # JSON Lines under that name
        (b'[{"text": "a"}, {"text": "' + b"x" * 6000 + b'"}, {"text": "b"}]', ["a", "too_long", "b"]),
    ],
)
def test_lists_of_any_look(tmp_path, monkeypatch, content, texts):
    monkeypatch.setattr(pieces, "_MAX_LINE", 4000)
    monkeypatch.setattr(pieces, "_CHUNK", 1000)
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert records_of(path) == texts
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(content))
    assert records_of(tmp_path / "b.json.gz") == texts


PRETTY = json.dumps({"text": "a", "list": [1, {"b": 2}]}, indent=2).encode()


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b'[\n{"text": "a"},\n{"text": "b"}\n]\n', ["a", "b"]),
        (BOM + PRETTY, ["a"]),
        (PRETTY.replace(b"\n", b"\r\n") + b"\n" + PRETTY, ["a", "a"]),
        (b'{"text": "a",\n"n": 1}\n{"text" 3}\n{"text": "b"}\n', ["a", "not_json", "b"]),
        # Lines, of which the first is damaged:
        (b'{"text": "a", "list": [1,\n{"text": "b"}\n{"text": "c"}\n', ["not_json", "b", "c"]),
        (b'{"text": "a\n{"text": "b"}\n', ["not_json", "b"]),
        (b'[{"text": "a"}]\n{"text": "b"}\n', ["not_json", "b"]),
        (b'{"text": "a\n{bad\n{"text": "b"}\n', ["not_json", "not_json", "b"]),
        (b'{"text": "a"}\n   \n\t\r\n{"text": "b"}\n' + BOM + b'{"text": "c"}', ["a", "b", "c"]),
    ],
)
def test_objects_over_several_lines_and_lines_that_are_damaged(tmp_path, content, texts):
    (tmp_path / "a.jsonl").write_bytes(content)
    assert records_of(tmp_path / "a.jsonl") == texts
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content))
    assert records_of(tmp_path / "b.jsonl.gz") == texts
    if content[:1] != b"[":
        (tmp_path / "c.json").write_bytes(content)
        assert records_of(tmp_path / "c.json") == texts


def test_a_table_of_records_is_no_record_of_its_last_line(tmp_path):
    (tmp_path / "a.json").write_text('{"data": [\n{"text": "a"},\n{"text": "b"}\n]}\n')
    (source,) = open_sources(Data(path=(str(tmp_path / "a.json"),)))
    assert [source[index] for index in range(len(source))] == [{"data": [{"text": "a"}, {"text": "b"}]}]


def test_a_field_that_stands_twice_is_told(tmp_path):
    lines = [
        '{"text": "a", "n": 1, "text": "b"}',
        '{"text": "c", "x": [{"y": 1, "y": 2}]}',
        '{"text": "d", "text": "d", "x": {"text": 1}}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (source,) = open_sources(Data(path=(str(tmp_path / "a.jsonl"),)))
    for number, name in enumerate(("text", "y")):
        with pytest.raises(BadSample, match=f"is not JSON: '{name}' stands twice in an object, and says") as caught:
            source[number]
        assert caught.value.reason == "not_json"
    assert source[2] == {"text": "d", "x": {"text": 1}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a",\n"n": [1', r"a\.json, line 1: what begins the file is not ended: expected \["),
        (b'{"text": "a",\n"n": 1}}\n{}', r"line \d: what begins the file has something behind its end"),
        (b'[{"text": "a"},\n{"text": "b"}', r"a\.json, line 2: what begins the file is not ended"),
        (b'[{"text": "a"},\n{"text": "b}]', r"a\.json, line \d: what begins the file is not ended"),
        (b'[{"text": "a"}]\n[{"text": "b"}]', r"line 1: what begins the file has something behind its end"),
        (b"[{}" + b", {}" * 1000 + b"]" + b" " * 5000 + b"x", r"has something behind its end"),
    ],
)
def test_damaged_lists_are_told_with_the_line(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(pieces, "_CHUNK", 1000)
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_sources(Data(path=(str(tmp_path / "a.json"),)))


def test_the_place_of_a_record_is_told(tmp_path):
    (tmp_path / "a.json").write_text('[\n{"text": "a"}, {"text": "b"},\n\n{"text": "c"}]')
    (tmp_path / "b.json").write_text('{"text": "a"}\n\n{"text": "c"}\n')
    (tmp_path / "c.csv").write_text('text,n\n"a\nb",1\n\nc,2\n')
    for name, expected in (
        ("a.json", ["line 2 (element 1)", "line 2 (element 2)", "line 4 (element 3)"]),
        ("b.json", ["line 1", "line 3"]),
        ("*.json", [*(f"line {n}" for n in ("2 (element 1)", "2 (element 2)", "4 (element 3)")), "line 1", "line 3"]),
        ("c.csv", ["line 2", "line 5"]),
    ):
        (source,) = open_sources(Data(path=(str(tmp_path / name),)))
        assert [source.where(index).partition(", ")[2] for index in range(len(source))] == expected


CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(CELL, CELL), min_size=1, max_size=8),
    ending=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    kind=st.sampled_from([(".csv", ","), (".tsv", "\t")]),
)
def test_tables_are_read_as_the_library_writes_them(tmp_path, rows, ending, quoting, kind):
    suffix, delimiter = kind
    written = io.StringIO()
    writer = csv.writer(written, delimiter=delimiter, lineterminator=ending, quoting=quoting)
    writer.writerows([("text", "other"), *rows])
    path = tmp_path / f"a{suffix}"
    path.write_bytes(written.getvalue().encode())
    (source,) = open_sources(Data(path=(str(path),)))
    assert [tuple(source[index].values()) for index in range(len(source))] == rows


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (BOM + b"text,id\na,1\nb,2", ["a", "b"]),
        (b',text\n0,a\n1,"b ""x"""\n', ["a", 'b "x"']),  # with pandas' index
        (b"text,id\na,1\nb\nc,3,4\nd,4\n", ["a", "not_csv", "not_csv", "d"]),
        (b'text,id\na,1\n"b"x,2\nc,3\n', ["a", "not_csv", "c"]),
        (b"text,id\na,1\n\xff,2\nc,3\n", ["a", "undecodable", "c"]),
        (b"text\na\n\n\nb\n", ["a", "b"]),
        (b'text\n"' + b"x" * 200_000 + b'"\nb\n', ["x" * 200_000, "b"]),  # more than the library's own limit
    ],
)
def test_tables_of_any_look(tmp_path, content, texts):
    (tmp_path / "a.csv").write_bytes(content)
    assert records_of(tmp_path / "a.csv") == texts
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(content))
    assert records_of(tmp_path / "b.csv.gz") == texts
    (tmp_path / "a.csv").write_bytes(content.replace(b"text", b"TEXT"))  # the names of before are not remembered
    os.utime(tmp_path / "a.csv", ns=(1, 1))
    assert records_of(tmp_path / "a.csv", "TEXT") == texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'text,id\na,1\n"b,2\nc,3\n', r"a\.csv, line 3: a quoted text is not ended"),
        (b"text,text\na,1\n", r"a\.csv, line 1: 'text, text': expected the names of the fields, each once"),
        (b"\xff,id\na,1\n", r"a\.csv, line 1: is not UTF-8: .*: expected the names of the fields"),
    ],
)
def test_damaged_tables_are_told_with_the_line(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        records_of(tmp_path / "a.csv")


def files_with(folder, texts):
    """The texts in a file of each kind."""
    paths = [folder / f"a.{kind}" for kind in ("jsonl", "json", "csv", "tsv", "csv.gz", "json.gz")]
    table = "".join(f"{number}{{}}{json.dumps(text)}\n" for number, text in enumerate(["text", *texts]))
    contents = [
        "".join(json.dumps({"text": text}) + "\n" for text in texts),
        json.dumps([{"text": text} for text in texts], indent=1),
        table.replace("{}", ","),
        table.replace("{}", "\t"),
        table.replace("{}", ","),
        json.dumps([{"text": text} for text in texts]),
    ]
    for path, content in zip(paths, contents):
        path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return list(map(str, paths))


def test_order_seeds_and_cursors_are_those_of_json_lines(tmp_path):
    training = Training(steps=1, sequence_length=32, local_batch_size=1, global_batch_size=2)
    texts = [f"Document {number} has some words, {number * 7}." for number in range(50)]
    expected = None
    for path in files_with(tmp_path, texts):
        data = Data(path=(path,), tokenizer=TOKENIZER, num_workers=0)
        loader = TokenLoader(data, training, 0, 1, seed=5)
        batches = [next(loader).tokens.tolist() for _ in range(40)]
        expected = expected or batches
        assert batches == expected, path
        later = TokenLoader(replace(data, num_workers=1), training, 0, 1, seed=5)
        resumed = TokenLoader(data, training, 0, 1, seed=5)
        for _ in range(20):
            next(later)
        resumed.load_cursors(later.cursors)
        later.close()
        assert [next(resumed).tokens.tolist() for _ in range(20)] == expected[20:]


def test_small_to_pickle(tmp_path):
    for path in files_with(tmp_path, ["x"] * 1000):
        (source,) = open_sources(Data(path=(path,)))
        assert len(source) == 1000
        assert len(pickle.dumps(source)) < 5000


def test_kinds_of_one_entry(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "a"}]')
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    assert records_of(tmp_path) == ["a", "b"]
    (tmp_path / "c.csv").write_text("text\nc\n")
    with pytest.raises(
        UserError, match=r"\.csv and \.json and \.jsonl files in one entry: expected one kind, as a glob"
    ):
        records_of(tmp_path)
    (tmp_path / "d.tsv").write_text("text\nd\n")
    assert records_of(tmp_path / "*.[ct]sv") == ["c", "d"]


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_memory_does_not_grow_with_the_file(tmp_path, kind):
    program = (
        "import os, resource, sys; from config.options import Data; from data.sources import open_sources\n"
        "(source,) = open_sources(Data(path=(sys.argv[1],)))\n"
        "record = source[len(source) - 1]\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for number in (100, 60_000):
        path, text = tmp_path / f"{number}.{kind}", "word " * 400
        with open(path, "w") as file:
            file.write("[\n" if kind == "json" else "text\n")
            for place in range(number):
                comma = "," * (place < number - 1)
                file.write(json.dumps({"text": text}) + comma + "\n" if kind == "json" else f'"{text}"\n')
            file.write("]" if kind == "json" else "")
        environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        command = [sys.executable, "-c", program, str(path)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) * 1024)
    assert path.stat().st_size > 110e6
    assert peaks[1] - peaks[0] < 30e6


def test_a_mark_before_quoted_names_of_fields(tmp_path):
    (tmp_path / "a.csv").write_bytes(BOM + b'"n\nm","text"\r\n1,"a\r\nb"\r\n')
    assert records_of(tmp_path / "a.csv") == ["a\r\nb"]


def test_lines_of_csv_that_end_in_cr_alone(tmp_path):
    """As the first row is not one, no row is: nothing of it would be read."""
    (tmp_path / "a.csv").write_bytes(b"text,n\ra,1\rb,2\r")
    (tmp_path / "b.csv").write_bytes(b"text,n\nc,1\n")
    with pytest.raises(UserError, match=r"a\.csv, line 1: is no row of CSV: it has CR without LF.* expected the names"):
        open_sources(Data(path=(str(tmp_path / "*.csv"),)))
