"""The layouts in which people write conversations: which of them a record has, told by its fields; one form of all.

    messages           {"messages": [{"role": ..., "content": ...}, ...]}
    sharegpt           {"conversations": [{"from": ..., "value": ...}, ...]}
    alpaca             {"instruction": ..., "input": ..., "output": ..., "history": [[question, answer], ...]}
    prompt_completion  {"prompt": ..., "completion": ...}, each a text or a list of messages

Lists and tables may stand as the JSON of themselves, as in CSV files.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from config.options import Data
from data.packing import BadSample
from data.records import parse_json

OPTIONS_KEY = "chat_template_kwargs"
"""The field with a sample's own options of the chat template, as TRL reads it."""
_MEANT = {
    "messages": "messages",
    "sharegpt": "ShareGPT conversations",
    "alpaca": "Alpaca instructions",
    "prompt_completion": "prompts and completions",
}


ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),  # the value is the call, as JSON
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response", "function"), "tool"),
    "system": "system",
}
"""The names of those who speak, in "from" or "role", in any case of letters, as roles of templates."""
_ANSWERS_OF_TWO = ("chosen", "rejected", "rejected_response", "rejected_messages")
_LABELS = ("label", "kto_tag")
_IS_GOOD = {"label": ("true", "false"), "kto_tag": ("true", "false", "1", "0", "1.0", "0.0")}  # a label may be a class
_UNREAD = {"system_prompt": "system_key", "system_message": "system_key", "functions": "tools_key"}
"""Fields that belong to a conversation if they are there, and the option that has to name them."""


class Chat(NamedTuple):
    """A record of any layout."""

    messages: Any  # a list for data/messages.py to read
    tools: list[Any] | None
    options: dict[str, Any]  # of the chat template, over those of the run


def fields_of(data: Data) -> dict[str, tuple[str, ...]]:
    """Of each layout that may be met, the fields that a record must have."""
    fields = {
        "messages": (data.messages_key,),
        "sharegpt": ("conversations",),
        "alpaca": ("instruction", "output"),
        "prompt_completion": ("prompt", "completion"),
    }
    if data.layout != "auto":
        return {data.layout: fields[data.layout]}
    # A key that was set says which.
    return fields if _is_open(data) else {"messages": fields["messages"]}


def optional_fields(data: Data) -> list[str]:
    """What else a conversation may have."""
    preferences = (*_ANSWERS_OF_TWO, *_LABELS) if _is_open(data) else ()
    return [data.tools_key, data.system_key, OPTIONS_KEY, "input", "history", *_UNREAD, *preferences]


def _is_open(data: Data) -> bool:
    """Whether no option says where the conversations are."""
    return data.layout == "auto" and data.messages_key == Data.messages_key


def preferences_refused(found: Iterable[str]) -> str:
    """What to say of fields with which answers are compared."""
    return (
        f"has {' and '.join(found)}: preferences, as for DPO and KTO, which are not trained on: expected "
        "data.messages_key or data.layout to name the answers to train on"
    )


def preferences_in(fields: Iterable[str]) -> list[str]:
    """Those of some fields that hold a better and a worse answer."""
    return [field for field in fields if field in _ANSWERS_OF_TWO]


def layout_of(record: dict[str, Any], data: Data) -> str:
    """The one layout whose fields a record has. Raises BadSample for none, and for more than one: these may say
    different things."""
    known = fields_of(data)
    fits = [layout for layout, fields in known.items() if all(record.get(field) is not None for field in fields)]
    fits = fits or [layout for layout, fields in known.items() if all(field in record for field in fields)]
    # A table of several layouts may fill up with empty texts and lists.
    fits = [layout for layout in fits if any(record[field] not in ("", []) for field in known[layout])] or fits
    if _is_open(data):
        compared = preferences_in(field for field, value in record.items() if value)
        labels = [field for field in _LABELS if str(record.get(field)).lower() in _IS_GOOD[field]] if fits else []
        if compared or labels:
            raise BadSample("wrong_type", preferences_refused(compared + labels))
    if len(fits) > 1:
        raise BadSample(
            "wrong_type",
            f"has the fields of {' and '.join(fits)}: expected data.layout to be one of them",
        )
    if fits:
        return fits[0]
    given = ", ".join(record) or "its fields, of which it has none"
    others = [" and ".join(map(repr, fields)) for fields in known.values()][1:]
    hint = f", or {', or '.join(others)}" if others else ""
    if isinstance(record.get(data.text_key), str):
        hint += f"; for the documents in {data.text_key!r}: data.format = 'text'"
    if data.layout not in ("auto", "messages"):
        raise BadSample(
            "wrong_type", f"data.layout = {data.layout!r}: expected {' and '.join(*known.values())}, found {given}"
        )
    raise BadSample("wrong_type", f"data.messages_key = {data.messages_key!r}: expected one of {given}{hint}")


def in_words(record: Any, data: Data) -> str:
    """What a record is, for people. Raises BadSample."""
    if not isinstance(record, dict):
        return "tokens"
    return f"texts in {data.text_key!r}" if data.format == "text" else _MEANT[layout_of(record, data)]


