"""Tokens a second, MFU, memory and where the time goes, of train.py's own step on random tokens.

    python -m benchmarks.throughput --config benchmarks/one_gpu_35b.toml [--section.key value ...]
    torchrun --nproc-per-node 2 -m benchmarks.throughput --config benchmarks/one_gpu_35b.toml \\
        --parallelism.expert_parallel_degree 2 --model.config.num_experts 64
    torchrun --nproc-per-node 8 -m benchmarks.throughput --config benchmarks/one_node_35b.toml

A global batch that is too small for the processes is one micro-batch of each. Memory is that of the process with most.
Options of its own: `--documents 4096,1024` cuts every row into documents of these lengths, again and again (default: a
row is one document); `--images HEIGHTxWIDTH:SHARE` has so large a share of the tokens stand for images of random pixels
of this size, for a model with a vision tower; `--steps N` timed steps (default 8); `--profile N` profiles N more and
prints the time by kind of work; `--trace FILE` also writes a trace of these, of which timeline.py makes a picture, that
of rank 1 as `rank1-FILE` beside it, and so on; `--launches-only` leaves the host's operations out of the profile, which
make the host late (such a trace names no steps: give timeline.py `--steps`, one more than N); `--json FILE` adds a JSON
line to FILE; `--record WHAT` adds the run, by this name, to recorded.jsonl, which the planner's predictions are held
to. The other options are train.py's.

`host_ahead_ms`, of each rank: how far its GPU is behind the host that launches its work, when all of a step has been
launched; the median. Near 0 the GPU waits for that host. A GPU's queue holds 1,024 launches, some 100 ms.
"""

import argparse
import dataclasses
import datetime
import functools
import gc
import itertools
import json
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.images import NONE, with_images
from config.checks import check_config
from config.options import Config
from config.reading import load_config, model_config
from data.batch import MicroBatch
from errors import OneLineParser, UserError, exit_on_error
from models.ops.documents import Documents
from models.ops.kernels import import_ahead
from models.qwen35_moe.init import init_weights
from parallelisms.context_parallel import own_share
from parallelisms.degrees import work_out_degrees
from parallelisms.mesh import build_meshes
from parallelisms.parallelize import local_region
from parallelisms.room import room_factor
from train import build_model
from training.distributed import init_distributed, sum_over_ranks, world_from_environment
from training.flops import flops_per_token, peak_flops
from training.metrics import expert_load, setup_logging
from training.optimizer import build_optimizer
from training.plan import Images, parse_documents, parse_images
from training.recorded import RECORDED, known_gpu, record
from training.step import LaunchedStep, Stepper
from training.vision_work import VisionWork

NUM_WARMUP_STEPS = 4

# Kinds of work, by what the names of their kernels say; the first that fits. The compiler's fused kernels carry the
# names of the operations that they fuse.
KINDS = {
    "communication": r"nccl",
    "attention": r"flash_(fwd|bwd)|fmha|flash::|sdpa",
    "delta rule": r"kkt|gdr|gated_delta|chunk_local_cumsum|tilelang|l2norm|group_reduce|recompute_w_u|wy_",
    "convolution": r"^_(forward|backward)_kernel",
    "optimizer, clipping": r"^_(update|squares|norms)_kernel|adam|multi_tensor_apply|lpnorm|foreach",
    "softmax of the loss": r"triton.*logsumexp",
    "routing, permutation": r"^_sum_ker|sort|searchsorted|bucketize|topk|scatter|radix|softmax|triton(?!.*silu).*index",
    "norms, gates, rotary, SwiGLU": r"triton",
    "expert matmuls": r"grouped|group_gemm|GroupProblem",
    "dense matmuls": r"gemm|nvjet|cutlass|cublas|splitK|matmul",
    "copies and other PyTorch kernels": r".",
}


