"""Tokenises a corpus ahead of time, so that training reads tokens from memory-mapped files.

    python -m data.tokenize --config X.toml --out FOLDER [--workers N] [--section.key value ...]

Reads what [data] describes (format "text"), in the files' order. FOLDER then takes the place of `data.path`:

    tokens.json             which tokenizer, and how many documents and tokens each shard has; written last
    00000.tokens            the tokens of the shard's documents end to end, uint16 or uint32
    00000.ends              where each of them ends, int64

The end-of-document token is not stored: `data.end_of_document` appends it when it is read.
"""

import functools
import json
import multiprocessing
import os
import shutil
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from config.reading import load_config, model_config
from data.check import check_data
from data.files import TOKENS_META
from data.packing import Share
from data.samples import Samples, open_samples, shows_media
from data.tokenizer import load_tokenizer, num_ids, tokenizer_identity
from errors import OneLineParser, UserError, exit_on_error

_SHARD = 100_000  # documents

Notes = list[tuple[str, str]]  # reason and message of each document that was skipped


def _write_shard(samples: Samples, skip_bad: bool, dtype: str, folder: Path, shard: int) -> tuple[int, int, Notes]:
    """Returns the numbers of documents and of tokens, and what was skipped."""
    end = min((shard + 1) * _SHARD, samples.num_documents)
    share = Share(samples.read, stride=1, end=end, skip_bad=skip_bad, max_bad=_SHARD)
    ends = [0]
    with open(folder / f"{shard:05}.tokens", "wb") as file:
        number, sample = share.first_from(shard * _SHARD)
        while sample is not None:
            sample.tokens.astype(dtype).tofile(file)
            ends.append(ends[-1] + len(sample.tokens))
            number, sample = share.first_from(number + 1)
    np.array(ends[1:], "<i8").tofile(folder / f"{shard:05}.ends")
    return len(ends) - 1, ends[-1], share.take_notes()


def main(argv: list[str]) -> None:
    """The command line. Raises UserError, one line."""
    parser = OneLineParser(prog="python -m data.tokenize", description="Tokenises a corpus ahead of time.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, which must not exist")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; default: one a core")
    options, rest = parser.parse_known_args(argv)
    config = load_config(rest)
    shape = model_config(config)
    check_data(config, shape.vocab_size, shape.vision)
    data, out = config.data, options.out
    if data.format != "text" or data.weights:
        raise UserError(f"data.format = {data.format!r}, weights = {list(data.weights)}: expected 'text' and none")
    if shape.vision is not None and shows_media(config):
        raise UserError("data.path: shows images or videos, which cannot be tokenised ahead: expected texts alone")
    if out.exists():
        raise UserError(f"--out = {str(out)!r} exists: expected a folder that does not")
    tokenizer = load_tokenizer(data.tokenizer)
    in_order = replace(data, shuffle=False, end_of_document=False)
    samples = open_samples(in_order, tokenizer, config.training.sequence_length, config.job.seed)
    dtype = "<u2" if num_ids(tokenizer.backend_tokenizer) <= 1 << 16 else "<u4"
    unfinished = out.with_name(f".{out.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    documents, tokens, skipped = [], [], Counter[str]()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores belong to other workers
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("forkserver")) as pool:
        write = functools.partial(_write_shard, samples, data.on_bad_sample == "skip", dtype, unfinished)
        for num_documents, num_tokens, notes in pool.map(write, range(-(-samples.num_documents // _SHARD))):
            documents.append(num_documents)
            tokens.append(num_tokens)
            skipped.update(reason for reason, _ in notes)
            for reason, message in notes:
                print(f"skipped ({reason}): {message}")
    identity = tokenizer_identity(data.tokenizer)
    meta = {"tokenizer": identity, "dtype": dtype, "documents": documents, "tokens": tokens}
    (unfinished / TOKENS_META).write_text(json.dumps(meta), encoding="utf-8")
    os.replace(unfinished, out)
    counts = "".join(f", {number:,} skipped: {reason}" for reason, number in sorted(skipped.items()))
    print(f"{out}: {sum(tokens):,} tokens of {sum(documents):,} documents{counts}")


if __name__ == "__main__":
    with exit_on_error():
        main(sys.argv[1:])
