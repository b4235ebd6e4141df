"""Metrics files across a resume, log lines, times."""

import json
import logging
import warnings
from pathlib import Path

import pytest

from training.metrics import MetricsWriter, setup_logging


def line(step: int) -> dict:
    numbers = ("loss", "grad_norm", "lr", "tokens_per_second", "step_seconds", "peak_memory_gib")
    return {"step": step, **dict.fromkeys(numbers, 1.0)}


def test_a_resumed_run_goes_on_after_its_checkpoint(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False, start_step=0, total_steps=9)
    for step in range(1, 6):
        writer.write(line(step))
    writer.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "lo')  # killed in the middle of a line
    writer = MetricsWriter(tmp_path, tensorboard=False, start_step=3, total_steps=9)
    writer.write(line(4))
    writer.close()
    assert [json.loads(text)["step"] for text in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_fresh_run_starts_a_fresh_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    MetricsWriter(tmp_path, tensorboard=False, start_step=0, total_steps=9).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path, tensorboard=True, start_step=0, total_steps=9)
    writer.write({**line(1), "loss": 2.5})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5)]


def test_the_log_tells_the_time_that_is_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False, start_step=0, total_steps=2)
    with caplog.at_level("INFO"):
        for seconds in (0.4, 59.6, 3723):
            writer.write({**line(1), "step_seconds": seconds})
    assert [text.split("left ")[1] for text in caplog.messages] == ["0:00:00", "0:01:00", "1:02:03"]


@pytest.mark.parametrize(("log_rank", "shown"), [("0", True), ("1,0", True), ("1", False), ("10", False)])
def test_log_rank_chooses_whose_log_is_shown(log_rank: str, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", logging.WARNING)
    monkeypatch.setenv("LOG_RANK", log_rank)
    setup_logging(0)
    assert logging.getLogger("train").isEnabledFor(logging.INFO) == shown


def test_noise_of_libraries_is_left_out_and_their_errors_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            shown.append(f"{record.name} {record.getMessage()}")

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        setup_logging(0)
        compiler = logging.getLogger("tilelang")
        monkeypatch.setattr(compiler, "handlers", [Keep()])
        compiler.setLevel(logging.INFO)  # as it does when it is imported
        for logger in (compiler, logging.getLogger("tilelang.jit.kernel")):
            logger.warning("a layout")
            logger.error("no compiler")
        warnings.warn("TensorFloat32 tensor cores for float32 matrix multiplication available", stacklevel=1)
        warnings.warn("Attempting to run cuBLAS, but there was no current CUDA context! Attempting", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert shown == ["tilelang no compiler", "tilelang.jit.kernel no compiler"]
    assert [str(warning.message) for warning in warned] == ["something else"]
    assert not logging.getLogger("torch._higher_order_ops.wrap").isEnabledFor(logging.WARNING)


def test_damaged_lines_are_set_aside_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    damaged = ["{", "[1]", '{"loss": 1}', '{"step": "three"}', "\udcff", "[" * 100_000]
    good = [json.dumps(line(step)) for step in (1, 2, 7)]
    text = "\n".join([good[0], *damaged, good[1], "", good[2]]) + "\n"
    (tmp_path / "metrics.jsonl").write_text(text, errors="surrogateescape")
    with caplog.at_level("WARNING"):
        writer = MetricsWriter(tmp_path, tensorboard=False, start_step=4, total_steps=9)
    writer.write(line(5))
    assert [json.loads(each)["step"] for each in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 5]
    assert len((tmp_path / "metrics.damaged.jsonl").read_bytes().splitlines()) == len(damaged)
    assert "6 damaged lines" in caplog.text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk is /dev/full")
def test_a_full_disk_is_told_once_and_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False, start_step=0, total_steps=9)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with caplog.at_level("WARNING"):
        writer.write(line(1))
        writer.write(line(2))
    assert caplog.text.count("No space left on device") == 1
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lo')  # what fitted
    writer.write(line(3))
    writer.close()
    kept = [json.loads(each) for each in (tmp_path / "metrics.jsonl").read_text().splitlines()[1:]]
    assert kept == [line(3)]


def test_tensorboard_that_fails_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", fail)
    writer = MetricsWriter(tmp_path, tensorboard=True, start_step=0, total_steps=9)
    writer.write(line(1))
    writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1
