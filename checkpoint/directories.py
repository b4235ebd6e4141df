"""Directories that readers see complete or not at all: they get their name last, and lose it first.

A checkpoint's manifest.json, written after everything else, tells every other file's size and CRC-32.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpoint.files import file_size, read_json
from errors import UserError, reading

_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE}
MANIFEST = "manifest.json"
STEP = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,17})")
"""The names of complete checkpoints: the step in eight digits, or in more if it has more."""


def complete_checkpoints(folder: Path) -> list[Path]:
    """Whatever bears a complete checkpoint's name in a run's `checkpoints` folder, oldest first. What is no directory,
    say a link to a disk that is not there, is a damaged one."""
    found = [path for path in folder.glob("step-*") if STEP.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def check_is_new(folder: Path) -> None:
    """Raises UserError if a run's `checkpoints` folder holds complete ones, for a run that is to resume from none."""
    if existing := complete_checkpoints(folder):
        raise UserError(
            f"checkpoint.resume = 'never': {str(folder)!r} holds {existing[-1].name} of an earlier run: expected "
            "another job.output_dir"
        )


def find_checkpoint(path: Path) -> Path:
    """`path` itself if it is a checkpoint, else the newest of the run whose output_dir it is. Raises UserError."""
    with reading(path):
        if (path / ".metadata").exists() or (path / MANIFEST).exists():
            return path
    found = complete_checkpoints(path / "checkpoints")
    if not found:
        raise UserError(f"{path}: expected a checkpoint, or a run's output_dir with a complete one in checkpoints/")
    return found[-1]


def describe_files(folder: Path, paths: list[Path]) -> dict[str, dict[str, int]]:
    """What a manifest says of these files, by their path in `folder`."""
    return {str(path.relative_to(folder)): {"size": path.stat().st_size, "crc32": _crc32(path)} for path in paths}


def write_manifest(folder: Path, known: dict[str, dict[str, int]] | None = None) -> None:
    """Writes the list of `folder`'s files, of which some are `known` already, and makes sure that what it lists is on
    disk before it is."""
    _flush_all(folder)
    files = dict(known or {})
    others = {path for path in folder.rglob("*") if path.is_file()} - {folder / name for name in (*files, MANIFEST)}
    files |= describe_files(folder, sorted(others))
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")


def find_damage(folder: Path, share: int = 0, num_shares: int = 1) -> str | None:
    """What is wrong with a checkpoint's files, or None; with several shares, each looks at its part of them."""
    try:
        for name, (size, crc32) in sorted(_read_manifest(folder).items())[share::num_shares]:
            path = folder / name
            if (found := file_size(path)) != size:
                return f"{path} has {found} bytes instead of {size}"
            with reading(path):
                if _crc32(path) != crc32:
                    return f"{path} is corrupted (CRC-32)"
    except UserError as error:
        return str(error)
    return None


def check_files(folder: Path) -> None:
    """Raises UserError for what `find_damage` finds. A plain DCP directory, which no run wrote, needs no manifest."""
    is_ours = STEP.fullmatch(folder.resolve().name) or (folder / "config.toml").exists()
    if (is_ours or os.path.lexists(folder / MANIFEST)) and (damage := find_damage(folder)):
        raise UserError(damage)


