"""What data.preview shows, as one page: rows with their pictures, trained spans in colour. It needs nothing else.

Nothing that the data say is markup, and the page forbids itself scripts, and whatever is not in it.
"""

import base64
import io
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.batch import Row
from data.preview_rows import Shown, Span, documents_of, shown_by, text_of, visible
from models.qwen35_moe.positions import multimodal_positions
from models.qwen35_moe.vision_config import VisionConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_MOST_NOTES = 500
_SMALL = 128  # pixels along the longer side
_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1c2127; --quiet: #5a646f; --line: #d5dbe1; --card: #f6f8fa;
  --trained: #0b5128; --tint: #cdf2d6; --bar: #b3261e; --fill: #4a90c2; }
@media (prefers-color-scheme: dark) { :root { --page: #111519; --text: #dfe4e9; --quiet: #98a3ae; --line: #303840;
  --card: #181d23; --trained: #a5efb6; --tint: #14432a; --bar: #ff8a80; --fill: #4f8fba; } }
body { margin: 0 auto; max-width: 64rem; padding: 1rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; margin: .5rem 0; } h2, h3 { font-size: 1.05rem; margin: 1.5rem 0 .5rem; }
small, figcaption, th, summary { color: var(--quiet); font-size: .8rem; font-weight: normal; }
ul { padding-left: 1.2rem; margin: .5rem 0; } li { margin: .15rem 0; }
.document { margin: .5rem 0; padding: .4rem .7rem .6rem; background: var(--card); border: 1px solid var(--line);
  border-left: 3px solid var(--bar); border-radius: .3rem; }
.text { margin: 0; font: .85rem/1.6 ui-monospace, monospace; white-space: pre-wrap; color: var(--quiet); }
.text span { unicode-bidi: isolate; }
.trained { color: var(--trained); background: var(--tint); border-radius: .2rem; box-decoration-break: clone;
  -webkit-box-decoration-break: clone; padding: .05rem .1rem; }
figure { display: inline-block; margin: .3rem .5rem .3rem 0; max-width: 100%; vertical-align: top;
  white-space: normal; }
img { min-width: 3rem; max-width: 100%; max-height: 20rem; box-sizing: border-box; border: 1px solid var(--line);
  object-fit: contain; vertical-align: top; }
img:focus { max-height: none; } .small { image-rendering: pixelated; }
figcaption { line-height: 1.3; font-family: system-ui, sans-serif; }
table { border-collapse: collapse; } td, th { padding: .1rem .6rem .1rem 0; text-align: left; vertical-align: top; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.lengths { width: 100%; } .lengths td { vertical-align: middle; } .lengths td:last-child { width: 99%; }
.fill { height: .8rem; background: var(--fill); border-radius: .15rem; min-width: 1px; }
"""


def page(
    title: str,
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerFast",
    vision: VisionConfig | None,
    facts: Sequence[str],
    bins: Sequence[tuple[int, int, int]],
    notes: Sequence[tuple[str, str]],
) -> str:
    """`facts`: lines about the corpus. `bins`: least and most tokens, and how many samples have so many. `notes`: of
    samples that are skipped, or not used as they are, reason and message."""
    parts = [
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>What is trained on: {_safe(title)}</title>\n<style>{_STYLE}</style>\n"
        f"<h1>What is trained on</h1>\n<p><small>{_safe(title)}</small></p>\n<h2>The corpus</h2>\n<ul>\n"
    ]
    parts += [f"<li>{_safe(fact)}</li>\n" for fact in facts]
    parts.append('</ul>\n<table class="lengths">\n')
    parts.append('<tr><th class="number">tokens</th><th class="number">samples</th><th></th></tr>\n')
    most = max(count for _, _, count in bins)
    for first, last, count in bins:
        bar = f'<div class="fill" style="width: {count / most:.1%}"></div>' if count else ""
        parts.append(
            f'<tr><td class="number">{first:,} to {last:,}</td><td class="number">{count:,}</td><td>{bar}</td></tr>\n'
        )
    parts.append(
        "</table>\n<h2>Rows</h2>\n"
        '<p class="text"><span class="trained">trained on</span> <span>not trained on</span></p>\n'
    )
    for number, row in enumerate(rows):
        parts += _row(number, row, tokenizer, vision)
    if notes:
        summary = f"{len(notes):,}" + f", of which the first {_MOST_NOTES} are listed" * (len(notes) > _MOST_NOTES)
        is_open = " open" * (len(notes) <= 20)
        parts.append(f"<h2>Samples that are skipped, or not used as they are</h2>\n<details{is_open}>\n")
        parts.append(f"<summary>{summary}</summary>\n<table>\n")
        parts += [f"<tr><td>{_safe(reason)}</td><td>{_safe(text)}</td></tr>\n" for reason, text in notes[:_MOST_NOTES]]
        parts.append("</table>\n</details>\n")
    return "".join([*parts, "</html>\n"])


def _row(number: int, row: Row, tokenizer: "PreTrainedTokenizerFast", vision: VisionConfig | None) -> Iterator[str]:
    documents, shown = list(documents_of(row, vision)), shown_by(row, vision)
    about = f"{len(documents)} documents, {len(row.tokens):,} tokens"
    yield f"<h3>Row {number} <small>{about}</small></h3>\n"
    for place, spans in enumerate(documents):
        begin, end = spans[0].begin, spans[-1].end
        num_trained = sum(span.end - span.begin for span in spans if span.is_trained)
        where = f"Document {place}: {_tokens(begin, end)}, {num_trained:,} trained on"
        yield f'<section class="document" title="{where}">\n<small>{where}</small>\n<div class="text">'
        own = [row.frames[span.frame] for span in spans if span.frame is not None]
        positions = _positions(begin, end - begin, own, vision)
        for span in spans:
            if span.frame is not None:
                first, last = positions[:, span.begin - begin].tolist(), positions[:, span.end - 1 - begin].tolist()
                _, height, width = row.frames[span.frame]
                title = (
                    f"{_tokens(span.begin, span.end)}; {width} x {height} patches; "
                    f"positions (time, height, width) {tuple(first)} to {tuple(last)}"
                )
                yield _figure(shown[span.frame], title)
            else:
                yield _text(span, text_of(row, span, tokenizer))
        yield "</div>\n</section>\n"
    if row.num_fillers:
        yield f"<p><small>{row.num_fillers:,} filler{'s' * (row.num_fillers > 1)}</small></p>\n"


def _positions(
    begin: int, length: int, frames: Sequence[tuple[int, int, int]], vision: VisionConfig | None
) -> NDArray[np.int32]:
    """[3, length], of a document that begins at `begin` of its row."""
    merge = 1 if vision is None else vision.spatial_merge_size
    return multimodal_positions(length, ((place - begin, h // merge, w // merge) for place, h, w in frames))


def _text(span: Span, text: str) -> str:
    kind = ' class="trained"' if span.is_trained else ""
    title = f"{_tokens(span.begin, span.end)}, {'' if span.is_trained else 'not '}trained on"
    return f'<span{kind} title="{title}">{_safe(text)}</span>'


def _figure(shown: Shown, title: str) -> str:
    images = []
    for picture in shown.pictures:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        # What has few pixels is shown twice as wide; of what has many, all are shown once it is clicked on.
        width = picture.shape[1]
        size = f'class="small" style="width: {2 * width}px"' if max(picture.shape) <= _SMALL else 'tabindex="0"'
        content = base64.b64encode(file.getvalue()).decode()
        images.append(f'<img {size} alt="{shown.mark}" src="data:image/png;base64,{content}">')
    grey = "; it could not be decoded, or is grey" if shown.is_grey else ""
    return f'<figure title="{title}">{" ".join(images)}<figcaption>{shown.mark[1:-1]}{grey}</figcaption></figure>'


def _tokens(begin: int, end: int) -> str:
    return f"tokens {begin:,} to {end - 1:,}" if end - begin > 1 else f"token {begin:,}"


def _safe(text: str) -> str:
    return escape(visible(text))
