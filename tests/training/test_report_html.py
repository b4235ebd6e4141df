"""The page that training.report writes: charts of any numbers, words, and a real browser that looks at it."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.browser import CHROMIUM, Browser
from tests.commands import status_of
from tests.training.test_report import CONFIG, write_run
from training.report import main, read_run
from training.report_html import _count, _duration, _ticks, page, thinned


@pytest.mark.parametrize("number", [0, 1, 399, 400, 401, 10_001])
def test_long_curves_are_thinned_to_means(number: int) -> None:
    points = [(float(x), 2.0 * x) for x in range(number)]
    thin = thinned(np.array(points).reshape(-1, 2))
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


@pytest.mark.parametrize(
    "lines",
    [
        [{"step": 1}],
        [{"step": 0, "loss": float("nan"), "tokens_seen": 0}],
        [{"step": 1, "loss": None, "tokens_seen": -5, "lr": 5e-324}, {"step": 2, "lr": 0, "tokens_seen": 5e-324}],
        [{"step": 1e29, "loss": -1e29, "tokens_seen": 1e29, "step_seconds": 1e29, "tokens_per_second": 1e29}],
        [{"step": n, "loss": 1 + n * 2e-16, "tokens_seen": n} for n in range(3)],
        [{"step": 3, "validation_loss": 2.0, "tokens_seen": 7}],
        [{"step": n, f"validation_loss_{n}": 2.0, "tokens_seen": 7} for n in range(3000)],
    ],
    ids=range(7),
)
def test_a_page_of_any_numbers_is_a_page_of_bounded_size(tmp_path: Path, lines: list[dict]) -> None:
    folder = write_run(tmp_path / "a", num_lines=1)
    # Killed in the middle of a line.
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 99, "lo')
    run = read_run(folder, "a")
    content = page([run]) + page([run, read_run(write_run(tmp_path / "b"), "b")])
    assert "damaged lines left out: 1<" in content
    assert not any(word in content.lower() for word in ("nan", ">inf", "none lines"))
    assert len(content) < 1_000_000


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
