"""Parquet files that differ in what nobody needs, nulls that tables add, and damaged tables."""

import json
import random

import pyarrow as pa
import pyarrow.parquet
import pytest

from config.options import Data
from data import tables
from data.packing import BadSample
from data.sources import open_sources
from errors import UserError


def open_source(*patterns, **data):
    (source,) = open_sources(Data(path=tuple(map(str, patterns)), **data))
    return source


def rows(source):
    """All rows, as they are read by their numbers and, the same, from the head."""
    by_number = [source[index] for index in range(len(source))]
    head = list(source.head())
    assert [read() for _, read in head] == by_number
    assert [where for where, _ in head] == [source.where(index) for index in range(len(source))]
    return by_number


def write(path, **columns):
    pyarrow.parquet.write_table(pa.table(columns), path)
    return path


def write_groups(path, groups):
    """Groups of rows whose columns have dictionaries of their own."""
    tables = [pa.table(columns) for columns in groups]
    with pyarrow.parquet.ParquetWriter(path, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)


def test_files_that_differ_in_other_columns_and_in_types(tmp_path):
    texts = [None if number % 7 else f"text {number}" for number in range(3000)]
    groups = [
        {"text": pa.array(texts[at : at + 500]).dictionary_encode(), "x": [1] * 500} for at in range(0, 3000, 500)
    ]
    write_groups(tmp_path / "0.parquet", groups)
    write(tmp_path / "1.parquet", y=pa.array([1.5]), text=pa.array(["c"], pa.large_string()))
    write(tmp_path / "2.parquet", text=pa.array([None], pa.null()), x=["other"])
    write(tmp_path / "3.parquet", text=pa.array(["d"], pa.string_view()))
    found = rows(open_source(tmp_path / "*.parquet"))
    assert [row["text"] for row in found] == [*texts, "c", None, "d"]


def test_a_file_without_the_column_among_others(tmp_path):
    write(tmp_path / "0.parquet", text=["a"])
    write(tmp_path / "1.parquet", body=["b"])
    with pytest.raises(UserError, match=r"data\.text_key = 'text': expected one of body, as in .*1\.parquet"):
        open_source(tmp_path / "*.parquet")


CALLS = pa.large_list(
    pa.struct([("function", pa.struct([("name", pa.string()), ("arguments", pa.map_(pa.string(), pa.string()))]))])
)
MESSAGE = pa.struct(
    [("role", pa.dictionary(pa.int16(), pa.string())), ("content", pa.large_string()), ("calls", CALLS)]
)


def test_nested_types(tmp_path):
    call = {"function": {"name": "f", "arguments": [("a", "1"), ("b", None)]}}
    chats = [[{"role": f"user {n}", "content": "x"}, {"role": "assistant", "calls": [call]}] for n in range(1500)]
    groups = [{"messages": pa.array(chats[at : at + 500], pa.list_(MESSAGE))} for at in (0, 500, 1000)]
    write_groups(tmp_path / "a.parquet", groups)
    found = rows(open_source(tmp_path / "a.parquet", format="chat"))
    answer = {"role": "assistant", "calls": [{"function": {"name": "f", "arguments": {"a": "1"}}}]}
    assert found == [{"messages": [{"role": f"user {n}", "content": "x"}, answer]} for n in range(1500)]


def test_nulls_that_a_table_adds_are_left_out_at_every_depth(tmp_path):
    """One tool has parameters that another has not: in a table both have all of them."""
    tools = [
        {"function": {"name": "f", "parameters": {"properties": {"city": {"type": "string"}}}}},
        {"function": {"name": "g", "parameters": {"properties": {"unit": {"enum": ["C", None]}}}}},
    ]
    call = [{"function": {"name": "f", "arguments": {"city": "Ulm", "deep": [{"a": 1}, {"b": 2}]}}}]
    chat = [{"role": "assistant", "tool_calls": call}, {"role": "user", "content": ""}]
    write(tmp_path / "a.parquet", messages=[chat], tools=[tools])
    write(tmp_path / "b.parquet", messages=[chat])
    whole, without = rows(open_source(tmp_path / "*.parquet", format="chat"))
    assert whole == {"messages": chat, "tools": tools}
    assert without == {"messages": chat}


