"""Files of data: which of them an entry of `data.path` stands for, and the cache of what is derived from them."""

import difflib
import glob
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from data.folders import files_in_folder, folder_of, once, walk
from errors import UserError, reading

T = TypeVar("T")

_PACKED = tuple(kind + packing for kind in (".jsonl", ".json", ".csv", ".tsv") for packing in ("", ".gz", ".zst"))
SUFFIXES = (*_PACKED, ".parquet", ".txt")
TOKENS_META = "tokens.json"
"""The file by which a folder is known as one that data.tokenize wrote."""
_MARKERS = (TOKENS_META, "dataset_info.json", "dataset_dict.json")
_HUB_NAME = re.compile(r"(?P<owner>[\w.-]+)/[\w.-]+(?P<subset>:[\w.-]+)?")
_ROOT = Path(__file__).resolve().parents[1]


def each_read(file: object, parts: Iterator[T]) -> Iterator[T]:
    """What an iterator makes of a file's bytes; what they make it raise is a UserError that names the file."""
    while True:
        with reading(file):
            try:
                part = next(parts)
            except StopIteration:
                return
        yield part


def suffix_of(file: str) -> str:
    """The one of SUFFIXES that a name ends in, in any case of letters, or else whatever it ends in."""
    return next((suffix for suffix in SUFFIXES if file.lower().endswith(suffix)), Path(file).suffix)


def plain_suffix(file: str) -> str:
    """What a name ends in, but for the packing."""
    return suffix_of(file).removesuffix(".gz").removesuffix(".zst")


def is_dataset(entry: str) -> bool:
    """Whether an entry of `data.path` is a folder that `datasets` or data.tokenize wrote, or a name on the Hub."""
    if os.path.isdir(entry):
        return any(os.path.exists(os.path.join(entry, marker)) for marker in _MARKERS)
    is_name = _HUB_NAME.fullmatch(entry) and suffix_of(entry) not in SUFFIXES
    return bool(is_name) and not os.path.exists(entry) and folder_of(entry) is None


def refuse_misspelt(entry: str, key: str = "data.path") -> None:
    """Raises UserError for a name on the Hub that is rather a path with a slip: asking the Hub for it takes long.

    Such a name begins like a folder that is here, or is nearly a path that is. With `:subset` it is meant as a name.
    """
    match = _HUB_NAME.fullmatch(entry)
    if match is None or match["subset"]:
        return
    owner = match["owner"]
    for root in (Path.cwd(), _ROOT):
        folders = [folder for folder in os.listdir(root) if (root / folder).is_dir()]
        inside = owner in folders
        near = [owner] if inside else difflib.get_close_matches(owner, folders, n=3, cutoff=0.75)
        paths = [f"{folder}/{path.name}" for folder in near for path in sorted((root / folder).glob("*"))]
        nearest = difflib.get_close_matches(entry, paths, n=1, cutoff=0.6 if inside else 0.8)
        if inside or nearest:
            hint = "".join(f"; did you mean {path!r}?" for path in nearest)
            raise UserError(
                f"{key} = {entry!r} does not exist: expected a path that does, or, for a data set on the Hub, "
                f"'{entry}:default'{hint}"
            )


def matches(pattern: str) -> list[str]:
    """What a path or glob stands for; a path that exists is never taken for a glob."""
    return [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)


def find_files(pattern: str, key: str = "data.path", split: str = "train") -> list[str]:
    """The files that a path, a glob or a folder stands for, by name; of a folder those of `split`. Raises UserError for
    none, or one not in SUFFIXES."""
    if found := folder_of(pattern):
        files = once(os.path.abspath(path) for path in files_in_folder(*found, split, SUFFIXES, key))
    else:
        met = [os.path.abspath(path) for path in sorted(set(matches(pattern)))]
        files = once(path for path in met if not os.path.isdir(path))
        for folder in filter(os.path.isdir, met):
            inside = [path for path in walk(folder) if suffix_of(path) in (*SUFFIXES, ".arrow")]
            if inside and not any(file.startswith(folder + os.sep) for file in files):
                raise UserError(
                    f"{key} = {pattern!r} matches the folder {folder!r} too, in which there are data: expected a glob "
                    "of files, or the folder as an entry"
                )
    if not files:
        folder, name = os.path.split(pattern)
        here = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
        nearest = difflib.get_close_matches(name, here, n=1)
        hint = "".join(f"; did you mean {os.path.join(folder, other)!r}?" for other in nearest)
        raise UserError(f"{key} = {pattern!r} matches no file: expected a file or a glob that matches some{hint}")
    for file in files:
        if not os.path.isfile(file):
            raise UserError(f"{key}: {file!r} is no file, or a link to none: expected a file")
        if suffix_of(file) not in SUFFIXES:
            raise UserError(f"{key}: {file!r} ends in {suffix_of(file)!r}: expected {', '.join(SUFFIXES)}")
    return files


def files_of(entry: str, split: str) -> list[Path]:
    """The files that an entry of `data.path` stands for, those in the folder of a dataset included; of the Hub none."""
    if not is_dataset(entry):
        return [Path(file) for file in find_files(entry, split=split)]
    return sorted(path for path in Path(entry).glob("*") if path.is_file() and not path.name.startswith("cache-"))


def cache_folder() -> Path:
    """Where `datasets` keeps what it derives from data, and so do we."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_DATASETS_CACHE") or os.path.join(home, "datasets")).expanduser()


def cached(
    files: list[str],
    what: str,
    suffix: str,
    make: Callable[[Path], None],
    is_current: Callable[[Path], bool] = lambda _: True,
) -> Path:
    """The file that `make(path)` writes for the present contents of `files`; made once, others wait for it.

    `is_current`: of one that is there, whether it need not be made again. `what` tells apart what is made of the same
    files. Raises UserError for a cache that cannot be written."""
    from filelock import FileLock

    with reading("data.path"):  # the system's errors name the file
        stats: list[Any] = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    key = json.dumps(stats + [what] * bool(what)).encode()
    with _writing_the_cache() as folder:
        path = folder / (hashlib.sha256(key).hexdigest()[:32] + suffix)

        def is_made() -> bool:
            return path.exists() and is_current(path)

        if is_made():  # all ranks may ask at once
            return path
        with FileLock(f"{path}.lock"):
            if not is_made():
                unfinished = path.with_name(f"{path.name}.unfinished")
                make(unfinished)
                os.replace(unfinished, path)
    return path


@contextmanager
def _writing_the_cache() -> Iterator[Path]:
    """The folder for what is derived. What the system refuses inside is a UserError."""
    folder = cache_folder() / "json_lines"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except OSError as error:
        raise UserError(
            f"HF_DATASETS_CACHE = {str(cache_folder())!r}: {error.strerror or error}: expected a folder that can be "
            "written, with room for what is derived from the data"
        ) from error


def check_cache() -> None:
    """Raises UserError for a cache that cannot be written."""
    with _writing_the_cache() as folder, tempfile.TemporaryFile(dir=folder):
        pass
