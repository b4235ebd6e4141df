"""Conversations: the tokenizer's own chat template renders them, and the assistant's turns are found in the result.

A template may drop, move, trim or add what it likes, so nothing is assumed about it. A second rendering, in which each
text of the assistant is replaced by a marker and a marker is put into each other text, shows where the texts went. Only
if putting them back gives the first rendering is the place of each known; a turn of the assistant reaches from there to
its end-of-turn token; and what the conversation says but the rendering does not is found missing.
"""

import functools
import json
import re
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from config.options import Data
from data.batch import Sample
from data.layouts import OPTIONS_KEY
from data.markers import Field, Located, Place, locate, with_markers, written
from data.media import Media, MediaReader, Source, moved, show_all
from data.messages import Conversation, Message, from_turn, later_turns, only_shows, read_messages
from data.packing import BadSample
from data.template import Template
from data.tokenizer import load_tokenizer, template_in

if TYPE_CHECKING:  # seconds to import, and of no use to workers that read text
    from transformers import PreTrainedTokenizerFast

_NO_THOUGHTS = re.compile(r"\s*<think>\s*</think>\s*")
_SURROGATE = re.compile("[\ud800-\udfff]")


class ChatTemplate:
    """Renders conversations with a tokenizer's template, and knows what the template puts before an answer."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        reader: MediaReader | None = None,
        *,
        train_on: str,
        train_empty_thinking: bool,
        options: dict[str, Any] | None = None,
        template: str | None = None,
    ) -> None:
        """`reader`: of images and videos. `options`: of the template, for all samples. `template`: instead of the
        tokenizer's. Raises UserError for a tokenizer without a chat template."""
        self._template = Template(tokenizer, options, template)
        self._tokenizer, self._reader = tokenizer, reader
        self._train_on, self._train_empty_thinking = train_on, train_empty_thinking
        self.ignored = set[str]()
        """Names of fields of messages that were left out so far."""
        self.ends = self._template.learnt.ends
        """The special tokens that end an answer."""

    def sample(
        self,
        messages: list[Message],
        tools: Any,
        media: Media | None = None,
        options: dict[str, Any] | None = None,
        max_tokens: int | None = None,
    ) -> Sample:
        """The tokens of a conversation, of which the assistant's are trained on. `media`: the images and videos that
        the record has beside it. `options`: of the template, for this sample. With `max_tokens`, of a longer one the
        first turns are left out, if that is enough. Raises BadSample."""
        if wrong := self._template.unusable(options or {}):
            raise BadSample("unused_field", f"has {OPTIONS_KEY} with {wrong}")
        self._template.use(options or {})
        media = media or Media({}, Data())
        read = read_messages(messages, self._template.learnt.reasoning, media)
        sources = media.finish()
        for text in texts_in([read.messages, tools, options or {}]):
            if found := self._template.special.search(text):
                raise BadSample("special_token", f"has the special token {found[0]!r} in a text")
            if _SURROGATE.search(text):
                raise BadSample("undecodable", "has half a surrogate pair in a text")
        self.ignored |= read.ignored
        sample = self._encode(read, tools, sources)
        if max_tokens is not None and len(sample.tokens) > max_tokens:
            sample = self._without_first_turns(sample, read, tools, sources, max_tokens)
        if not sample.is_trained[1:].any():
            raise BadSample("nothing_to_train", "has no turn of the assistant that is to be trained on")
        return sample

    def _without_first_turns(
        self, sample: Sample, read: Conversation, tools: Any, sources: list[Source], max_tokens: int
    ) -> Sample:
        """The sample from the first turn of the user's on from which it is short enough; as it is if there is none."""
        places, shorter = later_turns(read.messages), None
        low, high = 0, len(places)
        while low < high:
            middle = (low + high) // 2
            tried = self._encode(*from_turn(read, sources, places[middle], tools))
            if len(tried.tokens) <= max_tokens:
                high, shorter = middle, tried
            else:
                low = middle + 1
        if shorter is None:
            return sample
        message = f"has {len(sample.tokens)} tokens, more than the {max_tokens} of a row"
        return shorter._replace(note=("truncated", f"{message}: its first {low + 1} turn{'s' * (low > 0)} left out"))

    def _encode(self, read: Conversation, tools: Any, sources: list[Source]) -> Sample:
        messages = read.messages
        reader = self._reader
        if sources:
            reader, shown = show_all(sources, reader)
            # Says so of a template that knows of texts alone.
            reader.replace(self._template.render(messages, tools), shown)
        rendered, spans = self._spans(messages, tools)
        for number, field in read.unknown:
            without = [dict(message) for message in messages]
            del without[number][field]
            if self._template.render(without, tools) == rendered:
                raise BadSample("unused_field", f"has message {number} with {field!r:.60}, of which nothing is shown")
        wanted = [number for number, weight in read.weights.items() if weight]
        if self._train_on == "last":
            wanted = [number for number in wanted if number == max(read.weights)]
        if sources and reader:
            rendered, ranges, moves = reader.replace(rendered, shown)
            spans = {number: (moved(begin, moves), moved(end, moves)) for number, (begin, end) in spans.items()}
        encoding = self._tokenizer.backend_tokenizer.encode(rendered, add_special_tokens=False)
        begins, ends = offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        tokens, is_trained = np.array(encoding.ids, np.int32), np.zeros(len(encoding.ids), bool)
        for begin, end in (spans[number] for number in wanted if number in spans):
            inside = (begins >= begin) & (ends <= end) & (ends > begin)
            is_trained |= inside
            decoded = self._tokenizer.backend_tokenizer.decode(tokens[inside].tolist(), skip_special_tokens=False)
            if decoded != rendered[begin:end] and decoded != unicodedata.normalize("NFC", rendered[begin:end]):
                raise BadSample("unclear_spans", "has a token that lies across the border of a turn")
        if sources and reader:
            return reader.sample(tokens, offsets, is_trained, ranges, shown)
        return Sample(tokens, is_trained)

    def _spans(self, messages: list[Message], tools: Any) -> tuple[str, dict[int, tuple[int, int]]]:
        """The rendering, and where in it each of the assistant's turns begins and ends. Raises BadSample."""
        rendered, messages = self._with_reasoning_apart(messages, tools)
        places, missing = self._locate(rendered, messages, tools)
        self._check_shown(messages, missing)
        spans = {
            number: self._turn(rendered, places, number, messages, tools)
            for number, message in enumerate(messages)
            if message["role"] == "assistant" and not only_shows(message)
        }
        for number, message in enumerate(messages):
            begin, end = spans.get(number, (0, len(rendered)))
            for call in message.get("tool_calls", []):
                for forms in written(call["function"]["arguments"]):
                    if not any(form in rendered[begin:end] for form in forms):
                        raise BadSample(
                            "unrendered", f"has message {number} of whose tool call the template leaves out {forms[0]}"
                        )
        return rendered, spans

    def _locate(self, rendered: str, messages: list[Message], tools: Any) -> Located:
        """Where the texts are. Raises BadSample."""
        if not tools and (located := self._template.locate(rendered, messages)):
            return located
        # A template may look at how a text begins or ends, so at first the markers stand in the middle.
        for share in (0.5, 1.0, 0.0):
            marked, marked_tools, fields = with_markers(messages, tools, share, self._template.learnt.reasoning)
            if located := locate(rendered, self._template.render(marked, marked_tools), fields):
                return located
        raise _unclear()

    def _check_shown(self, messages: list[Message], missing: list[Field]) -> None:
        """Raises BadSample for texts that the rendering does not show. Reasoning before a question of the user's may be
        left out: templates show it only where it led to the present answer."""
        last_user = max((number for number, message in enumerate(messages) if message["role"] == "user"), default=-1)
        for number, kind, text, _ in missing:
            is_earlier = 0 <= number < last_user and messages[number]["role"] == "assistant"
            if not (kind == self._template.learnt.reasoning and self._template.learnt.shows_reasoning and is_earlier):
                whose = f"message {number} whose {kind}" if number >= 0 else "tools of which"
                raise BadSample("unrendered", f"has {whose} the chat template leaves out: {text!r:.60}")

    def _turn(
        self, rendered: str, places: list[Place], number: int, messages: list[Message], tools: Any
    ) -> tuple[int, int]:
        """Where the turn of message `number` begins and ends, its end-of-turn token included."""
        learnt = self._template.learnt
        every = (*learnt.ends, *learnt.other_ends)
        own = [index for index, place in enumerate(places) if place.message == number]
        # The name of a tool may stand in the answer to its call as well.
        while own and places[own[-1]].is_repeated:
            between = rendered[places[own[-1] - 1].end : places[own[-1]].begin]
            if not any(end in between for end in every):
                break
            own.pop()
        if not own or own != list(range(own[0], own[-1] + 1)):
            raise _unclear()
        first, last = places[own[0]], places[own[-1]]
        previous = places[own[0] - 1].end if own[0] else 0
        following = places[own[-1] + 1].begin if own[-1] + 1 < len(places) else len(rendered)

        # The end: nothing but the rest of a tool call may stand before the token. The model stops at its first.
        found = [(place, end) for end in every if (place := rendered.find(end, last.end, following)) >= 0]
        if not found or any(rendered.find(end, first.begin, last.end) >= 0 for end in learnt.ends):
            raise _unclear()
        end, token = min(found)
        rest = rendered[last.end : end]
        rest = self._reader.without_placeholders(rest) if self._reader else rest
        if last.kind != "tool_call" and rest.strip():
            raise _unclear()
        end += len(token) if token in learnt.ends else 0

        # The beginning: what the model is to write after the prompt for an answer. If it is not told what to think, the
        # empty thoughts before its answer are the template's, unless they are wanted.
        openings = learnt.openings[::-1] if self._train_empty_thinking else learnt.openings
        if first.kind == learnt.reasoning:
            openings = (learnt.prompt,)
        before = rendered[previous : first.begin]
        for opening in openings:
            if opening in before:
                begin = previous + before.rfind(opening) + len(opening)
                if not self._train_empty_thinking and _NO_THOUGHTS.fullmatch(rendered, begin, first.begin):
                    begin = first.begin
                return begin, end
        if first.kind != "tool_call":
            return first.begin, end
        # A template that puts nothing before an answer, but something before a call.
        prompt = self._template.render(messages[:number], tools, add_generation_prompt=True) if number else ""
        if not prompt or not rendered.startswith(prompt) or not previous <= len(prompt) <= first.begin:
            raise _unclear()
        return len(prompt), end

    def _with_reasoning_apart(self, messages: list[Message], tools: Any) -> tuple[str, list[Message]]:
        """The rendering, and messages that have it too, with reasoning that is written inside of a content apart."""
        rendered, apart, name = self._template.render(messages, tools), list(messages), self._template.learnt.reasoning
        for number, message in enumerate(messages):
            content = message["content"] if isinstance(message["content"], str) else ""
            if message["role"] == "assistant" and name not in message and (parts := _reasoning_in(content)):
                apart[number] = {**message, name: parts[0].strip("\n"), "content": parts[1].lstrip("\n")}
        return rendered, apart if apart != messages and self._template.render(apart, tools) == rendered else messages


