"""Saves that fail: a full disk, a read-only one; the run goes on, the next save is tried, earlier ones stay intact."""

import functools
import logging
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from checkpoint import directories
from checkpoint.convert_from_hf import convert_from_hf
from checkpoint.directories import complete_checkpoints, describe_files, find_damage
from checkpoint.export import export_to_hf
from errors import UserError
from models.qwen35_moe.hf_weights import hf_name
from tests.checkpoint.runs import Run
from tests.checkpoint.test_checkpointer import build
from tests.checkpoint.test_convert_to_hf import random_weights, write_hf
from tests.distributed import run_ranks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MB, 3 checkpoints of the model below; it needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("cannot mount a small tmpfs here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def cannot_read(folder: Path, paths: list[Path]) -> None:
    raise OSError(f"cannot read {paths}")


def saves(folder: str, async_: bool, failures: str, limit: int = 50_000) -> list[bool]:
    """Saves steps 1 to 4 on each rank while step 2 and 3 cannot succeed; whether each did."""
    _, _, checkpointer = build(folder, 1, 1, seed=0, async_=async_, keep=0)
    if failures == "file size limit":  # on a small disk an open file would be in the way
        logging.getLogger("train").addHandler(logging.FileHandler(Path(folder, "log")))
    first, filler = dist.get_rank() == 0, Path(folder, "filler")
    outcomes = []
    for step in (1, 2, 3, 4):
        if step == 2 and failures == "file size limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        elif step == 4 and failures == "file size limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        elif first and step == 2 and failures == "full":
            space = os.statvfs(folder)
            filler.write_bytes(bytes(space.f_bavail * space.f_frsize - 200_000))
        elif first and step == 4 and failures == "full":
            filler.unlink()
        elif first and failures == "read-only" and step in (2, 4):
            subprocess.run(["mount", "-o", f"remount,{'ro' if step == 2 else 'rw'}", folder], check=True)
        elif not first and failures == "not read back" and step in (2, 4):
            directories.describe_files = cannot_read if step == 2 else describe_files
        dist.barrier()
        checkpointer.save(step, 0, torch.zeros(2, 2, dtype=torch.int64))
        outcomes.append(checkpointer.wait())
    return outcomes


def check(folder: Path) -> None:
    paths = complete_checkpoints(folder / "checkpoints")
    assert [path.name for path in paths] == ["step-00000001", "step-00000004"]
    assert [find_damage(path) for path in paths] == [None, None]
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {path.name for path in paths}


@pytest.mark.parametrize("failure", ["full", "read-only"])
def test_on_a_small_disk(small_disk: Path, failure: str) -> None:
    for outcomes in run_ranks(saves, 2, str(small_disk), failure == "full", failure):
        assert outcomes == [True, False, False, True]
    check(small_disk)


@pytest.mark.parametrize(("async_", "limit"), [(False, 20_000), (False, 50_000), (True, 50_000)])
def test_under_a_limit_on_the_size_of_files(tmp_path: Path, async_: bool, limit: int) -> None:
    for outcomes in run_ranks(saves, 2, str(tmp_path), async_, "file size limit", limit):
        assert outcomes == [True, False, False, True]
    check(tmp_path)
    told = [line for line in (tmp_path / "log").read_text().splitlines() if "cannot save" in line]
    assert [": File too large (" in line for line in told] == [True, True], told


@pytest.mark.parametrize("size", [100, 20_000, 1_000_000])
@pytest.mark.parametrize("back", [False, True])
def test_a_conversion_without_room_is_one_line_and_leaves_nothing(tmp_path: Path, size: int, back: bool) -> None:
    write_hf(tmp_path / "hf", {hf_name(name): tensor for name, tensor in random_weights().items()})
    convert_from_hf(tmp_path / "hf", tmp_path / "step", None)
    to_hf = functools.partial(export_to_hf, tmp_path / "step")
    convert = to_hf if back else lambda out: convert_from_hf(tmp_path / "hf", out, torch.float32)
    before, limits = set(tmp_path.iterdir()), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(UserError, match=r"out cannot be written: File too large"):
            convert(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert set(tmp_path.iterdir()) == before


def test_files_that_one_rank_cannot_read_back(tmp_path: Path) -> None:
    for outcomes in run_ranks(saves, 2, str(tmp_path), True, "not read back"):
        assert outcomes == [True, False, False, True]
    check(tmp_path)


def test_a_run_goes_on_after_a_failed_save_and_ends_with_1_after_a_failed_last_one(small_disk: Path) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(bytes(11_000_000))
    run = Run(small_disk / "run", 2, "--training.steps=4", "--checkpoint.interval=2")
    assert run.wait() == [1, 1]
    assert [line["step"] for line in run.metrics()] == [1, 2, 3, 4]
    errors = [line for line in run.log.read_text().splitlines() if "cannot save" in line]
    assert [f"step-0000000{step}" in error for step, error in zip((2, 4), errors, strict=True)] == [True, True]
    assert "Traceback" not in run.log.read_text()
    filler.unlink()
    run = Run(small_disk / "run", 2, "--training.steps=4", "--checkpoint.interval=2")
    assert [line["step"] for line in run.finish()] == [1, 2, 3, 4]
