"""How many rows epochs make, counted exactly before a run: the slots themselves pack them, of samples without contents.

What a row takes depends on the lengths of samples, and on where their images lie, alone. So each sample is tokenised
once, by all cores, and what is left of it goes to the cache: int32 numbers, of each sample

    its tokens (0: it cannot be used), and of each image and video the first token and the one behind the last
"""

import dataclasses
import hashlib
import json
import logging
import math
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data.batch import Cursor, Medium, Sample
from data.files import cached, files_of
from data.packing import BadSample
from data.samples import Samples
from data.tokenizer import tokenizer_identity

if TYPE_CHECKING:
    from data.loader import Packer

logger = logging.getLogger("train")

_INDIFFERENT = {"path", "weights", "shuffle", "num_workers"}
"""Options of the data that change no sample's length, or are told in other ways."""
_MOST_PROCESSES = 32
_CHUNK = 2000  # samples that a process measures at a time
_MOST_FILES = 10_000  # whose size each process asks for when it starts: a second, or some over a network
Measured = tuple[NDArray[np.int64], NDArray[np.int32]]
"""Where each sample's numbers begin, and at the end where they end; the numbers."""


def deal(packer: "Packer") -> "Packer":
    """The packer with its samples dealt to slots by their lengths, so that all slots end at about the same step.

    Each time that every slot is given one, the longest goes to the slot that has had fewest tokens so far, and so on.
    That stays within an epoch, and what comes later changes nothing before it: more epochs may be added to a run.
    """
    assert packer.epochs is not None
    num_epochs = math.ceil(packer.epochs)
    num_documents, num_slots = packer.samples.num_documents, packer.num_slots

    def make(path: Path) -> None:
        starts, numbers = _measured(packer)
        lengths = numbers[starts[:-1]].astype(np.int64)
        tokens = np.zeros(num_slots, np.int64)
        with open(path, "wb") as file:
            for epoch in range(num_epochs):
                documents = packer.samples.permutation(epoch)
                place, first = 0, epoch * num_documents
                while place < num_documents:
                    end = min(place + num_slots, num_documents)
                    slots = np.arange(first + place, first + end) % num_slots
                    slots_by_need = np.argsort(tokens[slots], kind="stable")
                    by_length = np.argsort(-lengths[documents[place:end]], kind="stable")
                    documents[place + slots_by_need] = documents[place:end][by_length]
                    tokens[slots] += lengths[documents[place:end]]
                    place = end
                file.write(documents.astype("<i8").tobytes())

    with np.load(_lengths(packer)) as stored:
        digest = str(stored["digest"])
    path = _cached(packer, ["deal", num_slots, num_epochs, packer.samples.seed, digest], ".deal", make)
    return packer._replace(samples=packer.samples.dealt(path))


def most_rows(packer: "Packer", cursors: Sequence[Cursor], sequence_length: int) -> int:
    """Rows of the slots at `cursors` until their samples have ended: of the one that has most. Raises UserError as the
    rows themselves would."""
    assert packer.end is not None
    measured = _measured(packer)
    if packer.data.format == "text" and len(measured[1]) == packer.samples.num_documents:
        return max(_num_full_rows(packer, cursor, sequence_length, measured[1]) for cursor in cursors)
    num_tokens = sequence_length if packer.data.format == "chat" else int(measured[1].max(initial=1))
    longest = Sample.of(np.zeros(num_tokens, np.int32), False)
    return max(_num_rows(packer, cursor, sequence_length, measured, longest) for cursor in cursors)