def _reasoning_in(content: str) -> tuple[str, str] | None:
    """The one reasoning with which a content begins, and the answer: between tags, or, as what follows a prompt that
    opened it, up to a closing tag that a line begins or ends with. None where anything stands before."""
    head, tag, answer = content.partition("</think>")
    before, opening, reasoning = head.rpartition("<think>")
    if not tag or before.strip() or "</think>" in answer:
        return None
    ends_a_line = reasoning.rstrip(" ")[-1:] in ("\n", "") or answer.lstrip(" ")[:1] == "\n"
    return (reasoning, answer) if opening or ends_a_line else None


@functools.cache
def _end_ids(folder: str, template_file: str, options: str) -> list[int]:
    tokenizer = load_tokenizer(folder)
    template = ChatTemplate(
        tokenizer,
        train_on="all",
        train_empty_thinking=False,
        options=json.loads(options),
        template=template_in(template_file),
    )
    ids = map(tokenizer.backend_tokenizer.token_to_id, template.ends)
    return [number for number in ids if number is not None]  # all of them: they are special tokens of it


def end_of_turn_ids(folder: str, data: Data) -> list[int]:
    """The tokens that end the assistant's turns in the template of the tokenizer in `folder`, or in the one that `data`
    names. Raises UserError."""
    return _end_ids(folder, data.chat_template, json.dumps(data.template_options, sort_keys=True))


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
