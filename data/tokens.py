"""Tokenised corpora: what `python -m data.tokenize` wrote, checked once and read from memory-mapped files."""

import functools
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from config.options import Data
from data.files import TOKENS_META, cached
from data.records import Record, TokenisedChat, Whole, part_of
from data.tokenizer import num_ids, read_tokenizer, tokenizer_identity
from errors import UserError, reading

_BLOCK = 1 << 24  # numbers looked at together


CHAT_OPTIONS = ("train_on", "train_empty_thinking", "template_options")
"""Options that decide the tokens of chats, and which of them are trained on."""


def corpus_identity(data: Data) -> str:
    """Equal for equal tokens of the same texts or conversations."""
    if data.format == "text":
        return tokenizer_identity(data.tokenizer)  # the end of a document is appended when it is read
    return tokenizer_identity(data.tokenizer, data.format, data.chat_template)


class TokenisedCorpus(Whole):
    """The tokens of all documents end to end, and where each one ends, in shards."""

    def __init__(self, folder: str, data: Data) -> None:
        """Raises UserError if another tokenizer wrote it, or other options of chats, or something is missing, damaged
        or not what it says."""
        self._folder, tokenizer = folder, data.tokenizer
        path = Path(folder, TOKENS_META)
        with reading(path):
            meta = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(meta, dict):
            raise self._damaged(f"{TOKENS_META} is no table")
        documents, tokens, self._dtype = meta.get("documents"), meta.get("tokens"), meta.get("dtype", "")
        known = meta.get("tokenizer") or meta.get("tokenizer_sha256")  # the second: of shards from before
        if not isinstance(known, str):
            raise self._damaged(f"{TOKENS_META} names no tokenizer")
        held, options = meta.get("format", "text"), meta.get("options", {})
        if held not in ("text", "chat") or not isinstance(options, dict):
            raise self._damaged(f"{TOKENS_META} has other than format 'text' or 'chat' and a table of options")
        is_chat = held == "chat"
        self._kinds = ("tokens", "ends", "trained") if is_chat else ("tokens", "ends")
        if held != data.format:
            what = "conversations" if is_chat else "documents"
            raise UserError(f"data.path: {folder!r} holds the tokens of {what}: expected data.format = {held!r}")
        for name, value in options.items():
            if name in CHAT_OPTIONS and getattr(data, name) != value:
                raise UserError(
                    f"data.{name} = {getattr(data, name)!r}: expected {value!r}, with which {folder!r} was tokenised"
                )
        self._cut_to = meta.get("cut_to")
        if self._cut_to is not None and type(self._cut_to) is not int:
            raise self._damaged(f"{TOKENS_META} has cut_to = {self._cut_to!r:.60}, expected a number")
        if self._cut_to is not None and data.too_long != "truncate_left":
            raise UserError(
                f"data.too_long = {data.too_long!r}: expected 'truncate_left', with which {folder!r} was tokenised"
            )
        if is_chat and self._cut_to is None and data.too_long == "truncate_left":
            raise UserError(
                f"data.too_long = 'truncate_left': expected 'drop' or 'truncate', or {folder!r} tokenised with it: its "
                "conversations are whole, or were cut by a version that did not note it"
            )
        if (
            self._dtype not in ("<u2", "<u4")
            or not isinstance(documents, list)
            or not isinstance(tokens, list)
            or not all(type(n) is int and 0 <= n < 2**48 for n in itertools.chain(documents, tokens))
        ):
            raise self._damaged(f"{TOKENS_META} has other than dtype '<u2' or '<u4' and lists of numbers")
        if len(documents) != len(tokens):
            raise self._damaged(f"{TOKENS_META} has {len(documents)} numbers of documents and {len(tokens)} of tokens")
        if known != (corpus_identity(data) if "tokenizer" in meta else _sha256(tokenizer)):
            what = "tokenizer or chat template" if is_chat else "tokenizer"
            raise UserError(f"data.path: {folder!r} was made with another {what} than data.tokenizer = {tokenizer!r}")
        self._starts = list(itertools.accumulate(documents, initial=0))
        for shard, sizes in enumerate(zip(tokens, documents)):
            items = (np.dtype(self._dtype).itemsize, 8, 1)
            for file, number, size in zip(self._files(shard), (*sizes, sizes[0]), items):
                if not file.is_file():
                    raise self._damaged(f"{file.name} is missing")
                if file.stat().st_size != number * size:
                    raise self._damaged(f"shard {shard} has not the size in {TOKENS_META}")
        self._check_contents(tokenizer)

    def _damaged(self, why: str) -> UserError:
        return UserError(f"data.path: {self._folder!r} is damaged: {why}")

    def _files(self, shard: int) -> list[Path]:
        return _files(self._folder, shard, self._kinds)

    def _check_contents(self, tokenizer: str) -> None:
        """All tokens are the tokenizer's, and the ends are in order: looked at once, and again when a file changes."""
        size = num_ids(read_tokenizer(tokenizer))

        def make(path: Path) -> None:
            for shard in range(len(self._starts) - 1):
                tokens, ends, *trained = _arrays(self._folder, shard, self._kinds, self._dtype)
                flags = [each.view("u1") for each in trained]
                if any((each[at : at + _BLOCK] > 1).any() for each in flags for at in range(0, len(each), _BLOCK)):
                    raise self._damaged(f"shard {shard} has other than 0 and 1 for what is trained on")
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

    def __getitem__(self, index: int) -> Record:
        shard, place = part_of(index, self._starts)
        tokens, ends, *trained = _opened(self._folder, shard, self._kinds, self._dtype)
        own = slice(ends[place - 1] if place else 0, ends[place])
        return TokenisedChat(tokens[own], trained[0][own], self._cut_to) if trained else tokens[own]

    def where(self, index: int) -> str:
        return f"{self._folder}, document {index + 1}"


def _sha256(folder: str) -> str:
    """What told tokenizers apart in corpora that were written before there was `tokenizer_identity`."""
    path = Path(folder, "tokenizer.json")
    with reading(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()


def _files(folder: str, shard: int, kinds: tuple[str, ...]) -> list[Path]:
    return [Path(folder, f"{shard:05}.{kind}") for kind in kinds]


def _arrays(folder: str, shard: int, kinds: tuple[str, ...], dtype: str) -> list[NDArray[Any]]:
    """What is in a shard's files, memory-mapped. Not as memmaps: a slice of one takes ten times as long."""
    files = zip(_files(folder, shard, kinds), (dtype, "<i8", "?"))
    return [
        np.asarray(np.memmap(path, kind, "r")) if path.stat().st_size else np.empty(0, kind)  # nothing cannot be mapped
        for path, kind in files
    ]


_opened = functools.cache(_arrays)  # once in each process, and not by a corpus, which is pickled
