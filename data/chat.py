"""Conversations: the tokenizer's own chat template renders them, and the assistant's turns are found in the result.

A template may drop, move, trim or add what it likes, so nothing is assumed about it. A second rendering, in which each
text of the assistant is replaced by a marker and a marker is put into each other text, shows where the texts went. Only
if putting them back gives the first rendering is the place of each known; a turn of the assistant reaches from there to
its end-of-turn token; and what the conversation says but the rendering does not is found missing.
"""

import copy
import functools
import json
import re
import signal
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from config.options import Data
from data.batch import Sample
from data.media import Media, MediaReader, moved, show_all
from data.messages import Message, only_shows, read_messages
from data.packing import BadSample
from data.tokenizer import load_tokenizer
from errors import UserError
from models.ops.labels import IGNORED

if TYPE_CHECKING:  # seconds to import, and of no use to workers that read text
    from transformers import PreTrainedTokenizerFast

# Markers are private-use characters, of which no text is made: an opening one, digits, a closing one.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"
_MARKER = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_NO_THOUGHTS = re.compile(r"\s*<think>\s*</think>\s*")
_SURROGATE = re.compile("[\ud800-\udfff]")

_RENDER_SECONDS = 5.0  # of processor time, of which a long conversation takes a hundredth
_MAX_TIMEOUTS = 3
_MAX_RENDERING = 1 << 26  # characters


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


