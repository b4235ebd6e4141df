"""The recipe from TOML to a Hugging Face checkpoint, with real processes: training, resuming, stopping, converting."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoint.export import Options, export_to_hf
from checkpoint.tensors.dcp import read_dcp
from models.ops.documents import Documents
from models.ops.kernels import Kernels
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.model import Qwen35Moe
from tests.checkpoint.runs import Run
from tests.distributed import free_port
from tests.models.qwen35_moe.shapes import run_model
from tests.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[1]

# The tiny recipe with less of everything but kinds of layers.
SMALL = """
extends = "{root}/train_configs/qwen35moe_tiny.toml"
[model.config]
hidden_size = 64
num_hidden_layers = 2
full_attention_interval = 2
[training]
steps = 6
sequence_length = 64
local_batch_size = 1
global_batch_size = 4
[lr_scheduler]
warmup_steps = 2
[data]
num_workers = 0
[checkpoint]
interval = 3
keep = 0
[metrics]
log_interval = 1
tensorboard = false
"""

TIMES = {"tokens_per_second", "step_seconds", "data_seconds", "peak_memory_gib", "checkpoint_seconds"}


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.toml"
    path.write_text(SMALL.format(root=ROOT))
    return path


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **changes}


def run(config_file: Path, output_dir: Path, *options: str, ranks: int = 2) -> None:
    """train.py's main to its end, which must be a good one, in a tenth of the time that run_train.sh takes to start."""
    Run(output_dir, ranks, f"--config={config_file}", *options, defaults=()).finish()


def run_script(config_file: Path, output_dir: Path, *options: str, ranks: int = 2) -> str:
    """What run_train.sh prints to its end, which must be a good one."""
    command = ["bash", str(ROOT / "run_train.sh"), "--config", str(config_file), "--job.output_dir", str(output_dir)]
    done = subprocess.run(
        [*command, *options], env=environment(NGPU=str(ranks)), capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def metrics(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def without_times(lines: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def stored_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.read() for name, tensor in read_dcp(checkpoint).items()}


def native_model(checkpoint: Path, with_vision: bool = False) -> Qwen35Moe:
    """The model of a checkpoint in this one process."""
    shape = ModelConfig.from_pretrained(checkpoint / "hf", with_vision)
    model = Qwen35Moe(shape, Kernels(attention="sdpa"))
    tensors = {n.removeprefix("model."): t for n, t in stored_tensors(checkpoint).items() if n.startswith("model.")}
    model.load_state_dict(tensors)
    return model


def test_four_processes_train_and_transformers_loads_the_result(config_file: Path, tmp_path: Path) -> None:
    options = ("--training.steps=10", "--parallelism.expert_parallel_degree=4", "--validation.share=0.5")
    log = run_script(config_file, tmp_path / "run", *options, ranks=4)
    assert log.count("set, but not read: validation.share (validation.enable is false)\n") == 1
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert lines[-1]["tokens_seen"] == 10 * 4 * 64
    assert all(line["expert_load_max_over_mean"] >= 1 and line["grad_norm"] > 0 for line in lines)
    assert all("mfu" not in line for line in lines)

    export_to_hf(tmp_path / "run", tmp_path / "hf", Options(dtype=None, max_shard_bytes=400_000))
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True, dtype="auto")
    assert not any(loading.values()), loading
    assert model.dtype == torch.float32
    for layer in model.model.layers:
        assert layer.mlp.experts.gate_up_proj.shape == (8, 2 * 128, 64)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    tokens = tokenizer("The with statement is used to wrap a block.", return_tensors="pt").input_ids[0]
    native = native_model(tmp_path / "run/checkpoints/step-00000010")
    with torch.no_grad():
        expected, _ = run_model(native, tokens, torch.arange(len(tokens)), Documents.from_lengths([len(tokens)]))
        logits = model(tokens[None]).logits[0]
    # Two implementations in float32 (see the parity tests).
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(config_file: Path, tmp_path: Path) -> None:
    run(config_file, tmp_path / "whole", "--job.deterministic")
    first = tmp_path / "whole/checkpoints/step-00000003"
    run(config_file, tmp_path / "resumed", "--job.deterministic", f"--checkpoint.resume={first}")
    assert without_times(metrics(tmp_path / "resumed")) == without_times(metrics(tmp_path / "whole")[3:])
    whole, resumed = (stored_tensors(tmp_path / name / "checkpoints/step-00000006") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert any(name.startswith("optimizer.") for name in whole)
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


def test_resumes_on_another_layout(config_file: Path, tmp_path: Path) -> None:
    run(config_file, tmp_path / "whole")
    first = tmp_path / "whole/checkpoints/step-00000003"
    options = (f"--checkpoint.resume={first}", "--parallelism.expert_parallel_degree=1", "--data.num_workers=1")
    run(config_file, tmp_path / "alone", *options, ranks=1)
    expected = [line["loss"] for line in metrics(tmp_path / "whole")[3:]]
    assert [line["loss"] for line in metrics(tmp_path / "alone")] == pytest.approx(expected, rel=1e-5)
    # The same samples were read: the cursors after step 6 are equal.
    cursors = [
        stored_tensors(tmp_path / name / "checkpoints/step-00000006")["train.data_cursors"]
        for name in ("whole", "alone")
    ]
    assert torch.equal(*cursors)


def test_sigterm_saves_and_a_second_start_goes_on(config_file: Path, tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "run_train.sh"), "--config", str(config_file), "--job.output_dir", str(tmp_path)]
    endless = ["--training.steps=100000", "--checkpoint.interval=100000", "--data.num_workers=1"]
    process = subprocess.Popen([*command, *endless], env=environment(NGPU="2"))
    try:
        deadline = time.monotonic() + PATIENCE
        while not (tmp_path / "metrics.jsonl").exists() or len(metrics(tmp_path)) < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=PATIENCE) == 0
    finally:
        process.kill()
    last = metrics(tmp_path)[-1]["step"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step-{last:08}"]
    run(config_file, tmp_path, f"--training.steps={last + 2}")
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, last + 3))


