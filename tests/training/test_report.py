"""The page that compares runs: right numbers, no trust in what files say, and looked at by a real browser."""

import json
from pathlib import Path

import pytest

from tests.browser import CHROMIUM, Browser
from tests.commands import status_of
from training.report import main, read_run, short_names
from training.report_html import _count, _duration, _ticks, page, thinned

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
    assert run.curve("loss", "tokens_seen")[:2] == [(2000, pytest.approx(7.9)), (4000, pytest.approx(7.8))]
    assert run.curve("loss", "seconds")[:2] == [(4, pytest.approx(7.9)), (8, pytest.approx(7.8))]
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
    assert f"{len(bad)} damaged lines left out" in page([run])


@pytest.mark.parametrize("number", [0, 1, 399, 400, 401, 10_001])
def test_long_curves_are_thinned_to_means(number: int) -> None:
    points = [(float(x), 2.0 * x) for x in range(number)]
    thin = thinned(points)
    assert len(thin) <= 400
    assert thin[-1:] == points[-1:]
    assert all(y == pytest.approx(2 * x) for x, y in thin)
    if number <= 400:
        assert thin == points


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (2.3, 9.1), (0, 0), (5, 5), (-3, 4e6), (0, 4e12), (0, 3e-7), (0.1, 0.1001)]
)
@pytest.mark.parametrize("base", [10, 60])
def test_ticks_are_few_and_cover_the_range(low: float, high: float, base: int) -> None:
    ticks = _ticks(low, high, base)
    assert 1 <= len(ticks) <= 9
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] >= high - 1e-9 * abs(high)


def test_words_for_numbers() -> None:
    assert [_count(n) for n in (0, 0.5, 999, 1500, 2e6, 3.25e12)] == ["0", "0.5", "999", "1.5k", "2M", "3.25T"]
    assert [_duration(n) for n in (0, 30, 90, 3600, 5400, 90_000)] == [
        "0 s",
        "30 s",
        "1.5 min",
        "1 h",
        "1 h 30 min",
        "1 d 1 h",
    ]


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


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(main, [str(write_run(tmp_path / "a")), "--out", str(tmp_path / "none/page.html")]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_shows_it_and_loads_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = '<script>alert(1)</script>"><img src=x onerror=alert(2)>'
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", lr=2e-3)]
    (runs[1] / "config.toml").write_text(CONFIG.format(lr=2e-3) + f"extra = {json.dumps(hostile)}\n")
    metrics = (runs[1] / "metrics.jsonl").read_text()
    extra = json.dumps({"step": 61, f"validation_loss_{hostile}": 3.0, f"samples_{hostile}": 2, "tokens_seen": 61000})
    (runs[1] / "metrics.jsonl").write_text(metrics + extra + "\n")
    out = tmp_path / "page.html"
    assert status_of(main, [*map(str, runs), "--out", str(out)]) == 0
    browser = Browser(tmp_path / "profile")
    try:
        for width, scheme in ((1200, "light"), (400, "dark")):
            browser.show_as(width, scheme=scheme)
            browser.open(out)
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            sizes = browser.evaluate("[...document.images].map(image => [image.complete, image.naturalWidth])")
            assert sizes == [[True, 2], [True, 2]]
            assert browser.evaluate("document.querySelectorAll('script').length") == 0
            seen = browser.evaluate("[...document.querySelectorAll('path.curve')].map(path => path.getTotalLength())")
            assert min(seen) > 0
            # Of each run a curve a metric: 2 of the loss, 2 x 2 of validation, 4 and 2; and the hostile one's 2.
            assert len(seen) == 2 * (2 + 4 + 4 + 2) + 2
            text = browser.evaluate("document.body.innerText")
            assert all(part in text for part in ("not_json", "optimizer.lr", "0.002", hostile, "step 50"))
            assert "model.config.num_experts" not in text  # the same in both
        assert browser.messages == []
        assert all(url.startswith(("file:", "data:")) for url in browser.requests)
    finally:
        browser.close()
