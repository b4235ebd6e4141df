"""Shows what will be trained on, before it costs anything: the packed rows, decoded, and what an epoch comes to.

    python -m data.preview --skipped RUN/skipped OUT.jsonl
    python -m data.preview --config X.toml [--rows N] [--samples N] [--html FILE] [--section.key value ...]

Trained tokens are green, all others grey; a bar begins each document of a row. Images and fillers are shown by their
numbers; a page that --html writes has the pictures themselves. --skipped writes the samples that a run has skipped to a
file, so that they can be mended: each with what is wrong with it.
"""

import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from config.options import Config
from config.reading import load_config, model_config
from data.batch import Sample
from data.check import check_data
from data.epochs import deal, most_rows
from data.held_out import Side
from data.loader import Packer
from data.media import media_settings
from data.packing import BadSample
from data.preview_html import page
from data.preview_rows import show_row, size_of
from data.samples import Samples, data_in_words, open_samples
from data.skipped import write_skipped
from data.sources import open_sources
from data.tokenizer import load_tokenizer
from errors import OneLineParser, UserError, exit_on_error
from models.qwen35_moe.vision_config import VisionConfig

_MOST_SIZES = 8


@dataclass
class Measured:
    """What the first `num_samples` samples are. No image or video of theirs is decoded."""

    num_samples: int
    lengths: list[int] = field(default_factory=list)  # of those that can be used
    num_trained: int = 0
    num_vision: int = 0  # tokens
    num_images: int = 0
    num_videos: int = 0
    most_media: int = 0  # of a sample
    sizes: Counter[str] = field(default_factory=Counter)  # of images and of pairs of video frames
    notes: list[tuple[str, str]] = field(default_factory=list)  # reason and message
    skipped: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)  # of those that can be used

    @classmethod
    def of(cls, samples: Samples, num_samples: int, vision: VisionConfig | None) -> "Measured":
        """Reads them. Raises UserError if none can be used."""
        found, read = cls(num_samples), samples.reader()
        for number in range(num_samples):
            try:
                sample = read(number)
            except BadSample as error:
                found.skipped[error.reason] += 1
                found.notes.append((error.reason, str(error)))
                continue
            if sample.note is not None:
                found.noted[sample.note[0]] += 1
                found.notes.append(sample.note)
            found.lengths.append(len(sample.tokens))
            found.num_trained += int(sample.is_trained[1:].sum())
            if vision is not None:
                found._see(sample, vision)
        if not found.lengths:
            raise UserError(f"data.path: none of {num_samples} samples can be used: {dict(found.skipped)}")
        return found

    def _see(self, sample: Sample, vision: VisionConfig) -> None:
        frames = [frame for medium in sample.media for frame in medium.frames]
        self.num_vision += sum(height * width for _, height, width in frames) // vision.patches_per_token
        self.sizes.update(size_of(*(side * vision.patch_size for side in frame[1:])) for frame in frames)
        firsts = [sample.tokens[medium.frames[0].place] for medium in sample.media]
        num_videos = sum(first == vision.video_token_id for first in firsts)
        self.num_videos += num_videos
        self.num_images += len(firsts) - num_videos
        self.most_media = max(self.most_media, len(firsts))

    def bins(self) -> list[tuple[int, int, int]]:
        """How many samples have 1, 2 to 3, 4 to 7, ... tokens: (least, most, how many)."""
        bins = Counter(length.bit_length() for length in self.lengths)
        return [(1 << bits - 1, (1 << bits) - 1, bins[bits]) for bits in range(min(bins), max(bins) + 1)]

    def facts(self, num_documents: int, fill: float, config: Config, last_step: int) -> list[str]:
        """What there is to say, a line each. `num_documents`: of the corpus. `fill`: how full rows are, of 1.
        `last_step`: of the epochs that the run is to have, counted; 0 if it has steps."""
        training, num_tokens = config.training, sum(self.lengths)
        lines = [
            *(f"skipped ({what}): {n:,}, {n / self.num_samples:.2%}" for what, n in sorted(self.skipped.items())),
            *(f"used, but {reason}: {count:,}" for reason, count in sorted(self.noted.items())),
            f"rows are {fill:.1%} full, and {self.num_trained / num_tokens:.1%} of the tokens in them are trained on",
        ]
        if self.sizes:
            images, videos = (number / len(self.lengths) for number in (self.num_images, self.num_videos))
            sizes = [f"{size} ({count:,})" for size, count in self.sizes.most_common(_MOST_SIZES)]
            others = len(self.sizes) - len(sizes)
            lines += [
                f"{self.num_vision / num_tokens:.1%} of the tokens are vision tokens; a sample has {images:.2f} images "
                f"and {videos:.2f} videos, {self.most_media} together at most",
                f"sizes of images and pairs of video frames: {', '.join(sizes)}" + f", {others} others" * (others > 0),
            ]
        tokens = num_tokens / self.num_samples * num_documents
        about = "" if self.num_samples == num_documents else "about "
        steps = tokens / fill / training.sequence_length / training.global_batch_size
        epoch = f"an epoch has {about}{tokens:,.0f} tokens, {steps:,.1f} steps"
        if last_step:
            return [*lines, f"{epoch}; training.epochs = {training.epochs:g}: the last step is {last_step:,}"]
        assert training.steps is not None
        return [*lines, f"{epoch}; training.steps = {training.steps:,} are\n{training.steps / steps:,.2f} epochs"]


