"""Markers: where texts are found in a rendering, or that they are not; by renderings that are put together here."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.markers import CLOSE, OPEN, Field, locate, only_markers, plain_fields, with_markers, written

MESSAGES = [
    {"role": "user", "content": "Question?"},
    {"role": "assistant", "content": " Answer. ", "thought": "Hm."},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": {"x": "a b", "n": 1}}}],
    },
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "Adds.", "parameters": {}}}]


def mark(number):
    return f"{OPEN}{number}{CLOSE}"


def test_each_text_has_a_marker_and_nothing_is_changed_in_place():
    before = repr((MESSAGES, TOOLS))
    marked, tools, fields = with_markers(MESSAGES, TOOLS, 0.5, "thought")
    assert repr((MESSAGES, TOOLS)) == before
    assert marked[0]["content"] == f"Ques{mark(0)}tion?"
    assert marked[1] == {"role": "assistant", "content": mark(2), "thought": mark(1)}
    call = marked[2]["tool_calls"][0]["function"]
    assert call == {"name": mark(3), "arguments": {"x": f"a{mark(4)} b", "n": 1}}
    assert tools[0]["function"] == {"name": mark(5) + "f", "description": f"Ad{mark(6)}ds.", "parameters": {}}
    assert [field[:3] for field in fields] == [
        (0, "content", "Question?"),
        (1, "thought", "Hm."),
        (1, "content", " Answer. "),
        (2, "tool_call", "f"),
        (2, "tool_call", "a b"),
        (-1, "tools", "f"),
        (-1, "tools", "Adds."),
    ]
    assert [field.cut for field in fields] == [4, None, None, None, 1, 0, 2]


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, f" {mark(0)}ab "), (0.5, f" a{mark(0)}b "), (1.0, f" ab{mark(0)} ")]
)
def test_where_a_marker_is_put_into_a_text(share, expected):
    marked, _, _ = with_markers([{"role": "user", "content": " ab "}], None, share, "thought")
    assert marked[0]["content"] == expected


@given(
    st.lists(st.tuples(st.text("ab <\n", max_size=6), st.text("ab <\n", max_size=4)), min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from([str, str.strip, str.lstrip, str.rstrip]),
)
def test_texts_are_found_where_they_were_put(pairs, is_replaced, form):
    """Of texts that are shown whole or stripped, with anything between them."""
    texts = [text for text, _ in pairs]
    fields = [Field(n, "content", text, None if is_replaced else len(text) // 2) for n, text in enumerate(texts)]
    marked, rendered, places = "<", "<", []
    for (number, _, text, cut), (_, between) in zip(fields, pairs):
        shown = form(text) if is_replaced else text
        marked += (mark(number) if cut is None else text[:cut] + mark(number) + text[cut:]) + between
        places.append((number, len(rendered), len(rendered) + len(shown)))
        rendered += shown + between
    located = locate(rendered, marked, fields)
    if form is str or not is_replaced:  # stripped texts may fit in more than one way
        assert located is not None
    if located is not None:
        assert located.missing == []
        assert [place.message for place in located.places] == [number for number, _, _ in places]
        if is_replaced:
            for place, text in zip(located.places, texts):
                assert rendered[place.begin : place.end].strip() == text.strip()


@pytest.mark.parametrize("shown", [" a b ", "a b", "a b ", " a b"])
def test_a_text_may_be_shown_without_the_space_around_it(shown):
    located = locate(f"<{shown}>", f"<{mark(0)}>", [Field(0, "content", " a b ", None)])
    assert located is not None
    assert located.places == [(0, "content", 1, 1 + len(shown), False)]


def test_texts_that_were_changed_are_not_found_and_those_left_out_are_named():
    fields = [Field(0, "content", "Question?", None), Field(1, "content", "Answer.", None)]
    marked = f"U {mark(0)} A {mark(1)}<end>"
    assert locate("U Question? A Answer.<end>", marked, fields).places[1][2:4] == (14, 21)
    for rendered in ("U question? A Answer.<end>", "U Question? A Answer. <end>", "U Question? A Answer.<end>."):
        assert locate(rendered, marked, fields) is None
    assert locate("", marked, fields) is None
    located = locate("A Answer.<end>", f"A {mark(1)}<end>", fields)
    assert located.missing == [fields[0]]
    twice = locate("A Answer. Answer.", f"A {mark(1)} {mark(1)}", fields)
    assert [place.is_repeated for place in twice.places] == [False, True]


@pytest.mark.parametrize(
    ("before", "after", "is_found"),
    [
        ('a "', '<b"\n', True),
        ('a \\"', '<b\\"\\n', True),
        ('a \\"', '\\u003cb\\"\\n', True),
        ('a "', "<b", False),
        ("a \\u0022", "<b\\u0022\\n", False),
        ("A ", '<b"\n', False),
    ],
)
def test_a_cut_text_may_be_shown_as_in_json(before, after, is_found):
    """Of a text with a marker inside of it, what stands around the marker is compared in the forms of JSON too."""
    field = Field(0, "content", 'a "<b"\n', 3)
    located = locate(f"({before}{after})", f"({before}{mark(0)}{after})", [field])
    assert (located is not None) == is_found


def test_plain_messages_are_told_apart_by_all_but_their_texts():
    def beside(*messages):
        plain = plain_fields(list(messages), "thought")
        return plain and plain[1]

    user, other = {"role": "user", "content": "a"}, {"role": "user", "content": "b c"}
    assert beside(user) == beside(other)
    assert beside(user) is not None
    different = [
        beside(user),
        beside({"role": "user", "content": ""}),
        beside({"role": "user", "content": " "}),
        beside({"role": "system", "content": "a"}),
        beside({**user, "thought": "a"}),
        beside({**user, "thought": ""}),
        beside({"role": "user", "thought": "a", "content": ""}),
        beside(user, user),
    ]
    assert len(set(different)) == len(different)
    for more in ({"name": "x"}, {"tool_calls": []}, {"content": [{"type": "text", "text": "a"}]}):
        assert beside({**user, **more}) is None


def test_only_markers_replaces_each_text():
    messages = [*MESSAGES[:2], {"role": "user", "content": " "}]
    fields, _ = plain_fields(messages, "thought")
    kept = [dict(message) for message in messages]
    marked = only_markers(messages, fields)
    assert messages == kept
    kinds = {(field.message, field.kind): mark(number) for number, field in enumerate(fields)}
    assert kinds.keys() == {(0, "content"), (1, "content"), (1, "thought")}
    assert all(marked[number][kind] == text for (number, kind), text in kinds.items())
    assert marked[2] == messages[2]


def test_how_arguments_may_be_written():
    forms = list(written({"a<b": [1, None, {"c": True}], "d": "text"}))
    assert forms == [
        ("a<b", "a<b", "a\\u003cb"),
        ("1", "1"),
        ("null", "None"),
        ("c", "c", "c"),
        ("true", "True"),
        ("d", "d", "d"),
    ]
