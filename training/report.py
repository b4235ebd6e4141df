"""Compares runs on one page: curves over tokens and over time, the experts' load, skipped samples, configurations.

    python -m training.report RUN [RUN ...] [--out report.html]

RUN is a folder that a run writes (`job.output_dir`), also of one that is still going on; one that has logged nothing
yet is left out. The page needs nothing else, neither network nor scripts. Time is that of the training: pauses between
starts and for checkpoints are left out.
"""

import json
import math
import os
import sys
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tomli
from numpy.typing import NDArray

from errors import OneLineParser, UserError, exit_on_error, reading
from training.report_html import page

Points = list[tuple[float, float]]
_MOST_METRICS = 1000  # of other names than those a run has: a damaged file may have any number
_NEVER_NEGATIVE = ("step", "tokens_seen", "step_seconds")


class NotLogged(UserError):
    """A run that has no line of metrics yet."""


@dataclass
class Run:
    """What a run has written so far. Shapes: N lines of metrics.jsonl."""

    name: str
    metrics: dict[str, NDArray[np.float64]]
    """[N] each, in order of step; NaN where a line has none, or one that is not finite. "seconds" is that of the
    training so far."""
    num_damaged: int
    config: dict[str, str]
    """Every key of config.toml with its value, as TOML would show it."""
    load: list[list[int]] = field(default_factory=list)
    """Of the last line of expert_load.jsonl: for each block the tokens of each expert."""
    load_step: int = 0

    def values(self, name: str) -> NDArray[np.float64]:
        """All that there are of a metric."""
        column = self.metrics.get(name, np.empty(0))
        return column[~np.isnan(column)]

    def curve(self, name: str, over: str) -> NDArray[np.float64]:
        """[points, 2]: (tokens or seconds, value) wherever there is a value. `over`: "tokens_seen" or "seconds"."""
        if name not in self.metrics or over not in self.metrics:
            return np.empty((0, 2))
        points = np.stack([self.metrics[over], self.metrics[name]], axis=1)
        return points[~np.isnan(points).any(axis=1)]

    def names(self, beginning: str) -> list[str]:
        """The metrics whose names begin so, in order of appearance."""
        return [name for name in self.metrics if name.startswith(beginning)]

    def skipped(self) -> Counter[str]:
        """How many samples for which reason; each start of the run counts from 0."""
        total = Counter[str]()
        for name in self.names("samples_"):
            counts = np.nan_to_num(self.metrics[name])
            is_end = np.append(counts[1:] < counts[:-1], True)
            total[name.removeprefix("samples_")] = int(counts[is_end].sum())
        return total


def read_run(folder: Path, name: str) -> Run:
    """Raises UserError for a folder without metrics: NotLogged if it is a run's."""
    path = folder / "metrics.jsonl"
    if not os.path.isfile(path):
        is_run = any(os.path.isfile(folder / name) for name in ("run.lock", "config.toml"))
        kind = NotLogged if is_run else UserError
        raise kind(f"{str(folder)!r}: expected the folder of a run, with a metrics.jsonl")
    columns: dict[str, array[float]] = {"step": array("d"), "seconds": array("d")}
    steps, seconds, num_damaged = columns["step"], columns["seconds"], 0
    for line in _objects(path):
        numbers = _numbers(line) if line is not None else {}
        if "step" not in numbers:
            num_damaged += 1
            continue
        if steps and numbers["step"] <= steps[-1]:  # made once more after a resume: the later one counts
            first = bisect_left(steps, numbers["step"])
            for column in columns.values():
                del column[first:]
        before = (steps[-1], seconds[-1]) if steps else (0.0, 0.0)
        numbers["seconds"] = before[1] + (numbers["step"] - before[0]) * numbers.get("step_seconds", 0.0)
        count = len(steps)
        for metric, value in numbers.items():
            if metric in columns or len(columns) < _MOST_METRICS:
                column = columns.setdefault(metric, array("d"))
                column.extend([math.nan] * (count - len(column)))
                column.append(value)
    if not steps:
        raise NotLogged(f"{path}: expected at least one line of metrics that can be read")
    for column in columns.values():
        column.extend([math.nan] * (len(steps) - len(column)))
    metrics = {metric: np.array(column) for metric, column in columns.items()}
    run = Run(name, metrics, num_damaged, _read_config(folder / "config.toml"))
    for line in _objects(folder / "expert_load.jsonl"):
        if line and _is_table(line.get("tokens")):
            run.load, run.load_step = line["tokens"], int(_numbers(line).get("step", 0))
    return run


def _objects(path: Path) -> Iterator[dict[str, Any] | None]:
    """Of each line the object, or None where it is damaged."""
    if not os.path.isfile(path):
        return
    with reading(path):
        file = path.open("rb")
    with file:
        for line in file:
            if line.strip():
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    value = None
                yield value if isinstance(value, dict) else None


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    """Those entries that are numbers a curve can show."""
    return {
        name: float(value)
        for name, value in line.items()
        if type(value) in (int, float) and abs(value) < 1e30  # of NaN this is false
        if value >= 0 or name not in _NEVER_NEGATIVE
    }


def _is_table(load: object) -> bool:
    return (
        isinstance(load, list)
        and 0 < len(load) <= 10_000
        and all(isinstance(row, list) and 0 < len(row) <= 10_000 and len(row) == len(load[0]) for row in load)
        and all(type(count) is int and 0 <= count < 2**63 for row in load for count in row)
    )


def _read_config(path: Path) -> dict[str, str]:
    if not os.path.isfile(path):
        return {}
    with reading(path):
        tables = tomli.loads(path.read_text(encoding="utf-8"))
        return dict(_flat(tables))


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, default=str, ensure_ascii=False)


def short_names(folders: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [Path(os.path.realpath(folder)).parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = [os.path.join(*own[-length:]) for own in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def main(argv: list[str]) -> None:
    """The command line. Raises UserError, one line."""
    parser = OneLineParser(prog="python -m training.report", description="Compares runs on one page.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that runs write")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page; default: report.html")
    options = parser.parse_args(argv)
    runs, without_lines = [], []
    for folder, name in zip(options.runs, short_names(options.runs)):
        try:
            runs.append(read_run(folder, name))
        except NotLogged as error:
            without_lines.append(error)
    if not runs:
        raise without_lines[0]
    for left_out in without_lines:
        print(f"left out: {left_out}", file=sys.stderr)
    content = page(runs).encode(errors="replace")
    try:
        options.out.write_bytes(content)
    except OSError as error:
        raise UserError(
            f"--out {str(options.out)!r} cannot be written: {error.strerror}: expected the name of a file in a folder "
            "that exists"
        ) from None
    print(f"{options.out}: {len(content):,} bytes")


if __name__ == "__main__":
    with exit_on_error():
        main(sys.argv[1:])
