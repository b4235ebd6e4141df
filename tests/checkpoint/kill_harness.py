"""Kills a run at random moments, again and again, and checks that each resume goes on where a complete checkpoint is.

    python tests/checkpoint/kill_harness.py --kills 50 [--seed 0]

A run of two processes saves every step and keeps two checkpoints. It is killed (`kill -9`, one rank or both) while it
starts, resumes, trains, in the middle of a save, and in the middle of a deletion. After each kill every checkpoint that
has its name must be intact, none may have been lost, and the next start must resume from the newest. All steps' losses
and gradient norms must be, bit for bit, those of a run that nobody interrupted.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from checkpoint.directories import complete_checkpoints, find_damage
from tests.checkpoint.runs import Run

MOMENTS = ("start", "step", "save", "save", "deletion")


def wait_for(run: Run, moment: str, chance: random.Random) -> bool:
    """Returns when it is time to kill; False if the run ended before that moment came."""
    first_step = len(run.metrics())
    if moment == "start":
        time.sleep(chance.uniform(0, 6))
        return run.alive
    steps = chance.randint(1, 3)
    folder, suffix = run.folder / "checkpoints", ".removed" if moment == "deletion" else ""
    while run.alive:
        lines = run.metrics()
        # A resume drops the lines of steps that it will make again.
        if lines and "from step" in run.log.read_text() and len(lines) >= first_step_of(run, first_step) + steps:
            break
        time.sleep(0.01)
    if moment == "step":
        time.sleep(chance.uniform(0, 0.3))
        return run.alive
    while run.alive:
        names = [path.name for path in folder.glob(".step-*")]
        if any(name.endswith(".removed") == bool(suffix) for name in names):
            time.sleep(chance.choice((0, 0, 0.002, 0.01, 0.03, 0.1)) * chance.random())
            return run.alive
    return False


def first_step_of(run: Run, default: int) -> int:
    """The step that the run's log says it started from."""
    for line in run.log.read_text().splitlines():
        if "from step " in line:
            return int(line.split("from step ")[1].split()[0])
    return default


def same(lines: list[dict], reference: list[dict]) -> bool:
    keys = ("step", "loss", "grad_norm", "tokens_seen")
    return all(line[key] == expected[key] for line, expected in zip(lines, reference) for key in keys)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        common = [f"--training.steps={6 * options.kills + 10}", "--job.deterministic"]
        expected = Run(Path(temporary, "reference"), 2, *common, "--checkpoint.interval=100000").finish(900)
        common += ["--checkpoint.interval=1", "--checkpoint.keep=2"]
        folder = Path(temporary, "run")
        kills: Counter[str] = Counter()
        newest = -1
        while sum(kills.values()) < options.kills:
            moment = chance.choice(MOMENTS)
            run = Run(folder, 2, *common, f"--checkpoint.async={chance.choice(('true', 'false'))}")
            killed = wait_for(run, moment, chance)
            victims = chance.choice(([0], [1], [0, 1]))
            run.kill(victims)
            # A rank whose peer dies while they are joining waits for it until torchrun, which is not here, ends it: who
            # has not begun in 5 s does not.
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline and any(rank.is_alive() for rank in run.ranks):
                time.sleep(0.1)
            codes = run.wait(25 if "from step" in run.log.read_text() else 0)
            log = run.log.read_text()
            assert None not in codes or "from step" not in log, f"ranks were left behind: {codes}\n{log}"
            assert newest < 0 or "from step" not in log or f"resumed from {folder}/checkpoints/step-" in log, log
            if "from step" in log:
                assert first_step_of(run, -1) >= max(newest, 0), (newest, log)
            assert same(run.metrics(), expected), "the losses are not those of the uninterrupted run"
            steps = []
            for path in complete_checkpoints(folder / "checkpoints"):
                assert (damage := find_damage(path)) is None, damage
                steps.append(int(path.name.removeprefix("step-")))
            assert max(steps, default=-1) >= newest, (steps, newest)
            newest = max(steps, default=-1)
            if killed:
                kills[f"{moment}, {'all ranks' if len(victims) == 2 else 'one rank'}"] += 1
            if not killed and newest == len(expected):
                break
        last = Run(folder, 2, *common).finish(900)
        assert len(last) == len(expected)
        assert same(last, expected)
        print(f"{sum(kills.values())} kills, last at step {newest} of {len(expected)}: {dict(sorted(kills.items()))}")


if __name__ == "__main__":
    main()
