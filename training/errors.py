"""Turns a user's mistake, and a run that cannot go on, into one line and an exit code: 2 and 1."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class RunError(RuntimeError):
    """What stops a run that was started rightly. The message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


@contextmanager
def exit_on_error() -> Iterator[None]:
    """A ValueError that this repository raises is a user's mistake (house rule): print it, exit with code 2. A RunError
    is printed too, with exit code 1.

    A ValueError that comes from a library is a bug and keeps its traceback. Rank 0 prints first: torchrun ends all
    ranks when one has ended, so the others wait for it.
    """
    try:
        yield
    except (ValueError, RunError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        if not raised_in.is_relative_to(ROOT) or "site-packages" in raised_in.parts:
            raise
        rank = int(os.environ.get("RANK", "0"))
        if rank > 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's, once rank 0 has ended: nothing is left to say
            time.sleep(5)
        print(error if rank == 0 else f"[rank {rank}] {error}", file=sys.stderr, flush=True)
        sys.exit(1 if isinstance(error, RunError) else 2)