def read_layout(record: dict[str, Any], data: Data) -> Chat:
    """A conversation as messages. Raises BadSample."""
    layout = layout_of(record, data)
    if layout in ("messages", "sharegpt"):
        (field,) = fields_of(data)[layout]
        messages = _messages(record[field], field)
    elif layout == "alpaca":
        messages = _alpaca(record)
    else:
        messages = _prompt(record["prompt"]) + _completion(record["completion"])
    if system := record.get(data.system_key):
        messages = _with_system(messages, system, data.system_key)
    for field, key in _UNREAD.items():
        if record.get(field) and field != getattr(data, key) and record[field] != _system_of(messages):
            raise BadSample("unused_field", f"has {field!r}, which is not read: expected data.{key} = {field!r}")
    tools = _from_json(record.get(data.tools_key), data.tools_key) or None
    if not isinstance(tools, list | None):
        raise BadSample("wrong_type", f"has {data.tools_key} that are no list")
    tools = tools and [_from_json(tool, data.tools_key) for tool in tools]
    options = _from_json(record.get(OPTIONS_KEY), OPTIONS_KEY) or {}
    if not isinstance(options, dict):
        raise BadSample("wrong_type", f"has {OPTIONS_KEY} {options!r:.60}, expected a table of options")
    return Chat(messages, tools, options)


def _from_json(value: Any, field: str) -> Any:
    """A value that may stand as the JSON of itself."""
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return parse_json(value)
    except (ValueError, RecursionError) as error:
        raise BadSample("wrong_type", f"has {field} that are not JSON: {error}") from None


def _messages(value: Any, field: str) -> Any:
    """A list of messages, also one that `datasets` turned into a table of lists."""
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value)
        except (ValueError, RecursionError):
            raise BadSample("wrong_type", f"has no messages: expected a list in {field!r}, or its JSON") from None
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) > 1:
            raise BadSample("wrong_type", f"has {field} that are a table of lists of different lengths")
        return [dict(zip(value, row)) for row in zip(*value.values())]
    return value


def _text(record: dict[str, Any], field: str) -> str:
    text = record.get(field)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise BadSample("wrong_type", f"has {field} {text!r:.60}, expected a string")
    return text


def _alpaca(record: dict[str, Any]) -> list[Any]:
    """The instruction, with its input on the next line, after the turns of the history."""
    history = _from_json(record.get("history"), "history") or []
    if not isinstance(history, list):
        raise BadSample("wrong_type", f"has history {history!r:.60}, expected a list of [question, answer]")
    messages = []
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadSample("wrong_type", f"has history with {pair!r:.60}, expected [question, answer]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = "\n".join(text for text in (_text(record, "instruction"), _text(record, "input")) if text)
    answer = _text(record, "output")
    for field, text in (("instruction", question), ("output", answer)):
        if not text.strip():
            raise BadSample("empty", f"has an empty {field}")
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _prompt(value: Any) -> list[Any]:
    """What is asked: nothing in it is trained on."""
    messages = _side(value, "prompt", "user")
    return [{**message, "weight": 0} if _is_answer(message) else message for message in messages]


def _completion(value: Any) -> list[Any]:
    messages = _side(value, "completion", "assistant")
    if not any(map(_is_answer, messages)):
        raise BadSample("nothing_to_train", "has a completion without a message of the assistant")
    return messages


def _side(value: Any, field: str, role: str) -> list[Any]:
    """A text as one message of `role`; a list of messages, or the JSON of one, as it is."""
    if isinstance(value, str):
        try:
            parsed = parse_json(value) if value.lstrip().startswith("[") else None
        except (ValueError, RecursionError):
            parsed = None
        is_list = isinstance(parsed, list) and bool(parsed)
        if not is_list or not all(isinstance(each, dict) and each.keys() & {"role", "from"} for each in parsed or []):
            if not value.strip():
                raise BadSample("empty", f"has an empty {field}")
            return [{"role": role, "content": value}]
        value = parsed
    messages = _messages(value, field)
    if messages == []:
        raise BadSample("empty", f"has an empty {field}")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadSample("wrong_type", f"has {field} {value!r:.60}, expected a string or a list of messages")
    return messages


def role_of(message: dict[str, Any]) -> str | None:
    """The role of a message, in the names of templates; None if it has none, or is from somebody unknown. What else
    a "role" may be is the template's to know."""
    if isinstance(role := message.get("role"), str):
        return ROLES.get(role.lower(), role)
    return ROLES.get(sender.lower()) if isinstance(sender := message.get("from"), str) else None


def _is_answer(message: dict[str, Any]) -> bool:
    return role_of(message) == "assistant"


def _system_of(messages: Any) -> Any:
    """What the first message says, if it is one of system."""
    first = messages[0] if isinstance(messages, list) and messages else None
    if not isinstance(first, dict) or role_of(first) != "system":
        return None
    return first.get("content", first.get("value"))


def _with_system(messages: Any, system: Any, field: str) -> Any:
    """Messages that begin with the text of a field of its own."""
    if not isinstance(system, str):
        raise BadSample("wrong_type", f"has {field} {system!r:.60}, expected a string")
    if not isinstance(messages, list) or not messages or not system.strip():
        return messages
    said = _system_of(messages)
    if said not in (None, system):
        raise BadSample("wrong_type", f"has {field} beside a message of system that says something else")
    return messages if said == system else [{"role": "system", "content": system}, *messages]
