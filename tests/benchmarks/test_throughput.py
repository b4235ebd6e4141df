"""The throughput benchmark runs as the docs say, on a CPU too."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import throughput
from benchmarks.images import with_images
from benchmarks.throughput import Launches, random_micro_batch, time_by_kind, trace_of_rank
from config.options import Config
from config.reading import load_config, model_config
from errors import UserError
from training.plan import parse_images

ROOT = Path(__file__).resolve().parents[2]


def test_what_a_gpu_does_is_told_of_the_steps_after_the_first() -> None:
    on_gpu = torch.autograd.DeviceType.CUDA
    # Of a step: a product of 2 ms, 1 ms idle, an update of 1 ms; before the second step's there is 1 ms more idle.
    named = [("nvjet_a", 0, 2), ("_update_kernel", 3, 4), ("nvjet_a", 5, 7), ("_update_kernel_0", 8, 9)]
    events = [
        SimpleNamespace(
            device_type=on_gpu,
            is_user_annotation=False,
            name=name,
            time_range=SimpleNamespace(start=1000 * start, end=1000 * end, elapsed_us=lambda ms=end - start: 1000 * ms),
        )
        for name, start, end in named
    ]
    events.append(SimpleNamespace(device_type=torch.autograd.DeviceType.CPU, name="_update_kernel"))
    found = time_by_kind(SimpleNamespace(events=lambda: events), num_steps=1)  # type: ignore[arg-type]
    assert found == {"dense matmuls": 2.0, "idle": 2.0, "optimizer, clipping": 1.0}


def test_how_far_a_gpu_is_behind_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    # Seconds at which the host has launched, and the GPU is there: 0.5 ms after it at the start, then 100, 40 and 3.
    launched, reached = iter([7.0, 8.0, 9.0, 10.0]), iter([7.0005, 8.1, 9.04, 10.003])

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = next(reached)

        def elapsed_time(self, other: "Event") -> float:
            return (other.at - self.at) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(launched))
    launches = Launches(torch.device("cuda"))
    for _ in range(3):
        launches.note()
    assert launches.ahead() == pytest.approx(39.5)  # the median, from where the host found the GPU idle


def test_each_rank_has_a_trace_of_its_own() -> None:
    assert trace_of_rank("runs/trace.json.gz", 0) == "runs/trace.json.gz"
    assert trace_of_rank("runs/trace.json.gz", 3) == "runs/rank3-trace.json.gz"  # a name that is compressed stays one


def test_it_measures_a_training_step(tmp_path: Path) -> None:
    options = ["--model.config.num_hidden_layers=4", "--training.sequence_length=32", "--training.local_batch_size=1"]
    options += ["--training.global_batch_size=2", "--parallelism.expert_parallel_degree=1", "--documents=20,1"]
    command = [sys.executable, "-m", "benchmarks.throughput", "--config", "qwen35moe_tiny.toml", *options]
    done = subprocess.run(
        [*command, "--steps=2", "--profile=1", f"--trace={tmp_path}/trace.json", f"--json={tmp_path}/found.jsonl"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.jsonl").read_text())
    assert found["tokens_per_step"] == 64
    assert found["layers"] == 4
    assert found["documents"] == [20, 1]
    # Both are rounded: the seconds to 0.1 ms, these to a whole number.
    assert found["tokens_per_second_per_device"] == pytest.approx(64 / found["step_seconds"], rel=0.02, abs=0.5)
    assert 0 < found["loss"] < 10
    assert f"{'layers':32} 4" in done.stdout
    # The trace names its steps. Its picture needs a GPU, which timeline.py says in one line.
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert any(event["name"] == "ProfilerStep#0" for event in events)
    command = [sys.executable, "-m", "benchmarks.timeline", f"{tmp_path}/trace.json", f"{tmp_path}/picture.svg"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"{tmp_path}/trace.json: no GPU kernels in this trace, expected one that was made on a GPU\n"


def test_images_take_their_share(tmp_path: Path) -> None:
    options = ["--config", "qwen35moe_vision_tiny.toml", "--training.local_batch_size=2", "--images=64x64:0.1"]
    command = [sys.executable, "-m", "benchmarks.throughput", *options, f"--json={tmp_path}/found.jsonl", "--steps=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    config = load_config(options[:-1])
    vision = model_config(config).vision
    images = parse_images("64x64:0.1")
    # So small an image is enlarged to 256 x 256 pixels, which are 64 tokens.
    counts = []
    for number in range(10):
        batch = with_images(random_micro_batch(config, [], 4000, number), vision, images, number)
        counts.append(len(batch.patches.places) / 64)
        assert (batch.tokens[batch.patches.places] == vision.image_token_id).all()
        assert batch.positions.shape == (3, 512)
    assert sum(counts) == 8  # 10 * 512 * 0.1 / 64
    assert set(counts) == {0, 1}


@pytest.mark.parametrize("text", ["0x64:0.1", "64x0:0.1", "64:0.1", "64x64", "64x64:2"])
def test_images_of_no_size_or_share(text: str) -> None:
    with pytest.raises(UserError, match="expected as 1080x1920"):
        parse_images(text)


@pytest.mark.parametrize("profile", [[], ["--profile=1"]])
def test_launches_alone_are_profiled_on_a_gpu(profile: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: not profile)
    with pytest.raises(UserError, match="--launches-only: expected a GPU and --profile"):
        throughput.main(["--config=qwen35moe_tiny.toml", "--launches-only", *profile])


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what is missing where there is no GPU")
def test_the_stack_to_compare_with_tells_what_it_needs() -> None:
    command = [sys.executable, "-m", "benchmarks.transformers_stack", "--config", "qwen35moe_tiny.toml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "expected a CUDA GPU and the packages fla and liger_kernel; not here: " in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(("context", "rows"), [(1, 16), (2, 8)])
def test_a_batch_that_is_too_small_is_one_micro_batch(context: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each data rank: processes that share tokens read the same rows."""

    def measure(config: Config, *_: object) -> None:
        assert config.training.global_batch_size == rows
        raise KeyboardInterrupt  # all that is of interest is known

    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(throughput, "measure", measure)
    options = [f"--parallelism.context_parallel_degree={context}", "--parallelism.expert_parallel_degree=1"]
    options += ["--training.local_batch_size=4", "--training.global_batch_size=4"]
    with pytest.raises(KeyboardInterrupt):
        throughput.main(["--config=qwen35moe_tiny.toml", *options])
