"""The fields of messages: each is used, honoured under another name, named as ignored, or its sample is refused."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.options import Data
from data.messages import FIELDS
from data.packing import REASONS, BadSample
from data.samples import EncodeChat
from data.tokenizer import load_tokenizer
from models.ops.labels import IGNORED

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = load_tokenizer(str(ROOT / "data" / "tiny" / "tokenizer"))
TOKENIZER.chat_template = (Path(__file__).parent / "templates" / "qwen35_style.jinja").read_text()
ENCODER = EncodeChat(Data(format="chat"), TOKENIZER, 10_000)
QUESTION = {"role": "user", "content": "Hi?"}


def trained(*messages, tools=None):
    """The trained tokens, decoded."""
    sample = ENCODER({"messages": list(messages), "tools": tools})
    return TOKENIZER.decode(sample.labels[sample.labels != IGNORED].tolist())


def answer(content="Ho.", **fields):
    return {"role": "assistant", "content": content, **fields}


def refused(*messages):
    with pytest.raises(BadSample) as raised:
        ENCODER({"messages": list(messages)})
    return raised.value.reason, str(raised.value)


def test_the_documented_table_is_the_one_in_force():
    rows = re.findall(r"^\| (`.*`) \| (.*?) \|", (ROOT / "docs" / "data.md").read_text(), re.MULTILINE)
    documented = {name: words for names, words in rows for name in re.findall(r"`(\w+)`", names)}
    assert {field for field in FIELDS if field not in documented} == set()
    for kind, word in (("ignored", "ignored"), ("weight", "1 or 0"), ("passed on", "passed on")):
        assert all(word in documented[field] for field, of_field in FIELDS.items() if of_field == kind)
    assert set(REASONS) <= set(documented)


FLAGS = [field for field, kind in FIELDS.items() if kind.startswith("weight")]


@pytest.mark.parametrize("field", FLAGS)
@pytest.mark.parametrize(
    ("yes", "no"), [(True, False), (1, 0), (1.0, 0.0), ("true", "False"), ("1", "0"), ("Yes", "no")]
)
def test_flags_of_training_in_every_spelling(field, yes, no):
    if field == "masked":
        yes, no = no, yes
    turns = [QUESTION, answer("One."), QUESTION, answer("Two.", **{field: no})]
    assert trained(*turns) == "One.<|im_end|>"
    assert trained(*turns[:3], answer("Two.", **{field: yes})) == "One.<|im_end|>Two.<|im_end|>"
    assert trained({**QUESTION, field: no}, answer()) == "Ho.<|im_end|>"


@pytest.mark.parametrize("value", [0.5, 2, -1, "maybe", [1, 0], {"a": 1}])
@pytest.mark.parametrize("field", FLAGS)
def test_flags_that_are_neither(field, value):
    assert refused(QUESTION, answer(**{field: value})) == (
        "wrong_type", f"has message 1 with {field} {value!r}, expected 0 or 1",
    )  # fmt: skip


def test_flags_that_cannot_be_obeyed():
    assert refused(QUESTION, answer(train=True, weight=0))[1] == (
        "has message 1 whose train and weight contradict each other"
    )
    assert trained(QUESTION, answer(train=True, weight=1, masked=False)) == "Ho.<|im_end|>"
    for field in ("train", "loss", "trainable"):
        reason, message = refused({**QUESTION, field: True}, answer())
        assert (reason, message) == (
            "unused_field", f"has message 0 of user with {field}: only the assistant's train",
        )  # fmt: skip
    assert trained({**QUESTION, "weight": 1}, answer()) == "Ho.<|im_end|>"  # what it is if it is not given


def test_parts_that_are_texts_are_one_text():
    parts = [{"type": "text", "text": "A "}, "b", {"text": "c", "type": None, "image": None, "cache_control": {"a": 1}}]
    whole = ENCODER({"messages": [{"role": "user", "content": "A bc"}, answer("A bc")]})
    pieces = ENCODER({"messages": [{"role": "user", "content": parts}, answer(parts)]})
    assert pieces.tokens.tolist() == whole.tokens.tolist()
    assert pieces.labels.tolist() == whole.labels.tolist()


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "x", "video": "y"},
        {"type": "thinking", "thinking": "x"},
        {"type": "text", "text": 3},
        {"type": "text"},
        3,
        None,
        ["x"],
        {},
    ],
)
def test_parts_that_are_refused(part):
    assert refused({"role": "user", "content": ["x", part]}, answer())[0] == "unused_field"


def test_a_message_of_two_roles():
    assert refused({"from": "human", "role": "assistant", "value": "x"}, answer()) == (
        "wrong_type", "has message 0 from 'human' with the role 'assistant'",
    )  # fmt: skip
    assert trained({"from": "human", "role": "user", "value": "Hi."}, answer()) == "Ho.<|im_end|>"


def test_calls_of_functions_in_other_forms():
    expected = trained(
        QUESTION, answer("", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}])
    )
    for fields in (
        {"function_call": {"name": "f", "arguments": "{}"}},
        {"tool_calls": [{"name": "f", "arguments": ""}]},
        {"tool_calls": [{"name": "f", "arguments": "  "}]},
        {"tool_calls": [{"id": "3", "index": 0, "type": "function", "function": {"name": "f"}}]},
        {"tool_calls": [{"name": "f", "parameters": {}, "x": None, "y": []}]},
    ):
        assert trained(QUESTION, {"role": "assistant", **fields}) == expected


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tool_calls": [{"name": "f", "thought": "x"}]}, "unused_field"),
        ({"tool_calls": [{"function": {"name": "f", "thought": "x"}}]}, "unused_field"),
        ({"tool_calls": [{"function": {"name": "f"}, "arguments": {"a": 1}}]}, "unused_field"),
        ({"tool_calls": [{"function": {"name": "f"}, "name": "g"}]}, "unused_field"),
        ({"tool_calls": [{"name": "f", "arguments": {}, "parameters": {"a": 1}}]}, "unused_field"),
        ({"tool_calls": [{"name": "f"}], "function_call": {"name": "g"}}, "unused_field"),
        ({"tool_calls": [{"name": "f", "arguments": "[" * 100_000}]}, "wrong_type"),
        ({"tool_calls": [{"name": "f", "arguments": "{'a': 1}"}]}, "wrong_type"),
        *[({"tool_calls": [{"name": "f", "arguments": x}]}, "wrong_type") for x in ("0", "false", 0, False, '""', [1])],
        ({"tool_calls": [{"name": "f", "arguments": '{"a": 1, "b": 2, "a": 3}'}]}, "wrong_type"),
        ({"tool_calls": [3]}, "wrong_type"),
        ({"tool_calls": {"name": "f"}}, "wrong_type"),
        ({"function_call": "f"}, "wrong_type"),
        ({"reasoning": "a", "thinking": "b"}, "wrong_type"),
        ({"reasoning": ["a"]}, "wrong_type"),
    ],
)
def test_calls_and_reasoning_that_are_refused(fields, reason):
    assert refused(QUESTION, answer(**fields))[0] == reason


def test_reasoning_under_its_names():
    for name in ("reasoning_content", "reasoning", "thinking"):
        assert trained(QUESTION, answer(**{name: "So."})) == "So.\n</think>\n\nHo.<|im_end|>"
    twice = answer(reasoning="So.", reasoning_content="So.", thinking="")
    assert trained(QUESTION, twice) == "So.\n</think>\n\nHo.<|im_end|>"


def test_a_null_that_is_meant_is_trained_on():
    """Of JSON Lines; what tables add has gone when a message comes here."""
    call = {"name": "f", "arguments": {"a": None, "b": {"c": None}}}
    assert "<parameter=a>\nnull\n</parameter>\n<parameter=b>\n" + '{"c": null}' in trained(
        QUESTION, answer("", tool_calls=[call])
    )


def test_unknown_fields():
    for value in ("sad", 3, False, ["x"]):
        assert refused(QUESTION, answer(mood=value)) == (
            "unused_field", "has message 1 with 'mood', of which nothing is shown",
        )  # fmt: skip
    for value in (None, "", [], {}):
        assert trained(QUESTION, answer(mood=value)) == "Ho.<|im_end|>"
    tokenizer = load_tokenizer(TOKENIZER.name_or_path)
    tokenizer.chat_template = TOKENIZER.chat_template.replace('user\\n" ~', 'user\\n" ~ message.mood|default("") ~')
    encoder = EncodeChat(Data(format="chat"), tokenizer, 1000)
    sample = encoder({"messages": [{**QUESTION, "mood": "sad"}, answer()]})
    assert "user\nsadHi?" in tokenizer.decode(sample.tokens)


def test_ignored_fields_are_named_once():
    encoder = EncodeChat(Data(format="chat"), TOKENIZER, 1000)

    def note(**fields):
        return encoder({"messages": [QUESTION, answer(**fields)]}).note

    assert note() is None
    assert note(id="x", timestamp=3) == ("ignored_field", "has id, timestamp: ignored in all messages")
    assert note(id="x") is None
    assert note(model="m") == ("ignored_field", "has model: ignored in all messages")


# Any message: exactly as this independent reading says, or refused


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text("ab <\n", max_size=4),
    st.lists(st.text("ab", max_size=2), max_size=2), st.dictionaries(st.text("ab", max_size=1), st.none(), max_size=2),
)  # fmt: skip
FLAG = st.sampled_from([None, True, False, 0, 1, 0.0, 1.0, "", True, False, 0, 1, 0.5, [0, 1]])
LIKELY = {"weight": FLAG, "weight, the other way round": FLAG, "reasoning": st.none() | st.text("ab \n", max_size=5)}
OTHERS = [field for field in FIELDS if field not in ("role", "content", "tool_calls", "function_call")]
PLAIN = {
    "role": st.sampled_from(["assistant", "assistant", "user", "tool"]),
    "content": st.text("ab \n", min_size=1, max_size=5),
}
MESSAGES = st.lists(st.sampled_from([*OTHERS, "mood", "label"]), max_size=3, unique=True).flatmap(
    lambda fields: st.fixed_dictionaries(
        PLAIN | {field: LIKELY.get(FIELDS.get(field, ""), ANYTHING) for field in fields}
    )
)


def reading(message):
    """What a message says of its training, or None if it has to be refused. Another reading than the code's."""
    given = {field: value for field, value in message.items() if value is not None and value != "" and value != []}
    if {"mood", "label"} & {field for field, value in given.items() if value != {}}:
        return None
    thoughts = {given[name] for name in ("reasoning_content", "reasoning", "thinking") if name in given}
    opposite = {0: 1, 1: 0}
    flags = [given[name] for name in FLAGS if name in given and name != "masked"]
    if "masked" in given:
        flags.append(opposite.get(given["masked"], 0.5) if not isinstance(given["masked"], list) else 0.5)
    if len(thoughts) > 1 or not all(flag in (0, 1) for flag in flags) or {0, 1} <= set(flags):
        return None
    if message["role"] != "assistant":
        forced = any(given.get(name) == 1 for name in FLAGS if name not in ("weight", "masked"))
        return None if forced or given.get("masked") == 0 or any(text.strip() for text in thoughts) else False
    return not flags or bool(flags[0])


@settings(max_examples=400, deadline=None)
@given(st.lists(MESSAGES, min_size=1, max_size=4))
def test_random_fields_are_obeyed_or_refused(messages):
    messages = [QUESTION, *messages]
    readings = [reading(message) for message in messages]
    try:
        sample = ENCODER({"messages": messages})
    except BadSample as error:
        if error.reason in ("unused_field", "wrong_type"):
            assert None in readings
        return
    assert None not in readings
    expected = [message["content"].strip() + "<|im_end|>" for message, wanted in zip(messages, readings) if wanted]
    found = TOKENIZER.decode(sample.labels[sample.labels != IGNORED].tolist())
    for text in expected:  # in their order; reasoning may stand between them
        assert text in found
        found = found.partition(text)[2]
    assert np.sum(sample.labels == TOKENIZER.convert_tokens_to_ids("<|im_end|>")) == len(expected)
