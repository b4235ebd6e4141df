"""The messages of a chat: what each field that is met in the wild means here, and messages as templates take them."""

from typing import Any, NamedTuple

from data.layouts import ROLES, role_of
from data.media import Media, Source, kind_of_part
from data.packing import BadSample
from data.records import parse_json

Message = dict[str, Any]

FIELDS: dict[str, str] = {
    **dict.fromkeys(("role", "content", "tool_calls"), "used"),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "reasoning"),
    "function_call": "tool_calls",
    **dict.fromkeys(("name", "tool_call_id"), "passed on"),
    **dict.fromkeys(("weight", "train", "training", "trainable", "do_train"), "weight"),
    **dict.fromkeys(("loss", "loss_mask", "loss_weight", "loss_scale"), "weight"),
    "masked": "weight, the other way round",
    **dict.fromkeys(("id", "message_id", "uuid", "parent_id", "index", "metadata", "annotations"), "ignored"),
    **dict.fromkeys(("created", "created_at", "timestamp", "date", "model", "lang", "language"), "ignored"),
    **dict.fromkeys(("finish_reason", "stop_reason", "usage", "num_tokens", "token_count", "logprobs"), "ignored"),
    "cache_control": "ignored",
}
"""What becomes of a message's field. One that is not here must change the rendering, or its sample is refused; one that
is null or empty says nothing. docs/data.md has the same table."""

_FLAGS = {"true": 1, "yes": 1, "1": 1, "1.0": 1, "false": 0, "no": 0, "0": 0, "0.0": 0}
_SYSTEM = ("system", "developer")
_PART = ("type", "text", "cache_control", "annotations")


class Conversation(NamedTuple):
    """Messages with `content` as one string, or as parts, texts among images and videos, if it has any of these;
    reasoning under one name, and calls whose arguments are tables."""

    messages: list[Message]
    weights: dict[int, int]  # of each of the assistant's messages: 1 to train on it, or 0
    unknown: list[tuple[int, str]]  # message and name of fields that are not in FIELDS, still in `messages`
    ignored: set[str]  # names of fields that were left out


def read_messages(messages: Any, reasoning_key: str, media: Media) -> Conversation:
    """Messages in all the forms of FIELDS; reasoning goes by `reasoning_key`. Images and videos are collected in
    `media`, in order. Raises BadSample."""
    if not isinstance(messages, list) or not messages:
        raise BadSample("wrong_type" if messages else "empty", "has no messages: expected a list of them")
    read = Conversation([], {}, [], set())
    for number, message in enumerate(messages):
        read.messages.append(_read_message(_with_role(message, number), number, reasoning_key, read, media))
    return read


def _with_role(message: Any, number: int) -> Message:
    """A message with a `role` that templates know, with `content` instead of ShareGPT's `value`, and with the call that
    stands there in `tool_calls`."""
    given = message if isinstance(message, dict) else {}
    name = next((given[key] for key in ("role", "from") if given.get(key) is not None), None)
    if not isinstance(name, str):
        raise BadSample("wrong_type", f"has message {number} without a role")
    role = role_of(message)
    if role is None:
        raise BadSample("wrong_type", f"has message {number} from {name!r:.60}, expected {', '.join(ROLES)}")
    if role == message.get("role") and "value" not in message:
        return message
    sender = given.get("from") if given.get("role") is not None else None
    if role_of({"from": sender}) not in (None, role):  # it may be somebody's name
        raise BadSample("wrong_type", f"has message {number} from {sender!r:.60} with the role {name!r:.60}")
    given = {"role": role} | {key: value for key, value in message.items() if key not in ("role", "from")}
    if given.get("content") is None:
        given["content"] = given.pop("value", None)
    if name.lower() not in ("function_call", "tool_call"):
        return given
    try:
        calls = parse_json(given.pop("content"))
    except (TypeError, ValueError, RecursionError):
        raise BadSample("wrong_type", f"has message {number} from {name!r} whose value is not JSON") from None
    return {**given, "tool_calls": calls if isinstance(calls, list) else [calls]}


