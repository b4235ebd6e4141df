"""A chat template: renders conversations within bounds of time and size, and is tried out for what it does."""

import contextlib
import functools
import json
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from data.markers import OPEN, Located, locate, only_markers, plain_fields
from data.messages import Message
from data.packing import BadSample
from errors import UserError

if TYPE_CHECKING:  # seconds to import, and of no use to workers that read text
    from transformers import PreTrainedTokenizerFast

_NO_THOUGHTS_END = re.compile(r"<think>\s*</think>\s*$")
_RENDER_SECONDS = 5.0  # of processor time, of which a long conversation takes a hundredth
_MAX_TIMEOUTS = 3
_MAX_RENDERING = 1 << 26  # characters
_MOST_OUTLINES = 4096  # of a few messages each
_MOST_OPTIONS = 64  # of samples' own, that are remembered
_NOT_OPTIONS = {
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict", "role"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs", "self", "content", "message"),
}
"""What stands in templates and is no option of theirs, or is an argument of the function that renders."""


_GENERATION = re.compile(r"{%-?\s*(end)?generation\s*-?%}")  # a tag of transformers alone


@functools.lru_cache(maxsize=16)
def _read_by(template: str) -> set[str]:
    """The names that a template reads without having set them; none of one that cannot be parsed."""
    import jinja2.meta

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return jinja2.meta.find_undeclared_variables(environment.parse(_GENERATION.sub("", template)))
    except jinja2.TemplateSyntaxError:
        return set()


class Learnt(NamedTuple):
    """What a template does with conversations, found by trying it."""

    reasoning: str = "reasoning_content"  # the name that it knows
    shows_reasoning: bool = False
    calls_are_texts: bool = False  # it wants arguments as JSON, not as a table
    prompt: str = ""  # what it puts before an answer
    openings: tuple[str, ...] = ()  # more of these, the longest first
    ends: tuple[str, ...] = ()  # special tokens that end answers, as a model writes them; the usual one first
    other_ends: tuple[str, ...] = ()  # those that stand there in earlier turns, and that no model writes


