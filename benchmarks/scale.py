"""The tables of docs/scale.md and a simulated step, both from the planner: no GPU needed.

    python -m benchmarks.scale docs/scale.md [--trace trace.json]

Replaces what stands in the file between `<!-- table NAME -->` and `<!-- end -->`. `--trace` also writes a micro-batch
of 35B-A3B on 64 GPUs as a trace, of which timeline.py makes a picture as of a measured one.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from config.options import Config
from config.reading import load_config
from errors import OneLineParser, UserError, exit_on_error
from models.qwen35_moe.config import FULL
from training.hardware import GPUS
from training.memory import GIB
from training.plan import Change, Images, Plan, Where, alternatives

# What differs from 35B-A3B. Counted by this code, they have 34.7, 122.1 and 396.3 B parameters.
MODELS: dict[str, tuple[str, ...]] = {
    "35B-A3B": (),
    "122B-A10B": (
        "--model.config.hidden_size=3072",
        "--model.config.num_hidden_layers=48",
        "--model.config.num_attention_heads=32",
        "--model.config.linear_num_value_heads=64",
        "--model.config.moe_intermediate_size=1024",
        "--model.config.shared_expert_intermediate_size=1024",
    ),
    "397B-A17B": (
        "--model.config.hidden_size=4096",
        "--model.config.num_hidden_layers=60",
        "--model.config.num_attention_heads=32",
        "--model.config.linear_num_value_heads=64",
        "--model.config.moe_intermediate_size=1024",
        "--model.config.shared_expert_intermediate_size=1024",
        "--model.config.num_experts=512",
        "--model.config.num_experts_per_tok=10",
    ),
}
IMAGES = (
    "--model.config.vision_config.depth=27",
    "--model.config.image_token_id=4098",
    "--model.config.video_token_id=4099",
    "--model.config.vision_start_token_id=4096",
    "--model.config.vision_end_token_id=4097",
)
TOKENS_PER_STEP = {8: 2**20, 64: 2**22, 512: 2**24}
PICTURES = Images(1080, 1920, 0.3)


def configuration(model: str, gpus: int, length: int, *options: str) -> Config:
    """Of a step of so many tokens as befits the number of GPUs."""
    batch = f"--training.global_batch_size={max(gpus // 8, TOKENS_PER_STEP[gpus] // length)}"
    words = ["--config=qwen35moe_35b_a3b.toml", f"--training.sequence_length={length}", batch]
    return load_config([*words, *MODELS[model], *options])


def best(config: Config, gpus: int, images: bool) -> tuple[str, Plan, Change] | None:
    """On the smallest GPUs on which anything fits."""
    for gpu in GPUS:
        where = Where(gpus, 8, gpu, images=PICTURES if images else None)
        if found := alternatives(config, where):
            return gpu, *found[0]
    return None


def limit(plan: Plan) -> str:
    """What most of the time goes into that is not products or attention."""
    names = {
        "communication, not hidden": "links",
        "the GPU waits for the host": "the host",
        "norms, routing, copies": "memory's rate",
        "weights cast and gathered": "memory's rate",
        "numbers of copies": "the host",
    }
    of: dict[str, float] = {}
    for kind, seconds in plan.time.by_kind.items():
        if kind in names:
            of[names[kind]] = of.get(names[kind], 0.0) + seconds
    worst = max(of, key=lambda name: of[name])
    return f"{worst}, {of[worst] / plan.time.seconds:.0%}"


def row(model: str, gpus: int, length: int, images: bool, *options: str) -> str:
    """One line of a table."""
    found = best(configuration(model, gpus, length, *options), gpus, images)
    head = f"| {gpus} | {length // 1024}k{', images' if images else ''} | "
    if found is None:
        return head + "nothing fits | | | | | |"
    gpu, plan, change = found
    degrees = plan.case.degrees
    rows = change["training", "local_batch_size"]
    layout = f"{plan.case.mode}, ep {degrees.expert}, cp {degrees.context}, replicate {degrees.replicate}, rows {rows}"
    layout += ", reshard always" if plan.case.reshard == "always" else ""
    mfu = plan.time.flops * plan.tokens_per_second / GPUS[gpu].peak
    return (
        f"{head}{gpu.upper()} | {layout} | {plan.peak / GIB:.0f} | {plan.tokens_per_second:,.0f} | "
        f"{'' if images else f'{mfu:.0%}'} | {limit(plan)} |"
    )


def table(model: str) -> str:
    lines = [
        "| GPUs | documents | GPU | layout | peak, GiB | tokens/s a GPU | MFU | largest loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for gpus in TOKENS_PER_STEP:
        lines += [row(model, gpus, length, False) for length in (4096, 32768, 262144)]
        width = re.search(r"hidden_size=(\d+)", " ".join(MODELS[model]))
        size = f"--model.config.vision_config.out_hidden_size={width[1] if width else 2048}"
        lines.append(row(model, gpus, 32768, True, *IMAGES, size))
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """The document with its tables made anew. Raises UserError for a name that is no model's."""

    def made(found: re.Match[str]) -> str:
        if found[1] not in MODELS:
            raise UserError(f"table {found[1]!r}: expected one of {', '.join(MODELS)}")
        return f"<!-- table {found[1]} -->\n{table(found[1])}\n<!-- end -->"

    return re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", made, text, flags=re.DOTALL)