def _read_message(message: Message, number: int, reasoning_key: str, read: Conversation, media: Media) -> Message:
    out: Message = {}
    weights: dict[str, int] = {}
    for field, value in message.items():
        kind = FIELDS.get(field)
        if value is None or (kind not in ("used", "reasoning") and value in ("", [], {})):
            continue
        if kind == "weight":
            weights[field] = _flag(value, field, number)
        elif kind == "weight, the other way round":
            weights[field] = 1 - _flag(value, field, number)
        elif kind == "reasoning":
            if not isinstance(value, str):
                raise BadSample("wrong_type", f"has message {number} whose {field} is no string")
            if value and out.get(reasoning_key) and value != out[reasoning_key]:
                raise BadSample("wrong_type", f"has message {number} with two texts of reasoning, one in {field}")
            out[reasoning_key] = value or out.get(reasoning_key, "")
        elif kind == "tool_calls":
            if message.get("tool_calls"):
                raise BadSample("unused_field", f"has message {number} with {field} beside its tool_calls")
            out["tool_calls"] = [_read_call(value, number)]
        elif field == "content":
            out["content"] = _content(value, number, media, message.get("role") == "assistant")
        elif field == "tool_calls":
            if not isinstance(value, list):
                raise BadSample("wrong_type", f"has message {number} whose tool_calls are no list")
            if value:
                out["tool_calls"] = [_read_call(call, number) for call in value]
        elif kind == "ignored":
            read.ignored.add(field)
        else:
            out[field] = value
            if kind is None:
                read.unknown.append((number, field))
    if "content" not in out and "tool_calls" not in out:
        raise BadSample("wrong_type", f"has message {number} without content")
    content = out.setdefault("content", "")
    is_silent = isinstance(content, str) and not content.strip()
    if out["role"] == "assistant" and is_silent and not out.get("tool_calls") and not out.get(reasoning_key):
        raise BadSample("empty", f"has message {number} of the assistant that says nothing")
    if len(set(weights.values())) > 1:
        raise BadSample("wrong_type", f"has message {number} whose {' and '.join(weights)} contradict each other")
    if out["role"] == "assistant":
        read.weights[number] = min(weights.values(), default=1)
    elif asked := [field for field, weight in weights.items() if weight and field != "weight"]:  # 1 is its default
        role = out["role"]
        raise BadSample("unused_field", f"has message {number} of {role} with {asked[0]}: only the assistant's train")
    return out


def only_shows(message: Message) -> bool:
    """Whether a turn is images and videos alone, of which nothing can be trained on."""
    content = message["content"]
    is_silent = isinstance(content, list) and not any(part.get("text", "").strip() for part in content)
    return is_silent and message.keys() <= {"role", "content", "name"}


def later_turns(messages: list[Message]) -> list[int]:
    """Where a conversation may begin instead: at each message of the user's but the first."""
    users = [number for number, message in enumerate(messages) if message["role"] == "user"]
    after = [number for number in users if messages[number - 1]["role"] != "user"]  # several in a row are one turn
    return [number for number in after if number > users[0]]


def from_turn(
    read: Conversation, sources: list[Source], begin: int, tools: Any
) -> tuple[Conversation, Any, list[Source]]:
    """A conversation without what stands between its system prompt and message `begin`, with the rest of its tools,
    images and videos."""
    first = next(number for number, message in enumerate(read.messages) if message["role"] not in _SYSTEM)

    def num_media(messages: list[Message]) -> int:
        parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
        return sum(part["type"] != "text" for part in parts)

    kept = {number: number if number < first else number - begin + first for number in range(len(read.messages))}
    for number in range(first, begin):
        del kept[number]
    before, dropped = num_media(read.messages[:first]), num_media(read.messages[first:begin])
    shorter = Conversation(
        read.messages[:first] + read.messages[begin:],
        {kept[number]: weight for number, weight in read.weights.items() if number in kept},
        [(kept[number], field) for number, field in read.unknown if number in kept],
        read.ignored,
    )
    return shorter, tools, sources[:before] + sources[before + dropped :]