class ChatTemplate:
    """Renders conversations with a tokenizer's template, and knows what the template puts before an answer."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        reader: MediaReader | None = None,
        *,
        train_on: str,
        train_empty_thinking: bool,
    ) -> None:
        """`reader`: of images and videos. Raises UserError for a tokenizer without a chat template."""
        if not tokenizer.chat_template:
            raise UserError(f"data.tokenizer = {tokenizer.name_or_path!r}: expected one with a chat template")
        self._tokenizer, self._reader = tokenizer, reader
        self._train_on, self._train_empty_thinking = train_on, train_empty_thinking
        self._num_timeouts = 0
        self._reasoning, self._shows_reasoning = "reasoning_content", False  # the name that the template knows, if any
        self.end_of_turn = ""
        """The special token that ends an answer."""
        self.ignored = set[str]()
        """Names of fields of messages that were left out so far."""
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special = re.compile("|".join(map(re.escape, sorted(special | {_OPEN}, key=len, reverse=True))))
        try:
            self._learn_openings()
        except BadSample as error:
            raise UserError(f"data.tokenizer = {tokenizer.name_or_path!r}: its chat template fails: {error}") from None

    def sample(self, messages: list[Message], tools: Any, media: Media | None = None) -> Sample:
        """The tokens of a conversation, of which the assistant's are trained on. `media`: the images and videos that
        the record has beside it. Raises BadSample."""
        media = media or Media({}, Data())
        messages, weights, unknown, ignored = read_messages(messages, self._reasoning, media)
        sources = media.finish()
        for text in texts_in([messages, tools]):
            if found := self._special.search(text):
                raise BadSample("special_token", f"has the special token {found[0]!r} in a text")
            if _SURROGATE.search(text):
                raise BadSample("undecodable", "has half a surrogate pair in a text")
        reader = self._reader
        if sources:
            reader, shown = show_all(sources, reader)
            reader.replace(self._render(messages, tools), shown)  # says so of a template that knows of texts alone
        rendered, spans = self._spans(messages, tools)
        for number, field in unknown:
            without = [dict(message) for message in messages]
            del without[number][field]
            if self._render(without, tools) == rendered:
                raise BadSample("unused_field", f"has message {number} with {field!r:.60}, of which nothing is shown")
        self.ignored |= ignored
        wanted = [number for number, weight in weights.items() if weight]
        if self._train_on == "last":
            wanted = [number for number in wanted if number == max(weights)]
        if sources and reader:
            rendered, ranges, moves = reader.replace(rendered, shown)
            spans = {number: (moved(begin, moves), moved(end, moves)) for number, (begin, end) in spans.items()}
        encoding = self._tokenizer.backend_tokenizer.encode(rendered, add_special_tokens=False)
        begins, ends = offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        tokens, is_trained = np.array(encoding.ids, np.int32), np.zeros(len(encoding.ids), bool)
        for begin, end in (spans[number] for number in wanted if number in spans):
            inside = (begins >= begin) & (ends <= end) & (ends > begin)
            is_trained |= inside
            decoded = self._tokenizer.decode(tokens[inside].tolist(), clean_up_tokenization_spaces=False)
            if decoded != rendered[begin:end] and decoded != unicodedata.normalize("NFC", rendered[begin:end]):
                raise BadSample("unclear_spans", "has a token that lies across the border of a turn")
        if sources and reader:
            sample = reader.sample(tokens, offsets, is_trained, ranges, shown)
        else:
            sample = Sample.of(tokens, is_trained)
        if (sample.labels == IGNORED).all():
            raise BadSample("nothing_to_train", "has no turn of the assistant that is to be trained on")
        return sample

    def _render(self, messages: list[Message], tools: Any = None, **options: Any) -> str:
        try:
            with _time_limit(_RENDER_SECONDS):
                text = self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)
        except TimeoutError:
            self._num_timeouts += 1
            if self._num_timeouts > _MAX_TIMEOUTS:
                raise UserError(
                    f"data.tokenizer = {self._tokenizer.name_or_path!r}: its chat template took more than "
                    f"{_RENDER_SECONDS:g} s for each of {self._num_timeouts} conversations: expected one that ends"
                ) from None
            raise BadSample("template_error", f"takes the chat template more than {_RENDER_SECONDS:g} s") from None
        except Exception as error:  # templates are programs of others: they raise whatever they like
            raise BadSample("template_error", f"is refused by the chat template: {error}") from None
        if not isinstance(text, str) or len(text) > _MAX_RENDERING:
            raise BadSample("template_error", f"is rendered as more than {_MAX_RENDERING:,} characters")
        return text

    def _learn_openings(self) -> None:
        """What the template puts before an answer, and the token that ends one."""
        user, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
        prompts, openings = [], []
        asked = self._render([user])
        for name in ("reasoning_content", "reasoning", "thinking"):
            try:
                if _OPEN in self._render([user, {**answer, name: _OPEN}]):
                    self._reasoning, self._shows_reasoning = name, True
                    break
            except BadSample:
                continue
        for options in ({}, {"enable_thinking": False}):
            prompt = self._render([user], add_generation_prompt=True, **options)
            prompts += [prompt[len(asked) :]] if prompt.startswith(asked) else []
        for conversation in ([user, answer], [user, answer, user, answer]):
            before, _, after = self._render(conversation).partition("!")
            openings += [before[len(asked) :]] if before.startswith(asked) else []
        end = self._special.match(after.lstrip())
        if end is None:
            raise BadSample("template_error", "no special token ends the assistant's turns")
        self.end_of_turn = end[0]
        self._prompt = prompts[0] if prompts else ""
        self._openings = sorted({text for text in prompts + openings if text}, key=len, reverse=True)  # longest first

    def _spans(self, messages: list[Message], tools: Any) -> tuple[str, dict[int, tuple[int, int]]]:
        """The rendering, and where in it each of the assistant's turns begins and ends. Raises BadSample."""
        rendered, messages = self._with_reasoning_apart(messages, tools)
        # A template may look at how a text begins or ends, so at first the markers stand in the middle.
        for share in (0.5, 1.0, 0.0):
            marked, marked_tools, fields = self._with_markers(messages, tools, share)
            located = _locate(rendered, self._render(marked, marked_tools), fields)
            if located is not None:
                break
        else:
            raise _unclear()
        places, shown = located
        self._check_shown(messages, [field for number, field in enumerate(fields) if number not in shown])
        spans = {
            number: self._turn(rendered, places, number)
            for number, message in enumerate(messages)
            if message["role"] == "assistant" and not only_shows(message)
        }
        for number, message in enumerate(messages):
            begin, end = spans.get(number, (0, len(rendered)))
            for call in message.get("tool_calls", []):
                for forms in _written(call["function"]["arguments"]):
                    if not any(form in rendered[begin:end] for form in forms):
                        raise BadSample(
                            "unrendered", f"has message {number} of whose tool call the template leaves out {forms[0]}"
                        )
        return rendered, spans

    def _check_shown(self, messages: list[Message], missing: list[Field]) -> None:
        """Raises BadSample for texts that the rendering does not show. Reasoning before a question of the user's may be
        left out: templates show it only where it led to the present answer."""
        last_user = max((number for number, message in enumerate(messages) if message["role"] == "user"), default=-1)
        for number, kind, text, _ in missing:
            is_earlier = 0 <= number < last_user and messages[number]["role"] == "assistant"
            if not (kind == self._reasoning and self._shows_reasoning and is_earlier):
                whose = f"message {number} whose {kind}" if number >= 0 else "tools of which"
                raise BadSample("unrendered", f"has {whose} the chat template leaves out: {text!r:.60}")

    def _turn(self, rendered: str, places: list[Place], number: int) -> tuple[int, int]:
        """Where the turn of message `number` begins and ends, its end-of-turn token included."""
        own = [index for index, place in enumerate(places) if place.message == number]
        if not own or own != list(range(own[0], own[-1] + 1)):
            raise _unclear()
        first, last = places[own[0]], places[own[-1]]
        previous = places[own[0] - 1].end if own[0] else 0
        following = places[own[-1] + 1].begin if own[-1] + 1 < len(places) else len(rendered)

        # The end: nothing but the rest of a tool call may stand before the token.
        end = rendered.find(self.end_of_turn, last.end, following)
        rest = rendered[last.end : max(end, last.end)]
        rest = self._reader.without_placeholders(rest) if self._reader else rest
        if end < 0 or (last.kind != "tool_call" and rest.strip()):
            raise _unclear()
        end += len(self.end_of_turn)

        # The beginning: what the model is to write after the prompt for an answer. If it is not told what to think, the
        # empty thoughts before its answer are the template's, unless they are wanted.
        if first.kind == self._reasoning:
            openings = [self._prompt]
        else:
            openings = self._openings[::-1] if self._train_empty_thinking else self._openings
        before = rendered[previous : first.begin]
        for opening in openings:
            if opening in before:
                begin = previous + before.rfind(opening) + len(opening)
                if not self._train_empty_thinking and _NO_THOUGHTS.fullmatch(rendered, begin, first.begin):
                    begin = first.begin
                return begin, end
        if first.kind == "tool_call":
            raise _unclear()
        return first.begin, end

    def _with_reasoning_apart(self, messages: list[Message], tools: Any) -> tuple[str, list[Message]]:
        """The rendering, and messages that have it too, with reasoning that is written inside of a content apart."""
        rendered, apart = self._render(messages, tools), list(messages)
        for number, message in enumerate(messages):
            content = message["content"] if isinstance(message["content"], str) else ""
            if message["role"] == "assistant" and "</think>" in content and self._reasoning not in message:
                reasoning, _, answer = content.rpartition("</think>")
                reasoning = reasoning.rpartition("<think>")[2]
                apart[number] = {**message, self._reasoning: reasoning.strip("\n"), "content": answer.lstrip("\n")}
        return rendered, apart if apart != messages and self._render(apart, tools) == rendered else messages

    def _with_markers(
        self, messages: list[Message], tools: Any, share: float
    ) -> tuple[list[Message], Any, list[Field]]:
        """Copies with a marker for each text, and the texts by the markers' numbers. The assistant's are replaced; into
        others the marker is put after this `share` of them."""
        fields: list[Field] = []

        def marker(number: int, kind: str, text: str, cut: int | None = None) -> str:
            fields.append(Field(number, kind, text, cut))
            return f"{_OPEN}{len(fields) - 1}{_CLOSE}"

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
            for kind, holder, key in [(self._reasoning, message, self._reasoning), *(("content", *p) for p in parts)]:
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


