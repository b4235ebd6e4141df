"""Packing: a slot lays the documents of its share end to end and cuts the stream into rows. Nothing is padded."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IGNORED = -100  # the label of a token after which nothing is trained


class Cursor(NamedTuple):
    """Where a slot stands. The next row begins with token `offset` of sample `sample`."""

    sample: int
    """Number in the endless stream of epochs: sample v is document `permutation of epoch v // N` (v % N)."""
    offset: int


class Row(NamedTuple):
    """`sequence_length` tokens of one slot, S below."""

    tokens: NDArray[np.int32]  # [S]
    labels: NDArray[np.int32]  # [S], the token that follows in the same document, or IGNORED
    lengths: list[int]  # of the documents; their sum is S
    cursor: Cursor  # after this row


class Slot:
    """Reads every `stride`-th sample from `cursor` on, and packs them into rows.

    A document that the row's end cuts goes on in the next row as a document of its own. Its last token before the cut
    has a label nevertheless: the token after the cut. So in an epoch each token but a document's first is a label once.
    """

    def __init__(
        self, read: Callable[[int], NDArray[np.int32]], cursor: Cursor, stride: int, max_empty_documents: int
    ) -> None:
        """`read(v)`: all tokens of sample v. Documents without any are passed over, but at most `max_empty_documents`
        in a row."""
        self._read, self._stride, self._max_empty_documents = read, stride, max_empty_documents
        self._sample, self._offset = cursor
        self._document = np.empty(0, np.int32)  # the tokens of the sample at the cursor, read when they are needed
        self._is_read = False

    def next_row(self, sequence_length: int) -> Row:
        """Raises ValueError where `read` does, for too many empty documents, and for a cursor of other data."""
        tokens = np.empty(sequence_length, np.int32)
        labels = np.full(sequence_length, IGNORED, np.int32)
        lengths: list[int] = []
        start, num_empty = 0, 0
        while start < sequence_length:
            document = self._current_document()
            num_tokens = min(len(document) - self._offset, sequence_length - start)
            if num_tokens:
                end = self._offset + num_tokens
                tokens[start : start + num_tokens] = document[self._offset : end]
                targets = document[self._offset + 1 : end + 1]  # one fewer where the document ends
                labels[start : start + len(targets)] = targets
                lengths.append(num_tokens)
                start, self._offset, num_empty = start + num_tokens, end, 0
            else:
                num_empty += 1
                if num_empty > self._max_empty_documents:
                    raise ValueError(f"data.path: {num_empty} documents in a row without any token: expected text")
            if self._offset == len(document):
                self._sample, self._offset, self._is_read = self._sample + self._stride, 0, False
        return Row(tokens, labels, lengths, Cursor(self._sample, self._offset))

    def _current_document(self) -> NDArray[np.int32]:
        if not self._is_read:
            self._document, self._is_read = self._read(self._sample), True
            if self._offset and self._offset >= len(self._document):
                raise ValueError(
                    f"data: sample {self._sample} has {len(self._document)} tokens, but the checkpoint stands at its "
                    f"token {self._offset}: expected the data and the tokenizer that the run began with"
                )
        return self._document
