"""Options that are set and not read: which are told, and that no shipped configuration has any."""

import json
from pathlib import Path

import pytest

from config.options import Config
from config.reading import ROOT, load_config, model_config
from config.unread import unread
from parallelisms.degrees import Degrees
from tests.config.runs import load

TOWER = "--model.config={vision_config = {depth = 1}, image_token_id = 1, video_token_id = 2, "
TOWER += "vision_start_token_id = 3, vision_end_token_id = 4}"


def told(config: Config, expert: int = 1) -> str:
    return unread(config, model_config(config), Degrees(1, 2, expert))


@pytest.mark.parametrize(
    ("off", "names", "reason", "on"),
    [
        (
            ["--validation.share=0.5", "--validation.sets.a=text/a.jsonl", "--validation.steps=3"],
            "validation.share, validation.sets, validation.steps",
            "validation.enable is false",
            ["--validation.enable"],
        ),
        (["--mtp.loss_weight=1"], "mtp.loss_weight", "mtp.train is 'off'", ["--mtp.train=joint"]),
        (["--lora.targets=head", "--lora.alpha=3"], "lora.alpha, lora.targets", "lora.rank is 0", ["--lora.rank=8"]),
        (
            ["--data.template_options.a=3", "--data.train_on=last", "--data.too_long=truncate"],
            "data.template_options, data.train_on, data.too_long",
            "data.format is 'text'",
            ["--data.format=chat"],
        ),
        (
            ["--data.format=chat", "--data.text_key=a", "--data.end_of_document=false"],
            "data.text_key, data.end_of_document",
            "data.format is 'chat'",
            None,
        ),
        (
            ["--data.min_pixels=3", "--data.max_pixels=3"],
            "data.min_pixels, data.max_pixels",
            "the model has no tower",
            [TOWER],
        ),
        (["--moe.aux_loss_scope=hf"], "moe.aux_loss_scope", "moe.aux_loss_coef is 0", ["--moe.aux_loss_coef=1"]),
        (
            ["--lr_scheduler.decay=constant", "--lr_scheduler.min_lr_ratio=0"],
            "lr_scheduler.min_lr_ratio",
            "lr_scheduler.decay is 'constant'",
            None,
        ),
        (
            ["--checkpoint.enable=false", "--checkpoint.export_hf=last", "--checkpoint.keep=7"],
            "checkpoint.export_hf",
            "checkpoint.enable is false",
            None,
        ),
        (["--metrics.wandb_project=a"], "metrics.wandb_project", "metrics.wandb is false", ["--metrics.wandb"]),
    ],
)
def test_what_is_set_and_not_read_is_named(off: list[str], names: str, reason: str, on: list[str] | None) -> None:
    assert told(load(*off)) == f"set, but not read: {names} ({reason})"
    if on:
        assert told(load(*off, *on)) == ""


def test_all_in_one_line() -> None:
    config = load("--parallelism.expert_room=1.5", "--mtp.loss_weight=1")
    both = "mtp.loss_weight (mtp.train is 'off'); parallelism.expert_room (the expert-parallel degree is 1)"
    assert told(config) == f"set, but not read: {both}"
    assert "expert_room" not in told(config, expert=2)


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("train_configs/*.toml"), *ROOT.glob("benchmarks/*.toml")]), ids=lambda path: path.stem
)
def test_shipped_configurations_set_nothing_in_vain(folder: Path, path: Path) -> None:
    config = load_config(["--config", str(path)])
    if config.model.path:  # an export that the tiny run makes
        (folder / "config.json").write_text(json.dumps(model_config(load()).to_dict()))
        config = load_config(["--config", str(path), f"--model.path={folder}"])
    assert told(config, expert=2) == ""