def test_a_null_in_json_lines_is_meant(tmp_path):
    line = '{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": null}}]}]}'
    (tmp_path / "a.jsonl").write_text(line)
    assert open_source(tmp_path / "a.jsonl", format="chat")[0] == json.loads(line)
    pyarrow.parquet.write_table(pa.Table.from_pylist([json.loads(line)]), tmp_path / "a.parquet")
    calls = [{"name": "f", "arguments": {}}]
    assert rows(open_source(tmp_path / "a.parquet", format="chat"))[0]["messages"][0]["tool_calls"] == calls


def test_a_folder_of_datasets_has_no_nulls_either(tmp_path):
    import datasets

    chats = [[{"role": "user", "content": {"a": 1}}], [{"role": "assistant", "content": {"b": [None, 2]}}]]
    datasets.Dataset.from_dict({"messages": chats, "id": [1, 2]}).save_to_disk(tmp_path / "saved")
    assert rows(open_source(tmp_path / "saved", format="chat")) == [{"messages": chat} for chat in chats]


def test_text_that_is_no_utf8(tmp_path):
    array = pa.Array.from_buffers(pa.string(), 2, [None, *pa.array([b"ab", b"\xff"]).buffers()[1:]])
    write(tmp_path / "a.parquet", text=array)
    source = open_source(tmp_path / "a.parquet")
    assert source[0] == {"text": "ab"}
    with pytest.raises(BadSample, match="is not UTF-8") as raised:
        source[1]
    assert raised.value.reason == "undecodable"


@pytest.mark.parametrize("claimed", [0, 1, 3, 2**40])
def test_a_footer_that_counts_other_rows(tmp_path, monkeypatch, claimed):
    path = write(tmp_path / "a.parquet", text=["a", "b"])

    class Lying:
        def __init__(self, file):
            self._file = pyarrow.parquet.ParquetFile(file)
            self.metadata = self

        def __getattr__(self, name):
            return (
                claimed if name == "num_rows" else getattr(self._file, name, None) or getattr(self._file.metadata, name)
            )

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._file.close()

    monkeypatch.setattr("data.tables._parquet", Lying)
    with pytest.raises(UserError, match=r"a\.parquet is damaged: its footer counts \d+ rows, its groups 2"):
        open_source(path)
    with pytest.raises(UserError, match=rf"a\.parquet is damaged: it has 2 rows, not the {claimed} of its footer"):
        list(tables.ParquetFiles([str(path)], tables.Columns.of(Data())).head())


def test_damaged_files_are_refused_in_one_line_or_read(tmp_path):
    path = write(tmp_path / "a.parquet", text=[f"document {number}" for number in range(200)], x=[1] * 200)
    whole, num_refused = path.read_bytes(), 0
    for seed in range(120):
        draw = random.Random(seed)
        place = draw.randrange(len(whole))
        cut = seed % 3 == 0
        path.write_bytes(whole[:place] if cut else whole[:place] + draw.randbytes(4) + whole[place + 4 :])
        try:
            source = open_source(path)
            for index in range(min(len(source), 300)):
                try:
                    source[index]
                except BadSample as error:
                    assert "\n" not in str(error)  # noqa: PT017
        except UserError as error:
            num_refused += 1
            assert "\n" not in str(error)  # noqa: PT017
            assert "a.parquet" in str(error) or "no document" in str(error)  # noqa: PT017
    assert num_refused > 50


def test_fields_that_are_null_in_all_rows_of_a_file(tmp_path):
    turn = {"role": "assistant", "content": "A", "tool_calls": None, "parts": [None]}
    table = [{"messages": [{**turn, "role": "user"}, turn, turn]}] * 5
    pyarrow.parquet.write_table(pa.Table.from_pylist(table), tmp_path / "a.parquet", row_group_size=2)
    kept = {"role": "assistant", "content": "A", "parts": [None]}
    source = open_source(tmp_path / "a.parquet", format="chat")
    assert rows(source) == [{"messages": [{**kept, "role": "user"}, kept, kept]}] * 5
