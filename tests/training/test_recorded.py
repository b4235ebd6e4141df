"""The planner's formulas against every run that was measured; a new one is held to the same bounds."""

import json
from pathlib import Path

import pytest

from errors import UserError
from training.recorded import OFF_BY, Recorded, outside, record, recorded_runs

RUNS = recorded_runs()


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.what)
def test_peak_and_time_are_predicted(run: Recorded) -> None:
    peak, seconds = run.predicted()
    off = {}
    if run.peak_gib:
        off["peak"] = peak / run.peak_gib - 1
    if run.step_seconds:
        off["time"] = seconds / run.step_seconds - 1
    print(run.what, f"{peak:.1f} of {run.peak_gib} GiB, {seconds:.4f} of {run.step_seconds} s")
    assert off
    assert all(abs(value) <= OFF_BY[what] for what, value in off.items()), off


def test_each_mode_long_documents_experts_over_ranks_adapters_and_images_are_on_record() -> None:
    cases = [run.case for run in RUNS]
    assert {case.mode for case in cases} == {"none", "selective", "full"}
    assert {case.longest_document for case in cases} >= {4096, 32768, 131072}
    assert {case.degrees.expert for case in cases} >= {1, 2}
    assert {bool(case.lora.rank) for case in cases} == {bool(case.frames) for case in cases} == {False, True}
    assert {len(case.shape.layer_types) for case in cases} >= {12, 40}


def test_the_documentation_has_every_run() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs/scale.md").read_text()
    for run in RUNS:
        peak, seconds = run.predicted()
        figures = [f"{peak:.1f}, {run.peak_gib}"]
        figures += [f"{seconds:.3f}, {run.step_seconds:.3f}"] if run.step_seconds else []
        assert any(all(each in row for each in figures) for row in text.splitlines()), (run.what, figures)


def test_what_was_measured_is_not_outside_of_it() -> None:
    for run in RUNS:
        if run.step_seconds:
            assert outside(run.case, run.gpu, 8, RUNS) == [], run.what


def test_a_benchmark_is_recorded_as_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a run may be started anywhere
    path = tmp_path / "recorded.jsonl"
    found = {"device": "NVIDIA H200", "world_size": 1, "documents": [4096], "peak_gib": 54.6, "step_seconds": 0.33}
    arguments = ["--config=benchmarks/one_gpu_35b.toml", "--training.local_batch_size=3"]
    record(path, "a run", arguments, found | {"loss": 12.0}, "2026-11-28")
    (run,) = recorded_runs(path)
    assert (run.what, run.gpu, run.peak_gib, run.step_seconds) == ("a run", "h200", 54.6, 0.33)
    assert run.case.num_tokens == 3 * 4096
    row = json.loads(path.read_text())
    assert "loss" not in row
    path.write_text(json.dumps(row | {"device": "a toaster"}) + "\n")
    with pytest.raises(UserError, match=r"toaster.*expected one of h100, h200"):
        recorded_runs(path)
    with pytest.raises(UserError, match=r"recorded on 'cpu': expected one of h100, h200"):
        record(path, "a run", arguments, found | {"device": "cpu"}, "2026-11-28")
    path.write_text("{half")
    with pytest.raises(UserError, match=str(path)):
        recorded_runs(path)