def random_micro_batch(config: Config, lengths: list[int], vocab_size: int, seed: int) -> MicroBatch:
    """`local_batch_size` rows of random tokens, each cut into documents of `lengths`, over and over."""
    training, documents = config.training, list[int]()
    for _ in range(training.local_batch_size):
        left = training.sequence_length
        for length in itertools.cycle(lengths or [left]):
            documents.append(min(length, left))
            left -= documents[-1]
            if not left:
                break
    num_tokens = training.local_batch_size * training.sequence_length
    stream = torch.randint(vocab_size, (num_tokens + 1,), generator=torch.Generator().manual_seed(seed))
    return MicroBatch(
        tokens=stream[:-1],
        labels=stream[1:].clone(),
        positions=torch.cat([torch.arange(length) for length in documents]),
        documents=Documents.from_lengths(documents, max_seqlen=training.sequence_length),
    )


@functools.cache
def kind_of(kernel: str) -> str:
    """The kind of work of the kernel of this name."""
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE))


def union(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """What (start, stop) spans cover together: sorted, and no two of them touch."""
    merged: list[tuple[float, float]] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def time_by_kind(profile: torch.profiler.profile, num_steps: int) -> dict[str, float]:
    """Milliseconds a step that the GPU spends on each kind of work, on whatever stream, and idle; of `num_steps` after
    the first of the profile, to which the GPU comes with nothing else to do."""
    kinds = defaultdict[str, float](float)
    on_gpu = [each for each in profile.events() if each.device_type == torch.autograd.DeviceType.CUDA]
    on_gpu = [each for each in on_gpu if not each.is_user_annotation]
    updates = sorted(each.time_range.end for each in on_gpu if "update_kernel" in each.name)
    start = updates[len(updates) // (num_steps + 1) - 1] if updates else 0.0  # the end of the first step
    spans = [(start, start)] if updates else []
    for event in on_gpu:
        if event.time_range.start < start:
            continue
        spans.append((event.time_range.start, event.time_range.end))
        kinds[kind_of(event.name)] += event.time_range.elapsed_us() / 1000 / num_steps
    if busy := union(spans):
        kinds["idle"] = (busy[-1][1] - busy[0][0] - sum(stop - start for start, stop in busy)) / 1000 / num_steps
    return dict(sorted(kinds.items(), key=lambda item: -item[1]))


class Launches:
    """How far a GPU is behind its host; nothing elsewhere. To be made when the GPU has nothing to do."""

    def __init__(self, device: torch.device) -> None:
        self._moments: list[tuple[float, torch.cuda.Event]] = []
        self._is_gpu = device.type == "cuda"
        self.note()

    def note(self) -> None:
        """All of a step has been launched."""
        if self._is_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._moments.append((time.perf_counter(), event))

    def ahead(self) -> float:
        """The median, ms, of a GPU that has finished."""
        (start, first), *others = self._moments
        return statistics.median(first.elapsed_time(event) - (at - start) * 1e3 for at, event in others)


def trace_of_rank(trace: str, rank: int) -> str:
    """The path of a rank's trace; that of rank 0 is `trace` itself."""
    path = Path(trace)
    return str(path.with_name(f"rank{rank}-{path.name}")) if rank else trace


def measure(
    config: Config,
    lengths: list[int],
    num_steps: int,
    profile_steps: int,
    trace: str,
    images: Images | None = None,
    launches_only: bool = False,
) -> dict[str, Any]:
    """Runs and times optimizer steps on this rank's device; all ranks together. launches_only: profiles what the host
    launches and a GPU does, no more; there must be one."""
    rank, world_size = world_from_environment()
    device = init_distributed(config.job.collective_timeout_seconds)
    training, shape = config.training, model_config(config)
    degrees = work_out_degrees(config.parallelism, config.training, shape, world_size)
    meshes = build_meshes(device.type, degrees, room_factor(config.parallelism, device.type))
    torch.manual_seed(config.job.seed)
    started = time.perf_counter()
    model = build_model(config, shape, meshes, device)
    imports = import_ahead(model.kernels, device)
    built = time.perf_counter()
    init_weights(model, config.job.seed, local_region)
    drawn = time.perf_counter()
    imports.join()
    optimizer = build_optimizer(model, config.optimizer)
    stepper = Stepper(model, optimizer, meshes, device, training, config.moe, config.mtp)
    num_micro_batches = training.global_batch_size // (meshes.num_data_ranks * training.local_batch_size)
    tokens_per_step = training.global_batch_size * training.sequence_length
    vision_work = VisionWork(model, meshes)
    frames_of_step: list[list[int]] = []
    """Of each micro-batch, how many patches each frame has."""

    def step(number: int) -> LaunchedStep:
        # What the training loop gets from its loader, and on fresh data as there: routing differs from step to step.
        first = (number * meshes.num_data_ranks + meshes.data_rank) * num_micro_batches
        seeds = range(first, first + num_micro_batches)
        batches = [random_micro_batch(config, lengths, shape.vocab_size, seed) for seed in seeds]
        if shape.vision:
            batches = [with_images(batch, shape.vision, images or NONE, seed) for batch, seed in zip(batches, seeds)]
        batches = [own_share(batch, meshes.context_parallel, shape.vision) for batch in batches]
        if shape.vision:
            vision_work.add(sum_over_ranks(torch.tensor(vision_work.of(batches))).tolist())
            frames_of_step[:] = [batch.patches.frames.lengths() for batch in batches if batch.patches is not None]
        if shape.mtp_num_hidden_layers:
            batches = [batch.with_mtp_labels() for batch in batches]
        return stepper.launch(batches, tokens_per_step, tokens_per_step, of_all_ranks=True)

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for number in range(NUM_WARMUP_STEPS):
        step(number)
        if not number:
            synchronize()
            first_step = time.perf_counter()
    if shape.vision:
        vision_work.read()  # of the warm-up
    gc.collect()
    gc.freeze()  # as train.py does
    synchronize()
    launches = Launches(device)
    # As in training: a step's backward pass is waited for when the next step has been launched.
    told, launched = [time.perf_counter()], step(NUM_WARMUP_STEPS)
    for number in range(NUM_WARMUP_STEPS + 1, NUM_WARMUP_STEPS + 1 + num_steps):
        untold, launched = launched, step(number)
        launches.note()
        result = untold.result()
        told.append(time.perf_counter())
    synchronize()
    seconds = [stop - start for start, stop in itertools.pairwise(told)]
    median = sorted(seconds)[len(seconds) // 2]
    rate = tokens_per_step / median
    longest = max(lengths, default=training.sequence_length)
    flops = flops_per_token(shape, longest, config.lora, config.mtp.train != "head")
    of_vision, vision_flops = vision_work.read() if shape.vision else ({}, 0.0)
    flops += vision_flops / tokens_per_step
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "world_size": world_size,
        "expert_parallel_degree": degrees.expert,
        "context_parallel_degree": degrees.context,
        "layers": shape.num_hidden_layers,
        "experts": shape.num_experts,
        "tokens_per_step": tokens_per_step,
        "documents": lengths or [training.sequence_length],
        "activation_checkpoint": config.activation_checkpoint.mode,
        "compile": config.compile.enable,
        "balanced": config.moe.force_balanced_routing,
        "build_seconds": round(built - started, 1),
        "init_seconds": round(drawn - built, 1),
        "first_step_seconds": round(first_step - drawn, 1),
        "step_seconds": round(median, 4),
        "seconds_of_steps": [round(each, 4) for each in seconds],
        "tokens_per_second_per_device": round(rate / world_size),
        "gflop_per_token": round(flops / 1e9, 3),
        "tflops_per_device": round(flops * rate / world_size / 1e12, 1),
        **of_vision,
        "patches": max(map(sum, frames_of_step), default=0),
        "frames": list(itertools.chain(*frames_of_step)),
        **meshes.room.metrics,  # a step that was made anew is timed twice
        "loss": round(result.losses["loss"].item(), 4),
        "expert_load_max_over_mean": round(float(expert_load(result.expert_counts)["expert_load_max_over_mean"]), 2),
    }
    if device.type == "cuda":
        found["host_ahead_ms"] = [0.0] * world_size
        torch.distributed.all_gather_object(found["host_ahead_ms"], round(launches.ahead(), 1))
        peak_bytes = torch.tensor(torch.cuda.max_memory_allocated(), device=device)
        torch.distributed.all_reduce(peak_bytes, torch.distributed.ReduceOp.MAX)
        found["peak_gib"] = round(peak_bytes.item() / 2**30, 1)
        if peak := peak_flops(found["device"]):
            found["mfu"] = round(flops * rate / world_size / peak, 4)
    if profile_steps:
        only = [torch.profiler.ProfilerActivity.CUDA] if launches_only else None
        with torch.profiler.profile(activities=only) as profile:
            for number in range(profile_steps + 1):
                with torch.profiler.record_function(f"ProfilerStep#{number}"):  # as the profiler's own schedule does
                    step(number)
            synchronize()
        found["milliseconds_by_kind"] = {k: round(v, 2) for k, v in time_by_kind(profile, profile_steps).items()}
        if trace:
            profile.export_chrome_trace(trace_of_rank(trace, rank))
        if trace and rank == 0:
            averages = profile.key_averages().table(sort_by="cuda_time_total", row_limit=200, max_name_column_width=110)
            Path(trace).with_suffix(".txt").write_text(averages)
    return found


def report(found: dict[str, Any], json_file: str, **only_there: Any) -> None:
    """Prints a table; adds a line with `only_there` too to a file, if one is named."""
    for name, value in found.items():
        if name != "milliseconds_by_kind":
            print(f"{name:32} {value}")
    for kind, milliseconds in found.get("milliseconds_by_kind", {}).items():
        print(f"  {kind:50} {milliseconds:8.2f} ms")
    if json_file:
        with open(json_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(found | only_there) + "\n")


def main(arguments: list[str]) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", default="", metavar="LENGTHS")
    parser.add_argument("--images", default="", metavar="HEIGHTxWIDTH:SHARE")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--profile", type=int, default=0, metavar="STEPS")
    parser.add_argument("--trace", default="", metavar="FILE", help="also write a trace for chrome://tracing there")
    parser.add_argument("--launches-only", action="store_true", help="profile without the host's operations")
    parser.add_argument("--json", default="", metavar="FILE")
    parser.add_argument("--record", default="", metavar="WHAT")
    options, rest = parser.parse_known_args(arguments)
    documents, images = parse_documents(options.documents), parse_images(options.images)
    if options.steps < 1:
        raise UserError(f"--steps = {options.steps}: expected at least 1")
    if options.launches_only and not (options.profile and torch.cuda.is_available()):
        raise UserError("--launches-only: expected a GPU and --profile")
    if options.record:
        known_gpu(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    rank, world_size = world_from_environment()
    setup_logging(rank)
    config = load_config(rest)
    degrees = work_out_degrees(config.parallelism, config.training, model_config(config), world_size)
    rows = degrees.num_data_ranks * config.training.local_batch_size
    global_batch_size = max(config.training.global_batch_size, rows)
    training = dataclasses.replace(config.training, global_batch_size=global_batch_size)
    config = dataclasses.replace(config, training=training)
    check_config(config, world_size)
    found = measure(
        config, list(documents), options.steps, options.profile, options.trace, images, options.launches_only
    )
    if rank == 0:
        report(found, options.json, kernels=dataclasses.asdict(config.kernels))
        if options.record:
            record(RECORDED, options.record, rest, found, str(datetime.date.today()))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with exit_on_error():
        main(sys.argv[1:])
