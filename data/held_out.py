"""The share of the data that is held out for validation: by a hash of what a sample says, and of nothing else.

So a sample stays on its side whatever file, format or order it comes in, whichever others are added, and whatever the
seed is; equal samples are on one side; and a larger share holds out the same samples and more.
"""

import functools
import hashlib
import json
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from config.options import Config, Data
from data.files import cached, files_of
from data.layouts import read_layout
from data.media import Media, has_media, media_keys
from data.messages import Message, read_messages
from data.packing import BadSample
from data.records import Record, Source, TokenisedChat, mapped_numbers
from errors import UserError


class Side(NamedTuple):
    """Which samples of the data a loader reads: those that are held out, or all others."""

    share: float = 0.0
    is_held_out: bool = False

    @classmethod
    def of(cls, config: Config, is_held_out: bool = False) -> "Side":
        """Of a run's training, or of its validation."""
        return cls(config.validation.share if config.validation.enable else 0.0, is_held_out)


ALL = Side()
_CONVERSATIONS = (
    *("conversations", "system"),  # ShareGPT
    *("instruction", "input", "output", "history"),  # Alpaca
    *("prompt", "completion"),
)
"""The fields in which conversations stand, beside `data.messages_key`. Their order is part of the hash."""


class Part:
    """Some records of a source. Small to pickle, as the source is."""

    def __init__(self, source: Source, numbers: Path, begin: int, end: int) -> None:
        """`numbers`: a file of int64, of which those from `begin` to `end` are the records' numbers in `source`."""
        self._source, self._numbers, self._begin, self._end = source, numbers, begin, end

    def __len__(self) -> int:
        return self._end - self._begin

    def __getitem__(self, index: int) -> Record:
        return self._source[self._number(index)]

    def where(self, index: int) -> str:
        return self._source.where(self._number(index))

    def head(self) -> Iterator[tuple[str, Callable[[], Record]]]:
        for index in range(len(self)):
            yield self.where(index), functools.partial(self.__getitem__, index)

    def _number(self, index: int) -> int:
        return int(mapped_numbers(self._numbers)[self._begin + index])


def split(source: Source, entry: str, data: Data, side: Side) -> Source:
    """One side of the source that `entry` of `data.path` names. The first time, all its records are read once; which
    are held out is kept in the cache, as long as its files do not change."""
    if not side.share or not len(source):
        return source

    def make(path: Path) -> None:
        numbers = (array("q"), array("q"))
        for number in range(len(source)):
            numbers[_is_held_out(source, number, data, side.share)].append(number)
        kept, held_out = numbers
        with open(path, "wb") as file:
            for part in (array("q", [len(held_out)]), held_out, kept):
                file.write(np.array(part, "<i8").tobytes())

    what = json.dumps(["held out, by what is read", side.share, ends_of(source, data), _keys(data)])
    path = cached([str(file) for file in files_of(entry, data.split)], what, ".sides", make)
    num_held_out = int(mapped_numbers(path)[0])
    begin, end = (1, 1 + num_held_out) if side.is_held_out else (1 + num_held_out, 1 + len(source))
    return Part(source, path, begin, end)


def ends_of(source: Source, data: Data) -> tuple[int, float | None, float | None]:
    """What stands for a source whose files cannot be compared, of the Hub say: its size, first and last record."""
    return len(source), _place(source, 0, data), _place(source, len(source) - 1, data)


def _is_held_out(source: Source, number: int, data: Data, share: float) -> bool:
    place = _place(source, number, data)
    return place is not None and place < share


def _place(source: Source, number: int, data: Data) -> float | None:
    """Where a record stands between 0 and 1, by its hash; None for one that cannot be read, which training tells."""
    try:
        return place_of(source[number], data)
    except (BadSample, RecursionError):
        return None
    except OSError as error:
        raise UserError(f"{source.where(number)} cannot be read: {error.strerror or error}") from error
    except Exception:  # what else it may raise, `data.samples.read_sample` makes a BadSample of
        return None


def place_of(record: Record, data: Data) -> float:
    """A number from 0 to below 1, the same for all records that say the same: by what training reads of it, whatever
    else it holds, or by all of it where that is nothing."""
    if isinstance(record, dict):
        # What is absent, null or empty is left out: a key that is known here one day moves no record that lacks it.
        parts = [part for each in _said(record, data) if (part := _canonical(each)) not in (None, "", [])]
        content = json.dumps(parts or _canonical(record), sort_keys=True, default=_plain).encode()
    else:
        tokens = record.tokens if isinstance(record, TokenisedChat) else record
        content = tokens.astype("<u4").tobytes()
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53  # as many bits as a float has


def _said(record: dict[str, Any], data: Data) -> list[Any]:
    """What a record says, in any layout; of a conversation that cannot be read, which training tells, its fields."""
    if data.format == "text":
        return [record.get(key) for key in (_keys(data) if has_media(record, data) else [data.text_key])]
    try:
        chat, media = read_layout(record, data), Media(record, data)
        messages = read_messages(chat.messages, "reasoning_content", media).messages
        return [[_without_ids(message) for message in messages], chat.tools, [each.value for each in media.finish()]]
    except BadSample:
        return [record.get(key) for key in _keys(data)]


def _without_ids(message: Message) -> Message:
    """A message without what was drawn for it, as the numbers of tool calls, and without an empty content."""
    out = {key: value for key, value in message.items() if key != "tool_call_id" and value != ""}
    if "tool_calls" in out:
        functions = [call["function"] for call in out["tool_calls"]]
        out["tool_calls"] = [[function["name"], function["arguments"]] for function in functions]
    return out


def _keys(data: Data) -> list[str]:
    """The fields of a record that a sample is made of."""
    own = [data.text_key] if data.format == "text" else [data.messages_key, *_CONVERSATIONS, data.tools_key]
    return list(dict.fromkeys([*own, *(key for keys in media_keys(data).values() for key in keys)]))


def _canonical(value: Any) -> Any:
    """The same in tables, which give each row all fields of any, and in JSON; and where a field holds JSON."""
    if isinstance(value, dict):
        return {key: _canonical(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_canonical(inner) for inner in value]
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            return _canonical(json.loads(value))
        except ValueError:
            return value
    return value


def _plain(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)
