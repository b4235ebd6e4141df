"""run_train.sh: one line for every mistake, environment, exit status, signals, several nodes.

Launching is tested with a copy of the script beside a small train.py that neither imports torch nor needs data.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.checkpoint.runs import OPTIONS, Run
from tests.distributed import free_port
from tests.patience import PATIENCE

SCRIPT = Path(__file__).resolve().parents[1] / "run_train.sh"
LONG = 2 * PATIENCE  # what goes on so long has not been ended
OWN_VARIABLES = ("NGPU", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "LOG_RANK", "OMP_NUM_THREADS")

# Like the real one: the first signal asks for a stop, a second ends the process. Each rank logs to a file of its own,
# where a test can see it at once.
TRAIN = """
import os, signal, sys, time
rank = os.environ["RANK"]
log = open(os.path.join(sys.argv[1], f"rank-{rank}"), "a", buffering=1)
received = []
def on_signal(number, frame):
    if received:
        os._exit(128 + number)
    received.append(number)
    log.write(f"signal {number}\\n")
time.sleep(float(os.environ.get("START_SECONDS", 0)))
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, on_signal)
log.write(" ".join([rank] + [os.environ[name] for name in ("WORLD_SIZE", "OMP_NUM_THREADS", "LOG_RANK")]) + "\\n")
deadline = time.monotonic() + float(os.environ.get("RUN_SECONDS", 0))
while time.monotonic() < deadline and not received:
    time.sleep(0.02)
