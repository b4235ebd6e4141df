"""What there is to train on: each entry of `data.path` as a random-access sequence of records, whatever its kind.

Nothing is held in memory: JSON Lines are read in place by a file that says where each line begins, tokenised corpora
and Arrow files are memory-mapped. What is derived (indices, unpacked and Arrow files) goes to the cache of `datasets`,
once a file.
"""

import bisect
import functools
import hashlib
import itertools
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from filelock import FileLock
from numpy.typing import NDArray

from config import TOKENS_META, Data, find_files, is_dataset, suffix_of
from data.packing import BadSample
from errors import UserError

datasets.disable_progress_bars()

Record = dict[str, Any] | NDArray[np.unsignedinteger]
"""A document's fields, or, of a tokenised corpus, its tokens."""


class Source(Protocol):
    """Records by their number. Small to pickle: a worker process opens the files itself."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...  # raises BadSample

    def where(self, index: int) -> str: ...  # the file and the line of a record


def open_sources(data: Data) -> list[Source]:
    """One source for each entry of `data.path`. Raises UserError, one line, for what is missing, empty or damaged."""
    sources, seen = [], set[str]()
    for entry in data.path:
        if is_dataset(entry):
            sources.append(_open_dataset(entry, data))
            continue
        files = [file for file in find_files(entry) if data.weights or file not in seen]
        seen |= set(files)
        if files:
            sources.append(_open_files(files, data))
    empty = [entry for entry, source in zip(data.path, sources) if data.weights and not len(source)]
    if empty or not any(map(len, sources)):
        raise UserError(f"data.path: no document in {', '.join(map(repr, empty or data.path)) or '[]'}")
    return sources


def _open_files(files: list[str], data: Data) -> Source:
    kinds = {suffix_of(file).removesuffix(".gz").removesuffix(".zst") for file in files}
    if len(kinds) > 1:
        raise UserError(f"data.path: {' and '.join(sorted(kinds))} files in one entry: expected one kind")
    if kinds == {".jsonl"}:
        return JsonLines(files)
    if kinds == {".txt"}:
        return _TextFiles(files, data.text_key)
    rows = [_readable(file, lambda name: pa.parquet.read_metadata(name).num_rows) for file in files]
    if not any(rows):
        return _TextFiles([], "")
    full = [file for file, num_rows in zip(files, rows) if num_rows]  # `datasets` cannot open the others
    table = _readable(", ".join(full), lambda _: datasets.Dataset.from_parquet(full))
    return _Table(table, files, rows, data)


def _open_dataset(entry: str, data: Data) -> Source:
    """A tokenised corpus, a directory that `datasets` saved, or a dataset's name, with `:subset` if it has some."""
    if Path(entry, TOKENS_META).exists():
        try:
            return TokenisedCorpus(entry, data.tokenizer)
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise UserError(f"data.path: {entry!r} is damaged: {error!r}") from None
    if os.path.isdir(entry):
        table = _readable(entry, datasets.load_from_disk)
    else:
        name, _, subset = entry.partition(":")
        table = _readable(entry, lambda _: datasets.load_dataset(name, subset or None))
    if isinstance(table, dict):
        if data.split not in table:
            raise UserError(f"data.split = {data.split!r}: expected one of {', '.join(table)}, as in {entry!r}")
        table = table[data.split]
    return _Table(table, [entry], [len(table)], data)


