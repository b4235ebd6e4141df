"""Runs that were measured, and what the formulas say of them; which configurations lie outside of what was measured."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from config.reading import load_config
from errors import UserError, reading
from models.qwen35_moe.parts import OF_TEXT, parts_of_model
from training.hardware import GPUS
from training.memory import GIB, Case, case_of, peak_memory
from training.step_time import step_time

RECORDED = Path(__file__).resolve().parents[1] / "benchmarks/recorded.jsonl"
OFF_BY = {"peak": 0.05, "time": 0.10}
"""By which predictions may be off on any recorded run: what a test holds them to."""
GPUS_PER_NODE = 8


class Recorded(NamedTuple):
    """One run of benchmarks.throughput."""

    what: str
    gpu: str
    case: Case
    peak_gib: float | None
    step_seconds: float | None

    def predicted(self) -> tuple[float, float]:
        """(peak in GiB, seconds a step)."""
        peak = sum(peak_memory(self.case)[1].values()) / GIB
        return peak, step_time(self.case, self.gpu, GPUS_PER_NODE).seconds


def gpu_named(device: str) -> str | None:
    """The kind of a GPU by its driver's name; None: not in the table."""
    return next((name for name in GPUS if name in device.lower()), None)


def known_gpu(device: str) -> str:
    """The same. Raises UserError for one that is not in the table."""
    gpu = gpu_named(device)
    if gpu is None:
        raise UserError(f"a run that is recorded on {device!r}: expected one of {', '.join(GPUS)}")
    return gpu


def recorded_runs(path: Path = RECORDED) -> list[Recorded]:
    """All of them. Raises UserError for a damaged file."""
    with reading(path):
        rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        runs = [(row["what"], str(row["device"]), [str(word) for word in row["arguments"]], row) for row in rows]
        sizes = [(int(row["world_size"]), tuple(map(int, row.get("documents", ())))) for row in rows]
    return [_run(*run, *size) for run, size in zip(runs, sizes)]


def _run(
    what: str, device: str, arguments: list[str], row: dict[str, Any], world_size: int, documents: tuple[int, ...]
) -> Recorded:
    # Paths were from the repository's root, which need not be where a run is started.
    root = RECORDED.parents[1]
    arguments = [str(root / word) if word.endswith(".toml") and (root / word).is_file() else word for word in arguments]
    case = case_of(load_config(arguments), world_size, documents)
    case = replace(case, patches=row.get("patches", 0), frames=tuple(Counter(row.get("frames", ())).items()))
    return Recorded(what, known_gpu(device), case, row.get("peak_gib"), row.get("step_seconds"))


def record(path: Path, what: str, arguments: list[str], found: dict[str, Any], date: str) -> None:
    """Adds a line of what benchmarks.throughput `found` with these arguments of train.py's. Raises UserError for a GPU
    that is not in the table."""
    known_gpu(found["device"])
    kept = ("device", "world_size", "documents", "patches", "frames", "peak_gib", "step_seconds", "torch")
    apart = [part for word in arguments for part in word.split("=", 1)]  # as paths are looked for in them
    row = {"what": what, "date": date, "arguments": apart}
    row |= {key: found[key] for key in kept if found.get(key)}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row | {"source": "benchmarks.throughput --record"}) + "\n")


def outside(case: Case, gpu: str, gpus_per_node: int, runs: list[Recorded]) -> list[str]:
    """In what this case differs from all that was measured, each with the term that it makes uncertain."""
    cases = [run.case for run in runs]
    timed = [run.case for run in runs if run.step_seconds]
    found = []

    def unless(known: bool, what: str, term: str) -> None:
        if not known:
            found.append(f"{what}: {term}")

    degrees = case.degrees
    world, measured_world = degrees.replicate * degrees.shard, max(c.degrees.shard for c in cases)
    unless(
        world <= measured_world, f"{world} GPUs (measured: up to {measured_world})", "how much communication is hidden"
    )
    unless(world <= gpus_per_node, "several nodes", "the network's rate")
    for name in ("replicate", "expert", "context"):
        degree, most = getattr(degrees, name), max(getattr(c.degrees, name) for c in cases)
        term = {"replicate": "its all-reduce", "expert": "the all-to-alls' rate and the load of the fullest rank"}
        unless(
            degree <= most,
            f"{name} degree {degree} (measured: up to {most})",
            term.get(name, "activations, all-to-alls"),
        )
    if degrees.shard > 1:
        sharded = [c for c in cases if c.degrees.shard > 1]
        known = any((c.degrees.expert > 1) == (degrees.expert > 1) for c in sharded)
        unless(known, "several GPUs at ep 1", "what of FSDP's traffic is hidden")
        known = any(c.trains_text == case.trains_text for c in timed if c.degrees.shard > 1)
        unless(known, "frozen weights over several GPUs", "the time in which they are gathered and copied")
    least, most = min(c.num_tokens for c in timed), max(c.num_tokens for c in timed)
    unless(
        least <= case.num_tokens <= most,
        f"{case.num_tokens:,} tokens a rank and micro-batch (measured: {least:,} to {most:,})",
        "products' and kernels' rates, and what is alive in a block's backward pass",
    )
    longest = max(c.longest_document for c in timed)
    unless(
        case.longest_document <= longest,
        f"documents of {case.longest_document:,} tokens (measured: up to {longest:,})",
        "attention and the delta rule",
    )
    kinds = [(c.mode, bool(c.lora.rank)) for c in timed]
    adapters = " with adapters" if case.lora.rank else ""
    unless((case.mode, bool(case.lora.rank)) in kinds, f'mode "{case.mode}"{adapters}', "activations, and their time")
    unless("experts" not in case.lora.targets or not case.lora.rank, "adapters on experts", "the time of thin products")
    widths = [_widths(c) for c in cases]
    unless(_widths(case) in widths, "other widths than 35B-A3B's", "every kind's rate")
    unless(case.state_bytes == case.master_bytes, "moments of another dtype than weights", "the optimizer's rate")
    unless(case.c == 2, 'training.dtype = "float32"', "every kind's rate, and memory that is counted in bfloat16")
    unless(case.compiled, "compile.enable = false", "activations, elementwise passes, the host: all are more")
    some = case.trained & set(OF_TEXT)
    unless(
        not some or some >= set(parts_of_model(case.shape)) & set(OF_TEXT),
        "frozen parts of the text",
        "what they spare of activations and time, counted as if they trained",
    )
    has_mtp = [(c.shape.mtp_num_hidden_layers > 0, c.trunk_has_graph) for c in timed]
    known = (case.shape.mtp_num_hidden_layers > 0, case.trunk_has_graph) in has_mtp
    unless(known, "multi-token prediction", "its activations and time")
    unless(not case.frames or any(c.frames for c in timed), "images", "the tower's time")
    unless(case.accumulation == 1 or any(c.accumulation > 1 for c in timed), "several micro-batches", "their time")
    unless(any(run.gpu == gpu for run in runs), f"GPU {gpu}", "every rate")
    return found


def _widths(case: Case) -> tuple[int, ...]:
    shape = case.shape
    return (
        shape.hidden_size,
        shape.moe_intermediate_size,
        shape.num_attention_heads * shape.head_dim,
        shape.value_dim,
        shape.vocab_size,
        shape.num_experts_per_tok,
    )
