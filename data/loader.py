"""The loader: a data-parallel rank's micro-batches, tokenised and packed by worker processes, in a fixed order.

Row slot s of G = `global_batch_size` packs the samples s, s + G, s + 2G, ... of an endless stream of epochs. A rank
owns G / ranks consecutive slots, and each of its workers some of those for good, so nobody tokenises what another
needs, and the rows depend on nothing but the seed, the data, `sequence_length` and G. Where each slot stands is all
there is to save: every row brings the cursor behind it, and what workers prepared ahead does not count until returned.
"""

import atexit
import contextlib
import functools
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from config.options import Data, Training
from data.batch import Cursor, MicroBatch, Row, Sample
from data.epochs import deal, most_rows
from data.held_out import ALL, Side
from data.media import MediaSettings
from data.packing import NO_SAMPLE, NUM_PENDING, BadSample, ChatSlot, Share, TextSlot, filler_row
from data.preview_rows import show_row
from data.samples import Samples, open_samples
from data.tokenizer import load_tokenizer
from errors import UserError, regular_file

logger = logging.getLogger("train")

_SHOWN = 20_000  # characters of a row's text


class TokenLoader:
    """Iterates over one data rank's micro-batches, without end; `num_micro_batches` make a step.

    Where ranks * local_batch_size does not divide G, some ranks have rows of fillers beside their slots' own, so that
    all have as many micro-batches, and what is trained is the same.
    """

    def __init__(
        self,
        data: Data,
        training: Training,
        data_rank: int,
        num_data_ranks: int,
        seed: int,
        *,
        media: MediaSettings | None = None,
        mtp: bool = False,
        one_epoch: bool = False,
        side: Side = ALL,
        skipped_dir: Path | None = None,
    ) -> None:
        """Opens the data and the tokenizer. Raises UserError, one line, if they cannot be used.

        `media`: of images and videos, for a model with a tower. `mtp`: for one with multi-token prediction.
        `one_epoch`: the samples once instead of `training.epochs` times; then fillers, without end. `side`: which
        samples, if some are held out. `skipped_dir`: where to list skipped samples.
        """
        self._training, self._num_slots = training, training.global_batch_size
        first, end = (rank * self._num_slots // num_data_ranks for rank in (data_rank, data_rank + 1))
        self._slots = range(first, end)
        most_slots = -(-self._num_slots // num_data_ranks)
        self.num_micro_batches = -(-most_slots // training.local_batch_size)
        """Of this rank, and of every other, in a step."""
        rows_of_a_step = num_data_ranks * self.num_micro_batches * training.local_batch_size
        self.num_filler_rows = rows_of_a_step - self._num_slots
        """Of all ranks in a step: these are computed for nothing."""
        self._num_workers = min(data.num_workers, len(self._slots))
        if self._num_workers:
            _start_forkserver(data.format)  # imports while the rest is set up
        self._tokenizer = tokenizer = load_tokenizer(data.tokenizer)
        self._vision, self._mtp = media and media.vision, mtp
        samples = open_samples(data, tokenizer, training.sequence_length, seed, media, side)
        epochs = 1 if one_epoch else training.epochs
        packer = Packer(samples, data, tokenizer.eos_token_id or 0, self._num_slots, epochs)
        self._packer = packer if one_epoch or not epochs else deal(packer)
        self._may_fill = bool(epochs) or data.format == "chat" or self.num_filler_rows > 0 or media is not None
        self._shares: Iterator[list[Row] | UserError] | None = None  # of the workers in turn; None before `next`
        self._lifeline: Connection | None = None
        self._round: list[Row] = []  # a row of each own slot: what a step takes
        self._next = 0  # which micro-batch of the round comes next
        self._skipped_file = skipped_dir and regular_file(skipped_dir / f"rank-{data_rank:05}.jsonl")
        self.counts = Counter[str]()
        """Since the beginning: "real_tokens" and "tokens" of the rows returned; of REASONS, samples met on the way."""
        cursors = torch.tensor([self._packer.first_cursor(slot) for slot in range(self._num_slots)])
        self.cursors = self._first_cursors = cursors[first:end]
        """int64 [own slots, width]: where each own slot stands after the last micro-batch that was returned."""

    def rewind(self) -> None:
        """Starts again from the beginning; without workers only."""
        assert not self._num_workers
        self._shares, self._next, self.cursors = None, 0, self._first_cursors

    def load_cursors(self, all_cursors: Tensor) -> None:
        """Continues where the `cursors` of all ranks, in rank order [G, width], were taken; before the first `next`.

        They may come from any number of ranks and workers, but from the same G and between steps. Raises UserError.
        """
        assert self._shares is None
        if len(all_cursors) != self._num_slots:
            raise UserError(
                f"training.global_batch_size = {self._num_slots}: expected {len(all_cursors)}, as in the checkpoint"
            )
        if all_cursors.shape[1] != self.cursors.shape[1]:
            raise UserError(f"data.format = {self._packer.data.format!r}: expected the other, as in the checkpoint")
        if not torch.equal(all_cursors[:, 0] % self._num_slots, torch.arange(self._num_slots)):
            raise UserError("the checkpoint's data_cursors are no places in the data")
        if self._packer.end is not None and int(all_cursors[:, 0].max()) >= self._packer.end + self._num_slots:
            raise UserError(
                f"training.epochs = {self._packer.epochs}: the checkpoint has read more: expected more epochs"
            )
        self.cursors = all_cursors[self._slots.start : self._slots.stop].clone()

    def __iter__(self) -> "TokenLoader":
        return self

    def __next__(self) -> MicroBatch:
        """Raises UserError, one line, for a sample that cannot be used."""
        if not self._next:
            self._round = self._next_round()
            self._count(self._round)
        size = self._training.local_batch_size
        place = slice(self._next * size, (self._next + 1) * size)
        rows = self._round[place]
        if rows:
            self.cursors = self.cursors.clone()  # the old ones may be on their way into a checkpoint
            self.cursors[place] = torch.tensor([row.cursor for row in rows])
        self._next = (self._next + 1) % self.num_micro_batches
        fillers = [filler_row(self._training.sequence_length, self._packer.filler)] * (size - len(rows))
        batch = MicroBatch.of([*rows, *fillers], self._may_fill, self._vision)
        # As many as of any other rank and micro-batch: buffers of fixed sizes rely on it.
        assert len(batch.tokens) == size * self._training.sequence_length, (len(batch.tokens), size)
        return batch.with_mtp_labels() if self._mtp else batch

    def _count(self, rows: list[Row]) -> None:
        notes = [note for row in rows for note in row.notes]
        self.counts["tokens"] += len(rows) * self._training.sequence_length
        self.counts["real_tokens"] += sum(len(row.tokens) - row.num_fillers for row in rows)
        self.counts.update(reason for reason, _ in notes)
        if notes and self._skipped_file is not None:
            try:
                self._skipped_file.parent.mkdir(parents=True, exist_ok=True)
                with regular_file(self._skipped_file).open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps({"reason": reason, "sample": text}) + "\n" for reason, text in notes)
            except (OSError, UserError) as error:  # a full disk, say: they are counted nevertheless
                reason = getattr(error, "strerror", None) or error
                logger.warning(f"cannot list skipped samples in {self._skipped_file}: {reason}")
                self._skipped_file = None

    def first_lengths(self) -> list[int]:
        """In tokens, of the first samples that can be used: as many as are read in two seconds, a thousand at most."""
        lengths: list[int] = []
        deadline = time.monotonic() + 2
        for number in range(min(1000, self._packer.end or 1000)):
            with contextlib.suppress(BadSample):
                lengths.append(len(self._packer.samples.read(number).tokens))
            if time.monotonic() > deadline:
                break
        return lengths

    def show_rows(self) -> Callable[[], str]:
        """What gives the first rows of this rank's step, as text: what is trained on stands in guillemets."""
        rows = self._round[:2]

        def show() -> str:
            return "\n\n".join(show_row(row, self._tokenizer, self._vision, colours=False)[:_SHOWN] for row in rows)

        return show

    def num_steps_left(self) -> int:
        """Until the last sample of `training.epochs` has been returned, for the slots of this rank; before the first
        `next`."""
        assert self._shares is None
        cursors = [tuple(cursor) for cursor in self.cursors.tolist()]
        return most_rows(self._packer, cursors, self._training.sequence_length)

    def close(self) -> None:
        """Ends the workers; there is no micro-batch afterwards."""
        if self._lifeline is not None:
            self._lifeline.close()
        self._shares, self._next = iter(()), 0

    def _next_round(self) -> list[Row]:
        if self._shares is None:
            self._shares = self._start()
        shares = []
        for _ in range(max(1, self._num_workers)):
            share = next(self._shares)
            if isinstance(share, UserError):
                self.close()
                raise share
            shares.append(share)
        return [shares[place % len(shares)][place // len(shares)] for place in range(len(self._slots))]

    def _start(self) -> Iterator[list[Row] | UserError]:
        cursors = [tuple(cursor) for cursor in self.cursors.tolist()]
        shares = _Shares(self._packer, cursors, self._training.sequence_length)
        if not self._num_workers:
            return iter(shares)
        worker_end, self._lifeline = _context.Pipe(duplex=False)
        # Without this, a run that ends without `close` would wait at its exit for workers that ignore SIGTERM.
        atexit.register(self._lifeline.close)
        # torchdata's loader, its own state switched off: on 2026-11-28 it took 3 % more time an item than PyTorch's. It
        # stays since it saves what reads data with a state of its own, a stream say, as it is.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata's own affair
            loader = StatefulDataLoader(
                shares,
                batch_size=None,  # items as they are, ...
                collate_fn=_unchanged,  # ... not even made tensors: these would need a shared-memory file each
                num_workers=self._num_workers,
                worker_init_fn=functools.partial(_init_worker, worker_end),
                multiprocessing_context=_context,
                generator=torch.Generator(),  # else it draws a number from the global one
                snapshot_every_n_steps=None,  # the cursors are all the state there is
            )
            return iter(loader)


class Packer(NamedTuple):
    """What it takes to make a slot."""

    samples: Samples
    data: Data
    filler: int
    num_slots: int
    epochs: float | None = None
    """How often a sample is read; then come fillers. None: without end."""

    @property
    def end(self) -> int | None:
        """The first sample that is not read."""
        return max(1, round(self.epochs * self.samples.num_documents)) if self.epochs else None

    def first_cursor(self, number: int) -> Cursor:
        """Where slot `number` begins."""
        return (number, 0) if self.data.format == "text" else (number, *[NO_SAMPLE] * NUM_PENDING)

    def slot(self, cursor: Cursor, read: Callable[[int], Sample] | None = None) -> TextSlot | ChatSlot:
        """The one that stands at `cursor`. `read`: gives the samples instead of `samples`."""
        num_documents = self.samples.num_documents
        share = Share(
            read or self.samples.reader(self.num_slots),
            self.num_slots,
            end=self.end,
            skip_bad=self.data.on_bad_sample == "skip",
            # A slot of a small source may meet the same bad samples again and again by chance.
            max_bad=max(num_documents, 1000),
        )
        kind = TextSlot if self.data.format == "text" else ChatSlot
        return kind(share, cursor, self.filler)


class _Shares(IterableDataset[list[Row] | UserError]):
    """A row of each of the rank's slots, again and again; in worker w of n, of its slots w, w + n, ...

    A UserError is the last item: one that is raised would arrive as the text of its traceback.
    """

    def __init__(self, packer: Packer, cursors: list[Cursor], sequence_length: int) -> None:
        self._packer, self._cursors, self._sequence_length = packer, cursors, sequence_length

    def __iter__(self) -> Iterator[list[Row] | UserError]:
        info = get_worker_info()
        own = self._cursors[info.id :: info.num_workers] if info else self._cursors
        try:
            slots = [self._packer.slot(cursor) for cursor in own]
            while True:
                yield [slot.next_row(self._sequence_length) for slot in slots]
        except UserError as error:
            yield error


# Workers are forked from a server process that has imported what is slow to import and nothing else: a fork of the
# training process would inherit the locks, but not the threads, of NCCL, gloo and CUDA.
_context = multiprocessing.get_context("forkserver")


def _start_forkserver(data_format: str) -> None:
    """The server and its workers never see SIGINT or SIGTERM: schedulers and terminals send these to whole groups of
    processes, and training needs its workers until it has finished its step."""
    modules = ["torch", "torchdata.stateful_dataloader", "datasets"]
    _context.set_forkserver_preload(modules if data_format == "text" else [*modules, "transformers"])
    resource_tracker.ensure_running()  # or else the server starts it, which unblocks the signals
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _init_worker(lifeline: Connection, worker: int) -> None:
    """Ends this process when the other end of `lifeline` closes: the loader was closed, or the parent died."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores belong to other workers

    def watch() -> None:
        lifeline.poll(None)
        # The parent tells a worker to end as it closes: this one may just be reading that, and hold a lock that the
        # parent, for which it is a moment's work, would then wait for for ever.
        time.sleep(1)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def _unchanged(share: list[Row] | UserError) -> list[Row] | UserError:
    return share
