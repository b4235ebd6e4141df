"""Markers: what stands for the texts of a conversation in a second rendering, and shows where a template put them."""

import copy
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from data.messages import Message

# Markers are private-use characters, of which no text is made: an opening one, digits, a closing one.
OPEN, CLOSE = "\ue0f0", "\ue0f1"
_MARKER = re.compile(f"{OPEN}(\\d+){CLOSE}")


class Field(NamedTuple):
    """A text of a conversation, and how its marker stands for it."""

    message: int  # -1: of the tools
    kind: str  # "content", "tool_call", "tools" or the name of reasoning
    text: str
    cut: int | None  # where the marker was put into the text; None: it replaces the text


class Place(NamedTuple):
    """Where the rendering shows a text of a message, or, if its marker was put into it, a place in it."""

    message: int
    kind: str
    begin: int
    end: int
    is_repeated: bool  # it stands at an earlier place too


class Located(NamedTuple):
    """The texts in a rendering."""

    places: list[Place]  # in its own order
    missing: list[Field]  # that it does not show


def with_markers(
    messages: list[Message], tools: Any, share: float, reasoning: str
) -> tuple[list[Message], Any, list[Field]]:
    """Copies with a marker for each text, and the texts by the markers' numbers. The assistant's are replaced; into
    others the marker is put after this `share` of them. `reasoning`: the name of that."""
    fields: list[Field] = []

    def marker(number: int, kind: str, text: str, cut: int | None = None) -> str:
        fields.append(Field(number, kind, text, cut))
        return f"{OPEN}{len(fields) - 1}{CLOSE}"

    def insert(number: int, kind: str, text: str) -> str:
        if not text.strip():
            return text
        cut = len(text) - len(text.lstrip()) + int(len(text.strip()) * share)
        return text[:cut] + marker(number, kind, text, cut) + text[cut:]

    def insert_all(number: int, value: Any) -> Any:
        if isinstance(value, str):
            return insert(number, "tool_call", value)
        if isinstance(value, dict):
            return {key: insert_all(number, inner) for key, inner in value.items()}
        return [insert_all(number, inner) for inner in value] if isinstance(value, list) else value

    marked, marked_tools = copy.deepcopy(messages), copy.deepcopy(tools)
    for number, message in enumerate(marked):
        mark = marker if message["role"] == "assistant" else insert
        content = message["content"]
        parts = [(part, "text") for part in content] if isinstance(content, list) else [(message, "content")]
        for kind, holder, key in [(reasoning, message, reasoning), *(("content", *p) for p in parts)]:
            if holder.get(key, "").strip():
                holder[key] = mark(number, kind, holder[key])
        for call in message.get("tool_calls", []):
            function = call["function"]
            function["name"] = marker(number, "tool_call", function["name"])
            function["arguments"] = insert_all(number, function["arguments"])
    for tool in marked_tools or []:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        for key in ("name", "description"):
            if isinstance(function, dict) and isinstance(function.get(key), str):
                function[key] = insert(-1, "tools", function[key])
    return marked, marked_tools, fields


def plain_fields(messages: list[Message], reasoning: str) -> tuple[list[Field], tuple[object, ...]] | None:
    """The texts of messages that have nothing else, each to be replaced, and all that such messages have beside them:
    for equal ones a template writes the same around the texts, unless it looks at these. None for other messages."""
    fields, beside = list[Field](), list[object]()
    for number, message in enumerate(messages):
        beside.append(message["role"])
        for key, text in message.items():
            if key in ("content", reasoning) and isinstance(text, str):
                is_text = bool(text.strip())
                fields += [Field(number, key, text, None)] * is_text
                beside.append((key, None if is_text else text))
            elif key != "role":
                return None
    return fields, tuple(beside)


def only_markers(messages: list[Message], fields: list[Field]) -> list[Message]:
    """Copies in which each of the texts is a marker."""
    marked = [dict(message) for message in messages]
    for place, (number, kind, _, _) in enumerate(fields):
        marked[number][kind] = f"{OPEN}{place}{CLOSE}"
    return marked


def locate(rendered: str, marked: str, fields: list[Field]) -> Located | None:
    """Where the rendering shows the texts; None if the texts in the place of the markers do not make it."""
    pieces = _MARKER.split(marked)  # text, number, text, number, ..., text
    if not rendered.startswith(pieces[0]):
        return None
    places, position, numbers = [], len(pieces[0]), set[int]()
    for number, following in zip(map(int, pieces[1::2]), pieces[2::2]):
        message, kind, text, cut = fields[number]
        for shown in (text, text.strip(), text.lstrip(), text.rstrip()) if cut is None else ("",):
            if rendered.startswith(shown + following, position):
                break
        else:
            return None
        if cut is not None and not any(
            rendered.endswith(before.lstrip(), 0, position) and rendered.startswith(after.rstrip(), position)
            for before, after in zip(_forms(text[:cut]), _forms(text[cut:]))
        ):
            return None
        places.append(Place(message, kind, position, position + len(shown), number in numbers))
        numbers.add(number)
        position += len(shown) + len(following)
    missing = [field for number, field in enumerate(fields) if number not in numbers]
    return Located(places, missing) if position == len(rendered) else None


def _forms(text: str) -> tuple[str, ...]:
    """A text as it may be shown: itself, or as in JSON, where some templates escape <, >, & and the apostrophe."""
    inside = json.dumps(text, ensure_ascii=False)[1:-1]
    escaped = inside
    for character in "<>&'":
        escaped = escaped.replace(character, f"\\u{ord(character):04x}")
    return text, inside, escaped


def written(arguments: Any) -> Iterator[tuple[str, ...]]:
    """The forms in which names and values of arguments may be shown, but for strings: these have markers."""
    if isinstance(arguments, dict):
        for key, value in arguments.items():
            yield _forms(key)
            yield from written(value)
    elif isinstance(arguments, list):
        for value in arguments:
            yield from written(value)
    elif not isinstance(arguments, str):
        yield json.dumps(arguments), str(arguments)