def _num_full_rows(packer: "Packer", cursor: Cursor, sequence_length: int, lengths: NDArray[np.int32]) -> int:
    """Of texts without images, which are cut wherever a row ends: so all rows but the last are full."""
    number, offset = cursor
    assert packer.end is not None
    documents = packer.samples.documents(range(number, packer.end, packer.num_slots))
    return -(-(int(lengths[documents].sum(dtype=np.int64)) - offset) // sequence_length)


def _num_rows(packer: "Packer", cursor: Cursor, sequence_length: int, measured: Measured, longest: Sample) -> int:
    assert packer.end is not None
    starts, numbers = measured
    documents = np.asarray(packer.samples.documents(range(packer.end)))  # a file's, so it takes no memory

    def read(sample: int) -> Sample:
        document = documents[sample]
        num_tokens, *places = numbers[starts[document] : starts[document + 1]].tolist()
        if not num_tokens:
            raise BadSample("failed", f"sample {sample}")
        media = [Medium(begin, end, [], _no_pixels, 0) for begin, end in zip(places[::2], places[1::2])]
        return Sample(longest.tokens[:num_tokens], longest.is_trained[:num_tokens], media=media)

    slot = packer.slot(cursor, read)
    num_rows = 0
    while slot.next_row(sequence_length).num_fillers < sequence_length:
        num_rows += 1
    return num_rows


def _no_pixels() -> NDArray[np.uint8]:
    return np.empty((0, 0), np.uint8)


def _measured(packer: "Packer") -> Measured:
    """Of all samples, from the cache, or measured now."""
    with np.load(_lengths(packer)) as stored:
        return stored["starts"], stored["numbers"]


def _lengths(packer: "Packer") -> Path:
    """The file of what is measured: Measured, its digest, and of which files of images and videos."""
    samples = packer.samples.in_order()

    def make(path: Path) -> None:
        ranges = [
            range(begin, min(begin + _CHUNK, samples.num_documents))
            for begin in range(0, samples.num_documents, _CHUNK)
        ]
        measure = partial(_measure, samples, packer.data.on_bad_sample == "skip")
        if len(ranges) == 1:
            parts = [measure(ranges[0])]
        else:
            logger.info(f"measures {samples.num_documents:,} samples, once, to know the last step of training.epochs")
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the other cores belong to other workers
            num_processes = min(os.cpu_count() or 1, len(ranges), _MOST_PROCESSES)
            with ProcessPoolExecutor(num_processes, multiprocessing.get_context("forkserver")) as pool:
                parts = list(pool.map(measure, ranges))
        counts, numbers, files = zip(*parts)
        starts, all_numbers = np.concatenate([[0], np.cumsum(np.concatenate(counts))]), np.concatenate(numbers)
        digest = hashlib.sha256(starts.tobytes() + all_numbers.tobytes()).hexdigest()
        sizes = json.dumps(_looked_at({file: _size(file) for file in set().union(*files)}))
        with open(path, "wb") as file:
            np.savez(file, starts=starts, numbers=all_numbers, digest=digest, sizes=sizes)

    def is_current(path: Path) -> bool:
        with np.load(path) as stored:
            sizes = json.loads(str(stored["sizes"]))
        return all(_size(file) == size for file, size in sizes.items())

    return _cached(packer, ["lengths, and sizes of files"], ".lengths", make, is_current)


def _looked_at(sizes: dict[str, int]) -> dict[str, int]:
    """The files at which each start looks again, of those that are there and of those that are not: all, or so many."""
    chosen = dict[str, int]()
    for is_there in (False, True):
        files = sorted(file for file, size in sizes.items() if (size >= 0) == is_there)
        chosen |= {file: sizes[file] for file in files[:: -(-len(files) // _MOST_FILES) or 1]}
    return chosen


def _size(file: str) -> int:
    """In bytes; -1 if it is not there."""
    try:
        return os.stat(file).st_size
    except (OSError, ValueError):
        return -1


def _cached(
    packer: "Packer",
    what: list[Any],
    suffix: str,
    make: Callable[[Path], None],
    is_current: Callable[[Path], bool] = lambda _: True,
) -> Path:
    """What `make` makes of all that decides about the lengths of samples."""
    data = packer.data
    options = {name: value for name, value in dataclasses.asdict(data).items() if name not in _INDIFFERENT}
    of_samples = [tokenizer_identity(data.tokenizer, data.format, data.chat_template), packer.samples.made_by]
    files = [str(file) for entry in data.path for file in files_of(entry, data.split)]
    return cached(files, json.dumps([*what, options, *of_samples], default=str), suffix, make, is_current)


def _measure(
    samples: Samples, skip_bad: bool, documents: range
) -> tuple[NDArray[np.int64], NDArray[np.int32], set[str]]:
    """How many numbers there are of each document, the numbers, and the files of images and videos."""
    counts, numbers, read = [], [], samples.reader()
    files = set[str]()
    if samples.media is not None:
        samples.media.files = files
    for document in documents:
        try:
            sample = read(document)
            own = [len(sample.tokens), *(place for medium in sample.media for place in (medium.begin, medium.end))]
        except BadSample:
            if not skip_bad:
                raise
            own = [0]
        counts.append(len(own))
        numbers += own
    if samples.media is not None:
        samples.media.files = None
    return np.array(counts, np.int64), np.array(numbers, np.int32), files