def _readable(name: str, function: Callable[[str], Any]) -> Any:
    """`function(name)`, with what a library says of unusable data turned into one line."""
    try:
        return function(name)
    except (ValueError, OSError, EOFError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno is not None and not isinstance(cause, FileNotFoundError):
            raise  # such as a full disk: not the data's fault
        raise UserError(f"data.path: cannot read {name}: {' '.join(str(cause).split())}") from error


@functools.cache
def _mapped(path: Path, dtype: str) -> NDArray[Any]:
    """A file of numbers, mapped once in each process."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)  # nothing cannot be mapped


class JsonLines:
    """`.jsonl`, also packed with gzip or zstd: an object a line, empty lines aside. Found by an index of the lines."""

    def __init__(self, files: list[str]) -> None:
        self._files = files
        self._plain = [_unpacked(file) for file in files]
        self._index = _line_index(self._plain)

    def _place(self, index: int) -> list[int]:
        """The file, the offset in it, and the line."""
        return np.fromfile(self._index, "<i8", count=3, offset=24 * index).tolist()

    def __len__(self) -> int:
        return self._index.stat().st_size // 24

    def __getitem__(self, index: int) -> Record:
        file, offset, _ = self._place(index)
        with open(self._plain[file], "rb") as lines:  # kept open, many files would be too many
            lines.seek(offset)
            line = lines.readline()
        try:
            record = json.loads(line)
        except UnicodeDecodeError as error:
            raise BadSample("undecodable", f"is not UTF-8: {error}") from None
        except (ValueError, RecursionError) as error:
            raise BadSample("not_json", f"is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise BadSample("not_json", f"is {record!r:.60}, expected a JSON object")
        return record

    def where(self, index: int) -> str:
        file, _, line = self._place(index)
        return f"{self._files[file]}, line {line}"


class _TextFiles:
    """`.txt`: a file is a document."""

    def __init__(self, files: list[str], text_key: str) -> None:
        self._files, self._text_key = files, text_key

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        try:
            return {self._text_key: Path(self._files[index]).read_text(encoding="utf-8")}
        except UnicodeDecodeError as error:
            raise BadSample("undecodable", f"is not UTF-8: {error}") from None

    def where(self, index: int) -> str:
        return self._files[index]


class _Table:
    """A table of `datasets`: `.parquet` files, once turned into Arrow files in the cache, or a dataset of its own."""

    def __init__(self, table: datasets.Dataset, names: list[str], rows: list[int], data: Data) -> None:
        """`rows`: how many come from each of `names`."""
        key, others = ("text_key", []) if data.format == "text" else ("messages_key", [data.tools_key])
        name = getattr(data, key)
        if name not in table.features:
            raise UserError(f"data.{key} = {name!r}: expected one of {', '.join(table.features)}, as in {names[0]}")
        self._table = table.select_columns([name, *(other for other in others if other in table.features)])
        self._names, self._starts = names, list(itertools.accumulate(rows, initial=0))

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Record:
        try:
            return self._table[index]
        except UnicodeDecodeError as error:
            raise BadSample("undecodable", f"is not UTF-8: {error}") from None

    def where(self, index: int) -> str:
        place = bisect.bisect_right(self._starts, index) - 1
        return f"{self._names[place]}, row {index - self._starts[place] + 1}"


class TokenisedCorpus:
    """What `python -m data.tokenize` wrote: the tokens of all documents end to end, and where each one ends."""

    def __init__(self, folder: str, tokenizer: str) -> None:
        """Raises UserError if another tokenizer wrote it, or something is missing."""
        meta = json.loads(Path(folder, TOKENS_META).read_text(encoding="utf-8"))
        if meta["tokenizer_sha256"] != tokenizer_sha256(tokenizer):
            raise UserError(
                f"data.path: {folder!r} was made with another tokenizer than data.tokenizer = {tokenizer!r}"
            )
        self._folder, self._dtype = folder, meta["dtype"]
        self._starts = list(itertools.accumulate(meta["documents"], initial=0))
        for shard, (num_documents, num_tokens) in enumerate(zip(meta["documents"], meta["tokens"])):
            tokens, ends = self._shard(shard)
            if (len(ends), len(tokens)) != (num_documents, num_tokens):
                raise UserError(f"data.path: {folder!r} is damaged: shard {shard} has not the size in {TOKENS_META}")

    def _shard(self, shard: int) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]:
        tokens, ends = Path(self._folder, f"{shard:05}.tokens"), Path(self._folder, f"{shard:05}.ends")
        return _mapped(tokens, self._dtype), _mapped(ends, "<i8")

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Record:
        shard = bisect.bisect_right(self._starts, index) - 1
        place, (tokens, ends) = index - self._starts[shard], self._shard(shard)
        return tokens[ends[place - 1] if place else 0 : ends[place]]

    def where(self, index: int) -> str:
        return f"{self._folder}, document {index + 1}"


def tokenizer_sha256(folder: str) -> str:
    """What tells tokenizers apart."""
    return hashlib.sha256(Path(folder, "tokenizer.json").read_bytes()).hexdigest()


def _cached(files: Iterable[str], suffix: str, make: Callable[[Path], None]) -> Path:
    """The file that `make(path)` writes for the present contents of `files`; made once, others wait for it."""
    stats = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "json_lines"
    path = folder / (hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:32] + suffix)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            unfinished = path.with_name(f"{path.name}.unfinished")
            make(unfinished)
            os.replace(unfinished, path)
    return path


def _unpacked(file: str) -> str:
    """A file of the cache with what a `.gz` or `.zst` holds; any other as it is."""
    if suffix_of(file) == ".jsonl":
        return file

    def make(path: Path) -> None:
        with pa.input_stream(file) as packed, open(path, "wb") as plain:  # knows the compression by the name
            shutil.copyfileobj(packed, plain)

    return _readable(file, lambda _: str(_cached([file], ".jsonl", make)))


def _line_index(files: list[str]) -> Path:
    """Writes (file, offset, line number from 1) of each line of two characters or more: fewer make no object."""

    def make(path: Path) -> None:
        with open(path, "wb") as index:
            for number, file in enumerate(files):
                offset = 0
                with open(file, "rb") as lines:
                    for line_number, line in enumerate(lines, 1):
                        if len(line.rstrip(b"\n")) > 1:
                            index.write(struct.pack("<3q", number, offset, line_number))
                        offset += len(line)

    return _cached(files, ".index", make)
