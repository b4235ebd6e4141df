"""Compares the losses and gradient norms of two runs, and says at which step they part.

    python -m benchmarks.compare_losses BEFORE AFTER [--tolerance 1e-4]

BEFORE and AFTER are runs' output folders or `metrics.jsonl` files. Exit status: 0 if all steps that both have agree
within the tolerance (relative; default 0: bit for bit), 1 if not, 2 for a mistake.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

from errors import OneLineParser, UserError, exit_on_error

COMPARED = ("loss", "grad_norm")


class Comparison(NamedTuple):
    """Of one quantity."""

    largest: float
    """The largest relative difference over all common steps."""
    parted: int | None
    """The first step that differs at all; None if none does."""
    beyond: int | None
    """The first step whose difference exceeds the tolerance."""


def read_run(path: Path) -> dict[int, dict[str, float]]:
    """Step -> metrics. Raises UserError for what is no run."""
    file = path / "metrics.jsonl" if path.is_dir() else path
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return {line["step"]: line for line in lines}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: expected a run's output folder or its metrics.jsonl ({error!r})") from None


def relative_difference(before: float | None, after: float | None) -> float:
    """0 for equal values, also for two that were not finite (None); infinite for one that alone was not."""
    if before == after:
        return 0.0
    if before is None or after is None:
        return math.inf
    return abs(before - after) / max(abs(before), abs(after))


def compare(
    before: dict[int, dict[str, float]], after: dict[int, dict[str, float]], key: str, tolerance: float
) -> Comparison:
    """Compares `key` at all steps that both runs have."""
    differences = {
        step: relative_difference(before[step][key], after[step][key]) for step in sorted(common(before, after))
    }
    return Comparison(
        max(differences.values()),
        next((step for step, difference in differences.items() if difference > 0), None),
        next((step for step, difference in differences.items() if difference > tolerance), None),
    )


def common(before: dict[int, dict[str, float]], after: dict[int, dict[str, float]]) -> set[int]:
    """The steps that both have. Raises UserError if there are none."""
    steps = before.keys() & after.keys()
    if not steps:
        raise UserError("the runs have no step in common: expected the same metrics.log_interval")
    return steps


def main(argv: list[str]) -> int:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.0)
    arguments = parser.parse_args(argv)
    before, after = read_run(arguments.before), read_run(arguments.after)
    steps = common(before, after)
    keys = [key for key in COMPARED if all(key in run[step] for run in (before, after) for step in steps)]
    if not keys:
        raise UserError(f"the runs have neither of {', '.join(COMPARED)} at all {len(steps)} common steps")
    results = {key: compare(before, after, key, arguments.tolerance) for key in keys}
    print(f"{len(steps)} common steps, {min(steps)} to {max(steps)}")
    for key, (largest, parted, beyond) in results.items():
        if parted is None:
            print(f"{key}: equal bit for bit")
            continue
        values = f"{before[parted][key]} and {after[parted][key]}"
        print(f"{key}: part at step {parted} ({values}); at most {largest:.1e} apart")
        if beyond is not None:
            values = f"{before[beyond][key]} and {after[beyond][key]}"
            print(f"{key}: more than {arguments.tolerance:g} apart from step {beyond} ({values})")
    return int(any(result.beyond is not None for result in results.values()))


if __name__ == "__main__":
    with exit_on_error():
        sys.exit(main(sys.argv[1:]))
