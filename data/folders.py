"""A folder as an entry of `data.path`: the files of one split, by its README.md if it is a copy of a Hub data set.

The README's front matter says which files belong to which split (`configs` with `data_files`); without it the files'
names do: `data/train_sft-00000-of-00003.parquet`, or a word such as `train` or `test`. Both as on the Hub.
"""

import glob
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from errors import UserError, reading

_SHARD = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*)-\d{5}-of-\d{5}")
_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_WORD = re.compile(rf"(?<![a-z])({'|'.join(_WORDS)})(?![a-z])")
_NO_DATA = ("dataset_infos.json",)
_LIKE_DATA = re.compile(r"\.(jsonl|ndjson|json|csv|tsv|parquet|arrow|txt)(\.(gz|zst|bz2|xz|lz4|zip))?$")
_LFS = b"version https://git-lfs"


def folder_of(entry: str) -> tuple[str, str] | None:
    """The folder that an entry names, and which of its README's configs: "folder", or "folder:config"."""
    if os.path.isdir(entry):
        return entry, ""
    folder, _, config = entry.rpartition(":")
    return (folder, config) if folder and config and os.path.isdir(folder) else None


def files_in_folder(folder: str, config: str, split: str, suffixes: Sequence[str], key: str) -> list[str]:
    """The data files of a split, by name. Raises UserError, which names `key` or `data.split`."""
    base, patterns = folder, None
    configs = _configs(folder)
    if configs or config:
        chosen = _chosen(configs, folder, config, key)
        base = _inside(folder, chosen.get("data_dir") or ".")
        patterns = chosen.get("data_files")
    if patterns is None:
        splits = _by_names(base, suffixes, key)
    else:
        splits = {name: _matched(base, paths) for name, paths in _patterns(patterns, folder).items()}
    if not splits:
        raise UserError(f"{key} = {folder!r}: expected a folder with files that end in {', '.join(suffixes)}")
    if "" in splits:
        return _fetched(splits[""])
    if split not in splits:
        raise UserError(f"data.split = {split!r}: expected one of {', '.join(sorted(splits))}, as in {folder!r}")
    return _fetched(splits[split])


def _configs(folder: str) -> dict[str, dict[str, Any]]:
    """The configs of a data set's card by name; none without a card, or if it has none."""
    path = Path(folder, "README.md")
    if not path.is_file():
        return {}
    from huggingface_hub.repocard import metadata_load

    with reading(path):
        card = metadata_load(path) or {}
        configs = card.get("configs") or []
        return {str(each.get("config_name", "default")): dict(each) for each in configs}


def _chosen(configs: dict[str, dict[str, Any]], folder: str, config: str, key: str) -> dict[str, Any]:
    marked = [name for name, each in configs.items() if each.get("default")]
    if config or len(configs) == 1:
        name = config or next(iter(configs))
    else:
        name = marked[0] if len(marked) == 1 else "default"
    if name not in configs:
        names = ", ".join(f"'{folder}:{other}'" for other in configs) or f"{folder!r}"
        raise UserError(f"{key} = '{folder}{':' * bool(config)}{config}': expected one of {names}, as in its README.md")
    return configs[name]


def _inside(folder: str, path: Any) -> str:
    """A path of the README's, which stays inside the folder."""
    if not isinstance(path, str) or os.path.isabs(path) or ".." in path.split("/") or "://" in path or "\0" in path:
        raise UserError(f"{folder}/README.md: {path!r:.100} in configs: expected the path of files in this folder")
    return os.path.normpath(os.path.join(folder, path))


def _patterns(data_files: Any, folder: str) -> dict[str, list[str]]:
    """`data_files` in all of the Hub's forms: of each split the paths."""
    if isinstance(data_files, list) and all(isinstance(each, dict) for each in data_files):
        given = [(each.get("split"), each.get("path")) for each in data_files]
    elif isinstance(data_files, dict):
        given = list(data_files.items())
    else:
        given = [("train", data_files)]
    splits: dict[str, list[str]] = {}
    for split, paths in given:
        if not isinstance(split, str) or not isinstance(paths, str | list) or not paths:
            raise UserError(f"{folder}/README.md: data_files {data_files!r:.100}: expected splits with paths")
        splits.setdefault(split, []).extend([paths] if isinstance(paths, str) else paths)
    return splits


def _matched(folder: str, patterns: list[str]) -> list[str]:
    files: set[str] = set()
    for pattern in patterns:
        path = _inside(folder, pattern)
        found = (
            [path] if os.path.exists(path) else glob.glob(path.replace(folder, glob.escape(folder), 1), recursive=True)
        )
        found = [inner for each in found for inner in (walk(each) if os.path.isdir(each) else [each])]
        if not found:
            raise UserError(f"{folder}/README.md: {pattern!r} in data_files: expected a path that matches a file")
        files |= set(found)
    return sorted(files)


def walk(folder: str) -> list[str]:
    """All files, in folders at any depth and behind links; nothing that is hidden."""
    files, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        is_new = os.path.realpath(root) not in seen
        seen.add(os.path.realpath(root))
        folders[:] = sorted(name for name in folders if is_new and not name.startswith("."))
        files += [os.path.join(root, name) for name in sorted(names) if is_new and not name.startswith(".")]
    return files


def once(files: Iterable[str]) -> list[str]:
    """Files, without those that were met already by another link to them or to their folder."""
    met = dict[str, str]()
    for file in files:
        met.setdefault(os.path.realpath(file), file)
    return list(met.values())


def _by_names(folder: str, suffixes: Sequence[str], key: str) -> dict[str, list[str]]:
    """The data files of a folder by the split that their names tell; all under "" if none does."""
    splits: dict[str, list[str]] = {}
    for file in walk(folder):
        name = os.path.relpath(file, folder)
        if os.path.basename(name) in _NO_DATA:
            continue
        if name.lower().endswith(tuple(suffixes)):
            splits.setdefault(_split_of(name), []).append(file)
        elif _LIKE_DATA.search(name.lower()):
            raise UserError(f"{key} = {folder!r} has {name!r}, which is not read: expected {', '.join(suffixes)}")
    if "" in splits and len(splits) > 1:
        others = ", ".join(sorted(splits.keys() - {""}))
        raise UserError(
            f"{key} = {folder!r} has files of {others}, and {os.path.relpath(splits[''][0], folder)!r}, whose name "
            f"tells no split: expected a glob, such as {os.path.join(folder, '**', '*')!r} and an ending"
        )
    return splits


def _split_of(name: str) -> str:
    shard = _SHARD.match(os.path.basename(name))
    if shard:
        return shard[1]
    words = {_WORDS[word] for word in _WORD.findall(os.path.basename(name).lower())}
    for part in reversed(Path(name).parent.parts):
        words = words or {_WORDS[word] for word in _WORD.findall(part.lower())}
    return words.pop() if len(words) == 1 else ""


def _fetched(files: list[str]) -> list[str]:
    """The files. Raises UserError for one of which a clone has but the pointer."""
    for file in files:
        if os.path.isfile(file) and os.path.getsize(file) < 1024:
            with reading(file), open(file, "rb") as opened:
                start = opened.read(len(_LFS))
            if start == _LFS:
                raise UserError(
                    f"{file} is a pointer of Git LFS: expected the file itself, as `git lfs pull` fetches it"
                )
    return files
