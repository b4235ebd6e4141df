"""The page of training.report: tables, and charts as SVG. It needs nothing else, and forbids itself scripts.

Nothing that the runs say is markup.
"""

import base64
import io
import itertools
import math
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.packing import USED
from training.trackers import expert_picture

if TYPE_CHECKING:
    from training.report import Points, Run

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 520, 250, 58, 14, 10, 34
_MOST_POINTS = 400  # of a curve: each is the mean of those in its stretch
_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1c2127; --quiet: #5a646f; --line: #e3e7eb; --card: #f8f9fb;
  --c0: #0b62a4; --c1: #c8500a; --c2: #1a7f4b; --c3: #a03291; --c4: #8a6d00; --c5: #00808c; --c6: #b3261e;
  --c7: #5b5bd6; }
@media (prefers-color-scheme: dark) { :root { --page: #111519; --text: #dfe4e9; --quiet: #98a3ae; --line: #2b333b;
  --card: #181d23; --c0: #63b3f0; --c1: #f5964f; --c2: #5fd097; --c3: #e08ad3; --c4: #dcc052; --c5: #4fd0dc;
  --c6: #ff8a80; --c7: #a5a5ff; } }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; margin: .5rem 0; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
h3 { font-size: .9rem; margin: 0 0 .3rem; font-weight: 600; }
small, th { color: var(--quiet); font-size: .8rem; font-weight: normal; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: .8rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .4rem; padding: .6rem .7rem .4rem; }
.key { display: inline-block; width: 1.3rem; height: 0; border-top: 3px solid; margin-right: .45rem;
  vertical-align: middle; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; } td, th { padding: .2rem 1.1rem .2rem 0; text-align: left; vertical-align: top; }
td:first-child { min-width: 9rem; } thead th { border-bottom: 1px solid var(--line); white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font: .8rem/1.5 ui-monospace, monospace; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--quiet); font-size: 11px; }
.grid { stroke: var(--line); } .curve { fill: none; stroke-width: 1.7; stroke-linejoin: round; }
img { width: 100%; max-width: 100%; height: auto; image-rendering: pixelated; border: 1px solid var(--line);
  box-sizing: border-box; }
"""
_DASHES = ("", "6 4", "2 3", "9 3 2 3")


def page(runs: Sequence["Run"]) -> str:
    """The whole of it."""
    names = ", ".join(run.name for run in runs)
    parts = [
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>Runs: {_safe(names)}</title>\n<style>{_STYLE}</style>\n<h1>Runs</h1>\n",
        _summary(runs),
    ]
    both = (("tokens_seen", "tokens", _count), ("seconds", "time of training", _duration))
    losses = [_chart(f"Loss over {words}", runs, ["loss"], over, form) for over, words, form in both]
    validation = list(dict.fromkeys(name for run in runs for name in run.names("validation_loss")))
    parts.append(_charts("Loss", losses))
    if validation:
        charts = [_chart(f"Over {words}", runs, validation, over, form) for over, words, form in both]
        parts.append(_charts(f"Validation: {_dashes(validation)}", charts))
    over_tokens = ("tokens_seen", _count)
    parts.append(
        _charts(
            "Speed, gradients and learning rate",
            [
                _chart("Tokens a second", runs, ["tokens_per_second"], *over_tokens, from_zero=True),
                _chart("Gradient norm", runs, ["grad_norm"], *over_tokens, from_zero=True),
                _chart("Learning rate", runs, ["lr"], *over_tokens, from_zero=True),
                _chart("Memory, GiB", runs, ["peak_memory_gib"], *over_tokens, from_zero=True),
            ],
        )
    )
    load = [
        _chart("Largest load of an expert / mean, worst block", runs, ["expert_load_max_over_mean"], *over_tokens),
        _chart("Experts without tokens", runs, ["experts_without_tokens"], *over_tokens, from_zero=True),
    ]
    parts += [_charts("The experts' load", load), _pictures(runs), _skipped(runs), _differences(runs)]
    return "".join(parts)


def _summary(runs: Sequence["Run"]) -> str:
    heads = ("run", "step", "tokens", "time of training", "loss", "best validation", "tokens a second", "skipped")
    rows = []
    for number, run in enumerate(runs):
        losses, validated = run.values("loss"), run.values("validation_loss")
        tail = losses[-max(1, len(run.metrics["step"]) // 20) :]
        speeds, tokens = run.values("tokens_per_second"), run.values("tokens_seen")
        damaged = f" <small>damaged lines left out: {run.num_damaged:,}</small>" if run.num_damaged else ""
        cells = (
            f"{int(run.metrics['step'][-1]):,}",
            _count(tokens[-1]) if len(tokens) else "",
            _duration(run.metrics["seconds"][-1]),
            f"{tail.mean():.4f}" if len(tail) else "",
            f"{validated.min():.4f}" if len(validated) else "",
            f"{np.median(speeds):,.0f}" if len(speeds) else "",
            f"{sum(number for reason, number in run.skipped().items() if reason not in USED):,}",
        )
        key = f'<span class="key" style="border-color: {_colour(number)}"></span>'
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        rows.append(f"<tr><td>{key}{_safe(run.name)}{damaged}</td>{numbers}</tr>\n")
    head = "".join(f'<th class="{"number" if place else ""}">{text}</th>' for place, text in enumerate(heads))
    note = "<p><small>Loss: the mean of the last twentieth of the lines. Speed: the median.</small></p>\n"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n{"".join(rows)}</table></div>\n{note}'


def _charts(title: str, charts: Sequence[str]) -> str:
    shown = "".join(chart for chart in charts if chart)
    return f'<h2>{title}</h2>\n<div class="charts">\n{shown}</div>\n' if shown else ""


def _dashes(names: Sequence[str]) -> str:
    if len(names) == 1:
        return "its loss"
    words = ("solid", "dashed", "dotted", "dash and dot")
    return ", ".join(f"{_safe(name)} {words[place % len(words)]}" for place, name in enumerate(names))


def _chart(
    title: str,
    runs: Sequence["Run"],
    names: Sequence[str],
    over: str,
    form: Callable[[float], str],
    from_zero: bool = False,
) -> str:
    """The curves of some metrics of all runs; nothing if there are none. `form`: how places along the axis are told."""
    curves = [
        (number, run.name, place, points)
        for number, run in enumerate(runs)
        for place, name in enumerate(names)
        if (points := thinned(run.curve(name, over)))
    ]
    if not curves:
        return ""
    xs, ys = ([point[axis] for *_, points in curves for point in points] for axis in (0, 1))
    x_ticks = _ticks(0, max(xs), 60 if form is _duration else 10)
    y_ticks = _ticks(0 if from_zero else min(ys), max(ys))
    x_end = max(*xs, x_ticks[-1] if len(x_ticks) < 2 else 0) or 1
    low, high = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)
    high = high if high > low else low + max(1.0, abs(low))

    def x_of(value: float) -> float:
        return _LEFT + value / x_end * (_WIDTH - _LEFT - _RIGHT)

    def y_of(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<div class="card"><h3>{_safe(title)}</h3>\n<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{_safe(title)}">\n'
    ]
    decimals = _decimals(y_ticks)
    for tick in y_ticks:
        y = y_of(tick)
        text = _value(tick, decimals)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{text}</text>\n')
    for tick in x_ticks:
        if tick <= x_end:
            x = x_of(tick)
            parts.append(f'<path class="grid" d="M{x:.1f} {_HEIGHT - _BOTTOM}v4"/>')
            parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{form(tick)}</text>\n')
    for number, name, place, points in curves:
        path = "L".join(f"{x_of(x):.1f} {y_of(y):.1f}" for x, y in points)
        dash = f' stroke-dasharray="{_DASHES[place % len(_DASHES)]}"' if place else ""
        if len(points) == 1:
            path = f"{path}h.1"
            dash += ' stroke-linecap="round" style="stroke-width: 6"'
        label = _safe(f"{name}: {names[place]}")
        parts.append(
            f'<path class="curve" stroke="{_colour(number)}"{dash} d="M{path}"><title>{label}</title></path>\n'
        )
    return "".join([*parts, "</svg></div>\n"])


def thinned(points: NDArray[np.float64]) -> "Points":
    """Of [points, 2] at most _MOST_POINTS, each the mean of those of its stretch; the last as it is."""
    if len(points) > _MOST_POINTS:
        bounds = np.linspace(0, len(points) - 1, _MOST_POINTS).astype(int)
        means = [points[begin:end].mean(axis=0) for begin, end in itertools.pairwise(bounds)]
        points = np.stack([*means, points[-1]])
    return [(x, y) for x, y in points.tolist()]


def _ticks(low: float, high: float, base: int = 10) -> list[float]:
    """Four to eight round numbers over a range; of seconds, round in minutes and hours too."""
    span = max((high - low) or abs(high) or 1.0, 1e-300)  # the smallest numbers have no tenths
    rough = span / 5
    if base == 60 and rough >= 1:
        steps = [1.0, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200]
        step = next((step for step in steps if step >= rough), 86400 * math.ceil(rough / 86400))
    else:
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    return [(first + place) * step for place in range(math.ceil(high / step - 1e-9) - first + 1)]


def _value(tick: float, decimals: int) -> str:
    if abs(tick) >= 10_000:
        return _count(tick)
    return f"{tick:.1e}" if decimals > 4 and tick else f"{tick:.{min(decimals, 4)}f}"


def _decimals(ticks: Sequence[float]) -> int:
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) or 1
    return max(0, -math.floor(math.log10(step) + 1e-9))


def _pictures(runs: Sequence["Run"]) -> str:
    """The last load of each expert."""
    cards = []
    for run in runs:
        if run.load:
            file = io.BytesIO()
            pixels = expert_picture(np.array(run.load, np.int64), cell=1)
            Image.fromarray(pixels).save(file, "PNG")
            data = base64.b64encode(file.getvalue()).decode()
            cards.append(
                f'<div class="card"><h3>{_safe(run.name)}, step {run.load_step:,}</h3>\n'
                f'<img alt="load of each expert" src="data:image/png;base64,{data}">\n'
                f"<small>{len(run.load)} blocks from the top, {len(run.load[0])} experts from the left</small></div>\n"
            )
    note = (
        "<p><small>White: the mean of its block; red: up to four times as many tokens; blue: down to a quarter; black: "
        "none.</small></p>\n"
    )
    return f'<div class="charts" style="margin-top: .8rem">\n{"".join(cards)}</div>\n{note}' if cards else ""


def _skipped(runs: Sequence["Run"]) -> str:
    of_runs = [run.skipped() for run in runs]
    reasons = sorted({reason for skipped in of_runs for reason in skipped})
    if not reasons:
        return "<h2>Skipped samples</h2>\n<p>None.</p>\n"
    names = {reason: f"{reason} (used)" if reason in USED else reason for reason in reasons}
    rows = [[name, *(f"{skipped[reason]:,}" for skipped in of_runs)] for reason, name in names.items()]
    return "<h2>Skipped samples</h2>\n" + _table("reason", runs, rows, "number")


def _differences(runs: Sequence["Run"]) -> str:
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "job.output_dir")
    rows = [[key, *(run.config.get(key, "") for run in runs)] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    if len(runs) == 1:
        return ""
    if not rows:
        return "<h2>Differences of configuration</h2>\n<p>None.</p>\n"
    return "<h2>Differences of configuration</h2>\n" + _table("key", runs, rows, "value")


def _table(first: str, runs: Sequence["Run"], rows: Sequence[Sequence[str]], kind: str) -> str:
    head = "".join(f'<th class="{kind}">{_safe(run.name)}</th>' for run in runs)
    body = "".join(
        f"<tr><td><code>{_safe(name)}</code></td>"
        + "".join(f'<td class="{kind}"><code>{_safe(value)}</code></td>' for value in values)
        + "</tr>\n"
        for name, *values in rows
    )
    return f'<div class="scroll"><table><thead><tr><th>{first}</th>{head}</tr></thead>\n{body}</table></div>\n'


def _colour(number: int) -> str:
    return f"var(--c{number % 8})"


def _count(number: float) -> str:
    """As 1.5M."""
    for size, sign in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{sign}"
    return f"{number:.3g}"


def _duration(seconds: float) -> str:
    """As 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{seconds / 60:.3g} min" if seconds % 60 else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [f"{days} d"] * (days > 0) + [f"{hours} h"] * (hours > 0) + [f"{minutes} min"] * (minutes > 0 and not days)
    return " ".join(parts)


def _safe(text: str) -> str:
    """As text or an attribute's value, with signs for what a page would drop or turn round."""
    from data.preview_rows import visible

    return escape(visible(text))
