"""Conversations: the tokenizer's own chat template renders them, and the assistant's turns are found in the result.

A template may drop, move, trim or add what it likes, so nothing is assumed about it. A second rendering, in which each
text of the conversation is replaced by a marker, shows where the texts went. Only if putting them back gives the first
rendering is the place of each known; and a turn of the assistant reaches from there to its end-of-turn token.
"""

import copy
import json
import re
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data.batch import Sample
from data.packing import BadSample
from errors import UserError

if TYPE_CHECKING:  # seconds to import, and of no use to workers that read text
    from transformers import PreTrainedTokenizerFast

Message = dict[str, Any]

# Markers are private-use characters, of which no text is made: an opening one, digits, a closing one.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"
_MARKER = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


class Place(NamedTuple):
    """Where the rendering shows a text of a message."""

    message: int
    kind: str  # "reasoning_content", "content" or "tool_call": the name in a call
    begin: int
    end: int


class ChatTemplate:
    """Renders conversations with a tokenizer's template, and knows what the template puts before an answer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", *, train_on: str, train_empty_thinking: bool) -> None:
        """Raises UserError for a tokenizer without a chat template."""
        if not tokenizer.chat_template:
            raise UserError(f"data.tokenizer = {tokenizer.name_or_path!r}: expected one with a chat template")
        self._tokenizer, self._train_on, self._train_empty_thinking = tokenizer, train_on, train_empty_thinking
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special = re.compile("|".join(map(re.escape, sorted(special | {_OPEN}, key=len, reverse=True))))
        try:
            self._learn_openings()
        except BadSample as error:
            raise UserError(f"data.tokenizer = {tokenizer.name_or_path!r}: its chat template fails: {error}") from None

    def sample(self, messages: list[Message], tools: Any) -> Sample:
        """The tokens of a conversation, of which the assistant's are trained on. Raises BadSample."""
        messages, weights = _checked(messages)
        if found := next((m for text in _texts([messages, tools]) for m in self._special.finditer(text)), None):
            raise BadSample("special_token", f"has the special token {found[0]!r} in a text")
        rendered, spans = self._spans(messages, tools)
        wanted = [number for number, weight in weights.items() if weight]
        if self._train_on == "last":
            wanted = [number for number in wanted if number == max(weights)]
        encoding = self._tokenizer.backend_tokenizer.encode(rendered, add_special_tokens=False)
        begins, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        tokens, is_trained = np.array(encoding.ids, np.int32), np.zeros(len(encoding.ids), bool)
        for begin, end in (spans[number] for number in wanted):
            inside = (begins >= begin) & (ends <= end) & (ends > begin)
            is_trained |= inside
            decoded = self._tokenizer.decode(tokens[inside].tolist(), clean_up_tokenization_spaces=False)
            if decoded != rendered[begin:end] and decoded != unicodedata.normalize("NFC", rendered[begin:end]):
                raise BadSample("unclear_spans", "has a token that lies across the border of a turn")
        if not is_trained[1:].any():
            raise BadSample("nothing_to_train", "has no turn of the assistant that is to be trained on")
        return Sample.of(tokens, is_trained)

    def _render(self, messages: list[Message], tools: Any = None, **options: Any) -> str:
        try:
            return str(self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options))
        except Exception as error:  # templates are programs of others: they raise whatever they like
            raise BadSample("template_error", f"is refused by the chat template: {error}") from None

    def _learn_openings(self) -> None:
        """What the template puts before an answer, and the token that ends one."""
        user, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
        prompts, openings = [], []
        asked = self._render([user])
        for options in ({}, {"enable_thinking": False}):
            prompt = self._render([user], add_generation_prompt=True, **options)
            prompts += [prompt[len(asked) :]] if prompt.startswith(asked) else []
        for conversation in ([user, answer], [user, answer, user, answer]):
            before, _, after = self._render(conversation).partition("!")
            openings += [before[len(asked) :]] if before.startswith(asked) else []
        end = self._special.match(after.lstrip())
        if end is None:
            raise BadSample("template_error", "no special token ends the assistant's turns")
        self._end_of_turn = end[0]
        self._prompt = prompts[0] if prompts else ""
        self._openings = sorted({text for text in prompts + openings if text}, key=len, reverse=True)  # longest first

    def _spans(self, messages: list[Message], tools: Any) -> tuple[str, dict[int, tuple[int, int]]]:
        """The rendering, and where in it each of the assistant's turns begins and ends."""
        rendered, messages = self._with_reasoning_apart(messages, tools)
        marked, fields = _with_markers(messages)
        pieces = _MARKER.split(self._render(marked, tools))  # text, number, text, number, ..., text
        if not rendered.startswith(pieces[0]):
            raise _unclear()
        places, position = [], len(pieces[0])  # in the rendering's order
        for number, following in zip(map(int, pieces[1::2]), pieces[2::2]):
            message, kind, text = fields[number]
            for shown in (text, text.strip(), text.lstrip(), text.rstrip()):
                if rendered.startswith(shown + following, position):
                    break
            else:
                raise _unclear()
            places.append(Place(message, kind, position, position + len(shown)))
            position += len(shown) + len(following)
        if position != len(rendered):
            raise _unclear()
        return rendered, {
            number: self._turn(rendered, places, number)
            for number, message in enumerate(messages)
            if message["role"] == "assistant"
        }

    def _turn(self, rendered: str, places: list[Place], number: int) -> tuple[int, int]:
        """Where the turn of message `number` begins and ends, its end-of-turn token included."""
        own = [index for index, place in enumerate(places) if place.message == number]
        if not own or own != list(range(own[0], own[-1] + 1)):
            raise _unclear()
        first, last = places[own[0]], places[own[-1]]
        previous = places[own[0] - 1].end if own[0] else 0
        following = places[own[-1] + 1].begin if own[-1] + 1 < len(places) else len(rendered)

        # The end: nothing but the rest of a tool call may stand before the token.
        end = rendered.find(self._end_of_turn, last.end, following)
        if end < 0 or (last.kind != "tool_call" and rendered[last.end : end].strip()):
            raise _unclear()
        end += len(self._end_of_turn)

        # The beginning: what the model is to write after the prompt for an answer. If it is not told what to think, the
        # empty thoughts before its answer are the template's, unless they are wanted.
        if first.kind == "reasoning_content":
            openings = [self._prompt]
        elif self._train_empty_thinking:
            openings = self._openings[::-1]
        elif first.kind == "tool_call":
            openings = self._openings
        else:
            return first.begin, end
        before = rendered[previous : first.begin]
        for opening in openings:
            if opening in before:
                return previous + before.rfind(opening) + len(opening), end
        if first.kind == "tool_call":
            raise _unclear()
        return first.begin, end

    def _with_reasoning_apart(self, messages: list[Message], tools: Any) -> tuple[str, list[Message]]:
        """The rendering, and messages that have it too, with reasoning that is written inside of a content apart."""
        rendered, apart = self._render(messages, tools), list(messages)
        for number, message in enumerate(messages):
            content = message.get("content") or ""
            if message["role"] == "assistant" and "</think>" in content and "reasoning_content" not in message:
                reasoning, _, answer = content.rpartition("</think>")
                reasoning = reasoning.rpartition("<think>")[2]
                apart[number] = {**message, "reasoning_content": reasoning.strip("\n"), "content": answer.lstrip("\n")}
        return rendered, apart if apart != messages and self._render(apart, tools) == rendered else messages


