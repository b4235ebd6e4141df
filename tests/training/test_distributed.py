"""A rank that does not come to a collective: the run ends by itself and names it."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from config.options import Config, Data, Job, Optimizer, Training
from errors import UserError
from tests.commands import status_of
from tests.distributed import needs_gpus, run_ranks
from tests.patience import PATIENCE
from tests.training.test_load_balancing import ROOT, SMALL
from training.distributed import check_same_options, init_distributed, world_from_environment

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
    done = run_with_a_sleeper(tmp_path, rank, place, num_calls)
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if "waited in vain" in line]
    assert len(told) == 1, done.stderr[-3000:]
    prefix = "" if rank == "1" else "[rank 1] "
    assert told[0].startswith(f"{prefix}a collective waited in vain: missing ranks [{rank}] ")


# Two GPUs alone, so that both are in every group and a rank of a group is the rank of the run.
@pytest.mark.parametrize(
    ("rank", "place", "num_calls"),
    [
        pytest.param("1", '(data.loader.TokenLoader, "__next__")', 1, id="1 in the data", marks=needs_gpus(2)),
        pytest.param(
            "0", '(models.qwen35_moe.moe.SharedExpert, "forward")', 2, id="0 in the model", marks=needs_gpus(2)
        ),
    ],
)
def test_the_missing_rank_is_named_on_gpus(tmp_path: Path, rank: str, place: str, num_calls: int) -> None:
    done = run_with_a_sleeper(tmp_path, rank, place, num_calls, on_gpus=True)
    assert done.returncode == 1
    if rank == "1":  # the other waits on the host
        assert f"a collective waited in vain: missing ranks [{rank}] " in done.stderr
    else:  # or its GPU does, and NCCL's watchdog ends it and reports
        assert "Watchdog caught collective operation timeout" in done.stderr
        assert re.search(rf"\[{rank}\] finished collective #\d+, but didn't join collective", done.stderr)


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ({}, "0"),
        ({"TORCH_FR_BUFFER_SIZE": "2000"}, "2000"),
        ({"TORCH_NCCL_TRACE_BUFFER_SIZE": "2000"}, None),
    ],
)
def test_nccl_records_nothing_unless_asked(
    monkeypatch: pytest.MonkeyPatch, before: dict[str, str], expected: str | None
) -> None:
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DESYNC_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    # What init_distributed sets beside these is given back too.
    monkeypatch.setattr(os, "environ", {**os.environ, **before})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    assert init_distributed(1).type == "cuda"
    assert os.environ.get("TORCH_FR_BUFFER_SIZE") == expected
    assert "TORCH_NCCL_DESYNC_DEBUG" not in os.environ


def run_with_a_sleeper(
    tmp_path: Path, rank: str, place: str, num_calls: int, on_gpus: bool = False
) -> subprocess.CompletedProcess[str]:
    """Two processes of train.py with ep 2, of which `rank` falls asleep; they wait for each other 12 s at most."""
    (tmp_path / "small.toml").write_text(SMALL.format(root=ROOT))
    script = SCRIPT.format(root=str(ROOT), rank=rank, place=place, num_calls=num_calls)
    (tmp_path / "sleepy.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tmp_path / "sleepy.py"), f"--config={tmp_path / 'small.toml'}", f"--job.output_dir={tmp_path}"]
    command += ["--job.collective_timeout_seconds=12", "--parallelism.expert_parallel_degree=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if on_gpus:
        command.append("--kernels.cross_entropy=torch")  # nothing that is compiled for longer than they wait
        # As docs/communication.md has it; PyTorch would put what it recorded elsewhere.
        environment |= {"TORCH_NCCL_DESYNC_DEBUG": "1", "TORCH_FR_BUFFER_SIZE": "2000"}
        environment["TORCH_FR_DUMP_TEMP_FILE"] = str(tmp_path / "recorded_")
    else:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two': expected an integer"),
        ({"RANK": ""}, "RANK = '': expected an integer"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK = '-1': expected an integer"),
        ({"LOCAL_RANK": "0.5"}, "LOCAL_RANK = '0.5': expected an integer"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT = 'http': expected an integer"),
        ({"WORLD_SIZE": "0"}, "RANK = 0: expected less than WORLD_SIZE = 0"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK = 2: expected less than WORLD_SIZE = 2"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost"}, "MASTER_PORT is not set, but WORLD_SIZE = 2"),
        ({"WORLD_SIZE": "2"}, "RANK is not set, but WORLD_SIZE = 2"),
    ],
)
def test_an_impossible_environment_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, environment: dict[str, str], said: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("errors.time.sleep", lambda _: None)
    assert status_of(lambda _: world_from_environment() and None, []) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


ENDING = """
import atexit, sys, threading, time
import torch.distributed as dist
from errors import UserError, exit_on_error
from training.distributed import keep_exit_status

