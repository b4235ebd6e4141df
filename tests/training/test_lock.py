"""One run at a time in an output directory: refused, or taken over, on this host and from another."""

import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from errors import UserError
from training import lock
from training.lock import RunLock


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock, "WATCH_SECONDS", 0.5)


def hold(folder: Path, is_held: object) -> None:
    held = RunLock(folder)
    is_held.set()  # type: ignore[attr-defined]
    signal.pause()
    held.release()


@pytest.fixture
def holder(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    is_held = context.Event()
    process = context.Process(target=hold, args=(tmp_path, is_held))
    process.start()
    assert is_held.wait(60)
    yield process
    process.kill()
    process.join()


def test_a_second_run_is_refused_and_told_who_has_it(tmp_path: Path, holder: multiprocessing.Process) -> None:
    with pytest.raises(UserError, match=rf"process {holder.pid} on \S+ since 2") as caught:
        RunLock(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_killed_run_leaves_no_lock(tmp_path: Path, holder: multiprocessing.Process) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    RunLock(tmp_path).release()


def test_after_an_orderly_end_nobody_watches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock.socket, "gethostname", lambda: "node-a")
    RunLock(tmp_path).release()
    monkeypatch.setattr(lock.socket, "gethostname", lambda: "node-b")
    monkeypatch.setattr(RunLock, "_watch", lambda self: pytest.fail("watched"))
    RunLock(tmp_path).release()


OTHER = {"host": "node-a", "pid": 7, "since": "2026-01-01T00:00:00"}


def test_a_run_that_was_killed_on_another_host_is_found_dead(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text(json.dumps(OTHER))
    RunLock(tmp_path)
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


def test_a_run_that_lives_on_another_host_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    path.write_text(json.dumps(OTHER))
    ended = threading.Event()

    def beat() -> None:  # as another host sees it: no lock of this kernel, but a file that is touched
        while not ended.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="process 7 on node-a since 2026"):
            RunLock(tmp_path)
    finally:
        ended.set()
        thread.join()
    assert json.loads(path.read_text()) == OTHER


def test_the_holder_shows_signs_of_life(tmp_path: Path) -> None:
    held = RunLock(tmp_path)
    before = (tmp_path / "run.lock").stat().st_mtime_ns
    time.sleep(0.3)
    assert (tmp_path / "run.lock").stat().st_mtime_ns > before
    held.release()


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 5000, "\0\0"])
def test_a_damaged_lock_is_nobodys(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.lock").write_text(text)
    RunLock(tmp_path).release()


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="expected a folder to write to"):
        RunLock(tmp_path / "file" / "run")