time.sleep(float(os.environ.get("STOP_SECONDS", 0)))
log.write("done\\n")
sys.exit(int(os.environ.get("EXIT_CODE", 0)))
"""


def environment(**variables: object) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in OWN_VARIABLES}
    return {**inherited, "PYTHON": sys.executable, **{name: str(value) for name, value in variables.items()}}


def run_script(*arguments: str, cwd: Path | None = None, **variables: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [SCRIPT, *arguments], env=environment(**variables), cwd=cwd, capture_output=True, text=True, timeout=PATIENCE
    )


class Launch:
    """A running copy of the script in `folder`, beside TRAIN and a check that accepts everything."""

    def __init__(self, folder: Path, **variables: object) -> None:
        self.folder = folder
        shutil.copy(SCRIPT, folder)
        (folder / "training").mkdir()
        shutil.copy(SCRIPT.parent / "training" / "launch.py", folder / "training")
        (folder / "config").mkdir()
        (folder / "config" / "checks.py").write_text("")
        (folder / "train.py").write_text(TRAIN)
        self.process = subprocess.Popen(
            [folder / "run_train.sh", str(folder)],
            env=environment(**{"NGPU": 2, "CUDA_VISIBLE_DEVICES": "", **variables}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # a process group of its own, as in a terminal
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def log(self, rank: int) -> list[str]:
        path = self.folder / f"rank-{rank}"
        return path.read_text().splitlines() if path.exists() else []

    def wait_for_ranks(self, num_ranks: int = 2) -> None:
        deadline = time.monotonic() + PATIENCE
        while not all(map(self.log, range(num_ranks))):
            assert time.monotonic() < deadline, "the ranks did not start"
            assert self.process.poll() is None, self.process.stdout.read()
            time.sleep(0.05)

    def end(self) -> int:
        output, _ = self.process.communicate(timeout=PATIENCE)
        print(output)
        return self.process.returncode

    def descendants_alive(self) -> str:
        """Processes whose command line names this folder."""
        listing = subprocess.run(["ps", "-ewwo", "pid,args"], capture_output=True, text=True, check=True).stdout
        return "\n".join(line for line in listing.splitlines() if str(self.folder) in line)


MISTAKES = [
    (["--config", "qwen35moe_tinny.toml"], {}, ["--config = 'qwen35moe_tinny.toml'", "qwen35moe_tiny.toml"]),
    (["--config", "qwen35moe_tiny.toml", "--training.stpes", "3"], {}, ["--training.stpes = '3'", "training.steps?"]),
    (["--config=qwen35moe_tiny.toml", "--training.steps=0"], {}, ["training.steps = 0", "a positive integer"]),
    (
        ["--config=qwen35moe_tiny.toml", "--parallelism.expert_parallel_degree=2"],
        {"NGPU": 3},
        ["expert_parallel_degree = 2", "divisor of the shard degree 3"],
    ),
    (["--config", "qwen35moe_tiny.toml"], {"NGPU": "two"}, ["NGPU = 'two'", "positive integer"]),
    (["--config", "qwen35moe_tiny.toml"], {"NGPU": "100000"}, ["NGPU = '100000'", "at most 1024 processes"]),
    (["--config", "qwen35moe_tiny.toml"], {"PYTHON": "python0"}, ["PYTHON = 'python0'", "a Python interpreter"]),
    (["--config", "qwen35moe_tiny.toml"], {"NGPU": "0"}, ["NGPU = '0'", "positive integer"]),
    (["--config", "qwen35moe_tiny.toml"], {"NNODES": "-1"}, ["NNODES = '-1'", "positive integer"]),
    (["--config", "qwen35moe_tiny.toml"], {"NNODES": 2}, ["MASTER_ADDR = ''", "host of node 0"]),
    (["--config", "qwen35moe_tiny.toml"], {"NNODES": 2, "NODE_RANK": 2}, ["NODE_RANK = '2'", "from 0 to 1"]),
    (["--config", "qwen35moe_tiny.toml"], {"MASTER_PORT": 70000}, ["MASTER_PORT = '70000'", "to 65535"]),
    (["--config=qwen35moe_tiny.toml", "--max-restarts", "two"], {}, ["--max-restarts = 'two'", "at least 0"]),
    (["--config=qwen35moe_tiny.toml", "--max-restarts"], {}, ["--max-restarts = ''", "at least 0"]),
    (
        ["--max-restarts=9", "--config=qwen35moe_tiny.toml"],
        {"NNODES": 2, "MASTER_ADDR": "a", "MASTER_PORT": 65530},
        ["MASTER_PORT = '65530'", "at most 65526"],
    ),
    (["--config", "qwen35moe_tiny.toml"], {"LOG_RANK": "0;1"}, ["LOG_RANK = '0;1'", "commas"]),
    (["--config", "qwen35moe_tiny.toml"], {"NGPU": 2, "LOG_RANK": "0,2"}, ["LOG_RANK = '0,2'", "below 2"]),
]


@pytest.mark.parametrize(("arguments", "variables", "expected"), MISTAKES)
def test_a_mistake_is_one_line_and_status_2(arguments: list[str], variables: dict, expected: list[str]) -> None:
    result = run_script(*arguments, **{"CUDA_VISIBLE_DEVICES": "", **variables})
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for part in expected:
        assert part in result.stderr


def test_help_from_any_directory(tmp_path: Path) -> None:
    result = run_script("--config", "qwen35moe_tiny.toml", "--help", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "--training.sequence_length: a positive integer below 2**31; required" in result.stdout


def test_ranks_environment_and_success(tmp_path: Path) -> None:
    launch = Launch(tmp_path, OMP_NUM_THREADS=3, LOG_RANK="1,0")
    assert launch.end() == 0
    assert launch.log(0) == ["0 2 3 1,0", "done"]
    assert launch.log(1) == ["1 2 3 1,0", "done"]


def test_two_runs_at_once(tmp_path: Path) -> None:
    """They choose different ports; the threads of a rank default to cores / processes."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    launches = [Launch(folder, RUN_SECONDS=2) for folder in folders]
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    for launch in launches:
        assert launch.end() == 0
        assert launch.log(1) == [f"1 2 {threads} 0", "done"]


@pytest.mark.parametrize(("of_rank", "status", "said"), [(3, 1, "ended with status 3"), (2, 2, None)])
def test_a_failure_is_passed_on_in_one_line(tmp_path: Path, of_rank: int, status: int, said: str | None) -> None:
    launch = Launch(tmp_path, EXIT_CODE=of_rank)
    output, _ = launch.process.communicate(timeout=PATIENCE)
    assert launch.process.returncode == status
    lines = output.splitlines()
    # A rank that found a mistake has told it itself.
    assert lines == [] if said is None else (len(lines) == 1 and said in lines[0]), output


