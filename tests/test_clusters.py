"""Restarts after a rank's death, and the SLURM script with launchers on this machine in place of nodes: real runs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed import free_port
from tests.patience import PATIENCE
from tests.test_train import ROOT, SMALL, environment, metrics, run, without_times

MANY_STEPS = ("--training.steps=40", "--checkpoint.interval=4", "--job.deterministic")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.toml"
    path.write_text(SMALL.format(root=ROOT))
    return path


@pytest.fixture(scope="module")
def undisturbed(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The lines of a run of two processes that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(config_file, folder, *MANY_STEPS)
    return without_times(metrics(folder))


def rank_pids(folder: Path, rank: int) -> list[int]:
    """The processes that are this rank of the run in `folder`, workers of theirs left out."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"RANK={rank}".encode() in variables and str(folder).encode() in words:
            found.append(int(process.name))
    return found


def wait_until(what: object, process: subprocess.Popen, seconds: int = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def start(folder: Path, config_file: Path, *options: str, **variables: str) -> subprocess.Popen:
    command = ["bash", str(ROOT / "run_train.sh"), "--config", str(config_file), "--job.output_dir", str(folder)]
    return subprocess.Popen(
        [*command, *options], env=environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def step_of(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="ranks are found in /proc")
@pytest.mark.parametrize(("num_nodes", "kills"), [(1, [(0, 4, 6)]), (2, [(1, 4, 6), (0, 12, 15)])], ids=["1", "2"])
def test_killed_ranks_are_started_again_and_go_on(
    config_file: Path, undisturbed: list[dict], tmp_path: Path, num_nodes: int, kills: list[tuple[int, int, int]]
) -> None:
    """A rank is killed when a step has been saved and another one made, and on two nodes another rank later: all losses
    are those of a run that nobody disturbed."""
    killed = tmp_path / "killed"
    of_nodes = {"NGPU": str(2 // num_nodes), "NNODES": str(num_nodes), "MASTER_ADDR": "127.0.0.1"}
    of_nodes["MASTER_PORT"] = str(free_port(3))  # one a start
    launchers = [
        start(killed, config_file, *MANY_STEPS, "--max-restarts", str(len(kills)), NODE_RANK=str(node), **of_nodes)
        for node in range(num_nodes)
    ]
    try:
        for rank, saved, step in kills:
            wait_until((killed / f"checkpoints/step-{saved:08}").exists, launchers[0])
            wait_until(lambda: step_of(killed) >= step, launchers[0])  # noqa: B023
            (pid,) = rank_pids(killed, rank)
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: rank_pids(killed, rank) not in ([], [pid]), launchers[0])  # noqa: B023
        said = [launcher.communicate(timeout=PATIENCE)[1] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    assert [launcher.returncode for launcher in launchers] == [0] * num_nodes, said
    # Each on the node of the rank that was killed: the first on the last node.
    assert f"was ended by SIGKILL; the others were stopped: restart 1 of {len(kills)}" in said[-1]
    assert f"restart {len(kills)} of {len(kills)}" in said[0]
    assert without_times(metrics(killed)) == undisturbed


def test_kubernetes_variables(config_file: Path, tmp_path: Path) -> None:
    """Those that the training operators set for torchrun, in two pods."""
    pods = []
    shared = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1"}
    shared["PET_MASTER_PORT"] = str(free_port())
    options = ["--config", str(config_file), "--job.output_dir", str(tmp_path / "run"), "--training.steps=2"]
    for node in ("0", "1"):
        pods.append(
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", str(ROOT / "train.py"), *options],
                env=environment(PET_NODE_RANK=node, **shared),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [pod.communicate(timeout=PATIENCE)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], said
    assert "2 x cpu" in said[0]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]


FAKES = {
    # As many launchers on this machine as there are nodes; options are srun's own. Ends with the worst status.
    "srun": """#!/bin/bash
while [[ ${1:-} == -* ]]; do shift; done
for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do SLURM_NODEID=$node "$@" & jobs="${jobs:-} $!"; done
worst=0
for job in $jobs; do wait "$job" || worst=$?; done
exit $worst
""",
    "scontrol": """#!/bin/bash
if [[ $1 == show ]]; then printf '127.0.0.1\\nelsewhere\\n'; else echo "$@" >>"$SCONTROL_LOG"; fi
""",
}


def test_the_slurm_script_stops_in_time_queues_again_and_finishes(config_file: Path, tmp_path: Path) -> None:
    for name, content in FAKES.items():
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    folder, log = tmp_path / "run", tmp_path / "scontrol.log"
    job = environment(
        PATH=f"{tmp_path}:{os.environ['PATH']}", SCONTROL_LOG=str(log), SLURM_JOB_ID=str(free_port()), NGPU="1",
        SLURM_JOB_NUM_NODES="2", SLURM_NTASKS="2", SLURM_JOB_NODELIST="node[0-1]", SLURM_SUBMIT_DIR=str(ROOT),
    )  # fmt: skip
    options = ["--config", str(config_file), "--job.output_dir", str(folder), "--job.deterministic"]
    command = ["bash", str(ROOT / "scripts/train.sbatch"), *options, "--training.steps=40"]
    first = subprocess.Popen(
        command, env=job, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_until(lambda: step_of(folder) >= 2, first)
    first.send_signal(signal.SIGTERM)  # SLURM's, to the batch script alone, some time before the end
    output, _ = first.communicate(timeout=PATIENCE)
    assert first.returncode == 0, output
    stopped = step_of(folder)
    assert 2 <= stopped < 40
    assert (folder / f"checkpoints/step-{stopped:08}").exists()
    assert log.read_text() == f"requeue {job['SLURM_JOB_ID']}\n"

    second = subprocess.run(command, env=job, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert second.returncode == 0, second.stdout + second.stderr
    assert [line["step"] for line in metrics(folder)] == list(range(1, 41))
    assert log.read_text().count("requeue") == 1

    wrong = subprocess.run([*command, "--training.stpes=3"], env=job, capture_output=True, text=True, timeout=PATIENCE)
    assert wrong.returncode == 2
    assert "training.steps?" in wrong.stderr
    assert log.read_text().count("requeue") == 1
