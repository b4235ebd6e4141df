"""A picture of one rank's trace: what it computes, what it communicates, and how much of that behind computation.

    torchrun ... -m benchmarks.throughput ... --profile 2 --trace trace.json.gz
    python -m benchmarks.timeline trace.json.gz docs/overlap.svg [--start MS] [--duration MS] [--steps N]

Writes an SVG of one block's forward and one block's backward pass in mid-step; or of `--duration` ms (default 10) from
`--start`, in ms from the trace's first GPU work (default 0). Prints for how many ms each kind of collective runs, and
how many of these lie behind computation; and for how many nothing runs, and how many of these because the host was
late; over the whole trace and divided by its steps (`--steps`; default: as many as the trace names, else 1). The
profiler makes hosts late: for that take traces of `--launches-only`, one of each rank. Exit status: 0, or 2 for a
mistake.
"""

import argparse
import gzip
import itertools
import json
import re
import statistics
import sys
import zlib
from html import escape
from pathlib import Path
from typing import NamedTuple

from benchmarks.throughput import KINDS, kind_of, union
from errors import OneLineParser, UserError, exit_on_error

Span = tuple[float, float]  # start and stop, ms from the trace's first GPU work

COMPUTATION = "computation"
# By what the names of NCCL's kernels say; the first that fits.
COLLECTIVES = {
    "all-to-all": r"SendRecv|AllToAll",
    "all-gather": r"AllGather",
    "reduce-scatter": r"ReduceScatter",
    "all-reduce": r"AllReduce",
    "other collectives": r".",
}
FORWARD_ALL_TO_ALLS = 4  # of one block: docs/communication.md

MERGED_GAP = 0.01  # ms: what is no further apart is drawn as one
WIDTH, LEFT, RIGHT, LANE, GAP = 1000, 118, 24, 26, 6  # of the SVG: a lane's height, and what is between two
COLOURS = ["#4e79a7", "#59a14f", "#a5d18c", "#9c755f", "#d37295", "#edc948", "#b07aa1", "#f28e2b", "#86bcb6", "#bab0ac"]
COLOUR = dict(zip([kind for kind in KINDS if kind != "communication"], itertools.cycle(COLOURS)))
HIDDEN, ALONE = "#9aa4af", "#cf222e"
STYLE = (
    "text{font:12px -apple-system,'Segoe UI',Helvetica,Arial,sans-serif;fill:#1f2328}"
    ".heading{font-size:14px;font-weight:600}.lane{text-anchor:end}.tick{text-anchor:middle;fill:#59636e}"
)


class Work(NamedTuple):
    """A kernel, copy or memset on the GPU."""

    start: float
    stop: float
    lane: str
    """COMPUTATION or a kind of collective."""
    kind: str
    name: str
    thread: int | None
    """That launched it; None if the trace does not say."""
    launched: float | None
    """When; likewise."""


def read_trace(path: Path) -> tuple[list[Work], int]:
    """The GPU's work by start, and the number of steps (1 if the trace does not say). Raises UserError."""
    try:
        content = path.read_bytes()
        trace = json.loads(gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content)
        events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
        launches = {
            event["args"]["correlation"]: event
            for event in events
            if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
        }
        on_gpu = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
        first = min((event["ts"] for event in on_gpu), default=0.0)
        work = []
        for event in on_gpu:
            lane, kind, name = COMPUTATION, kind_of(event["name"]), event["name"]
            if kind == "communication":
                lane = kind = next(kind for kind, pattern in COLLECTIVES.items() if re.search(pattern, name, re.I))
            start, launch = (event["ts"] - first) / 1000, launches.get(event.get("args", {}).get("correlation"))
            by_whom = (launch["tid"], (launch["ts"] - first) / 1000) if launch else (None, None)
            work.append(Work(start, start + event["dur"] / 1000, lane, kind, name, *by_whom))
        steps = {event["name"] for event in events if event["name"].startswith("ProfilerStep#")}
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: expected a trace as throughput.py --trace writes it ({error!r})") from None
    if not work:
        raise UserError(f"{path}: no GPU kernels in this trace, expected one that was made on a GPU")
    return sorted(work, key=lambda item: item.start), max(1, len(steps))


def intersection(first: list[Span], second: list[Span]) -> list[Span]:
    """What lies in both of two lists, each as `union` returns it."""
    found, i, j = [], 0, 0
    while i < len(first) and j < len(second):
        start, stop = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < stop:
            found.append((start, stop))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return found


def overlap(work: list[Work]) -> dict[str, Span]:
    """Kind of collective -> (ms in which one of the kind runs, ms of these in which computation runs too).

    Computation is all that is not NCCL's: kernels, copies and memsets, on whatever stream. Both are lengths of unions:
    when two kernels of a kind run at once, on two streams, their time counts once. A NCCL kernel that occupies its
    stream while it waits for another rank counts as communication for as long as it waits. Kinds run at once too, so
    the last line, "together", is less than the sum of the others. Empty for a trace without collectives.
    """

    def spans(*lanes: str) -> list[Span]:
        return union((item.start, item.stop) for item in work if item.lane in lanes)

    def length(spans: list[Span]) -> float:
        return sum(stop - start for start, stop in spans)

    computation = spans(COMPUTATION)
    rows = {kind: spans(kind) for kind in COLLECTIVES} | {"together": spans(*COLLECTIVES)}
    return {kind: (length(row), length(intersection(row, computation))) for kind, row in rows.items() if row}


