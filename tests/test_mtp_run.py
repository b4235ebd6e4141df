"""Runs that train multi-token prediction: metrics, validation, resumes, and what a run without it is told."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.runs import Run
from tests.test_train import metrics, stored_tensors, without_times

HELD_OUT = "The with statement is used to wrap the execution of a block. "
SHORT = ("--training.steps=4", "--checkpoint.interval=2", "--checkpoint.keep=0", "--job.deterministic")


@pytest.fixture
def validation(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "held_out.txt").write_text(HELD_OUT * 12)
    return ("--validation.enable", f"--validation.path={tmp_path}/held_out.txt", "--validation.interval=2")


def lines_of(folder: Path, ranks: int, *options: str) -> list[dict[str, Any]]:
    return Run(folder, ranks, *SHORT, *options).finish()


def test_one_process_and_two_that_share_rows_or_tokens(tmp_path: Path, validation: tuple[str, ...]) -> None:
    options = ("--mtp.train=joint", "--moe.aux_loss_coef=0.01", *validation, "--training.local_batch_size=4")
    one = lines_of(tmp_path / "one", 1, *options)
    for name, ranks, others in (
        ("rows", 2, ("--training.local_batch_size=2", "--parallelism.expert_parallel_degree=2")),
        ("tokens", 2, ("--parallelism.context_parallel_degree=2", "--parallelism.expert_parallel_degree=1")),
    ):
        different = [option for option in options if "local_batch_size" not in option or name == "tokens"]
        found = lines_of(tmp_path / name, ranks, *different, *others)
        for line, expected in zip(found, one, strict=True):
            assert line.keys() == expected.keys()
            for key in line.keys() & {"loss", "mtp_loss", "aux_loss", "validation_loss", "validation_mtp_loss"}:
                assert line[key] == pytest.approx(expected[key], rel=1e-6), (name, key)
            assert line.get("mtp_acceptance") == expected.get("mtp_acceptance"), name
            assert line["experts_without_tokens"] == expected["experts_without_tokens"], name
    assert ["mtp_acceptance" in line for line in one] == [False, True, False, True]
    assert all(line["mtp_loss"] > 1 for line in one)


def test_a_resume_goes_on_bit_for_bit_and_the_module_belongs_to_the_checkpoint(
    tmp_path: Path, validation: tuple[str, ...]
) -> None:
    whole = lines_of(tmp_path / "whole", 1, "--mtp.train=head", *validation)
    first = tmp_path / "whole/checkpoints/step-00000002"
    lines_of(tmp_path / "resumed", 1, "--mtp.train=head", *validation, f"--checkpoint.resume={first}")
    assert without_times(metrics(tmp_path / "resumed")) == without_times(whole[2:])
    states = [stored_tensors(tmp_path / name / "checkpoints/step-00000004") for name in ("whole", "resumed")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    # The module alone has moved, and has a state.
    before = stored_tensors(first)
    moved = {name for name, tensor in states[0].items() if not torch.equal(tensor, before[name])}
    assert {name for name in moved if name.startswith("model.")} == {n for n in before if n.startswith("model.mtp.")}
    assert all(name.startswith("optimizer.mtp.") for name in before if name.startswith("optimizer."))

    run = Run(tmp_path / "off", 1, *SHORT, f"--checkpoint.resume={first}")
    assert run.wait() == [2]
    log = run.log.read_text()
    assert "has an unknown tensor 'model.mtp.fc.weight': expected one of the same model, or mtp.train = 'joint'" in log


def test_drafts_come_to_fit_a_model_that_had_none(tmp_path: Path, validation: tuple[str, ...]) -> None:
    length = ("--training.steps=40", "--checkpoint.interval=40")
    Run(tmp_path / "off", 1, *length).finish()
    start = f"--checkpoint.start_from={tmp_path}/off/checkpoints/step-00000040"
    head = Run(tmp_path / "head", 1, "--mtp.train=head", *length, *validation, start)
    lines = [line for line in head.finish() if "mtp_acceptance" in line]
    assert "has no multi-token prediction: it begins with random weights" in head.log.read_text()
    assert lines[0]["mtp_acceptance"] < 0.5 < lines[-1]["mtp_acceptance"]
    assert lines[-1]["validation_mtp_loss"] < lines[0]["validation_mtp_loss"]
    assert len({line["validation_loss"] for line in lines}) == 1  # the model is as it was
