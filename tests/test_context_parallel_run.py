"""Runs whose processes share the tokens of their rows: metrics, validation, lists and cursors as of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.runs import Run
from tests.test_train import ROOT, stored_tensors

SHARED = ("--parallelism.context_parallel_degree=2",)
HELD_OUT = "The with statement is used to wrap the execution of a block. "


def lines_of(folder: Path, ranks: int, *options: str) -> list[dict[str, Any]]:
    return Run(folder, ranks, "--training.steps=4", "--checkpoint.interval=4", *options).finish()


def check(found: list[dict[str, Any]], expected: list[dict[str, Any]], equal: tuple[str, ...] = ()) -> None:
    """Losses and norms but for the order of sums, as in tests/parallelisms/test_layouts.py; counts exactly."""
    assert len(found) == len(expected) == 4
    for line, other in zip(found, expected):
        assert line.keys() == other.keys()
        for key in line.keys() & {"loss", "aux_loss", "validation_loss"}:
            assert line[key] == pytest.approx(other[key], rel=1e-6), key
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
        for key in (*equal, "tokens_seen", "expert_load_max_over_mean", "experts_without_tokens"):
            assert line[key] == other[key], key


def cursors(folder: Path) -> torch.Tensor:
    return stored_tensors(folder / "checkpoints/step-00000004")["train.data_cursors"]


def test_text_and_its_validation(tmp_path: Path) -> None:
    # Several rows of one document, and one that begins and ends inside a row.
    (tmp_path / "held_out.txt").write_text(HELD_OUT * 12)
    options = ("--validation.enable", f"--validation.path={tmp_path}/held_out.txt", "--validation.interval=2")
    options += ("--moe.aux_loss_coef=0.01",)
    one = lines_of(tmp_path / "one", 1, *options, "--training.local_batch_size=4")
    assert ["validation_loss" in line for line in one] == [False, True, False, True]
    for name, ranks, others in (
        # All rows in one micro-step, as the loss of the routers is one of a micro-step.
        ("two", 2, (*SHARED, "--training.local_batch_size=4")),
        ("four", 4, (*SHARED, "--training.local_batch_size=2", "--parallelism.expert_parallel_degree=4")),
    ):
        check(lines_of(tmp_path / name, ranks, *options, *others), one)
        assert torch.equal(cursors(tmp_path / name), cursors(tmp_path / "one"))


def test_conversations_with_fillers_and_bad_samples(tmp_path: Path) -> None:
    chats = (ROOT / "data/tiny/chat/conversations.jsonl").read_text().splitlines()
    (tmp_path / "chat.jsonl").write_text("\n".join([*chats[:20], '{"messages": []}', "{broken"] * 2))
    # Rows of 70: few sums of lengths reach it, so there are fillers.
    options = ("--data.format=chat", f"--data.path={tmp_path}/chat.jsonl", "--training.sequence_length=70")
    options += ("--moe.aux_loss_coef=0.01", "--moe.aux_loss_scope=hf", "--training.local_batch_size=2")
    one = lines_of(tmp_path / "one", 1, *options)
    counts = ("fill_rate", *(key for key in one[-1] if key.startswith("samples_")))
    assert len(counts) > 1
    two = lines_of(tmp_path / "two", 2, *options, *SHARED)
    check(two[-1:] * 4, one[-1:] * 4, counts)
    check(two, one)
    assert torch.equal(cursors(tmp_path / "two"), cursors(tmp_path / "one"))
    lists = [sorted((tmp_path / name / "skipped").iterdir()) for name in ("one", "two")]
    assert [path.name for path in lists[0]] == [path.name for path in lists[1]] == ["rank-00000.jsonl"]
    assert lists[0][0].read_text() == lists[1][0].read_text()


def test_images(tmp_path: Path) -> None:
    options = ("--config=qwen35moe_vision_tiny.toml", "--model.config.hidden_size=64", "--training.sequence_length=256")
    options += ("--training.local_batch_size=2", "--validation.interval=4", "--validation.steps=2")
    one = lines_of(tmp_path / "one", 1, *options)
    for name, ranks, others in (("two", 2, SHARED), ("four", 4, (*SHARED, "--parallelism.expert_parallel_degree=2"))):
        found = lines_of(tmp_path / name, ranks, *options, *others)
        check(found, one, ("vision_tokens",))
        # Whole frames are dealt: the tower's work is shared, and none of it is done twice.
        assert all(1 <= line["patches_max_over_mean"] < 1.5 for line in found)
