"""What goes wrong with DCP's files is told as the disk tells it, on every rank and in one line."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Never

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from checkpoint.writer import Writer, one_line
from errors import UserError

FULL = OSError(errno.ENOSPC, "No space left on device", "/disk/__0_0.distcp")


def behind(cause: Exception) -> RuntimeError:
    """As torch.save makes another error of the disk's."""
    try:
        try:
            raise cause
        finally:
            raise RuntimeError("unexpected pos 704 vs 598\nand more")
    except RuntimeError as error:
        return error


def failing(error: Exception) -> Callable[..., Never]:
    def write_data(*_: object) -> Never:
        raise error

    return write_data


@pytest.mark.parametrize("error", [FULL, behind(FULL), behind(behind(FULL))])
def test_the_disks_own_error_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", failing(error))
    with pytest.raises(OSError, match="No space left") as caught:
        Writer(tmp_path).write_data(None, None)  # type: ignore[arg-type]
    assert caught.value is FULL


def test_any_other_error_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = behind(ValueError("no disk"))
    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", failing(error))
    with pytest.raises(RuntimeError) as caught:
        Writer(tmp_path).write_data(None, None)  # type: ignore[arg-type]
    assert caught.value is error
    assert error.__cause__ is None


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FULL, "/disk/__0_0.distcp: No space left on device"),
        (behind(FULL), "/disk/__0_0.distcp: No space left on device"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
        (behind(ValueError("no disk")), "unexpected pos 704 vs 598"),
        (UserError("as it is"), "as it is"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_one_line(error: Exception, line: str) -> None:
    assert one_line(error) == line
    assert one_line(CheckpointException("write", {1: (error, None)})) == line  # type: ignore[dict-item]
