"""The layouts of conversations: each becomes the messages that it means, what fits two is refused, and it is told."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from config.options import Data
from data.layouts import layout_of, read_layout
from data.media import Media
from data.messages import read_messages
from data.packing import BadSample
from data.samples import EncodeText, data_in_words, open_samples
from data.tokenizer import load_tokenizer
from errors import UserError
from tests.data.test_chat import ROOT

TOKENIZER = str(ROOT / "data" / "tiny" / "tokenizer")
CHAT = Data(format="chat", tokenizer=TOKENIZER, shuffle=False)
Q, A = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
S, Q2, A2 = (
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "A2"},
)
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, A]
SHAREGPT = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]

RECORDS = [
    ("messages", {"messages": [Q, A]}, [Q, A], [1]),
    ("messages", {"messages": json.dumps([Q, A])}, [Q, A], [1]),
    ("messages", {"messages": PARTS, "system": "S"}, [S, Q, A], [1]),
    ("messages", {"messages": [S, Q, A], "system": "S"}, [S, Q, A], [1]),
    ("messages", {"messages": {"role": ["user", "assistant"], "content": ["Q", "A"]}}, [Q, A], [1]),
    ("messages", {"messages": [Q, A], "prompt": "Q", "output": "A"}, [Q, A], [1]),  # as in UltraChat
    ("sharegpt", {"conversations": SHAREGPT}, [Q, A], [1]),
    ("sharegpt", {"conversations": json.dumps(SHAREGPT), "system": "S", "tools": "[]"}, [S, Q, A], [1]),
    ("sharegpt", {"conversations": [{"from": "USER", "value": "Q"}, {"from": "chatgpt", "value": "A"}]}, [Q, A], [1]),
    ("sharegpt", {"conversations": [{"from": "system", "value": "S"}, *SHAREGPT], "system": "S"}, [S, Q, A], [1]),
    ("sharegpt", {"conversations": [Q, A]}, [Q, A], [1]),
    ("messages", {"messages": [{"role": "Human", "value": "Q"}, {"role": "GPT", "content": "A"}]}, [Q, A], [1]),
    ("messages", {"messages": [Q, A], "label": 3, "chosen": None, "system_prompt": ""}, [Q, A], [1]),
    ("messages", {"messages": [S, Q, A], "system_prompt": "S"}, [S, Q, A], [1]),
    ("alpaca", {"instruction": "Q", "input": "", "output": "A", "text": "Below is an"}, [Q, A], [1]),
    ("alpaca", {"instruction": "Q", "output": "A", "system": "S", "history": []}, [S, Q, A], [1]),
    ("alpaca", {"instruction": "Q2", "output": "A2", "history": [["Q", "A"]]}, [Q, A, Q2, A2], [1, 1]),
    ("alpaca", {"instruction": "Q2", "output": "A2", "history": '[["Q", "A"]]'}, [Q, A, Q2, A2], [1, 1]),
    ("alpaca", {"instruction": "I", "input": "x", "output": "A"}, [{"role": "user", "content": "I\nx"}, A], [1]),
    ("prompt_completion", {"prompt": "Q", "completion": "A"}, [Q, A], [1]),
    ("prompt_completion", {"prompt": [S, Q], "completion": [A]}, [S, Q, A], [1]),
    ("prompt_completion", {"prompt": [Q, A, Q2], "completion": "A2"}, [Q, A, Q2, A2], [0, 1]),
    ("prompt_completion", {"prompt": json.dumps([Q, A, Q2]), "completion": json.dumps([A2])}, [Q, A, Q2, A2], [0, 1]),
    ("prompt_completion", {"prompt": SHAREGPT + SHAREGPT[:1], "completion": "A2"}, [Q, A, Q, A2], [0, 1]),
    ("prompt_completion", {"prompt": "[1, 2]", "completion": "A"}, [{"role": "user", "content": "[1, 2]"}, A], [1]),
    ("prompt_completion", {"prompt": "Q", "completion": "A", "messages": [], "output": ""}, [Q, A], [1]),
]


@pytest.mark.parametrize(("layout", "record", "messages", "weights"), RECORDS)
def test_every_layout_becomes_messages(layout, record, messages, weights):
    assert layout_of(record, CHAT) == layout
    read = read_messages(read_layout(record, CHAT).messages, "reasoning", Media({}, CHAT))
    assert read.messages == messages
    assert list(read.weights.values()) == weights


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [Q, A], "conversations": SHAREGPT}, "of messages and sharegpt: expected data.layout to be one"),
        ({"instruction": "Q", "output": "A", "prompt": "Q", "completion": "A"}, "of alpaca and prompt_completion"),
        ({"id": 3, "question": "Q"}, "expected one of id, question, or 'conversations', or 'instruction' and 'output'"),
        ({"text": "x"}, "; for the documents in 'text': data.format = 'text'"),
        ({"messages": [Q, A], "system": 3}, "has system 3, expected a string"),
        ({"messages": [S, Q, A], "system": "T"}, "has system beside a message of system that says something else"),
        ({"messages": "[{]"}, "has no messages: expected a list in 'messages', or its JSON"),
        ({"messages": {"role": ["user"], "content": []}}, "a table of lists of different lengths"),
        ({"messages": [Q, A], "tools": "{"}, "has tools that are not JSON"),
        ({"messages": [Q, A], "tools": {"a": 1}}, "has tools that are no list"),
        ({"messages": [Q, A], "chat_template_kwargs": "[1]"}, "has chat_template_kwargs [1], expected a table"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "has chosen and rejected: preferences, as for DPO and KTO"),
        ({"chosen": [Q, A], "rejected": [Q, A2]}, "expected data.messages_key or data.layout to name the answers"),
        ({"conversations": SHAREGPT, "chosen": SHAREGPT[1], "rejected": SHAREGPT[1]}, "has chosen and rejected: pref"),
        ({"messages": [Q, A], "rejected_response": "B"}, "has rejected_response: preferences"),
        ({"prompt": "Q", "completion": "A", "label": False}, "has label: preferences"),
        ({"messages": [Q, A], "kto_tag": "true"}, "has kto_tag: preferences"),
        ({"messages": [Q, A], "kto_tag": 0}, "has kto_tag: preferences"),
        (
            {"messages": [Q, A], "system_prompt": "S"},
            "has 'system_prompt', which is not read: expected data.system_key",
        ),
        ({"messages": [Q, A], "functions": [{"name": "f"}]}, "expected data.tools_key = 'functions'"),
        ({"messages": [Q, {"role": "assistant", "content": " "}]}, "has message 1 of the assistant that says nothing"),
        ({"messages": [Q, {"role": None, "content": "A"}]}, "has message 1 without a role"),
        ({"instruction": 3, "output": "A"}, "has instruction 3, expected a string"),
        ({"instruction": "", "output": "A"}, "has an empty instruction"),
        ({"instruction": "Q", "output": " "}, "has an empty output"),
        ({"instruction": "Q", "output": "A", "history": [["Q"]]}, "history with ['Q'], expected [question, answer]"),
        ({"instruction": "Q", "output": "A", "history": 3}, "has history 3, expected a list of [question, answer]"),
        ({"prompt": "Q", "completion": ""}, "has an empty completion"),
        ({"prompt": [], "completion": [A]}, "has an empty prompt"),
        ({"prompt": {"role": [], "content": []}, "completion": "A"}, "has an empty prompt"),
        ({"prompt": "Q", "completion": [Q2]}, "has a completion without a message of the assistant"),
        ({"prompt": 3, "completion": "A"}, "has prompt 3, expected a string or a list of messages"),
        ({"conversations": [{"from": "gpt4", "value": "A"}]}, "has message 0 from 'gpt4', expected human, user, gpt"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "from 'function_call' whose value is not JSON"),
    ],
)
def test_what_is_wrong_is_told(record, message):
    with pytest.raises(BadSample) as raised:
        read_messages(read_layout(record, CHAT).messages, "reasoning", Media({}, CHAT))
    assert message in str(raised.value)


def test_a_layout_that_is_named_or_a_key_that_is_set_decides():
    record = {"messages": [Q, A], "conversations": [*SHAREGPT, *SHAREGPT], "prompt": "Q2", "completion": "A2"}
    for options, expected in (
        ({"layout": "messages"}, [Q, A]),
        ({"layout": "sharegpt"}, [*SHAREGPT, *SHAREGPT]),
        ({"messages_key": "conversations"}, [*SHAREGPT, *SHAREGPT]),
        ({"layout": "prompt_completion"}, [Q2, A2]),
    ):
        assert read_layout(record, Data(format="chat", **options)).messages == expected
    with pytest.raises(
        BadSample, match=r"data\.layout = 'alpaca': expected instruction and output, found messages, conv"
    ):
        read_layout(record, Data(format="chat", layout="alpaca"))
    with pytest.raises(
        BadSample, match=r"data\.messages_key = 'turns': expected one of messages, conversations, prompt, "
    ):
        read_layout(record, Data(format="chat", messages_key="turns"))


def test_answers_that_are_compared_are_trained_on_if_they_are_named(tmp_path):
    record = {"prompt": "Q2", "chosen": [Q, A], "rejected": [Q, A2], "messages": [Q, A2], "label": False}
    for options, expected in (({"messages_key": "chosen"}, [Q, A]), ({"layout": "messages"}, [Q, A2])):
        assert read_layout(record, Data(format="chat", **options)).messages == expected
    for number, fields in enumerate(({"prompt", "chosen", "rejected"}, {"messages", "label"}, {"messages", "chosen"})):
        path = tmp_path / f"{number}.parquet"
        pyarrow.parquet.write_table(pa.Table.from_pylist([{name: record[name] for name in fields}]), path)
        with pytest.raises(UserError, match=rf"{number}\.parquet.* has (chosen|rejected|label).*: preferences, as for"):
            open_samples(Data(format="chat", path=(str(path),)), load_tokenizer(TOKENIZER), 100, 0)


def test_tools_may_be_json_each():
    tool = {"type": "function", "function": {"name": "f"}}
    record = {"messages": [Q, A], "tools": [json.dumps(tool), tool]}
    assert read_layout(record, CHAT).tools == [tool, tool]


@pytest.mark.parametrize("sender", ["from", "role"])
@pytest.mark.parametrize(("call", "response"), [("function_call", "observation"), ("tool_call", "Tool_Response")])
def test_every_name_of_a_call(sender, call, response):
    turns = [(call, '{"name": "f", "arguments": {}}'), (response, "2")]
    messages = [Q, *({sender: name, "value": value} for name, value in turns), A]
    read = read_messages(read_layout({"messages": messages}, CHAT).messages, "reasoning", Media({}, CHAT))
    called = {"type": "function", "function": {"name": "f", "arguments": {}}}
    expected = {"role": "assistant", "tool_calls": [called], "content": ""}
    assert read.messages == [Q, expected, {"role": "tool", "content": "2"}, A]
    assert read.weights == {1: 1, 3: 1}


def test_calls_of_functions_in_sharegpt():
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}
    record = {"conversations": [*SHAREGPT[:1], call, {"from": "observation", "value": "2"}, *SHAREGPT[1:]]}
    read = read_messages(read_layout(record, CHAT).messages, "reasoning", Media({}, CHAT))
    assert [message["role"] for message in read.messages] == ["user", "assistant", "tool", "assistant"]
    assert read.messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
    ]


FILES = {
    "messages": [{"messages": [Q, A]}, {"messages": [Q2, A2]}],
    "sharegpt": [{"conversations": SHAREGPT, "system": "S"}, {"conversations": SHAREGPT, "system": ""}],
    "alpaca": [
        {"instruction": "Q", "input": "", "output": "A", "history": []},
        {"instruction": "Q2", "input": "x", "output": "A2", "history": [["Q", "A"]]},
    ],
    "prompt_completion": [{"prompt": "Q", "completion": "A"}, {"prompt": "Q2", "completion": "A2"}],
    "prompts of messages": [{"prompt": [Q, A, Q2], "completion": [A2]}, {"prompt": [S, Q], "completion": [A]}],
}
WORDS = {
    "messages": "messages",
    "sharegpt": "ShareGPT conversations",
    "alpaca": "Alpaca instructions",
    "prompt_completion": "prompts and completions",
    "prompts of messages": "prompts and completions",
}


def write_as(folder, kind, records):
    """A file of each kind with the records, or a folder that `datasets` saved."""
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif kind == "json":
        path.write_text(json.dumps(records, indent=2))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(records), path)
    elif kind == "datasets":
        datasets.Dataset.from_list(records).save_to_disk(path)
    else:
        cells = [
            [value if isinstance(value, str) else json.dumps(value) for value in each.values()] for each in records
        ]
        quoted = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in [list(records[0]), *cells]]
        path.write_text("\r\n".join(("," if kind == "csv" else "\t").join(row) for row in quoted))
    return str(path)


@pytest.mark.parametrize("layout", FILES)
def test_every_layout_in_every_kind_of_file_is_trained_on_alike(tmp_path, layout):
    expected = None
    for kind in ("jsonl", "json", "csv", "tsv", "parquet", "datasets"):
        data = Data(format="chat", path=(write_as(tmp_path, kind, FILES[layout]),), tokenizer=TOKENIZER, shuffle=False)
        samples = open_samples(data, load_tokenizer(TOKENIZER), 500, 0)
        found = [[part.tolist() for part in samples.read(number)[:2]] for number in range(samples.num_documents)]
        expected = expected or found
        assert found == expected, kind
        assert len(found) == 2
        assert data_in_words(data) == f"data: {data.path[0]}: {WORDS[layout]}"


def test_texts_in_every_kind_of_file(tmp_path):
    records = [{"text": "one, \"two\"\nthree"}, {"text": "día 🙂"}]  # fmt: skip
    tokenizer = load_tokenizer(TOKENIZER)
    for kind in ("jsonl", "json", "csv", "tsv", "parquet", "datasets"):
        data = Data(path=(write_as(tmp_path, kind, records),), tokenizer=TOKENIZER, shuffle=False)
        samples = open_samples(data, tokenizer, 500, 0)
        texts = [tokenizer.decode(samples.read(number).tokens[:-1].tolist()) for number in range(2)]
        assert texts == [record["text"] for record in records], kind
        assert data_in_words(data) == f"data: {data.path[0]}: texts in 'text'"


def test_what_the_data_are_is_told_of_each_entry(tmp_path):
    paths = []
    for number, records in enumerate(
        [FILES["alpaca"], [*FILES["messages"], *FILES["sharegpt"]], [{"x": 1}]] + [[]] * 7
    ):
        (tmp_path / f"{number}").mkdir()
        paths.append(write_as(tmp_path / f"{number}", "jsonl", records))
    told = data_in_words(Data(format="chat", path=tuple(paths)))
    assert told.startswith(f"data: {paths[0]}: Alpaca instructions; {paths[1]}: messages and ShareGPT conversations; ")
    assert f"{paths[2]}: nothing that can be used; " in told
    assert told.endswith("; 2 other entries")


def test_chats_where_texts_were_expected_say_so(tmp_path):
    encode = EncodeText(Data(), load_tokenizer(TOKENIZER).backend_tokenizer, None, 100)
    with pytest.raises(BadSample, match=r"'text' is missing among .* or data\.format = 'chat' for its ShareGPT conv"):
        encode({"conversations": SHAREGPT})
    with pytest.raises(BadSample, match=r"expected a string$"):
        encode({"body": "x"})
    with pytest.raises(BadSample, match=r"expected one of its fields, of which it has none, or 'conversations'"):
        read_layout({}, Data(format="chat"))
    table = pa.Table.from_pylist([{"question": "x"}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    data = Data(format="chat", path=(str(tmp_path / "a.parquet"),), tokenizer=TOKENIZER)
    with pytest.raises(
        UserError, match=r"'messages': expected one of question, or 'conversations', or 'instruction' and"
    ):
        open_samples(data, load_tokenizer(TOKENIZER), 100, 0)


def test_an_ambiguous_source_is_refused_in_one_line_that_names_the_key(tmp_path):
    path = write_as(tmp_path, "jsonl", [{"messages": [Q, A], "conversations": SHAREGPT}] * 3)
    with pytest.raises(
        UserError, match=r"line 1: has the fields of messages and sharegpt: expected data\.layout to be"
    ):
        open_samples(Data(format="chat", path=(path,)), load_tokenizer(TOKENIZER), 100, 0)
    data = Data(format="chat", path=(path,), layout="sharegpt", tokenizer=TOKENIZER)
    assert isinstance(open_samples(data, load_tokenizer(TOKENIZER), 100, 0).read(0).tokens, np.ndarray)
