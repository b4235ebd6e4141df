"""Directories that readers see complete or not at all: they get their name last, and lose it first."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yields a directory to fill, which takes the name `out` when the block ends well and vanishes when it does not.

    Raises ValueError if `out` exists, unless it is an empty directory.
    """
    if is_taken(out):
        raise ValueError(f"{out} exists: expected a new or an empty directory")
    out = out.resolve()
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        publish(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def is_taken(out: Path) -> bool:
    """Whether something stands where a new directory is to be made."""
    return out.exists() and (not out.is_dir() or any(out.iterdir()))


def publish(unfinished: Path, final: Path) -> None:
    """Gives a finished directory its name, in place of what bears it; by then its contents survive a power cut."""
    for path in (*unfinished.rglob("*"), unfinished):
        _flush(path)
    before = _hide(final) if final.exists() else None
    unfinished.rename(final)
    _flush(final.parent)
    if before:
        shutil.rmtree(before)


def remove(folder: Path) -> None:
    """Deletes a directory whose name readers know."""
    shutil.rmtree(_hide(folder))


def _hide(folder: Path) -> Path:
    leaving = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(leaving, ignore_errors=True)  # left by a process that was killed
    return folder.rename(leaving)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
