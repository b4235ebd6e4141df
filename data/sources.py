"""What there is to train on: files and globs as one random-access sequence of documents."""

import functools
import glob
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets

from config import find_files


class TextSource:
    """The documents of files, in the order of the files and, of a file, in its own; memory does not grow with them.

    `.jsonl`: one object a line, `.parquet`: one row, a document each; `.txt`: the whole file is one document. The
    `datasets` library turns them once into a memory-mapped Arrow file in its cache; processes that start together wait
    for the first.
    """

    def __init__(self, patterns: Sequence[str], text_key: str) -> None:
        """Raises ValueError for a pattern that matches no file, and for files that hold no text under `text_key`."""
        files = find_files(patterns)
        self._table = _open_table(files)
        self._text_key = text_key
        features = self._table.features
        if not len(self._table):
            raise ValueError(f"data.path: no document in {_name(files)}")
        if text_key not in features:
            raise ValueError(
                f"data.text_key = {text_key!r}: expected one of {', '.join(features)}, as in {_name(files)}"
            )
        if getattr(features[text_key], "dtype", None) not in ("string", "large_string"):
            raise ValueError(
                f"data.text_key = {text_key!r}: expected strings in {_name(files)}, not {features[text_key]}"
            )
        self._table = self._table.select_columns([text_key])

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> str:
        """Document `index`. Raises ValueError if it is not a string."""
        try:
            text = self._table[index][self._text_key]
        except UnicodeDecodeError as error:
            raise ValueError(f"data.path: sample {index} is not UTF-8: {error}") from None
        if not isinstance(text, str):
            raise ValueError(f"data.path: {self._text_key!r} of sample {index} is {text}, expected a string")
        return text


_READERS: dict[str, Callable[[list[str]], datasets.Dataset]] = {
    ".jsonl": datasets.Dataset.from_json,
    ".parquet": datasets.Dataset.from_parquet,
    ".txt": functools.partial(datasets.Dataset.from_text, sample_by="document"),
}


def _open_table(files: list[str]) -> datasets.Dataset:
    suffixes = sorted({Path(file).suffix for file in files})
    for suffix in suffixes:
        if suffix not in _READERS:
            file = next(file for file in files if Path(file).suffix == suffix)
            raise ValueError(f"data.path: {file!r} ends in {suffix!r}: expected {', '.join(_READERS)}")
    if len(suffixes) > 1:
        raise ValueError(f"data.path: {' and '.join(suffixes)} files together: expected one kind")
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return _READERS[suffixes[0]](list(map(glob.escape, files)))  # the library takes paths for patterns
    except StopIteration:  # no table at all in any file
        raise ValueError(f"data.path: no document in {_name(files)}") from None
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error if isinstance(error, ValueError) else error.__cause__
        if not isinstance(cause, ValueError):  # such as a full disk: not the data's fault
            raise
        raise ValueError(f"data.path: cannot read {_name(files)}: {' '.join(str(cause).split())}") from error
    finally:
        if shown:
            datasets.enable_progress_bars()


def _name(files: list[str]) -> str:
    return files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
