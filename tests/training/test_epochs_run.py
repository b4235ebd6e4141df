"""A run of epochs with held-out samples: its last step, its schedule, its resume, its validation by names."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.test_train import SMALL, metrics, run, without_times

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"def f{number}(): return {number} " + "a = b + c " * (number % 13) for number in range(60)]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    for name, texts in (("all", TEXTS), ("other", ["The with statement is used. " * 3])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    path = tmp_path / "epochs.toml"
    path.write_text(
        SMALL.format(root=ROOT).replace("steps = 6", "epochs = 1.5").replace("[data]", "[data]\npath = ['all.jsonl']")
        + "[validation]\nenable = true\nshare = 0.2\ninterval = 4\nsets.other = ['other.jsonl']\n"
    )
    return path


def test_epochs_end_where_it_was_said_and_go_on_on_another_layout(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    from data.preview import main

    main(["--config", str(config_file), "--rows=0"])
    out = capsys.readouterr().out
    said = int(out.split("training.epochs = 1.5: the last step is ")[1])
    (num_kept,) = re.findall(r"of (\d+) samples measured; validation.share = 0.2 holds (\d+) more out", out)
    assert sum(map(int, num_kept)) == len(TEXTS)

    options = ("--metrics.grad_norm_by_part", "--job.deterministic", "--parallelism.expert_parallel_degree=1")
    run(config_file, tmp_path / "whole", *options, ranks=1)
    whole = metrics(tmp_path / "whole")
    assert [line["step"] for line in whole] == list(range(1, said + 1))
    assert whole[-1]["lr"] == pytest.approx(3e-4)  # min_lr_ratio of the peak, at the last step
    assert whole[-2]["lr"] > 3.01e-4
    validated = [line for line in whole if "validation_loss" in line]
    assert [line["step"] for line in validated] == list(range(4, said + 1, 4))
    assert all(line["validation_loss_other"] not in (0, line["validation_loss"]) for line in validated)

    parts = [value for name, value in whole[0].items() if name.startswith("grad_norm_")]
    assert len(parts) == 8
    assert sum(part**2 for part in parts) == pytest.approx(whole[0]["grad_norm"] ** 2, rel=1e-9)

    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for checkpoint in sorted((tmp_path / "part/checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(checkpoint)
    run(config_file, tmp_path / "part", *options, ranks=2)
    part = metrics(tmp_path / "part")
    assert without_times(part)[:3] == without_times(whole)[:3]
    for line, expected in zip(part[3:], whole[3:], strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)  # see test_layouts.py
        assert line["lr"] == expected["lr"]
        for name in (name for name in line if name.startswith("grad_norm_")):
            assert line[name] == pytest.approx(expected[name], rel=1e-5)

    run_again = ["--validation.share=0.3"]
    with pytest.raises(AssertionError, match=r"other data: .*validation.share"):
        run(config_file, tmp_path / "part", *options, *run_again, "--training.epochs=3")
    with pytest.raises(AssertionError, match=r"other data: .*order"):
        run(config_file, tmp_path / "part", *options, "--training.steps=300")