def idle(work: list[Work]) -> Span:
    """For how many ms nothing runs between the first work, by start, and the last; and for how many of these because
    the host had not launched yet what comes next. To the first step of a profile the GPU comes with nothing to do."""
    nothing = late = 0.0
    free = work[0].stop
    for item in work:
        if item.start > free:
            nothing += item.start - free
            late += max(0.0, min(item.start, item.launched or 0.0) - free)
        free = max(free, item.stop)
    return nothing, late


def middle_blocks(work: list[Work]) -> dict[str, Span]:
    """Heading -> window: one block's forward and one block's backward pass, amid the micro-batch amid the trace.

    Blocks are told apart by their all-to-alls (all-gathers where there are none), and the passes by the thread that
    launched these: reduce-scatters come from autograd's. Forward is from the end of one block's last all-to-all to the
    end of the next one's; backward from the start of one block's first to the start of the next one's. A trace without
    two blocks in both gives one window, the twentieth in its middle.
    """
    per_block, marks = FORWARD_ALL_TO_ALLS, [item for item in work if item.lane == "all-to-all"]
    if not marks:
        per_block, marks = 1, [item for item in work if item.lane == "all-gather"]
    launchers = [item.thread for item in work if item.lane == "reduce-scatter"]
    autograd = statistics.mode(launchers) if launchers else None
    passes = [(key, list(run)) for key, run in itertools.groupby(marks, key=lambda item: item.thread == autograd)]
    micro_batches = [
        (forward, backward)
        for (is_backward, forward), (_, backward) in itertools.pairwise(passes)
        if not is_backward and len(forward) >= 2 * per_block and len(backward) >= 2
    ]
    if not micro_batches:
        end = max(item.stop for item in work)
        return {"Middle of the trace": (0.475 * end, 0.525 * end)}
    forward, backward = micro_batches[len(micro_batches) // 2]
    num_blocks = len(forward) // per_block
    first = num_blocks // 2 * per_block
    per_block_backward = max(1, len(backward) // num_blocks)
    second = len(backward) // per_block_backward // 2 * per_block_backward
    return {
        "Forward pass of one block": (forward[first - 1].stop, forward[first + per_block - 1].stop),
        "Backward pass of one block": (backward[second - per_block_backward].start, backward[second].start),
    }


def neighbours(work: list[Work], gap: float) -> list[list[Work]]:
    """The work of one lane, by start; neighbours of one kind that are less than `gap` ms apart are together."""
    groups: list[list[Work]] = []
    for item in work:
        if groups and groups[-1][0].kind == item.kind and item.start - groups[-1][-1].stop < gap:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def hover_text(group: list[Work]) -> str:
    """Kernels' names and milliseconds; these are the whole kernels', also where a window cuts them."""
    longest = max(group, key=lambda item: item.stop - item.start)
    name = longest.name.removeprefix("void ")
    text = f"{name if len(name) <= 80 else name[:79] + '…'}, {longest.stop - longest.start:.3f} ms"
    many = f"{len(group)} kernels from {group[0].start:.3f} to {group[-1].stop:.3f} ms, the longest "
    return f"{group[0].kind}: {many if len(group) > 1 else ''}{text}"


def panel(heading: str, window: Span, work: list[Work], lanes: list[str], top: float) -> tuple[str, float]:
    """A heading, the lanes and a time axis in ms from the window's start; its SVG from `top` on, and where it ends."""
    begin, end = window
    work = [item for item in work if item.start < end and item.stop > begin]
    scale = (WIDTH - LEFT - RIGHT) / (end - begin)
    gap = max(MERGED_GAP, 0.5 / scale)
    bottom = top + 26 + len(lanes) * (LANE + GAP)
    tick = min(t for e in range(-5, 7) for m in (1, 2, 5) if (t := m * 10.0**e) * 10 >= end - begin)
    parts = [f'<text x="{LEFT}" y="{top + 14}" class="heading">{heading}, {end - begin:.2f} ms</text>']
    parts.append(f'<text x="{LEFT - 14}" y="{bottom + 18}" class="lane">ms</text>')
    for i in range(int((end - begin) / tick) + 1):
        x = LEFT + i * tick * scale
        parts.append(f'<path d="M{x:.2f} {top + 24}V{bottom + 4}" stroke="#d0d7de"/>')
        parts.append(f'<text x="{x:.2f}" y="{bottom + 18}" class="tick">{i * tick:g}</text>')

    def rectangle(span: Span, colour: str) -> str:
        x, width = LEFT + (span[0] - begin) * scale, (span[1] - span[0]) * scale
        return f'<rect x="{x:.2f}" width="{width:.2f}" height="{LANE}" fill="{colour}"/>'

    bridged = union((item.start, item.stop + gap) for item in work if item.lane == COMPUTATION)
    computation = [(start, stop - gap) for start, stop in bridged]
    for i, lane in enumerate(lanes):
        y = top + 26 + i * (LANE + GAP)
        parts.append(f'<text x="{LEFT - 14}" y="{y + LANE // 2 + 4}" class="lane">{lane}</text>')
        parts.append(f'<g transform="translate(0 {y})">{rectangle(window, "#f0f2f5")}')
        groups = neighbours([item for item in work if item.lane == lane], gap)
        # The longest first: of what runs on several streams at once the shorter lies on top.
        for group in sorted(groups, key=lambda group: group[0].start - group[-1].stop):
            span = max(begin, group[0].start), min(end, max(item.stop for item in group))
            shapes = rectangle(span, COLOUR.get(group[0].kind, ALONE))
            if lane != COMPUTATION:
                shapes += "".join(rectangle(part, HIDDEN) for part in intersection([span], computation))
            parts.append(f"<g><title>{escape(hover_text(group))}</title>{shapes}</g>")
        parts.append("</g>")
    return "\n".join(parts), bottom + 40


def legend(colours: dict[str, str], top: float) -> tuple[str, float]:
    """Text -> colour; its SVG from `top` on, and where it ends."""
    parts, x = [], LEFT
    for text, colour in colours.items():
        width = 30 + 7 * len(text)
        if x + width > WIDTH:
            x, top = LEFT, top + 20
        parts.append(f'<rect x="{x}" y="{top}" width="12" height="12" rx="2" fill="{colour}"/>')
        parts.append(f'<text x="{x + 17}" y="{top + 10}">{text}</text>')
        x += width
    return "\n".join(parts), top + 34


def picture(work: list[Work], windows: dict[str, Span], caption: str) -> str:
    """The SVG: a legend, a panel for each window, the caption. Raises UserError if there is nothing to show."""
    shown = [item for item in work if any(item.start < end and item.stop > begin for begin, end in windows.values())]
    if not shown:
        end = max(item.stop for item in work)
        raise UserError(f"no GPU work in this window: expected --start and --duration within the trace's {end:.2f} ms")
    lanes = [COMPUTATION, *(kind for kind in COLLECTIVES if any(item.lane == kind for item in shown))]
    colours = {kind: colour for kind, colour in COLOUR.items() if any(item.kind == kind for item in shown)}
    if len(lanes) > 1:
        colours |= {"communication behind computation": HIDDEN, "communication alone": ALONE}
    part, top = legend(colours, 18)
    parts = [part]
    for heading, window in windows.items():
        part, top = panel(heading, window, shown, lanes, top)
        parts.append(part)
    size = f'width="{WIDTH}" height="{top + 20}" viewBox="0 0 {WIDTH} {top + 20}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{caption}">',
        f"<style>{STYLE}</style>",
        # A background of its own, for dark pages.
        f'<rect x=".5" y=".5" width="{WIDTH - 1}" height="{top + 19}" rx="6" fill="#fff" stroke="#d0d7de"/>',
        *parts,
        f'<text x="{RIGHT}" y="{top + 3}">{caption}</text>',
        "</svg>\n",
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--start", type=float, metavar="MS")
    parser.add_argument("--duration", type=float, metavar="MS")
    parser.add_argument("--steps", type=int, metavar="N")
    arguments = parser.parse_args(argv)
    start, duration = arguments.start, arguments.duration
    for name, value in (("duration", duration), ("steps", arguments.steps)):
        if value is not None and value <= 0:
            raise UserError(f"--{name} {value}: expected more than 0")
    work, steps = read_trace(arguments.trace)
    steps = arguments.steps or steps
    found = {kind: (total / steps, hidden / steps) for kind, (total, hidden) in overlap(work).items()}
    if start is None and duration is None:
        windows = middle_blocks(work)
    else:
        windows = {f"From {start or 0:g} ms of the trace": (start or 0.0, (start or 0.0) + (duration or 10.0))}
    shares = [f"{k} {hidden:.1f} of {total:.1f}" for k, (total, hidden) in found.items() if k in COLLECTIVES]
    caption = f"Behind computation over the whole trace, ms a step: {', '.join(shares) or 'no collectives'}"
    try:
        arguments.picture.write_text(picture(work, windows, caption), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{arguments.picture} cannot be written: {error.strerror}") from None
    print(f"{f'ms a step (of {steps})':24} {'total':>10} {'hidden':>10} {'alone':>10}")
    for kind, (total, hidden) in found.items():
        print(f"{kind:24} {total:10.2f} {hidden:10.2f} {total - hidden:10.2f}")
    nothing, late = idle(work)
    print(f"idle {nothing / steps:.2f}, of which the host was late {late / steps:.2f}")
    for heading, (begin, end) in windows.items():
        print(f"{heading}: --start {begin:.3f} --duration {end - begin:.3f}")


if __name__ == "__main__":
    with exit_on_error():
        main(sys.argv[1:])
