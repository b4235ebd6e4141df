"""Shows what will be trained on, before it costs anything: the packed rows, decoded, and what an epoch comes to.

    python -m data.preview --config X.toml [--rows N] [--samples N] [--section.key value ...]

Trained tokens are green, all others grey; a bar begins each document of a row, and fillers are shown by their number.
"""

import sys
from collections import Counter
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from config.reading import load_config, model_config
from data.batch import Row
from data.check import check_data
from data.loader import Packer
from data.media import media_settings
from data.packing import BadSample
from data.samples import open_samples
from data.tokenizer import load_tokenizer
from errors import OneLineParser, UserError, exit_on_error
from models.ops.labels import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_GREEN, _GREY, _BAR, _PLAIN = "\033[32m", "\033[90m", "\033[1;31m", "\033[0m"


def show_row(row: Row, tokenizer: "PreTrainedTokenizerFast", colours: bool) -> str:
    """A row as text. Without colours, what is trained on stands in «guillemets»."""
    # A label stands at the token before: the first of a document is never trained on.
    is_trained = np.concatenate(([False], row.labels[:-1] != IGNORED))
    on, off, bar, plain = (_GREEN, _GREY, _BAR, _PLAIN) if colours else ("«", "", "", "")
    parts, start = [], 0
    for length in row.lengths:
        parts.append(f"{bar}|{plain}")
        if start == len(row.tokens) - row.num_fillers:
            parts.append(f"{off}({row.num_fillers} fillers){plain}")
            break
        is_trained[start] = False
        for trained, places in groupby(range(start, start + length), lambda place: bool(is_trained[place])):
            text = tokenizer.decode(row.tokens[list(places)].tolist())
            parts.append(f"{on if trained else off}{text}{plain if colours else '»' if trained else ''}")
        start += length
    return "".join(parts)


def histogram(lengths: list[int]) -> str:
    """How many samples have 1, 2 to 3, 4 to 7, ... tokens."""
    bins = Counter(length.bit_length() for length in lengths)
    lines = []
    for bits in range(min(bins), max(bins) + 1):
        bar = "#" * round(50 * bins[bits] / max(bins.values()))
        lines.append(f"{1 << bits - 1:>9,} to {(1 << bits) - 1:>9,} tokens  {bins[bits]:>7,}  {bar}")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """The command line. Raises UserError, one line."""
    parser = OneLineParser(prog="python -m data.preview", description="Shows what will be trained on.")
    parser.add_argument("--rows", type=int, default=2, help="rows to show")
    parser.add_argument("--samples", type=int, default=1000, help="samples to measure")
    options, rest = parser.parse_known_args(argv)
    config = load_config(rest)
    shape = model_config(config)
    check_data(config, shape.vocab_size, shape.vision)
    training, tokenizer = config.training, load_tokenizer(config.data.tokenizer)
    media = media_settings(config, shape.vision)
    samples = open_samples(config.data, tokenizer, training.sequence_length, config.job.seed, media)

    noted = Counter[str]()
    packer = Packer(samples, config.data, tokenizer.eos_token_id or 0, training.global_batch_size, False)
    for number in range(min(options.rows, training.global_batch_size)):
        row = packer.slot(packer.first_cursor(number)).next_row(training.sequence_length)
        noted.update(reason for reason, _ in row.notes if reason == "ignored_field")  # told once, so it may be here
        print(f"Row {number}: {len(row.lengths)} documents\n{show_row(row, tokenizer, sys.stdout.isatty())}\n")

    lengths, num_trained, skipped = [], 0, Counter[str]()
    num_measured = min(options.samples, samples.num_documents)
    for number in range(num_measured):
        try:
            sample = samples.read(number)
        except BadSample as error:
            skipped[error.reason] += 1
            continue
        if sample.note is not None:
            noted[sample.note[0]] += 1
        lengths.append(len(sample.tokens))
        num_trained += int((sample.labels != IGNORED).sum())
    if not lengths:
        raise UserError(f"data.path: none of {num_measured} samples can be used: {dict(skipped)}")
    slot = Packer(samples, config.data, 0, 1, False).slot(packer.first_cursor(0))
    rows = [slot.next_row(training.sequence_length) for _ in range(-(-sum(lengths) // training.sequence_length))]
    fill = 1 - sum(row.num_fillers for row in rows) / (len(rows) * training.sequence_length)
    tokens = sum(lengths) / num_measured * samples.num_documents
    about = "" if num_measured == samples.num_documents else "about "
    print(f"{num_measured:,} of {samples.num_documents:,} samples measured:")
    print(histogram(lengths))
    for reason, count in sorted(skipped.items()):
        print(f"skipped ({reason}): {count:,}, {count / num_measured:.2%}")
    for reason, count in sorted(noted.items()):
        print(f"used, but {reason}: {count:,}")
    print(f"rows are {fill:.1%} full, and {num_trained / sum(lengths):.1%} of the tokens in them are trained on")
    steps = tokens / fill / training.sequence_length / training.global_batch_size
    print(f"an epoch has {about}{tokens:,.0f} tokens, {steps:,.1f} steps; training.steps = {training.steps:,} are")
    print(f"{training.steps / steps:,.2f} epochs")


if __name__ == "__main__":
    with exit_on_error():
        main(sys.argv[1:])