def test_a_rank_that_is_killed_is_named(tmp_path: Path) -> None:
    launch = Launch(tmp_path, RUN_SECONDS=LONG)
    launch.wait_for_ranks()
    ranks = [
        line.split()[0] for line in launch.descendants_alive().splitlines() if line.endswith(f"train.py {tmp_path}")
    ]
    os.kill(int(ranks[-1]), signal.SIGKILL)
    output, _ = launch.process.communicate(timeout=PATIENCE)
    assert launch.process.returncode == 1
    assert output.splitlines()[-1].endswith("was ended by SIGKILL; the others were stopped")


def test_what_only_a_rank_finds_is_one_line_and_status_2(tmp_path: Path) -> None:
    """Two runs on one folder: the second is refused by its first rank, not by the check before the run."""
    first = Run(tmp_path / "run", 1, "--training.steps=100000")
    try:
        deadline = time.monotonic() + PATIENCE
        while not first.metrics():
            assert time.monotonic() < deadline
            assert first.alive, first.log.read_text()
            time.sleep(0.05)
        os.kill(first.ranks[0].pid or 0, signal.SIGSTOP)  # it keeps its lock, and leaves the cores to the second
        second = run_script(*OPTIONS, f"--job.output_dir={first.folder}", CUDA_VISIBLE_DEVICES="")
    finally:
        first.kill([0])
        first.wait()
    assert second.returncode == 2
    assert len(second.stderr.splitlines()) == 1, second.stderr
    assert "a run has it (process" in second.stderr


def test_a_scheduler_that_starts_several_runs_of_one_process(tmp_path: Path) -> None:
    options = ["--config=qwen35moe_tiny.toml", "--parallelism.expert_parallel_degree=1", f"--job.output_dir={tmp_path}"]
    result = subprocess.run(
        [sys.executable, SCRIPT.parent / "train.py", *options],
        env=environment(CUDA_VISIBLE_DEVICES="", SLURM_NTASKS=2),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert "SLURM_NTASKS = '2'" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_ranks_but_not_torchrun(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C in a terminal goes to the script's whole process group; `kill` to the script alone."""
    launch = Launch(tmp_path, RUN_SECONDS=LONG, STOP_SECONDS=0.5)
    launch.wait_for_ranks()
    (os.killpg if number == signal.SIGINT else os.kill)(launch.process.pid, number)
    assert launch.end() == 0
    for rank in (0, 1):
        assert launch.log(rank)[1:] == [f"signal {number.value}", "done"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="readiness is read from /proc")
def test_a_signal_before_the_ranks_are_ready_is_kept_for_them(tmp_path: Path) -> None:
    launch = Launch(tmp_path, START_SECONDS=1, RUN_SECONDS=LONG)
    time.sleep(0.3)  # bash has set its traps; torchrun still imports torch
    launch.process.send_signal(signal.SIGTERM)
    assert launch.end() == 0
    for rank in (0, 1):
        assert launch.log(rank)[-1] == "done"
        assert f"signal {signal.SIGTERM.value}" in launch.log(rank)


def test_a_second_signal_ends_everything_at_once(tmp_path: Path) -> None:
    launch = Launch(tmp_path, RUN_SECONDS=LONG, STOP_SECONDS=LONG)
    launch.wait_for_ranks()
    launch.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE
    while not all(len(launch.log(rank)) == 2 for rank in (0, 1)) and time.monotonic() < deadline:
        time.sleep(0.05)
    launch.process.send_signal(signal.SIGINT)
    assert launch.process.wait(timeout=5) == 128 + signal.SIGINT
    deadline = time.monotonic() + 10  # torchrun needs a moment to see its ranks dead
    while (alive := launch.descendants_alive()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive
    assert "done" not in launch.log(0) + launch.log(1)


def test_two_nodes(tmp_path: Path) -> None:
    """Two torchrun agents on this machine, one process each plus one: ranks are global."""
    port = free_port()
    launches = []
    for node in (0, 1):
        folder = tmp_path / str(node)
        folder.mkdir()
        launches.append(
            Launch(folder, NNODES=2, NODE_RANK=node, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS=1)
        )
    assert [launch.end() for launch in launches] == [0, 0]
    for node, launch in enumerate(launches):
        for rank in (2 * node, 2 * node + 1):
            assert launch.log(rank) == [f"{rank} 4 1 0", "done"]
