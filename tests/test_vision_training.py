"""Runs with images, from their options on: numbers of processes and what is frozen change what they should alone."""

from pathlib import Path

import pytest

from tests.test_train import ROOT, metrics, run, stored_tensors

TINY = ROOT / "train_configs/qwen35moe_vision_tiny.toml"
SHORT = ("--training.steps=2", "--metrics.log_interval=1", "--validation.interval=2", "--validation.steps=2")
SHORT += ("--checkpoint.export_hf=never", "--lr_scheduler.warmup_steps=1")


def test_one_process_and_two_and_what_is_frozen(tmp_path: Path) -> None:
    run(TINY, tmp_path / "one", *SHORT, "--job.deterministic", "--data.num_workers=0", ranks=1)
    run(TINY, tmp_path / "two", *SHORT, "--activation_checkpoint.mode=full", "--optimizer.merger_lr_ratio=1")
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for alone, together in zip(one, two, strict=True):
        for name in ("loss", "grad_norm"):
            assert together[name] == pytest.approx(alone[name], rel=1e-4), name
        assert together["vision_tokens"] == alone["vision_tokens"] > 0
        assert alone["patches_max_over_mean"] == 1 <= together["patches_max_over_mean"] < 2
    assert two[-1]["validation_loss"] == pytest.approx(one[-1]["validation_loss"], rel=1e-4)

    run(TINY, tmp_path / "frozen", *SHORT, "--model.freeze=vision,merger", "--data.num_workers=0")
    frozen = metrics(tmp_path / "frozen")
    assert frozen[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-4)
    assert frozen[0]["grad_norm"] < one[0]["grad_norm"]
    (all_trained, text_trained) = (
        stored_tensors(tmp_path / name / "checkpoints/step-00000002") for name in ("one", "frozen")
    )
    of_tower = {name for name in all_trained if name.startswith("optimizer.visual.")}
    assert of_tower
    assert text_trained.keys() == all_trained.keys() - of_tower
