"""Adapters by their options: frozen weights of a directory, and a resume on another layout."""

import shutil
from pathlib import Path

import pytest
import torch

from checkpoint.export import Options, export_to_hf
from tests.test_train import ROOT, SMALL, metrics, run, stored_tensors

LORA = (
    "--lora.rank=8",
    "--lora.alpha=64",
    "--lora.targets=attention,linear_attention,shared_expert,experts,head",
    "--optimizer.lr=1e-2",
)


def test_adapters_train_and_resume_on_another_layout(tmp_path: Path) -> None:
    config_file = tmp_path / "small.toml"
    config_file.write_text(SMALL.format(root=ROOT))
    # Weights that know no batch better than another.
    run(config_file, tmp_path / "whole", "--training.steps=1", "--lr_scheduler.warmup_steps=1", "--optimizer.lr=1e-12")
    base = tmp_path / "base"
    export_to_hf(tmp_path / "whole", base, Options(dtype=torch.float32))
    options = [f"--model.path={base}", "--model.initial_load=hf", *LORA]
    text = SMALL.format(root=ROOT)
    table = text[text.index("[training]") :]
    config_file.write_text(f'extends = "{ROOT}/train_configs/qwen35moe_sft_tiny.toml"\n' + table)
    data = ["--data.format=text", f"--data.path={ROOT}/data/tiny/*.jsonl", "--optimizer.eps=1e-4"]

    run(config_file, tmp_path / "two", *options, *data)
    two = metrics(tmp_path / "two")
    middle = tmp_path / "two/checkpoints/step-00000003"
    saved = stored_tensors(middle)
    assert all("lora_" in name for name in saved if not name.startswith("train."))
    assert two[-1]["loss"] < two[0]["loss"] - 0.1

    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    again = [*options[1:], *data, f"--model.path={moved}", f"--checkpoint.resume={middle}"]
    run(config_file, tmp_path / "one", *again, "--parallelism.expert_parallel_degree=1", ranks=1)
    # To rounding, as in test_train.py.
    expected = [line["loss"] for line in two[3:]]
    assert [line["loss"] for line in metrics(tmp_path / "one")] == pytest.approx(expected, rel=1e-5)