def histogram(bins: list[tuple[int, int, int]]) -> str:
    """Lengths of samples, a bar each."""
    most = max(count for _, _, count in bins)
    return "\n".join(
        f"{a:>9,} to {b:>9,} tokens  {count:>7,}  {'#' * round(50 * count / most)}" for a, b, count in bins
    )


def _fill(packer: Packer, num_rows: int, sequence_length: int) -> float:
    """How full rows are, of 1: those of one slot that reads all samples, and decodes none of their pictures."""
    read = packer.samples.reader()

    def unseen(number: int) -> Sample:
        sample = read(number)
        empty = [medium._replace(decode=lambda: np.empty((0, 0), np.uint8)) for medium in sample.media]
        return sample._replace(media=empty)

    slot = packer._replace(num_slots=1, epochs=None).slot(packer.first_cursor(0), unseen)
    num_fillers = sum(slot.next_row(sequence_length).num_fillers for _ in range(num_rows))
    return 1 - num_fillers / (num_rows * sequence_length)


def _check_writable(file: str) -> None:
    """Raises UserError now rather than after the work. Leaves the file as it is."""
    existed = os.path.lexists(file)
    _write(file, b"", "ab")
    if not existed:
        os.unlink(file)


def _write(file: str, content: bytes, mode: str) -> None:
    try:
        with open(file, mode) as opened:
            opened.write(content)
    except OSError as error:
        raise UserError(
            f"--html {file!r} cannot be written: {error.strerror}: expected the name of a file in a folder that exists"
        ) from error


def main(argv: list[str]) -> None:
    """The command line. Raises UserError, one line."""
    parser = OneLineParser(prog="python -m data.preview", description="Shows what will be trained on.")
    parser.add_argument("--rows", type=int, default=2, help="rows to show")
    parser.add_argument("--samples", type=int, default=1000, help="samples to measure")
    parser.add_argument("--html", metavar="FILE", help="write a page with the rows and their pictures")
    parser.add_argument("--skipped", nargs=2, type=Path, metavar=("FOLDER", "OUT"), help="write skipped samples to OUT")
    options, rest = parser.parse_known_args(argv)
    if options.skipped:
        folder, out = options.skipped
        stored = folder.resolve().parent / "config.toml"
        names_one = any(word.partition("=")[0] == "--config" for word in rest)
        if not names_one and not stored.is_file():
            raise UserError(f"--skipped {str(folder)!r}: expected config.toml of its run beside it, or --config")
        print(write_skipped(load_config(rest if names_one else ["--config", str(stored), *rest]), folder, out))
        return
    config = load_config(rest)
    shape = model_config(config)
    if options.html is not None:
        _check_writable(options.html)
    check_data(config, shape.vocab_size, shape.vision)
    training, tokenizer = config.training, load_tokenizer(config.data.tokenizer)
    media = media_settings(config, shape.vision)
    side = Side.of(config)
    samples = open_samples(config.data, tokenizer, training.sequence_length, config.job.seed, media, side)

    packer = Packer(samples, config.data, tokenizer.eos_token_id or 0, training.global_batch_size, training.epochs)
    dealt = deal(packer) if training.epochs else packer
    rows = []
    for number in range(min(options.rows, training.global_batch_size)):
        row = dealt.slot(dealt.first_cursor(number)).next_row(training.sequence_length)
        rows.append(row)
        text = show_row(row, tokenizer, shape.vision, sys.stdout.isatty())
        print(f"Row {number}: {len(row.lengths)} documents\n{text}\n")

    measured = Measured.of(samples, min(options.samples, samples.num_documents), shape.vision)
    notes = [note for row in rows for note in row.notes]
    # Told once, so it may have been told of a row.
    measured.noted.update(reason for reason, _ in notes if reason == "ignored_field")
    fill = _fill(packer, -(-sum(measured.lengths) // training.sequence_length), training.sequence_length)
    heading = f"{measured.num_samples:,} of {samples.num_documents:,} samples measured"
    cursors = [packer.first_cursor(number) for number in range(training.global_batch_size)]
    last_step = most_rows(dealt, cursors, training.sequence_length) if training.epochs else 0
    if side.share:
        held_out = sum(map(len, open_sources(config.data, side._replace(is_held_out=True))))
        heading += f"; validation.share = {side.share:g} holds {held_out:,} more out"
    facts = measured.facts(samples.num_documents, fill, config, last_step)
    print(data_in_words(config.data))
    print("\n".join([f"{heading}:", histogram(measured.bins()), *facts]))
    if options.html is not None:
        notes = [*dict.fromkeys([*notes, *measured.notes])]
        html = page(" ".join(rest), rows, tokenizer, shape.vision, [heading, *facts], measured.bins(), notes)
        content = html.encode(errors="replace")
        _write(options.html, content, "wb")
        print(f"{options.html}: {len(content):,} bytes")


if __name__ == "__main__":
    with exit_on_error():
        main(sys.argv[1:])