# Kinds of work, by names of kernels that timeline.py sorts into the same; whether a full or a linear block has them.
KERNELS = {
    "attention": ("flash_fwd", True),
    "delta rule": ("gdr", False),
    "convolution": ("_forward_kernel", False),
    "norms, routing, copies": ("triton_norms", None),
    "experts' products": ("grouped", None),
    "dense products": ("gemm", None),
}
COLLECTIVES = {"all-gather": "ncclDevKernel_AllGather", "reduce-scatter": "ncclDevKernel_ReduceScatter"}


def simulated(plan: Plan) -> list[dict[str, Any]]:
    """A micro-batch at ep 1: each block's weights are gathered while the block before computes, and its gradients are
    reduced while the next one does. A block waits for its weights."""
    case, events = plan.case, list[dict[str, Any]]()
    types, parts = list(case.shape.layer_types), 1 / case.accumulation
    forward = 1 / 4 if case.mode == "full" else 1 / 3
    seconds = {kind: plan.time.by_kind.get(kind, 0.0) * parts for kind in KERNELS}
    links = {link.traffic.kind: link.seconds * parts for link in plan.time.links if link.traffic.axis == "fsdp"}

    def add(name: str, start: float, length: float, thread: int) -> float:
        number = len(events)
        where: dict[str, Any] = {"ph": "X", "ts": start * 1e6, "args": {"correlation": number}}
        events.append(where | {"cat": "cuda_runtime", "name": "launch", "dur": 0, "tid": thread})
        events.append(where | {"cat": "kernel", "name": name, "dur": length * 1e6, "tid": 0})
        return start + length

    def compute(index: int, share: float, now: float, thread: int) -> float:
        for kind, (name, of_full) in KERNELS.items():
            has = [of_full is None or (each == FULL) == of_full for each in types]
            if has[index]:
                now = add(name, now, share * seconds[kind] / sum(has), thread)
        return now

    gather, reduce = links["all-gather"] / (2 * len(types)), links["reduce-scatter"] / len(types)
    now = gathered = add(COLLECTIVES["all-gather"], 0.0, gather, 1)
    reduced = 0.0
    passes: Iterable[tuple[bool, list[int]]] = [
        (True, list(range(len(types)))),
        (False, list(reversed(range(len(types))))),
    ]
    for is_forward, order in passes:
        thread = 1 if is_forward else 2
        for index in order:
            start = max(now, gathered)
            gathered = add(COLLECTIVES["all-gather"], max(start, gathered), gather, thread)
            now = compute(index, forward if is_forward else 1 - forward, start, thread)
            if not is_forward:
                reduced = add(COLLECTIVES["reduce-scatter"], max(now, reduced), reduce, thread)
    return events


def main(arguments: list[str]) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path)
    parser.add_argument("--trace", type=Path)
    options = parser.parse_args(arguments)
    text = options.document.read_text(encoding="utf-8")
    if options.trace:
        config = configuration("35B-A3B", 64, 4096)
        found = alternatives(config, Where(64, 8, "h100"))
        plan = next(plan for plan, _ in found if plan.case.degrees == (1, 64, 1, 1))
        options.trace.write_text(json.dumps({"traceEvents": simulated(plan)}))
    options.document.write_text(with_tables(text), encoding="utf-8")


if __name__ == "__main__":
    with exit_on_error():
        main(sys.argv[1:])
