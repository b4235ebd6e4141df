"""The page that compares runs: right numbers, no trust in what files say, and looked at by a real browser."""

import json
import re
import tracemalloc
from pathlib import Path

import pytest

from data.packing import USED
from tests.commands import status_of
from training.report import main, read_run, short_names
from training.report_html import page

CONFIG = '[job]\noutput_dir = "x"\n[optimizer]\nlr = {lr}\nbetas = [0.9, 0.95]\n[model.config]\nnum_experts = 4\n'


def write_run(folder: Path, lr: float = 1e-3, num_lines: int = 30, **others: object) -> Path:
    folder.mkdir(parents=True)
    lines = []
    for step in range(2, 2 * num_lines + 1, 2):
        line = {"step": step, "loss": 8 - 0.05 * step, "grad_norm": 1.0, "lr": lr, "tokens_seen": step * 1000}
        line |= {"tokens_per_second": 500.0, "step_seconds": 2.0, "peak_memory_gib": 1.5, **others}
        line |= {"expert_load_max_over_mean": 2.0, "experts_without_tokens": 3, "samples_not_json": step // 2}
        if step % 10 == 0:
            line |= {"validation_loss": 6.0 - step / 100, "validation_loss_code": 5.0}
        lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "config.toml").write_text(CONFIG.format(lr=lr))
    (folder / "expert_load.jsonl").write_text('{"step":1,"tokens":[[1,1]]}\n{"step":50,"tokens":[[1,2],[0,3]]}\n')
    return folder


def test_a_run_is_read(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a"), "a")
    assert run.curve("loss", "tokens_seen")[:2].tolist() == [[2000, pytest.approx(7.9)], [4000, pytest.approx(7.8)]]
    assert run.curve("loss", "seconds")[:2].tolist() == [[4, pytest.approx(7.9)], [8, pytest.approx(7.8)]]
    assert run.names("validation_loss") == ["validation_loss", "validation_loss_code"]
    assert (run.load, run.load_step) == ([[1, 2], [0, 3]], 50)
    assert run.skipped() == {"not_json": 30}
    assert run.config["optimizer.betas"] == "[0.9, 0.95]"


def test_counts_of_skipped_samples_start_anew_with_each_start(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    counts = [1, 5, 5, 2, 3, 0, 4]
    lines = [json.dumps({"step": n, "samples_empty": count}) for n, count in enumerate(counts)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    assert read_run(folder, "a").skipped() == {"empty": 5 + 3 + 4}


def test_samples_that_are_used_are_no_skipped_ones(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    counts = {f"samples_{reason}": number for number, reason in enumerate(("empty", *USED), start=4)}
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 3.0, "tokens_seen": 5, **counts}))
    summary, _, table = page([read_run(folder, "a")]).partition("<h2>Skipped samples</h2>")
    assert '<td class="number">4</td></tr>' in summary
    rows = re.findall(r"<code>([a-z_ ()]+)</code></td><td class=.number.><code>(\d+)</code>", table)
    assert dict(rows) == {"empty": "4"} | {f"{reason} (used)": str(n) for n, reason in enumerate(USED, start=5)}


def test_damaged_lines_and_values_that_are_none_are_left_out_and_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", num_lines=3)
    bad = [
        b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"loss": 1}', b'{"step": "4"}', b'{"step": 1e999}',
        b'{"step": true, "loss": 3}',
    ]  # fmt: skip
    odd = b'{"step": 7, "loss": null, "lr": "x", "grad_norm": NaN, "tokens_seen": 7000, "step_seconds": -1e29}'
    (folder / "metrics.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes() + b"\n".join([*bad, odd]))
    (folder / "expert_load.jsonl").write_text('{"tokens": [[1, -1]]}\n{"tokens": [[1], [1, 2]]}\n{"tokens": 3}\n[]\n')
    run = read_run(folder, "a")
    assert run.num_damaged == len(bad)
    assert len(run.curve("loss", "tokens_seen")) == 3
    assert run.load == []
    assert f"damaged lines left out: {len(bad)}" in page([run])


def test_names_tell_runs_apart() -> None:
    assert short_names([Path("/a/x/run"), Path("/a/y/run")]) == ["x/run", "y/run"]
    assert short_names([Path("/a/one"), Path("/b/two")]) == ["one", "two"]


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (lambda folder: None, "expected the folder of a run, with a metrics.jsonl"),
        (lambda folder: (folder / "metrics.jsonl").write_text("[]\n"), "at least one line of metrics"),
        (lambda folder: (write_run(folder / "b") / "config.toml").write_text("= 3"), "config.toml cannot be read"),
    ],
)
def test_what_is_no_run_is_one_line(
    tmp_path: Path, prepare: object, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(tmp_path)
    folder = tmp_path / "b" if (tmp_path / "b").exists() else tmp_path
    assert status_of(main, [str(folder), "--out", str(tmp_path / "page.html")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert expected in error
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("lines", [None, "", "[]\n"])
def test_a_run_that_has_not_logged_is_left_out_beside_one_that_has(
    tmp_path: Path, lines: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new, options = write_run(tmp_path / "old"), tmp_path / "new", ["--out", str(tmp_path / "page.html")]
    new.mkdir()
    (new / "run.lock").write_text("")
    if lines is not None:
        (new / "metrics.jsonl").write_text(lines)
    main([str(new), str(old), *options])
    error = capsys.readouterr().err
    assert error.startswith("left out: ")
    assert str(new) in error
    assert len(error.splitlines()) == 1
    assert (tmp_path / "page.html").exists()
    assert status_of(main, [str(new), *options]) == 2
    (new / "run.lock").unlink()
    (new / "metrics.jsonl").unlink(missing_ok=True)
    assert status_of(main, [str(new), str(old), *options]) == 2  # a mistake in a name


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(main, [str(write_run(tmp_path / "a")), "--out", str(tmp_path / "none/page.html")]) == 2
    assert "--out" in capsys.readouterr().err


def test_steps_that_are_made_once_more_after_a_resume_count_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", num_lines=1)
    steps = [1, 2, 3, 4, 3, 4, 5, 3, 4]
    lines = [
        {"step": step, "loss": place, "tokens_seen": 10 * step, "step_seconds": 2.0} for place, step in enumerate(steps)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = read_run(folder, "a")
    assert run.curve("loss", "tokens_seen").tolist() == [[10, 0], [20, 1], [30, 7], [40, 8]]
    assert run.curve("loss", "seconds")[:, 0].tolist() == [2, 4, 6, 8]


def test_a_long_run_is_read_in_little_memory(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", num_lines=1)
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 30_001):
            file.write(json.dumps(line | {"step": step, "tokens_seen": step}) + "\n")
    tracemalloc.start()
    try:
        content = page([read_run(folder, "a")])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 30_000 * 8 * 60  # a dictionary of a line's numbers alone would take thrice as much
    assert len(content) < 100_000


def test_folders_that_the_system_does_not_take_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for name in ("a" * 300, "a/" * 3000, str(tmp_path / "loop")):
        assert status_of(main, [name, "--out", str(tmp_path / "page.html")]) == 2
        assert "expected the folder of a run" in capsys.readouterr().err
