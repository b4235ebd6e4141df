"""TensorBoard's pictures and texts, Weights & Biases with and without its package, and that none of it ends a run."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from config.reading import load_config
from errors import UserError
from tests.training.test_metrics import line
from training.metrics import MetricsWriter
from training.trackers import expert_picture, start_wandb

COUNTS = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [1, 1, 1, 13]])


def test_a_picture_tells_each_expert_s_load() -> None:
    picture = expert_picture(COUNTS.numpy())
    assert picture.shape == (3 * 8, 4 * 8, 3)
    assert picture.dtype == np.uint8
    colours = picture[4::8, 4::8].tolist()
    white, red, blue, black = [247] * 3, [178, 24, 43], [33, 102, 172], [0] * 3
    assert colours[0] == [white] * 4
    assert colours[1] == [red, black, black, black]
    assert colours[2][:3] == [blue] * 3
    assert colours[2][3][0] > colours[2][3][2]


def test_tensorboard_shows_load_lengths_and_samples(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path, tensorboard=True, start_step=0, total_steps=9)
    writer.write_lengths([1, 2, 2, 300], 0)
    for step in range(1, 201):
        writer.write_view(step, COUNTS * step, lambda: "# a\n<b> «c»")
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"tensors": 0, "images": 0, "histograms": 0})
    events.Reload()
    steps = [image.step for image in events.Images("expert_load")]
    assert steps[:12] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14]
    assert len(steps) < 45
    assert (events.Images("expert_load")[0].width, events.Images("expert_load")[0].height) == (32, 24)
    (histogram,) = events.Histograms("document_lengths")
    assert histogram.histogram_value.num == 4
    text = events.Tensors("samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == "    # a\n    <b> «c»"
    written = [json.loads(each) for each in (tmp_path / "expert_load.jsonl").read_text().splitlines()]
    assert [each["step"] for each in written] == steps
    assert written[1]["tokens"] == (2 * COUNTS).tolist()


def test_a_resume_drops_what_came_later(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False, start_step=0, total_steps=9)
    for step in (1, 5, 9):
        writer.write_view(step, COUNTS, str)
    MetricsWriter(tmp_path, tensorboard=False, start_step=5, total_steps=9)
    assert [json.loads(each)["step"] for each in (tmp_path / "expert_load.jsonl").read_text().splitlines()] == [1, 5]


def test_tensorboard_has_each_step_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, end in ((0, 5), (3, 6), (2, 4)):  # cut off at 5, gone on with from 3, and then from 2
        writer = MetricsWriter(tmp_path, tensorboard=True, start_step=start, total_steps=9)
        for step in range(start + 1, end + 1):
            writer.write({**line(step), "loss": 10.0 * start + step})
            writer.write_view(step, COUNTS, lambda: "text")
        writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    told = [(event.step, event.value) for event in events.Scalars("loss")]
    assert told == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0)]
    steps = [image.step for image in events.Images("expert_load")]
    assert sorted(set(steps)) == steps


class FakeRun:
    def __init__(self, **options: object) -> None:
        self.options, self.logged, self.has_ended = options, [], False

    def define_metric(self, name: str, step_metric: str = "") -> None:
        assert (name, step_metric) in (("step", ""), ("*", "step"))

    def log(self, values: dict) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.has_ended = True


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """The runs that a stand-in for the package begins."""
    begun: list[FakeRun] = []
    errors = types.SimpleNamespace(
        UsageError=type("UsageError", (Exception,), {}),
        AuthenticationError=type("AuthenticationError", (Exception,), {}),
    )

    def init(**options: object) -> FakeRun:
        begun.append(FakeRun(**options))
        return begun[-1]

    package = types.SimpleNamespace(
        init=init,
        errors=errors,
        Settings=dict,
        Image=np.shape,
        Histogram=list,
        Table=lambda columns, data: data,
    )
    monkeypatch.setitem(sys.modules, "wandb", package)
    return begun


def with_wandb(folder: Path, start_step: int = 0) -> MetricsWriter:
    config = load_config(["--config", "qwen35moe_tiny.toml", "--metrics.wandb", "--metrics.wandb_project=mine"])
    return MetricsWriter(folder, False, start_step, 9, start_wandb(folder, config))


def test_wandb_is_told_everything_and_a_resume_goes_on_with_the_run(tmp_path: Path, runs: list[FakeRun]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    writer = with_wandb(folder)
    writer.write_lengths([5, 6], 0)
    writer.write({**line(1), "loss": 2.5})
    writer.write_view(1, COUNTS, lambda: "text")
    writer.close()
    with_wandb(folder, start_step=1).close()
    with_wandb(tmp_path).close()
    assert [run.options["id"] == runs[0].options["id"] for run in runs] == [True, True, False]
    options = runs[0].options
    assert (options["project"], options["name"], options["resume"]) == ("mine", "run", "allow")
    assert options["config"]["training"]["sequence_length"] == 256
    assert runs[0].logged[0] == {"document_lengths": [5, 6], "step": 0}
    assert runs[0].logged[1] == {**line(1), "loss": 2.5}
    assert runs[0].logged[2:] == [
        {"expert_load": (24, 32, 3), "step": 1}, {"samples": [[1, "text"]], "step": 1},
    ]  # fmt: skip
    assert all(run.has_ended for run in runs)


def test_a_service_that_fails_is_told_once_and_ends_no_run(
    tmp_path: Path, runs: list[FakeRun], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = with_wandb(tmp_path)

    def fail(_: object) -> None:
        raise ConnectionError("the service is down")

    monkeypatch.setattr(runs[0], "log", fail)
    for step in (1, 2):
        writer.write(line(step))
        writer.write_view(step, COUNTS, str)
    writer.close()
    assert caplog.text.count("the service is down") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2

    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **_: fail(0))
    with_wandb(tmp_path).write(line(1))
    assert caplog.text.count("the service is down") == 2


def test_a_missing_login_is_one_line(tmp_path: Path, runs: list[FakeRun], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise sys.modules["wandb"].errors.UsageError("No API key configured")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(UserError, match=r"metrics\.wandb = true: No API key .*WANDB_MODE=offline"):
        with_wandb(tmp_path)


def test_the_package_itself_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run in two folders, as `wandb sync` takes them."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for start in (0, 2):
        writer = with_wandb(tmp_path, start)
        for step in range(start + 1, start + 3):
            writer.write(line(step))
            writer.write_view(step, COUNTS, lambda: "text «trained»")
        writer.write_lengths([5, 6], 0)
        writer.close()
    run_id = (tmp_path / "wandb_run").read_text().strip()
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert folders
    assert all(run_id in folder.name for folder in folders)
    records = b"".join(path.read_bytes() for path in (tmp_path / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
    for expected in (b"tokens_per_second", b"expert_load", b"samples", b"document_lengths", b"mine"):
        assert expected in records