def _flag(value: Any, field: str, number: int) -> int:
    """Whether to train on a message, in any of the spellings of 0 and 1."""
    flag = _FLAGS.get(value.strip().lower()) if isinstance(value, str) else int(value) if value in (0, 1) else None
    if flag is None:
        raise BadSample("wrong_type", f"has message {number} with {field} {value!r:.60}, expected 0 or 1")
    return flag


def _content(content: Any, number: int, media: Media, is_answer: bool) -> str | list[dict[str, str]]:
    """A content: a string, or parts that are texts, end to end; with images or videos among them, parts as templates
    take them. These are collected in `media`."""
    if not isinstance(content, str | list):
        raise BadSample("wrong_type", f"has message {number} whose content is no string and no list of parts")
    parts: list[dict[str, str]] = []
    for part in [content] if isinstance(content, str) else content:
        given = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
        if kind := kind_of_part(given):
            parts.append({"type": media.in_part(given, kind).kind})
            continue
        text = part if isinstance(part, str) else given.get("text")
        if not isinstance(text, str) or given.get("type", "text") != "text":
            name = repr(given.get("type")) if given else type(part).__name__
            raise BadSample(
                "unused_field",
                f"has message {number} with a content part of type {name}, expected 'text', 'image' or 'video'",
            )
        if unknown := [key for key, value in given.items() if key not in _PART and value not in ("", [], {})]:
            raise BadSample("unused_field", f"has message {number} with a content part that has {unknown[0]!r:.60}")
        for piece in media.in_text(text, is_answer):
            if not isinstance(piece, str):
                parts.append({"type": piece.kind})
            elif parts and parts[-1]["type"] == "text":
                parts[-1] = {"type": "text", "text": parts[-1]["text"] + piece}
            else:
                parts.append({"type": "text", "text": piece})
    is_text = all(part["type"] == "text" for part in parts)
    return "".join(part["text"] for part in parts) if is_text else parts


def _read_call(call: Any, number: int) -> dict[str, Any]:
    """A tool call whose arguments are a table, as templates want it: many write them as a string of JSON."""
    is_wrapped = isinstance(call, dict) and "function" in call
    function = call["function"] if is_wrapped else call
    if not isinstance(function, dict) or not isinstance(name := function.get("name"), str) or not name.strip():
        raise BadSample("wrong_type", f"has message {number} with a tool call without a name")
    known = {"call": ("id", "type", "index", "function"), "function": ("name", "arguments", "parameters")}
    if not is_wrapped:
        known["call"] += known["function"]
    for fields, names in ((call, known["call"]), (function if is_wrapped else {}, known["function"])):
        for field, value in fields.items():
            if field not in names and value not in (None, "", [], {}):
                raise BadSample("unused_field", f"has message {number} with a tool call that has {field!r:.60}")
    given = [function[key] for key in ("arguments", "parameters") if function.get(key) is not None]
    if len(given) > 1:
        raise BadSample("unused_field", f"has message {number} with a tool call that has arguments and parameters")
    arguments = given[0] if given else {}
    try:
        if isinstance(arguments, str):
            arguments = parse_json(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        raise BadSample("wrong_type", f"has message {number} with a tool call whose arguments are not JSON") from None
    arguments = {} if arguments in (None, []) else arguments  # an empty table of Arrow's is a list
    if not isinstance(arguments, dict):
        raise BadSample(
            "wrong_type",
            f"has message {number} with a tool call whose arguments are {arguments!r:.60}: expected a table",
        )
    outer = call if is_wrapped else {"type": "function"}
    inner = {key: value for key, value in function.items() if key != "parameters"}
    return {**outer, "function": {**inner, "arguments": arguments}}
