"""validation.share: what is held out is so for ever, whatever becomes of the files; all else is trained on."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.options import Data
from data.held_out import Side, place_of
from data.sources import open_sources
from errors import UserError

TEXTS = [f"text {number} " * (number % 5 + 1) for number in range(400)]
PLACES = [0.8425693909534336, 0.46866087250310995, 0.6181246264498789]


def texts_of(data, share, is_held_out):
    sources = open_sources(data, Side(share, is_held_out))
    return [source[number][data.text_key] for source in sources for number in range(len(source))]


def both(data, share):
    held_out, kept = texts_of(data, share, True), texts_of(data, share, False)
    return set(held_out), set(kept)


def write_jsonl(path, texts, key="text", **others):
    path.write_text("".join(json.dumps({**others, key: text}) + "\n" for text in texts))
    return str(path)


def test_a_share_and_the_rest_make_all(tmp_path: Path) -> None:
    data = Data(path=(write_jsonl(tmp_path / "all.jsonl", TEXTS),))
    held_out, kept = both(data, 0.1)
    assert held_out | kept == set(TEXTS)
    assert not held_out & kept
    assert 20 <= len(held_out) <= 60
    assert both(data, 0.2)[0] > held_out
    assert texts_of(data, 0.0, False) == TEXTS


def test_it_is_the_same_in_other_files_formats_orders_and_beside_others(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    one = Data(path=(write_jsonl(tmp_path / "one.jsonl", TEXTS),))
    held_out, kept = both(one, 0.1)
    shuffled = np.random.default_rng(0).permutation(TEXTS).tolist()
    (tmp_path / "shards").mkdir()
    for shard in range(3):
        write_jsonl(tmp_path / f"shards/{shard}.jsonl", shuffled[shard::3], id=shard)
    new = [f"new {number}" for number in range(100)]
    write_jsonl(tmp_path / "shards/new.jsonl", new)
    pq.write_table(pa.table({"id": range(400), "body": shuffled}), tmp_path / "t.parquet")
    for data in (
        Data(path=(f"{tmp_path}/shards/*.jsonl",)),
        Data(path=(str(tmp_path / "t.parquet"),), text_key="body"),
        Data(path=(f"{tmp_path}/shards/2.jsonl", f"{tmp_path}/shards/[01].jsonl")),
    ):
        now_held_out, now_kept = both(data, 0.1)
        assert now_held_out - set(new) == held_out
        assert now_kept - set(new) == kept


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    data = Data(path=(write_jsonl(tmp_path / "a.jsonl", TEXTS[:200]),))
    before, _ = both(data, 0.1)
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    after, kept = both(data, 0.1)
    assert before < after
    assert after | kept == set(TEXTS)


def test_the_hash_is_the_same_tomorrow() -> None:
    """A run of next year, with another version, holds out what this one does."""
    assert place_of({"text": "The with statement"}, Data()) == pytest.approx(PLACES[0], abs=1e-15)
    chat = {"messages": [{"role": "user", "content": "a"}]}
    assert place_of(chat, Data(format="chat")) == pytest.approx(PLACES[1], abs=1e-15)
    assert place_of(np.array([1, 2, 3], "<u2"), Data()) == pytest.approx(PLACES[2], abs=1e-15)


def test_conversations_are_the_same_in_tables_and_as_json() -> None:
    data = Data(format="chat")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    nulls = [{**message, "name": None} for message in messages]
    place = place_of({"messages": messages, "tools": None}, data)
    assert place_of({"id": 7, "messages": nulls}, data) == place
    assert place_of({"messages": json.dumps(messages)}, data) == place
    assert place_of({"messages": messages[:1]}, data) != place
    assert place_of({"messages": messages, "images": [{"bytes": b"1"}]}, data) != place
    for fields in (
        {"conversations": messages},
        {"instruction": "a", "output": "b"},
        {"prompt": "a", "completion": "b"},
    ):
        place = place_of(fields, data)
        assert place_of({"id": 7, **fields, "input": "", "history": [], "tools": None}, data) == place
        assert place_of(dict.fromkeys(fields, "c"), data) != place
    assert place_of({"own": "a"}, data) != place_of({"own": "b"}, data)


def test_what_is_not_read_does_not_count() -> None:
    """Nor does the layout: what says the same is on one side."""
    data = Data(format="chat")
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [call]}]
    ids = [{**message, "id": f"drawn {number}", "timestamp": number} for number, message in enumerate(messages)]
    ids[1] |= {"tool_calls": [{**call, "id": "call_1"}], "weight": 1, "usage": {"n": 3}}
    texts = [{**messages[0], "content": [{"type": "text", "text": "a"}], "name": "", "tool_calls": []}, messages[1]]
    as_json = {"name": "f", "arguments": '{"x": 1}'}
    same = [messages, ids, texts, [messages[0], {**messages[1], "tool_calls": [as_json]}]]
    assert len({place_of({"messages": each}, data) for each in same}) == 1
    plain = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    layouts = [
        {"messages": plain},
        {"messages": {"role": ["user", "assistant"], "content": ["a", "b"]}},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"instruction": "a", "output": "b"},
    ]
    assert len({place_of(each, data) for each in layouts}) == 1
    assert place_of(layouts[0], data) != place_of({"messages": messages}, data)
    document = {"text": "a", "image": "thumbnail.png"}
    assert place_of(document, Data()) == place_of({"text": "a"}, Data())
    assert place_of({"text": "<image>a", "images": ["1.png"]}, Data()) != place_of({"text": "<image>a"}, Data())


def test_empty_lists_are_nothing_in_csv_too() -> None:
    record = {"instruction": "I", "output": "O"}
    same = [record, {**record, "history": [], "tools": None}, {**record, "history": "[]", "input": ""}]
    assert len({place_of(each, Data(format="chat")) for each in same}) == 1


@given(st.lists(st.integers(0, 2**16 - 1)))
def test_tokens_count_and_not_their_width(tokens: list[int]) -> None:
    narrow, wide = (place_of(np.array(tokens, dtype), Data()) for dtype in ("<u2", "<u4"))
    assert narrow == wide
    assert 0 <= narrow < 1


def test_what_cannot_be_read_is_on_the_side_that_tells_of_it(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    write_jsonl(path, TEXTS[:50])
    path.write_bytes(path.read_bytes() + b"no JSON\n\xff\xff\n" + b"[" * 100_000 + b"\n")
    sizes = [len(open_sources(Data(path=(str(path),)), Side(0.5, side))[0]) for side in (True, False)]
    assert sum(sizes) == 53
    held_out = open_sources(Data(path=(str(path),)), Side(0.99, True))[0]
    assert all(held_out[number] for number in range(len(held_out)))


@pytest.mark.parametrize(("share", "is_held_out", "expected"), [(1e-9, True, "larger"), (0.999999, False, "smaller")])
def test_a_side_without_samples_is_one_line(tmp_path: Path, share: float, is_held_out: bool, expected: str) -> None:
    path = write_jsonl(tmp_path / "few.jsonl", TEXTS[:3])
    with pytest.raises(UserError, match=f"validation.share = .*few.jsonl.*expected a {expected} share"):
        open_sources(Data(path=(path,)), Side(share, is_held_out))
