"""Tokenises a corpus ahead of time, so that training reads tokens from memory-mapped files.

    python -m data.tokenize --config X.toml --out FOLDER [--workers N] [--section.key value ...]

Reads what [data] describes, in the files' order. FOLDER then takes the place of `data.path`:

    tokens.json             which tokenizer, and how many documents and tokens each shard has; written last
    00000.tokens            the tokens of the shard's documents end to end, uint16 or uint32
    00000.ends              where each of them ends, int64
    00000.trained           of chats: 1 for each token that is trained on, else 0, uint8

Conversations are stored whole: `data.too_long` is asked when they are read. With "truncate_left" they are cut now, for
rows of this length alone. The end-of-document token is not stored: `data.end_of_document` appends it when it is read.
"""

import contextlib
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
from data.packing import USED, Share
from data.samples import Samples, open_samples, shows_media
from data.tokenizer import load_tokenizer, num_ids
from data.tokens import CHAT_OPTIONS, corpus_identity
from errors import OneLineParser, UserError, exit_on_error

_SHARD = 100_000  # documents

Notes = list[tuple[str, str]]  # reason and message, of documents that were skipped or not used as they are


def _write_shard(
    samples: Samples, skip_bad: bool, is_chat: bool, dtype: str, folder: Path, shard: int
) -> tuple[int, int, Notes]:
    """Returns the numbers of documents and of tokens, and notes."""
    end = min((shard + 1) * _SHARD, samples.num_documents)
    share = Share(samples.reader(), stride=1, end=end, skip_bad=skip_bad, max_bad=_SHARD)
    ends = [0]
    with contextlib.ExitStack() as files:
        file = files.enter_context(open(folder / f"{shard:05}.tokens", "wb"))
        trained = files.enter_context(open(folder / f"{shard:05}.trained", "wb")) if is_chat else None
        number, sample = share.first_from(shard * _SHARD)
        while sample is not None:
            sample.tokens.astype(dtype).tofile(file)
            if trained is not None:
                is_trained = sample.is_trained.astype("u1")
                is_trained[0] = 0  # nothing predicts it
                is_trained.tofile(trained)
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
    data, out = config.data, options.out
    is_chat, length = data.format == "chat", config.training.sequence_length
    is_cut = data.too_long == "truncate_left"
    max_tokens = sys.maxsize if is_chat and not is_cut else length
    as_stored = replace(config, training=replace(config.training, sequence_length=max_tokens))
    check_data(as_stored, shape.vocab_size, shape.vision)
    if data.weights:
        raise UserError(f"data.weights = {list(data.weights)}: expected none: shards are mixed when they are read")
    if shape.vision is not None and shows_media(config):
        raise UserError("data.path: shows images or videos, which cannot be tokenised ahead: expected texts alone")
    if out.exists():
        raise UserError(f"--out = {str(out)!r} exists: expected a folder that does not")
    tokenizer = load_tokenizer(data.tokenizer)
    in_order = replace(data, shuffle=False, end_of_document=False)
    samples = open_samples(in_order, tokenizer, max_tokens, config.job.seed)
    dtype = "<u2" if num_ids(tokenizer.backend_tokenizer) <= 1 << 16 else "<u4"
    unfinished = out.with_name(f".{out.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    documents, tokens, counts = [], [], Counter[str]()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores belong to other workers
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("forkserver")) as pool:
        write = functools.partial(_write_shard, samples, data.on_bad_sample == "skip", is_chat, dtype, unfinished)
        for num_documents, num_tokens, notes in pool.map(write, range(-(-samples.num_documents // _SHARD))):
            documents.append(num_documents)
            tokens.append(num_tokens)
            for reason, message in notes:
                became = "used, but" if reason in USED else "skipped"
                counts[f"{became} {reason}" if reason in USED else f"{became}: {reason}"] += 1
                print(f"{became} ({reason}): {message}")
    meta: dict[str, object] = {
        "tokenizer": corpus_identity(data),
        "dtype": dtype,
        "documents": documents,
        "tokens": tokens,
    }
    if is_chat:
        meta |= {"format": "chat", "options": {name: getattr(data, name) for name in CHAT_OPTIONS}}
        meta |= {"cut_to": length} if is_cut else {}
    (unfinished / TOKENS_META).write_text(json.dumps(meta), encoding="utf-8")
    os.replace(unfinished, out)
    counted = "".join(f", {number:,} {what}" for what, number in sorted(counts.items()))
    print(f"{out}: {sum(tokens):,} tokens of {sum(documents):,} documents{counted}")


if __name__ == "__main__":
    with exit_on_error():
        main(sys.argv[1:])