def test_two_nodes(config_file: Path, tmp_path: Path) -> None:
    # Two torchrun agents on this machine stand in for two nodes.
    port = str(free_port())
    agents = [
        subprocess.Popen(
            [
                "bash",
                str(ROOT / "run_train.sh"),
                "--config",
                str(config_file),
                "--job.output_dir",
                str(tmp_path / "two"),
            ],
            env=environment(NGPU="1", NNODES="2", NODE_RANK=str(node), MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
        )
        for node in range(2)
    ]
    assert [agent.wait(timeout=PATIENCE) for agent in agents] == [0, 0]
    run(config_file, tmp_path / "one")
    assert without_times(metrics(tmp_path / "two")) == without_times(metrics(tmp_path / "one"))


def test_plain_python_is_one_process_and_mistakes_are_one_line(config_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(config_file), f"--job.output_dir={tmp_path}"]
    options = ["--parallelism.expert_parallel_degree=1", "--training.steps=2", "--checkpoint.interval=2"]
    subprocess.run([*command, *options], env=environment(), check=True, timeout=PATIENCE)
    assert len(metrics(tmp_path)) == 2

    wrong = [*command, "--parallelism.expert_parallel_degree=2"]
    done = subprocess.run(wrong, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "expert_parallel_degree = 2" in done.stderr

    def mistake(*options: str) -> str:
        """The one line, beside the log, that tells what is found when the run has begun."""
        again = Run(tmp_path, 1, f"--config={config_file}", *options, defaults=())
        assert again.wait() == [2]
        (line,) = [line for line in again.log.read_text().splitlines() if " [rank 0] " not in line]
        return line

    assert "resume = 'never'" in mistake(*options, "--checkpoint.resume=never")
    other_model = mistake(*options, "--model.config.num_experts=4", "--model.config.num_experts_per_tok=1")
    assert "mlp.experts.down_proj" in other_model
    other_batch = mistake(*options, "--training.global_batch_size=8")
    assert "training.global_batch_size" in other_batch
    assert "8 now" in other_batch


def test_bare_torchrun_tells_a_mistake_in_one_line_too(config_file: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(ROOT / "train.py"), "--config", str(config_file), f"--job.output_dir={tmp_path}"]
    done = subprocess.run(
        [*command, "--parallelism.expert_parallel_degree=3"], env=environment(), capture_output=True, text=True
    )
    assert done.returncode != 0
    assert done.stderr.splitlines()[0].startswith("parallelism.expert_parallel_degree = 3")
