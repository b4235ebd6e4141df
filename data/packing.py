"""Packing: a slot lays the samples of its share end to end in rows. Text is cut to fill them; chats stay whole."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from data.batch import Cursor, Frame, Row, Sample, end_to_end
from errors import UserError
from models.ops.labels import IGNORED

REASONS = (
    "not_json",
    "not_csv",
    "undecodable",
    "wrong_type",
    "empty",
    "too_long",
    "truncated",  # what is left of it is trained on
    "template_error",
    "special_token",
    "special_in_text",  # it is taken as that token
    "unclear_spans",
    "nothing_to_train",
    "unrendered",
    "unused_field",
    "ignored_field",  # the rest of it is trained on
    "media_count",  # other images than its texts name
    "no_vision",  # images, for a model without a tower
    "missing_file",
    "broken_image",
    "broken_video",
    "oversized",
    "failed",
)


WHOLE = ("ignored_field", "special_in_text")
"""Those of which something is told, although nothing is missing."""
USED = ("truncated", *WHOLE)
"""And those that are trained on."""


class BadSample(UserError):
    """A sample that cannot be used: one of REASONS, and one line that says where and why."""

    def __init__(self, reason: str, message: str) -> None:
        assert reason in REASONS
        super().__init__(reason, message)  # both, so that it survives pickling
        self.reason = reason
        self.raw: bytes | None = None
        """What its file has, if that is text and no record could be made of it."""

    def __str__(self) -> str:
        return in_one_line(str(self.args[1]))


def in_one_line(text: str) -> str:
    """A text that can be told whatever it holds, line ends or half a surrogate pair say."""
    return " ".join(text.encode(errors="backslashreplace").decode().split())


@dataclass
class Share:
    """What one slot may read: every `stride`-th sample of the stream.

    A sample that cannot be used is noted and passed over; without `skip_bad` it is an error.
    """

    read: Callable[[int], Sample]
    stride: int
    end: int | None = None  # the first sample that does not exist
    skip_bad: bool = True
    max_bad: int = 1000  # more than so many in a row that cannot be used are an error
    notes: list[tuple[str, str]] = field(default_factory=list)

    def first_from(self, number: int) -> tuple[int, Sample | None]:
        """The first sample from `number` on that can be used, and its number; None at the end. Raises UserError."""
        num_bad = 0
        while self.end is None or number < self.end:
            try:
                sample = self.read(number)
                if sample.note is not None:
                    self.notes.append(sample.note)
                return number, sample
            except BadSample as error:
                if not self.skip_bad:
                    raise
                self.notes.append((error.reason, str(error)))
                num_bad += 1
                if num_bad > self.max_bad:
                    raise UserError(f"data: {num_bad} samples in a row cannot be used, the last: {error}") from error
            number += self.stride
        return number, None

    def take_notes(self) -> list[tuple[str, str]]:
        """The notes since the last call."""
        notes, self.notes = self.notes, []
        return notes


def _row(samples: list[Sample], sequence_length: int, filler: int, cursor: Cursor, share: Share) -> Row:
    """Samples end to end, and fillers behind them. Their images and videos are decoded here, so that those of samples
    that wait for a row take no memory."""
    lengths = [len(sample.tokens) for sample in samples]
    num_fillers = sequence_length - sum(lengths)
    if num_fillers:
        samples, lengths = [*samples, Sample.of(np.full(num_fillers, filler), False)], [*lengths, num_fillers]
    tokens, labels = end_to_end(samples)
    frames, pixels, begin = list[Frame](), [], 0
    for sample, length in zip(samples, lengths):
        is_good = True
        for medium in sample.media:
            try:
                pixels.append(medium.decode() if is_good else medium.grey())
            except BadSample as error:
                # Only now, as its header was good. The row stays as it is, and so do the cursors of all to come: what
                # they are depends on the data alone. But nothing is learnt from it.
                if not share.skip_bad:
                    raise
                share.notes.append((error.reason, str(error)))
                pixels.append(medium.grey())
                labels[begin : begin + length], is_good = IGNORED, False
            frames += [frame._replace(place=begin + frame.place) for frame in medium.frames]
        begin += length
    shown = np.concatenate(pixels) if pixels else None
    return Row(tokens, labels, lengths, num_fillers, cursor, share.take_notes(), frames, shown)


def filler_row(sequence_length: int, filler: int) -> Row:
    """A row of nothing but fillers, for a rank that has fewer slots than another."""
    return _row([], sequence_length, filler, (), Share(_nothing, 1))


def _nothing(number: int) -> Sample:
    raise AssertionError(f"sample {number} of a share that has none")


class TextSlot:
    """Documents end to end, cut where the row ends, or before an image there. Cursor: (sample, token offset in it).

    A document that the row's end cuts goes on in the next row as a document of its own. Its last token before the cut
    has a label nevertheless: the token after the cut. So in an epoch each token but a document's first is a label once.
    """

    def __init__(self, share: Share, cursor: Cursor, filler: int = 0) -> None:
        """`filler`: the token to fill up rows with when the share has ended."""
        self._share, self._filler = share, filler
        self._number, self._offset = cursor
        self._document: Sample | None = None  # the sample at the cursor, read when it is needed

    def next_row(self, sequence_length: int) -> Row:
        """Raises UserError for a share without usable samples, and for a cursor of other data."""
        pieces, room = [], sequence_length
        while room and (document := self._document or self._read()):
            piece = document.piece(self._offset, room)
            pieces += [piece] if len(piece.tokens) else []
            room -= len(piece.tokens)
            self._document, self._offset = document, self._offset + len(piece.tokens)
            if self._offset < len(document.tokens):  # cut: at the row's end, or before an image that needs more room
                break
            self._number, self._offset, self._document = self._number + self._share.stride, 0, None
        return _row(pieces, sequence_length, self._filler, (self._number, self._offset), self._share)

    def _read(self) -> Sample | None:
        number, document = self._share.first_from(self._number)
        num_tokens = 0 if document is None or number != self._number else len(document.tokens)
        if self._offset and self._offset >= num_tokens:
            raise UserError(
                f"data: sample {self._number} has {num_tokens} tokens, but the checkpoint stands at its token "
                f"{self._offset}: expected the data and the tokenizer that the run began with"
            )
        self._number = number
        return document


# How many samples a chat slot chooses from. With 32, rows that hold two samples or more on average are over 97 % full.
NUM_PENDING = 32
NO_SAMPLE = -1


class ChatSlot:
    """Whole samples, chosen from the next few so that they fill the row best; a filler, if anything is left.

    Cursor: (sample to be read next, the samples that were read and wait, oldest first, then -1s). The oldest goes
    into each row, so none waits for more than NUM_PENDING rows.
    """

    def __init__(self, share: Share, cursor: Cursor, filler: int) -> None:
        """The share's samples fit into a row. `filler`: the token that fills it up. Raises UserError for a cursor of
        other data."""
        self._share, self._filler = share, filler
        self._number = cursor[0]
        self._pending: list[tuple[int, Sample]] = []
        for expected in (number for number in cursor[1:] if number != NO_SAMPLE):
            number, sample = share.first_from(expected)
            if sample is None or number != expected:
                raise UserError(
                    f"data: sample {expected}, for which the checkpoint waits, cannot be used: expected the data and "
                    "the tokenizer that the run began with"
                )
            self._pending.append((number, sample))
        share.take_notes()  # dropped: they were counted when the samples were first read

    def next_row(self, sequence_length: int) -> Row:
        """Raises UserError for a share without usable samples."""
        chosen: list[Sample] = []
        room = sequence_length
        self._refill()
        while self._pending:
            lengths = [len(sample.tokens) for _, sample in self._pending]
            places = best_fill(lengths, room)
            chosen += [self._pending[place][1] for place in places]
            room -= sum(lengths[place] for place in places)
            self._pending = [kept for place, kept in enumerate(self._pending) if place not in places]
            if self._pending:
                break
            self._refill()  # all of them fitted: there may be room for more
        waiting = [number for number, _ in self._pending]
        cursor = (self._number, *waiting, *[NO_SAMPLE] * (NUM_PENDING - len(waiting)))
        return _row(chosen, sequence_length, self._filler, cursor, self._share)

    def _refill(self) -> None:
        while len(self._pending) < NUM_PENDING:
            self._number, sample = self._share.first_from(self._number)
            if sample is None:
                return
            self._pending.append((self._number, sample))
            self._number += self._share.stride


def best_fill(lengths: Sequence[int], room: int) -> list[int]:
    """The places of those lengths whose sum comes closest to `room` from below; the first is among them if it fits.

    Solves the subset-sum problem: bit t of an integer says whether the lengths so far can make the sum t. Takes
    len(lengths) shifts of `room` bits, and prefers what stands further ahead.
    """
    mask = (1 << room + 1) - 1
    sums = [1 << lengths[0] if lengths[0] <= room else 1]
    for length in lengths[1:]:
        sums.append((sums[-1] | sums[-1] << length) & mask)
    total, places = sums[-1].bit_length() - 1, []
    for place in range(len(lengths) - 1, 0, -1):
        if not sums[place - 1] >> total & 1:
            places.append(place)
            total -= lengths[place]
    return [0] * (lengths[0] <= room) + places[::-1]