def _unclear() -> BadSample:
    return BadSample("unclear_spans", "has turns of the assistant that cannot be found in the chat template's output")


def _checked(messages: Any) -> tuple[list[Message], dict[int, int]]:
    """Messages as a template takes them, and the weights of the assistant's. Raises BadSample."""
    if not isinstance(messages, list) or not messages:
        raise BadSample("wrong_type" if messages else "empty", "has no messages: expected a list of them")
    checked, weights = [], {}
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadSample("wrong_type", f"has message {number} without a role")
        message = {key: value for key, value in message.items() if value is not None}  # Arrow fills up with None
        weight = message.pop("weight", 1)
        for key in ("content", "reasoning_content"):
            if not isinstance(message.get(key, ""), str):
                raise BadSample("wrong_type", f"has message {number} whose {key} is no string")
        if weight not in (0, 1):
            raise BadSample("wrong_type", f"has message {number} with weight {weight!r}, expected 0 or 1")
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list):
            raise BadSample("wrong_type", f"has message {number} whose tool_calls are no list")
        if calls:
            message["tool_calls"] = [_checked_call(call, number) for call in calls]
        elif "content" not in message:
            raise BadSample("wrong_type", f"has message {number} without content")
        message.setdefault("content", "")
        if message["role"] == "assistant":
            weights[number] = int(weight)
        checked.append(message)
    return checked, weights


def _checked_call(call: Any, number: int) -> dict[str, Any]:
    """A tool call whose arguments are a table, as templates want it: many write them as a string of JSON."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadSample("wrong_type", f"has message {number} with a tool call without a name")
    arguments = function.get("arguments", {})
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        raise BadSample("wrong_type", f"has message {number} with a tool call whose arguments are not JSON") from None
    outer = call if "function" in call else {"type": "function"}
    return {**outer, "function": {**function, "arguments": arguments}}


def _with_markers(messages: list[Message]) -> tuple[list[Message], list[tuple[int, str, str]]]:
    """Copies whose reasoning, content and names in tool calls are markers; and the message, kind and text of each."""
    fields: list[tuple[int, str, str]] = []

    def marker(number: int, kind: str, text: str) -> str:
        fields.append((number, kind, text))
        return f"{_OPEN}{len(fields) - 1}{_CLOSE}"

    marked = copy.deepcopy(messages)
    for number, message in enumerate(marked):
        for kind in ("reasoning_content", "content"):
            if message.get(kind, "").strip():
                message[kind] = marker(number, kind, message[kind])
        for call in message.get("tool_calls", []):
            function = call["function"]
            function["name"] = marker(number, "tool_call", function["name"])
    return marked, fields


def _texts(value: Any) -> Iterator[str]:
    """All strings in a structure, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts([*value.keys(), *value.values()])
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