class Template:
    """A tokenizer's template, or one of the user's, with the options of a run and of the sample at hand."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerFast", options: dict[str, Any] | None, template: str | None
    ) -> None:
        """`template`: instead of the tokenizer's. Raises UserError for one that cannot be used."""
        template = template or tokenizer.chat_template
        if not template:
            raise UserError(
                f"data.tokenizer = {tokenizer.name_or_path!r}: expected one with a chat template, or data.chat_template"
            )
        self._tokenizer, self._text = tokenizer, template
        self._num_timeouts = 0
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.special = re.compile("|".join(map(re.escape, sorted(special | {OPEN}, key=len, reverse=True))))
        """Special tokens of the tokenizer."""
        if wrong := self.unusable(options or {}):
            raise UserError(f"data.template_options.{wrong}")
        self._run_options = self._options = options or {}
        self._all_learnt: dict[str, Learnt] = {}  # by a sample's own options
        self._outlines: dict[tuple[object, ...], str | None] = {}
        try:
            self.use({})
        except BadSample as error:
            raise UserError(f"data.tokenizer = {tokenizer.name_or_path!r}: its chat template fails: {error}") from None

    def render(self, messages: list[Message], tools: Any = None, **options: Any) -> str:
        try:
            with _time_limit(_RENDER_SECONDS):
                text = self._tokenizer.apply_chat_template(
                    self._as_wanted(messages),
                    tools=tools,
                    tokenize=False,
                    chat_template=self._text,
                    **{**self._options, **options},
                )
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

    def unusable(self, options: dict[str, Any]) -> str | None:
        """The option that no template can have, or this one does not read, and what would be accepted."""
        templates = self._text.values() if isinstance(self._text, dict) else [self._text]
        for name, value in options.items():
            if name in _NOT_OPTIONS:
                return f"{name} = {value!r:.60}: expected an option of the chat template"
            if not any(name in _read_by(template) for template in templates):
                return f"{name} = {value!r:.60}: the chat template does not read it: expected an option that it reads"
        return None

    def use(self, own: dict[str, Any]) -> None:
        """Renders with a sample's own options from now on."""
        self._options = self._run_options | own
        self._key = key = json.dumps(own, sort_keys=True, default=str) if own else ""
        if key not in self._all_learnt:
            if len(self._all_learnt) >= _MOST_OPTIONS:
                self._all_learnt.clear()
            self.learnt = Learnt()
            self._all_learnt[key] = self._learn()
        self.learnt = self._all_learnt[key]

    def locate(self, rendered: str, messages: list[Message]) -> Located | None:
        """Where a rendering without tools shows the texts of its messages, if these are plain: by what the template
        wrote around the texts of such messages before. None if that does not fit."""
        plain = plain_fields(messages, self.learnt.reasoning)
        if plain is None:
            return None
        fields, beside = plain
        key = (self._key, *beside)
        if key not in self._outlines:
            if len(self._outlines) >= _MOST_OUTLINES:
                self._outlines.clear()
            self._outlines[key] = None
            with contextlib.suppress(BadSample):
                self._outlines[key] = self.render(only_markers(messages, fields))
        outline = self._outlines[key]
        return None if outline is None else locate(rendered, outline, fields)

    def _learn(self) -> Learnt:
        """What the template puts before an answer, and the tokens that end one."""
        user, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
        prompts, openings, ends = [], [], []
        asked = self.render([user])
        reasoning, shows_reasoning = "reasoning_content", False
        for name in ("reasoning_content", "reasoning", "thinking"):
            with contextlib.suppress(BadSample):
                if OPEN in self.render([user, {**answer, name: OPEN}]):
                    reasoning, shows_reasoning = name, True
                    break
        for options in ({}, {"enable_thinking": False}):
            prompt = self.render([user], add_generation_prompt=True, **options)
            prompts += [prompt[len(asked) :]] if prompt.startswith(asked) else []
        for conversation in ([user, answer], [user, answer, user, answer]):
            before, _, after = self.render(conversation).partition("!")
            opening = before[len(asked) :] if before.startswith(asked) else ""
            # What stands behind the prompt is the model's to write, but for empty thoughts.
            is_longer = any(prompt and opening.startswith(prompt) for prompt in prompts)
            openings += [opening] if not is_longer or _NO_THOUGHTS_END.search(opening) else []
            ends += [end[0]] if (end := self.special.match(after.lstrip())) else [""]
        last, earlier = ends
        if not last:
            raise BadSample("template_error", "no special token ends the assistant's turns")
        # A token that ends the user's turns too is an end; any other may begin the next turn.
        others = [earlier] if earlier != last and asked.rpartition("?")[2].lstrip().startswith(earlier or "?") else []
        calls_are_texts, call_end = self._learn_calls(user)
        ends = list(dict.fromkeys([last, *([call_end] if call_end not in ("", *others) else [])]))
        return Learnt(
            reasoning,
            shows_reasoning,
            calls_are_texts,
            prompts[0] if prompts else "",
            tuple(sorted({text for text in prompts + openings if text}, key=len, reverse=True)),
            tuple(ends),
            tuple(others),
        )

    def _learn_calls(self, user: Message) -> tuple[bool, str]:
        """Whether arguments are to be given as JSON, and the token that ends a turn with a call, or ""."""
        arguments = {"x": "y"}
        for are_texts in (False, True):
            function = {"name": "f", "arguments": json.dumps(arguments) if are_texts else arguments}
            call = {"id": "abcdefghi", "type": "function", "function": function}
            with contextlib.suppress(BadSample):
                rendered = self.render([user, {"role": "assistant", "content": "", "tool_calls": [call]}])
                if str(arguments) not in rendered:  # as Python writes a table
                    ends = self.special.findall(rendered)
                    return are_texts, ends[-1] if ends and rendered.rstrip().endswith(ends[-1]) else ""
        return False, ""

    def _as_wanted(self, messages: list[Message]) -> list[Message]:
        """Messages with arguments of calls as the template takes them."""
        if not self.learnt.calls_are_texts:
            return messages

        def as_text(call: dict[str, Any]) -> dict[str, Any]:
            arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            return {**call, "function": {**call["function"], "arguments": arguments}}

        return [
            {**each, "tool_calls": list(map(as_text, each["tool_calls"]))} if "tool_calls" in each else each
            for each in messages
        ]


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
