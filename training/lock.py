"""One run at a time in an output directory: a lock that names its holder, and that no killed run keeps."""

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
from datetime import datetime
from pathlib import Path

from errors import UserError, regular_file

logger = logging.getLogger("train")

BEAT_SECONDS = 2.0
WATCH_SECONDS = 15.0
"""How long a beat may be late. A process that is stopped for longer counts as gone on other hosts."""


class RunLock:
    """Held by rank 0 from before the run writes anything until the process ends, however it ends.

    On one host the kernel tells whether the holder lives (flock). Another host may not see that lock, so the holder
    also touches the file all the time, and who finds another host's name in it watches whether it still does.
    """

    def __init__(self, output_dir: Path) -> None:
        """Takes the lock. Raises UserError if another run has it, or the folder cannot be written to."""
        self._path = output_dir / "run.lock"
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            self._file = regular_file(self._path).open("a+", encoding="utf-8")
        except OSError as error:
            raise self._refusal(f"{error.strerror or error}: expected a folder to write to") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._taken() from None
        except OSError as error:
            logger.warning(f"{self._path}: no locks on this file system ({error.strerror})")
        host, before = socket.gethostname(), self._holder().get("host")
        if before not in (None, host):
            self._watch()
            logger.warning(f"{self._path}: the run on {before} shows no sign of life: its lock is taken over")
        try:
            self._write({"host": host, "pid": os.getpid(), "since": datetime.now().isoformat("T", "seconds")})
        except OSError as error:
            raise self._refusal(f"{error.strerror}: expected room to write") from None
        self._ended = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self) -> None:
        """At an orderly end: nobody has to watch for signs of life."""
        self._ended.set()
        try:
            self._write({})
            self._file.close()
        except OSError as error:
            logger.warning(f"{self._path}: {error.strerror}")

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a full or slow disk does not end a run
                os.utime(self._path)

    def _watch(self) -> None:
        """Raises UserError as soon as the file is touched; by its own clock, which need not be this host's."""
        before, deadline = self._path.stat().st_mtime_ns, time.monotonic() + WATCH_SECONDS
        while time.monotonic() < deadline:
            time.sleep(BEAT_SECONDS / 4)
            if self._path.stat().st_mtime_ns != before:
                raise self._taken()

    def _holder(self) -> dict[str, object]:
        """Who wrote its name last; nobody, if that cannot be read."""
        try:
            self._file.seek(0)
            holder = json.loads(self._file.read(10_000) or "{}")
            return holder if isinstance(holder, dict) else {}
        except (OSError, ValueError, RecursionError):
            return {}

    def _write(self, holder: dict[str, object]) -> None:
        self._file.truncate(0)
        self._file.write(json.dumps(holder) + "\n")
        self._file.flush()

    def _taken(self) -> UserError:
        holder = self._holder()
        who = f"process {holder['pid']} on {holder['host']} since {holder['since']}" if len(holder) == 3 else "another"
        return self._refusal(f"a run has it ({who}): expected another folder, or its end")

    def _refusal(self, why: str) -> UserError:
        return UserError(f"job.output_dir = {str(self._path.parent)!r}: {why}")