@functools.cache
def end_of_turn_id(folder: str) -> int:
    """The token that ends the assistant's turns in the template of the tokenizer in `folder`. Raises UserError."""
    tokenizer = load_tokenizer(folder)
    template = ChatTemplate(tokenizer, train_on="all", train_empty_thinking=False)
    number = tokenizer.backend_tokenizer.token_to_id(template.end_of_turn)
    assert number is not None  # it is one of the tokenizer's special tokens
    return number


def _locate(rendered: str, marked: str, fields: list[Field]) -> tuple[list[Place], set[int]] | None:
    """Where the rendering shows the texts, in its own order, and the numbers of those that it shows; None if the texts
    in the place of the markers do not make it."""
    pieces = _MARKER.split(marked)  # text, number, text, number, ..., text
    if not rendered.startswith(pieces[0]):
        return None
    places, position = [], len(pieces[0])
    numbers = list(map(int, pieces[1::2]))
    for number, following in zip(numbers, pieces[2::2]):
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
        places.append(Place(message, kind, position, position + len(shown)))
        position += len(shown) + len(following)
    return (places, set(numbers)) if position == len(rendered) else None


def _forms(text: str) -> tuple[str, ...]:
    """A text as it may be shown: itself, or as in JSON, where some templates escape <, >, & and the apostrophe."""
    inside = json.dumps(text, ensure_ascii=False)[1:-1]
    escaped = inside
    for character in "<>&'":
        escaped = escaped.replace(character, f"\\u{ord(character):04x}")
    return text, inside, escaped


def _written(arguments: Any) -> Iterator[tuple[str, ...]]:
    """The forms in which names and values of arguments may be shown, but for strings: these have markers."""
    if isinstance(arguments, dict):
        for key, value in arguments.items():
            yield _forms(key)
            yield from _written(value)
    elif isinstance(arguments, list):
        for value in arguments:
            yield from _written(value)
    elif not isinstance(arguments, str):
        yield json.dumps(arguments), str(arguments)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError inside when this process has computed for so long, if this is its main thread, as in workers.

    Processor time, so that a machine that is busy or asleep refuses nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _unclear() -> BadSample:
    return BadSample("unclear_spans", "has turns of the assistant that cannot be found in the chat template's output")


def texts_in(value: Any) -> Iterator[str]:
    """All strings in a structure, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from texts_in([*value.keys(), *value.values()])
    elif isinstance(value, list):
        for inner in value:
            yield from texts_in(inner)
