"""What there is to train on: each entry of `data.path` as a random-access sequence of records, whatever its kind.

Nothing is held in memory: JSON Lines are read in place by a file that says where each line begins, tokenised corpora
and Arrow files are memory-mapped. What is derived (indices, unpacked and Arrow files) goes to the cache of `datasets`,
once a file, when a source is first asked for its length; `head` reads the first records without it.
"""

import functools
import io
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from config.options import Data
from data.files import TOKENS_META, cached, each_read, find_files, is_dataset, refuse_misspelt, suffix_of
from data.held_out import ALL, Side, split
from data.packing import BadSample
from data.records import Record, Source, Whole
from data.tables import ParquetFiles, SavedDataset, columns_of
from data.tokens import TokenisedCorpus
from errors import UserError, reading

_MAX_LINE = 1 << 26  # bytes: what is longer is no document, and would not fit into memory as tokens


def open_sources(data: Data, side: Side = ALL) -> list[Source]:
    """One source for each entry of `data.path`. Raises UserError, one line, for what is missing, empty or damaged.
    `side`: which of their samples are meant, if some are held out."""
    sources = [split(source, entry, data, side) for entry, source in declared_sources(data)]
    empty = [entry for entry, source in zip(data.path, sources) if data.weights and not len(source)]
    if side.share and (empty or not any(map(len, sources))):
        left = "held out of" if side.is_held_out else "left to train on in"
        raise UserError(
            f"validation.share = {side.share}: nothing is {left} {', '.join(map(repr, empty or data.path))}: expected "
            f"a {'larger' if side.is_held_out else 'smaller'} share, or more samples"
        )
    if empty or not any(map(len, sources)):
        raise UserError(f"data.path: no document in {', '.join(map(repr, empty or data.path)) or '[]'}")
    return sources


def declared_sources(data: Data, key: str = "data.path") -> Iterator[tuple[str, Source]]:
    """The entries and their sources, of which nothing but names is read yet. A file that an earlier entry has is left
    out, unless there are weights. Raises UserError, which names `key`."""
    seen = set[str]()
    for entry in data.path:
        if is_dataset(entry):
            yield entry, _dataset(entry, data, key)
            continue
        files = [file for file in find_files(entry, key) if data.weights or file not in seen]
        seen |= set(files)
        if files:
            yield entry, _of_files(files, data, key)


def _of_files(files: list[str], data: Data, key: str) -> Source:
    kinds = {suffix_of(file).removesuffix(".gz").removesuffix(".zst") for file in files}
    if len(kinds) > 1:
        raise UserError(f"{key}: {' and '.join(sorted(kinds))} files in one entry: expected one kind")
    if kinds == {".jsonl"}:
        return JsonLines(files)
    if kinds == {".txt"}:
        if data.format == "chat":
            raise UserError(f"{key}: {files[0]!r} with data.format = 'chat': expected conversations, not text files")
        return _TextFiles(files, data.text_key)
    return ParquetFiles(files, *columns_of(data))


def _dataset(entry: str, data: Data, key: str) -> Source:
    """A tokenised corpus, a directory that `datasets` saved, or a dataset's name, with `:subset` if it has some."""
    if Path(entry, TOKENS_META).exists():
        if data.format == "chat":
            raise UserError(f"{key}: {entry!r} with data.format = 'chat': expected conversations, not tokens")
        return TokenisedCorpus(entry, data.tokenizer)
    if not os.path.isdir(entry):
        refuse_misspelt(entry, key)
    return SavedDataset(entry, data.split, *columns_of(data))


class JsonLines:
    """`.jsonl`, also packed with gzip or zstd: an object a line, empty lines aside. Found by an index of the lines."""

    def __init__(self, files: list[str]) -> None:
        self._files = files

    @functools.cached_property
    def _plain(self) -> list[str]:
        return [_unpacked(file) for file in self._files]

    @functools.cached_property
    def _index(self) -> Path:
        """The file that says (file, offset, line number) of each line that `_lines` gives."""

        def make(path: Path) -> None:
            with open(path, "wb") as index:
                for number, file in enumerate(self._plain):
                    with _open_packed(file) as lines:
                        for offset, line_number, _ in _lines(lines, file):
                            index.write(struct.pack("<3q", number, offset, line_number))

        return cached(self._plain, "", ".index", make)

    def _place(self, index: int) -> list[int]:
        """The file, the offset in it, and the line."""
        return np.fromfile(self._index, "<i8", count=3, offset=24 * index).tolist()

    def __len__(self) -> int:
        return self._index.stat().st_size // 24

    def __getitem__(self, index: int) -> Record:
        file, offset, _ = self._place(index)
        with open(self._plain[file], "rb") as lines:  # kept open, many files would be too many
            lines.seek(offset)
            line = lines.readline(_MAX_LINE + 1)
        return _parsed(line, is_first=not offset)

    def where(self, index: int) -> str:
        file, _, line = self._place(index)
        return f"{self._files[file]}, line {line}"

    def head(self) -> Iterator[tuple[str, Callable[[], Record]]]:
        for file in self._files:
            with _open_packed(file) as lines:
                for offset, number, line in _lines(lines, file):
                    yield f"{file}, line {number}", functools.partial(_parsed, line, not offset)


def _parsed(line: bytes, is_first: bool) -> Record:
    """The object in a line, of which more than _MAX_LINE bytes need not be given."""
    if len(line) > _MAX_LINE:
        raise BadSample("too_long", f"is a line of more than {_MAX_LINE:,} bytes")
    try:
        record = json.loads(line.decode("utf-8-sig" if is_first else "utf-8"))
    except UnicodeDecodeError as error:
        raise BadSample("undecodable", f"is not UTF-8: {error}") from None
    except (ValueError, RecursionError) as error:
        raise BadSample("not_json", f"is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise BadSample("not_json", f"is {record!r:.60}, expected a JSON object")
    return record


def _lines(file: BinaryIO, name: str) -> Iterator[tuple[int, int, bytes]]:
    """Offset, line number from 1, and content of each line of two characters or more: fewer make no object. Of a line
    of more than _MAX_LINE bytes only the beginning is kept."""
    offset = number = 0
    is_rest = False  # of the line before
    for line in each_read(name, iter(lambda: file.readline(_MAX_LINE + 1), b"")):
        if not is_rest:
            number += 1
            if len(line.rstrip(b"\n")) > 1:
                yield offset, number, line
        offset += len(line)
        is_rest = not line.endswith(b"\n")


class _TextFiles(Whole):
    """`.txt`: a file is a document."""

    def __init__(self, files: list[str], text_key: str) -> None:
        self._files, self._text_key = files, text_key

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        try:
            return {self._text_key: Path(self._files[index]).read_text(encoding="utf-8-sig")}
        except UnicodeDecodeError as error:
            raise BadSample("undecodable", f"is not UTF-8: {error}") from None

    def where(self, index: int) -> str:
        return self._files[index]


def _open_packed(file: str) -> BinaryIO:
    """What a file holds, or what a `.gz` or `.zst` file does."""
    with reading(file):
        if suffix_of(file) == ".jsonl":
            return open(file, "rb")
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(file))  # knows the compression by the name


def _unpacked(file: str) -> str:
    """A file of the cache with what a `.gz` or `.zst` holds; any other as it is."""
    if suffix_of(file) == ".jsonl":
        return file

    def make(path: Path) -> None:
        with _open_packed(file) as packed, open(path, "wb") as plain:
            plain.writelines(each_read(file, iter(lambda: packed.read(1 << 20), b"")))

    return str(cached([file], "", ".jsonl", make))
