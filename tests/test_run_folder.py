"""Pipes, devices and folders in the places of a run's own files: one line and exit status 2, and no run that waits."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoint.directories import tidy, write_manifest
from data.batch import Row
from data.loader import TokenLoader
from data.packing import filler_row
from data.skipped import write_skipped
from errors import UserError, regular_file
from tests.checkpoint.runs import Run
from tests.data.test_loader import make_loader
from tests.training.test_metrics import line
from training.metrics import MetricsWriter
from training.trackers import _run_id

FILES = ["run.lock", "config.toml", "skipped/rank-00000.jsonl"]
FILES += [f"{name}{kind}.jsonl" for name in ("metrics", "expert_load") for kind in ("", ".damaged")]
FILES += [f"checkpoints/step-00000001/{name}" for name in ("manifest.json", "run.json", "__0_0.distcp")]
FOLDERS = ["checkpoints", "hf", "skipped", "tensorboard", "checkpoints/step-00000001"]


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    Run(folder, 1, "--training.steps=1").finish()
    return folder


@pytest.mark.parametrize(
    ("name", "put"),
    [(name, put) for name in FILES for put in (os.mkfifo, Path.mkdir, device)]
    + [(name, put) for name in FOLDERS for put in (os.mkfifo, Path.touch)],
)
def test_a_run_says_what_is_in_the_way(finished: Path, tmp_path: Path, name: str, put: Callable) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    put(path)
    run = Run(folder, 1, "--training.steps=2")
    assert run.wait(120) == [2], run.log.read_text()
    *before, last = run.log.read_text().splitlines()
    assert str(path) in last or Path(name).name in last
    assert "expected" in last
    assert not any("Traceback" in text for text in before)


def test_what_is_no_file_is_told_by_its_kind(tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert regular_file(path) == path
    path.symlink_to(tmp_path / "b")  # the file that it names is yet to be made
    assert regular_file(path) == path
    (tmp_path / "b").touch()
    assert regular_file(path) == path
    os.mkfifo(tmp_path / "pipe")
    for other, said in ((tmp_path / "pipe", "a pipe or a device"), (tmp_path, "a folder")):
        with pytest.raises(UserError, match=f"{other} is {said}: expected a file"):
            regular_file(other)


def test_metrics_go_on_without_a_file_that_became_a_pipe(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False, start_step=0, total_steps=9)
    path = tmp_path / "metrics.jsonl"
    path.unlink()
    os.mkfifo(path)
    writer.write(line(1))
    assert [text for text in caplog.messages if "the run goes on without them" in text] == [
        "cannot write metrics (No such device or address): the run goes on without them"
    ]


def test_skipped_samples_go_on_without_a_list_that_became_a_pipe(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts, folder = tmp_path / "texts.jsonl", tmp_path / "skipped"
    texts.write_text(json.dumps({"text": "word"}) + "\n")
    folder.mkdir()
    loader: TokenLoader = make_loader(str(texts), skipped_dir=folder)
    os.mkfifo(folder / "rank-00000.jsonl")
    row: Row = filler_row(16, 0)._replace(notes=[("empty", "a sample")])
    loader._count([row])
    assert loader.counts["empty"] == 1
    assert "is a pipe or a device" in caplog.text


def test_a_list_of_skipped_samples_is_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rank-00000.jsonl")
    with pytest.raises(UserError, match="is a pipe or a device"):
        write_skipped(None, tmp_path, tmp_path / "out")  # type: ignore[arg-type]


def test_the_name_of_a_tracked_run_is_in_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "wandb_run")
    with pytest.raises(UserError, match="is a pipe or a device"):
        _run_id(tmp_path / "wandb_run")


def test_a_pipe_in_a_save_that_was_cut_off_keeps_nobody_waiting(tmp_path: Path) -> None:
    unfinished = tmp_path / ".step-00000003"
    unfinished.mkdir()
    for name in (".metadata", "weights"):
        (unfinished / name).write_bytes(b"abc")
    write_manifest(unfinished)
    os.mkfifo(unfinished / "pipe")
    tidy(tmp_path)
    assert (tmp_path / "step-00000003" / "weights").exists()