class Last:
    def __del__(self):
        print("torn down", flush=True)

last = Last()
atexit.register(print, "hooks")
has_group = sys.argv[1] == "True"
if has_group:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
with keep_exit_status(), exit_on_error():
    threading.Thread(target=lambda: (time.sleep(0.5), print("saved"))).start()
    if sys.argv[2] == "error":
        raise UserError("wrong")
    sys.exit(None if sys.argv[2] == "None" else int(sys.argv[2]))
"""


@pytest.mark.parametrize("has_group", [True, False])
@pytest.mark.parametrize(("how", "status"), [("error", 2), ("3", 3), ("None", 0)])
def test_beside_a_group_a_process_ends_but_for_pythons_last_act(has_group: bool, how: str, status: int) -> None:
    command = [sys.executable, "-c", ENDING, str(has_group), how]
    environment = {**os.environ, "RANK": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == status
    assert done.stderr == ("wrong\n" if how == "error" else "")
    assert done.stdout.splitlines() == ["saved", "hooks"] + ([] if has_group else ["torn down"])


OPTIONS = Config(
    job=Job(output_dir="/here"),
    data=Data(path=("/here",), tokenizer="/here"),
    training=Training(steps=1, sequence_length=64, global_batch_size=4),
    optimizer=Optimizer(lr=1e-3),
)
CHANGES = [
    {"training": replace(OPTIONS.training, sequence_length=32)},
    {"training": replace(OPTIONS.training, local_batch_size=2)},
    {"parallelism": replace(OPTIONS.parallelism, expert_room=1.5)},
    {"checkpoint": replace(OPTIONS.checkpoint, async_=not OPTIONS.checkpoint.async_)},
    {"validation": replace(OPTIONS.validation, sets={"held_out": ("/a", "owner/name")})},
    # Another machine may have them elsewhere.
    {"job": replace(OPTIONS.job, output_dir="/elsewhere")},
    {"data": replace(OPTIONS.data, path=("/elsewhere",), tokenizer="/elsewhere", num_workers=3)},
    {"compile": replace(OPTIONS.compile, cache_dir="/elsewhere"), "kernels": replace(OPTIONS.kernels, self_test=False)},
]
EXPECTED = [
    "training.sequence_length = 32 on rank 1: expected 64, as on rank 0",
    "training.local_batch_size = 2 on rank 1: expected 1, as on rank 0",
    "parallelism.expert_room = 1.5 on rank 1: expected -1.0, as on rank 0",
    "checkpoint.async = False on rank 1: expected True, as on rank 0",
    "validation.sets = {'held_out': ['PATH', 'owner/name']} on rank 1: expected {}, as on rank 0",
    "",
    "",
    "",
]


def told_of(others: list[Config]) -> list[str]:
    """What is said where rank 1 has these options, each in turn."""
    told = []
    for other in others:
        try:
            check_same_options(other if dist.get_rank() else OPTIONS)
            told.append("")
        except UserError as error:
            told.append(str(error))
    return told


def test_ranks_with_other_options_are_named() -> None:
    others = [replace(OPTIONS, **changes) for changes in CHANGES]  # type: ignore[arg-type]
    assert run_ranks(told_of, 2, others) == [EXPECTED, EXPECTED]


@pytest.mark.slow
def test_a_node_with_other_options_ends_the_run_at_once(tmp_path: Path) -> None:
    """Buffers of fixed sizes, and one rank with shorter rows: the ranks would wait, or end in a traceback of gloo's."""
    (tmp_path / "small.toml").write_text(SMALL.format(root=ROOT))
    (tmp_path / "other.py").write_text(
        "import os, runpy, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "sys.argv += ['--training.sequence_length=32'] if os.environ['RANK'] == '1' else []\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tmp_path / "other.py"), f"--config={tmp_path / 'small.toml'}", f"--job.output_dir={tmp_path}"]
    command += ["--parallelism.expert_parallel_degree=2", "--parallelism.expert_room=1.2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1  # torchrun's, whatever its ranks' are
    assert "training.sequence_length = 32 on rank 1: expected 64, as on rank 0" in done.stderr.splitlines()
    assert "exitcode  : 2" in done.stderr
