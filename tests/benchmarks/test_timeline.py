"""The timeline finds what communication lies behind computation, finds a block in mid-step, and draws what it says."""

import gzip
import itertools
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from benchmarks.throughput import KINDS, union
from benchmarks.timeline import (
    ALONE,
    COLOUR,
    HIDDEN,
    LEFT,
    RIGHT,
    WIDTH,
    idle,
    main,
    middle_blocks,
    overlap,
    read_trace,
)
from tests.commands import status_of

SEND = "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)"
GATHER = "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
REDUCE = "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
GEMM, ATTENTION = "nvjet_tst_128x256", "void flash_fwd_kernel<Traits<128, 64>>(Params&)"
FORWARD, BACKWARD = 11, 12  # threads
ORIGIN = 5e9  # microseconds: traces do not begin at 0
LAUNCHES = itertools.count()
SVG = "{http://www.w3.org/2000/svg}"

Events = list[dict[str, Any]]


def work(
    name: str, start: float, stop: float, thread: int = FORWARD, category: str = "kernel", launch_at: float = 0.0
) -> Events:
    """The events of one kernel, from `start` to `stop` ms: its launch by the host, at `launch_at`, and itself."""
    args = {"correlation": next(LAUNCHES)}
    launch = {"cat": "cuda_runtime", "name": "cudaLaunchKernelExC", "tid": thread, "dur": 3.0}
    launch["ts"] = ORIGIN + launch_at * 1000
    kernel = {"cat": category, "name": name, "tid": 7, "ts": ORIGIN + start * 1000, "dur": (stop - start) * 1000}
    return [{"ph": "X", "args": args} | event for event in (kernel, launch)]


def write(path: Path, *events: Events, num_steps: int = 0) -> Path:
    step = {"ph": "X", "cat": "user_annotation", "ts": ORIGIN - 99, "dur": 9.0, "tid": FORWARD}
    steps = [step | {"name": f"ProfilerStep#{i}"} for i in range(num_steps)]
    steps += [step | {"cat": "gpu_user_annotation"} for step in steps]  # each is there twice
    metadata = {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}}
    content = json.dumps({"traceEvents": [metadata, *steps, *itertools.chain(*events)]}).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def overlapping() -> Events:
    computation = work(GEMM, 0, 10) + work(ATTENTION, 5, 15) + work("Memcpy DtoD", 20, 30, category="gpu_memcpy")
    gathers = work(GATHER, 0, 4) + work(GATHER, 2, 6)
    return computation + work(SEND, 8, 22) + gathers + work(REDUCE, 40, 45)


def test_union() -> None:
    assert union([(4, 6), (0, 3), (1, 2), (6, 7)]) == [(0, 3), (4, 7)]


def test_overlap_is_of_unions(tmp_path: Path) -> None:
    found = overlap(read_trace(write(tmp_path / "trace.json", overlapping()))[0])
    assert {kind: pytest.approx(times) for kind, times in found.items()} == {
        "all-to-all": (14, 9),  # 8 to 15, where two streams compute until 10, and 20 to 22
        "all-gather": (6, 6),
        "reduce-scatter": (5, 0),
        "together": (25, 15),
    }


