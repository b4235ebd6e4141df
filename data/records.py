"""What a source is: records by their number."""

import bisect
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class TokenisedChat(NamedTuple):
    """A conversation's tokens, and which of them are trained on."""

    tokens: NDArray[np.unsignedinteger]
    is_trained: NDArray[np.bool_]
    cut_to: int | None = None
    """The length of a row for which first turns of longer ones were left out; None where all are whole."""


Record = dict[str, Any] | NDArray[np.unsignedinteger] | TokenisedChat
"""A document's fields, or, of a tokenised corpus, its tokens."""


def parse_json(text: str) -> Any:
    """What a text says, in objects where no field says two things: one would be lost. Raises ValueError."""
    return json.loads(text, object_pairs_hook=_table)


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        for name, value in pairs:
            if value != table[name]:
                raise ValueError(f"{name!r:.60} stands twice in an object, and says two things")
    return table


def part_of(index: int, starts: list[int]) -> tuple[int, int]:
    """Of parts that begin at `starts`: which one an index falls into, and its number there."""
    part = bisect.bisect_right(starts, index) - 1
    return part, index - starts[part]


@functools.cache
def mapped_numbers(path: Path) -> NDArray[np.int64]:
    """A file of int64, memory-mapped once in each process."""
    return np.memmap(path, "<i8", "r")


class Source(Protocol):
    """Records by their number. Small to pickle: a worker process opens the files itself."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...  # raises BadSample

    def where(self, index: int) -> str: ...  # the file and the line of a record

    def head(self) -> Iterator[tuple[str, Callable[[], Record]]]: ...  # where the first records are, and their reading


class Whole:
    """`head` of a source that is opened at no cost."""

    def head(self: Source) -> Iterator[tuple[str, Callable[[], Record]]]:
        for index in range(len(self)):
            yield self.where(index), functools.partial(self.__getitem__, index)
