"""Tokenised corpora: what `python -m data.tokenize` wrote, checked once and read from memory-mapped files."""

import functools
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.files import TOKENS_META, cached
from data.records import Whole, part_of
from data.tokenizer import num_ids, read_tokenizer, tokenizer_identity
from errors import UserError, reading

_BLOCK = 1 << 24  # numbers looked at together


class TokenisedCorpus(Whole):
    """The tokens of all documents end to end, and where each one ends, in shards."""

    def __init__(self, folder: str, tokenizer: str) -> None:
        """Raises UserError if another tokenizer wrote it, or something is missing, damaged or not what it says."""
        self._folder = folder
        path = Path(folder, TOKENS_META)
        with reading(path):
            meta = json.loads(path.read_text(encoding="utf-8"))
            documents, tokens, self._dtype = meta["documents"], meta["tokens"], meta["dtype"]
            known = meta.get("tokenizer") or meta["tokenizer_sha256"]  # the second: of shards from before
        counts = [documents, tokens] if isinstance(documents, list) and isinstance(tokens, list) else [[None]]
        if self._dtype not in ("<u2", "<u4") or not all(
            type(n) is int and 0 <= n < 2**48 for n in itertools.chain(*counts)
        ):
            raise self._damaged(f"{TOKENS_META} has other than dtype '<u2' or '<u4' and lists of numbers")
        if len(documents) != len(tokens):
            raise self._damaged(f"{TOKENS_META} has {len(documents)} numbers of documents and {len(tokens)} of tokens")
        if known != (tokenizer_identity(tokenizer) if "tokenizer" in meta else _sha256(tokenizer)):
            raise UserError(
                f"data.path: {folder!r} was made with another tokenizer than data.tokenizer = {tokenizer!r}"
            )
        self._starts = list(itertools.accumulate(documents, initial=0))
        for shard, sizes in enumerate(zip(tokens, documents)):
            for file, number, size in zip(self._files(shard), sizes, (np.dtype(self._dtype).itemsize, 8)):
                if not file.is_file():
                    raise self._damaged(f"{file.name} is missing")
                if file.stat().st_size != number * size:
                    raise self._damaged(f"shard {shard} has not the size in {TOKENS_META}")
        self._check_contents(tokenizer)

    def _damaged(self, why: str) -> UserError:
        return UserError(f"data.path: {self._folder!r} is damaged: {why}")

    def _files(self, shard: int) -> tuple[Path, Path]:
        return Path(self._folder, f"{shard:05}.tokens"), Path(self._folder, f"{shard:05}.ends")

    def _check_contents(self, tokenizer: str) -> None:
        """All tokens are the tokenizer's, and the ends are in order: looked at once, and again when a file changes."""
        size = num_ids(read_tokenizer(tokenizer))

        def make(path: Path) -> None:
            for shard in range(len(self._starts) - 1):
                tokens, ends = map(_map, self._files(shard), (self._dtype, "<i8"))
                largest = max((int(tokens[at : at + _BLOCK].max()) for at in range(0, len(tokens), _BLOCK)), default=0)
                if largest >= size:
                    raise self._damaged(f"shard {shard} has token {largest}, the tokenizer only {size}")
                if len(ends) and (ends[0] < 0 or ends[-1] != len(tokens) or (ends[1:] < ends[:-1]).any()):
                    raise self._damaged(f"shard {shard} has documents that end where they cannot")
                if not len(ends) and len(tokens):
                    raise self._damaged(f"shard {shard} has tokens of no document")
            path.touch()

        files = [str(file) for shard in range(len(self._starts) - 1) for file in self._files(shard)]
        cached(files, f"tokens {size} {self._dtype}", ".checked", make)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> NDArray[np.unsignedinteger]:
        shard, place = part_of(index, self._starts)
        tokens, ends = map(_mapped, self._files(shard), (self._dtype, "<i8"))
        return tokens[ends[place - 1] if place else 0 : ends[place]]

    def where(self, index: int) -> str:
        return f"{self._folder}, document {index + 1}"


def _sha256(folder: str) -> str:
    """What told tokenizers apart in corpora that were written before there was `tokenizer_identity`."""
    path = Path(folder, "tokenizer.json")
    with reading(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()


def _map(path: Path, dtype: str) -> NDArray[Any]:
    """A file of numbers, memory-mapped."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)  # nothing cannot be mapped


_mapped = functools.cache(_map)  # once in each process