def test_figures_are_of_a_step(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trace, picture = write(tmp_path / "trace.json", overlapping(), num_steps=2), tmp_path / "picture.svg"
    for arguments, steps, row in (([], 2, ["7.00", "4.50", "2.50"]), (["--steps=4"], 4, ["3.50", "2.25", "1.25"])):
        assert status_of(main, [str(trace), str(picture), "--start=0", *arguments]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"ms a step (of {steps})")
        assert lines[1].split() == ["all-to-all", *row]
    assert "all-to-all 2.2 of 3.5, all-gather 1.5 of 1.5, reduce-scatter 0.0 of 1.2" in picture.read_text()
    assert status_of(main, [str(write(trace, overlapping())), str(picture), "--start=0"]) == 0
    assert "all-to-all 9.0 of 14.0" in picture.read_text()


def test_idle_is_the_hosts_where_the_next_launch_came_too_late(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    events = work(GEMM, 0, 10) + work(SEND, 5, 20) + work(GEMM, 21, 22)  # launched long before: waits for something
    events += work(ATTENTION, 25, 30, launch_at=24) + work(GEMM, 26, 28, launch_at=24) + work(GEMM, 30, 31)
    events += work(GEMM, 33, 34, launch_at=30.9)  # launched just before the one before ended
    trace = write(tmp_path / "trace.json", events)
    assert idle(read_trace(trace)[0]) == (pytest.approx(6), pytest.approx(2))
    assert status_of(main, [str(trace), str(tmp_path / "picture.svg"), "--steps=2"]) == 0
    assert "idle 3.00, of which the host was late 1.00" in capsys.readouterr().out.splitlines()


def test_compressed_traces_are_read(tmp_path: Path) -> None:
    events = overlapping()
    assert read_trace(write(tmp_path / "t.json.gz", events)) == read_trace(write(tmp_path / "t.json", events))


def drawn(picture: Path, duration: float) -> dict[str, list[tuple[float, float, str]]]:
    """Hover text up to its first comma -> its rectangles: start and stop in ms of the window, and colour."""
    found: dict[str, list[tuple[float, float, str]]] = {}
    for group in ET.parse(picture).iter(f"{SVG}g"):
        if (title := group.find(f"{SVG}title")) is not None:
            rectangles = found[(title.text or "").split(",")[0]] = []
            for shape in group.findall(f"{SVG}rect"):
                x, width = float(shape.get("x", "")) - LEFT, float(shape.get("width", ""))
                start, stop = (edge * duration / (WIDTH - LEFT - RIGHT) for edge in (x, x + width))
                rectangles.append((start, stop, shape.get("fill", "")))
    return found


def test_the_picture_says_when(tmp_path: Path) -> None:
    """A window from 4 to 24 ms: what it cuts is cut, what is outside is left out."""
    trace, picture = write(tmp_path / "trace.json", overlapping()), tmp_path / "picture.svg"
    assert status_of(main, [str(trace), str(picture), "--start=4", "--duration=20"]) == 0
    shapes = drawn(picture, duration=20)
    expected = {
        f"dense matmuls: {GEMM}": [(4, 10, COLOUR["dense matmuls"])],
        "attention: flash_fwd_kernel<Traits<128": [(5, 15, COLOUR["attention"])],
        "copies and other PyTorch kernels: Memcpy DtoD": [(20, 24, COLOUR["copies and other PyTorch kernels"])],
        f"all-to-all: {SEND}": [(8, 22, ALONE), (8, 15, HIDDEN), (20, 22, HIDDEN)],
        f"all-gather: {GATHER}": [(4, 6, ALONE), (4, 6, HIDDEN)],
    }
    assert shapes.keys() == expected.keys()
    for text, found in expected.items():
        for shape, (start, stop, colour) in zip(shapes[text], found, strict=True):
            assert shape == (pytest.approx(start - 4, abs=1e-3), pytest.approx(stop - 4, abs=1e-3), colour)
    texts = [(text.text, float(text.get("x", ""))) for text in ET.parse(picture).iter(f"{SVG}text")]
    ticks = [(text, x) for text, x in texts if text in ("0", "10", "20")]
    assert ticks == [("0", LEFT), ("10", pytest.approx((LEFT + WIDTH - RIGHT) / 2)), ("20", WIDTH - RIGHT)]
    assert "reduce-scatter" not in [text for text, _ in texts]  # no lane for what the window does not have


def test_near_kernels_of_one_kind_are_one(tmp_path: Path) -> None:
    kernels = [work(GEMM, 0, 0.1), work(GEMM, 0.105, 0.2), work(GEMM, 0.22, 0.3), work(ATTENTION, 0.3, 0.4)]
    picture = tmp_path / "picture.svg"
    assert status_of(main, [str(write(tmp_path / "trace.json", *kernels)), str(picture), "--duration=1"]) == 0
    spans = {text: [shape[:2] for shape in found] for text, found in drawn(picture, duration=1).items()}
    assert spans["dense matmuls: 2 kernels from 0.000 to 0.200 ms"] == [pytest.approx((0, 0.2), abs=1e-4)]
    assert spans[f"dense matmuls: {GEMM}"] == [pytest.approx((0.22, 0.3), abs=1e-4)]


def micro_batch(start: float, num_blocks: int, backward: int) -> Events:
    """Blocks of 10 ms each, forward and backward, as at ep > 1 where the last block stays gathered."""
    events = []
    for block in range(num_blocks):
        now = start + 10 * block
        events += work(GATHER, now, now + 2) + work(GEMM, now, now + 5)
        for i in range(4):
            events += work(SEND, now + 5 + i, now + 5.5 + i)
    for block in range(num_blocks):
        now = start + 10 * (num_blocks + block)
        events += work(GATHER, now, now + 2, BACKWARD) if block else []
        for i in range(backward):
            events += work(SEND, now + i, now + i + 0.5, BACKWARD)
        events += work(GEMM, now + 5, now + 9, BACKWARD) + work(REDUCE, now + 9, now + 12, BACKWARD)
    return events


@pytest.mark.parametrize("backward", [3, 5])
def test_a_block_in_mid_step_is_found(tmp_path: Path, backward: int) -> None:
    """Of three micro-batches of 4 blocks the second, from 80 ms: its third block forward and second backward."""
    events = [micro_batch(80 * i, num_blocks=4, backward=backward) for i in range(3)]
    found, _ = read_trace(write(tmp_path / "trace.json", *events))
    assert middle_blocks(found) == {
        "Forward pass of one block": pytest.approx((80 + 18.5, 80 + 28.5)),
        "Backward pass of one block": pytest.approx((80 + 50, 80 + 60)),
    }
    # Without all-to-alls, as at ep 1, from one all-gather to the next.
    found = [item for item in found if item.lane != "all-to-all"]
    assert middle_blocks(found) == {
        "Forward pass of one block": pytest.approx((80 + 12, 80 + 22)),
        "Backward pass of one block": pytest.approx((80 + 50, 80 + 60)),
    }


def test_the_picture_of_blocks(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trace, picture = write(tmp_path / "trace.json", micro_batch(0, num_blocks=4, backward=3)), tmp_path / "picture.svg"
    assert status_of(main, [str(trace), str(picture)]) == 0
    assert "Backward pass of one block: --start 50.000 --duration 10.000" in capsys.readouterr().out
    texts = [text.text for text in ET.parse(picture).iter(f"{SVG}text")]
    assert "Forward pass of one block, 10.00 ms" in texts
    for lane in ("computation", "all-to-all", "all-gather", "reduce-scatter"):
        assert texts.count(lane) == 2
    for shape in ET.parse(picture).iter(f"{SVG}rect"):  # neither panel has what only the other shows
        assert 0 <= float(shape.get("x", "")) < float(shape.get("x", "")) + float(shape.get("width", "")) <= WIDTH


def test_no_collectives(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trace, picture = write(tmp_path / "trace.json", work(GEMM, 0, 50), work(ATTENTION, 50, 100)), tmp_path / "p.svg"
    assert overlap(read_trace(trace)[0]) == {}
    assert status_of(main, [str(trace), str(picture)]) == 0
    assert "Middle of the trace: --start 47.500 --duration 5.000" in capsys.readouterr().out
    texts = [text.text or "" for text in ET.parse(picture).iter(f"{SVG}text")]
    assert texts[-1].endswith("no collectives")
    assert not any("communication" in text for text in texts)


def test_each_kind_has_a_colour_of_its_own() -> None:
    assert len(set(COLOUR.values()) - {HIDDEN, ALONE}) == len(KINDS.keys() - {"communication"})


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    good, picture = str(write(tmp_path / "good.json", overlapping())), str(tmp_path / "picture.svg")
    (tmp_path / "text.json").write_text("no trace\n")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(Path(good).read_bytes())[:-20])
    host = str(write(tmp_path / "host.json", work("aten::mm", 0, 1, category="cpu_op")))
    traces = [str(tmp_path / name) for name in ("text.json", "list.json", "empty.json", "cut.json.gz", "missing.json")]
    for arguments in (
        *([trace] for trace in traces),
        [good, "--duration=0"],
        [good, "--steps=0"],
        [good, "--start=99"],
    ):
        assert status_of(main, [*arguments, picture]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert "expected" in error
    assert status_of(main, [host, picture]) == 2
    assert "no GPU kernels" in capsys.readouterr().err
    assert status_of(main, [good, str(tmp_path / "missing" / "picture.svg")]) == 2
    assert not Path(picture).exists()
