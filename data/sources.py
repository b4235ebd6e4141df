"""What there is to train on: each entry of `data.path` as a random-access sequence of records, whatever its kind.

Nothing is held in memory: JSON and CSV are read in place by a file that says where each record begins, tokenised
corpora and Arrow files are memory-mapped. What is derived (indices, unpacked and Arrow files) goes to the cache of
`datasets`, once a file, when a source is first asked for its length; `head` reads the first records without it.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from config.options import Data
from data.files import TOKENS_META, find_files, is_dataset, plain_suffix, refuse_misspelt
from data.held_out import ALL, Side, split
from data.packing import BadSample
from data.pieces import CsvFiles, JsonFiles, JsonLines
from data.records import Record, Source, Whole
from data.tables import Columns, ParquetFiles, SavedDataset
from data.tokens import TokenisedCorpus
from errors import UserError


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
        files = [file for file in find_files(entry, key, data.split) if data.weights or file not in seen]
        seen |= set(files)
        if files:
            yield entry, _of_files(files, data, key)


def _of_files(files: list[str], data: Data, key: str) -> Source:
    kinds = {plain_suffix(file) for file in files}
    if kinds <= {".jsonl", ".json"}:
        return JsonFiles(files) if ".json" in kinds else JsonLines(files)
    if kinds <= {".csv", ".tsv"}:
        return CsvFiles(files)
    if len(kinds) > 1:
        raise UserError(
            f"{key}: {' and '.join(sorted(kinds))} files in one entry: expected one kind, as a glob such as "
            f"{os.path.join('FOLDER', '**', '*' + min(kinds))!r} gives it"
        )
    if kinds == {".txt"}:
        if data.format == "chat":
            raise UserError(f"{key}: {files[0]!r} with data.format = 'chat': expected conversations, not text files")
        return _TextFiles(files, data.text_key)
    return ParquetFiles(files, Columns.of(data))


def _dataset(entry: str, data: Data, key: str) -> Source:
    """A tokenised corpus, a directory that `datasets` saved, or a dataset's name, with `:subset` if it has some."""
    if Path(entry, TOKENS_META).exists():
        return TokenisedCorpus(entry, data)
    if not os.path.isdir(entry):
        refuse_misspelt(entry, key)
    return SavedDataset(entry, data.split, Columns.of(data))


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