def _read_manifest(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and CRC-32 of each file: all lie in `folder`, and all that a reader might open are among them."""
    path, files = folder / MANIFEST, {}
    with reading(path):
        entries = read_json(path)["files"]
        root = folder.resolve()
        for name, said in dict(entries).items():
            numbers, parts = (said["size"], said["crc32"]), Path(name).parts
            plain = len(name) < 256 and ".." not in parts and not Path(name).is_absolute()
            if not plain or not (root / name).resolve().is_relative_to(root):
                raise ValueError(f"{name!r:.100} is no file in its folder")
            if not all(type(number) is int and number >= 0 for number in numbers):
                raise ValueError(f"it does not tell the size and CRC-32 of {name!r}")
            files[name] = numbers
    of_hf = [path for pattern in ("[!.]*", "[!.]*/**/*") for path in folder.glob(f"hf/{pattern}")]
    read = [folder / ".metadata", *folder.glob("*.distcp"), *folder.glob("run.json")]
    read += [path for path in of_hf if path.is_symlink() or not path.is_dir()]
    if unlisted := sorted({str(file.relative_to(folder)) for file in read} - files.keys()):
        raise UserError(f"{path} does not list {unlisted[0]!r}: expected the folder as the run left it")
    return files


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb", buffering=0) as file:
        while data := file.read(1 << 24):
            value = zlib.crc32(data, value)
    return value


@contextmanager
def new_directory(out: Path, source: Path) -> Iterator[Path]:
    """Yields a directory to fill, which takes the name `out` when the block ends well and vanishes when it does not.

    Raises UserError if `out` exists, unless it is an empty directory, if it cannot be made, lies in `source` or is made
    by another process, and if the disk gets full or fails.
    """
    check_is_free(out)
    with reading(out):
        out = out.resolve()
        if out.is_relative_to(source.resolve()):
            raise UserError(f"{out} lies in {source}, which is read: expected another place")
    unfinished = out.with_name(f".{out.name}.unfinished")
    try:
        if unfinished.is_dir():
            os.close(_lock(unfinished))
        make_afresh(unfinished)
        lock = _lock(unfinished)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from error
    try:
        yield unfinished
        publish(unfinished, out)
    except UserError:
        raise
    except Exception as error:
        if cause := disk_error(error):
            raise UserError(f"{out} cannot be written: {cause.strerror}") from error
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        os.close(lock)


def disk_error(error: BaseException | None) -> OSError | None:
    """What the disk said, if that is what an error came from: torch.save makes another error of it."""
    while error and not (isinstance(error, OSError) and error.errno in _OF_THE_DISK):
        error = error.__context__
    return error if isinstance(error, OSError) else None


def _lock(folder: Path) -> int:
    """A descriptor of a directory that others cannot lock until it is closed. Raises UserError if another has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{folder} is being written by another process: expected its end, or another place") from None
    except OSError:
        pass  # no locks on this file system
    return descriptor


def check_is_free(out: Path) -> None:
    """Raises UserError if something stands where a new directory is to be made."""
    with reading(out):
        if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} exists: expected a new or an empty directory")


def make_afresh(unfinished: Path) -> None:
    """An empty directory in place of what a process that was killed left there."""
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)


def publish(unfinished: Path, final: Path) -> None:
    """Gives a finished directory its name, in place of what bears it; by then its contents survive a power cut."""
    _flush_all(unfinished)
    before = _hide(final) if os.path.lexists(final) else None
    unfinished.rename(final)
    _flush(final.parent)
    if before:
        _delete(before)


def remove(folder: Path) -> None:
    """Deletes a directory whose name readers know."""
    _delete(_hide(folder))


def _delete(path: Path) -> None:
    """A directory with its contents; a link, and not what it names; a file."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def tidy(folder: Path) -> None:
    """Clears what killed runs left among the checkpoints in `folder`.

    One that was complete and had not got its name yet gets it, where none bears it: the one that it was to replace may
    have lost the name already.
    """
    for path in sorted(folder.glob(".step-*")):
        final = folder / path.name.removeprefix(".")
        is_named = STEP.fullmatch(final.name) and not path.is_symlink()
        if is_named and not os.path.lexists(final) and find_damage(path) is None:
            publish(path, final)
        else:
            _delete(path)


def _hide(folder: Path) -> Path:
    leaving = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(leaving, ignore_errors=True)  # left by a process that was killed
    return folder.rename(leaving)


def _flush_all(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        if path.is_file() or path.is_dir():  # a pipe cannot be opened without its other end
            _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
