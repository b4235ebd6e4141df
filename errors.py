"""A user's mistake, a run that cannot go on, and the one outermost place of every command that tells them.

How they are told from a bug: what a user can cause is a UserError. Code that reads a file says so (`reading`), and
there whatever a parser raises is the file's fault. All else is a bug of this repository and keeps its traceback.
"""

import argparse
import os
import pickle
import select
import signal
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn


class _OneLine(Exception):
    """Its words have no line ends, and not the middle of what a damaged file makes endless."""

    def __str__(self) -> str:
        text = " ".join(super().__str__().splitlines())
        return text if len(text) <= 2000 else f"{text[:1000]} ... {text[-900:]}"


class UserError(_OneLine, ValueError):
    """A user's mistake, or a file that cannot be used: what is wrong and what would be accepted, in one line."""

    exit_code = 2


class WrongTensors(UserError):
    """A set of tensors that differs from what the class of the model needs."""

    exit_code = 1


class RunError(_OneLine, RuntimeError):
    """What stops a run that was started rightly, in one line."""

    exit_code = 1


@contextmanager
def reading(path: object) -> Iterator[None]:
    """Inside, bytes of `path` are parsed and nothing else is done: what they make a parser raise is a UserError that
    names the file. Of several around each other the innermost names it."""
    try:
        yield
    except (UserError, RunError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except OSError as error:
        if error.errno is None:  # raised by a library: of a format, not of the system
            raise UserError(f"{path} cannot be read: {_reason(error)}") from error
        raise UserError(f"{error.filename or path} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise UserError(f"{path} cannot be read: it is nested too deeply") from error
    except BaseException as error:  # a damaged file can raise nearly anything, Rust's panics included
        raise UserError(f"{path} cannot be read: {_reason(error)}") from error


def regular_file(path: Path) -> Path:
    """`path`, if a file is there or nothing. Raises UserError for anything else: whoever opens a pipe may wait for ever
    for its other end, and a device may never end."""
    with reading(path):
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is {'a folder' if path.is_dir() else 'a pipe or a device'}: expected a file")
    return path


def _reason(error: BaseException) -> str:
    """What an exception says, in one line; its kind where the words alone would not tell."""
    text = " ".join(str(error).split())[:500]
    if isinstance(error, (ValueError, OSError, zlib.error, pickle.UnpicklingError)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _stdout_is_closed() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors are told whatever is asked for
    return any(event & select.POLLERR for _, event in poll.poll(0))


class OneLineParser(argparse.ArgumentParser):
    """A mistake on the command line is a UserError, without the usage: also a name that is cut short, and an option
    that is given twice."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        names = [word.partition("=")[0] for word in words]
        for name in self._option_string_actions:
            if names.count(name) > 1:
                raise UserError(f"{name} is given a second time: expected one value")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


@contextmanager
def exit_on_error(prefix: str = "", interrupted: str = "") -> Iterator[None]:
    """Around a command: a UserError and a RunError become one line on stderr, begun with `prefix`; exit code 2 and 1.

    So does Ctrl-C, with code 130, if there are words for it. A reader of stdout that has gone ends the command quietly.
    Rank 0 prints first: torchrun ends all ranks when one has ended, so the others wait for it.
    """
    try:
        yield
        sys.stdout.flush()
    except (UserError, RunError) as error:
        given = os.environ.get("RANK", "0")
        rank = int(given) if given.isdecimal() else 0
        if rank > 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's, once rank 0 has ended: nothing is left to say
            time.sleep(5)
        print(f"{prefix}{error}" if rank == 0 else f"[rank {rank}] {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        if not interrupted:
            raise
        print(f"{prefix}{interrupted}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        if not _stdout_is_closed():  # another pipe: of a worker, say
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain once more at its end
        sys.exit(0)
