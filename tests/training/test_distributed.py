"""A rank that does not come to a collective: the run ends by itself and names it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.test_load_balancing import ROOT, SMALL

# train.py with one rank that falls asleep in its second step: in the data loader, or between two collectives.
SCRIPT = """
import os, runpy, signal, sys, time
sys.path.insert(0, {root!r})
import data.loader, models.qwen35_moe.moe
if os.environ["RANK"] == {rank!r}:
    owner, name = {place}
    original, num_calls = getattr(owner, name), 0
    def sleepy(*args):
        global num_calls
        num_calls += 1
        if num_calls > {num_calls}:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # to be gone when torchrun ends it
            time.sleep(1000)
        return original(*args)
    setattr(owner, name, sleepy)
runpy.run_path({root!r} + "/train.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "place", "num_calls"),  # how often it is called in the first step
    [("1", '(data.loader.TokenLoader, "__next__")', 1), ("0", '(models.qwen35_moe.moe.SharedExpert, "forward")', 2)],
    ids=["1 in the data", "0 in the model"],
)
def test_the_missing_rank_is_named(tmp_path: Path, rank: str, place: str, num_calls: int) -> None:
    (tmp_path / "small.toml").write_text(SMALL.format(root=ROOT))
    script = SCRIPT.format(root=str(ROOT), rank=rank, place=place, num_calls=num_calls)
    (tmp_path / "sleepy.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tmp_path / "sleepy.py"), f"--config={tmp_path / 'small.toml'}", f"--job.output_dir={tmp_path}"]
    command += ["--job.collective_timeout_seconds=12", "--parallelism.expert_parallel_degree=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if "waited in vain" in line]
    assert len(told) == 1, done.stderr[-3000:]
    prefix = "" if rank == "1" else "[rank 1] "
    assert told[0].startswith(f"{prefix}a collective waited in vain: missing ranks [{rank}] ")
