"""Runs a command's main as its process would: what its end says and its exit status."""

from collections.abc import Callable

from errors import exit_on_error


def status_of(main: Callable[[list[str]], int | None], arguments: list[str], interrupted: str = "interrupted") -> int:
    """The exit status; what goes to stdout and stderr is for capsys."""
    try:
        with exit_on_error(interrupted=interrupted):
            return main(arguments) or 0
    except SystemExit as end:
        return int(end.code or 0)
