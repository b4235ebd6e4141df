"""What a run tells: one JSON object a logged step, a log line, and what TensorBoard and W&B show."""

import json
import logging
import math
import os
import resource
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import torch

from data.packing import REASONS, WHOLE
from errors import regular_file
from training.distributed import sum_over_ranks
from training.trackers import Careful, TensorBoard, expert_picture

logger = logging.getLogger("train")


class _Handler(logging.StreamHandler):
    """Whoever reads the log may have gone, as `head` does: the run goes on."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], BrokenPipeError):
            super().handleError(record)


def setup_logging(rank: int) -> None:
    """Shows this rank's log if LOG_RANK (global ranks, separated by commas; default 0) names it."""
    shown = str(rank) in os.environ.get("LOG_RANK", "0").split(",")
    logging.basicConfig(
        format=f"%(asctime)s [rank {rank}] %(message)s",
        datefmt="%H:%M:%S",
        level=logging.INFO if shown else logging.ERROR,
        handlers=[_Handler(sys.stdout)],
    )
    _quieten_libraries()


def _quieten_libraries() -> None:
    """What others say of things that are as they should be, between the lines of our own log."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # TileLang's compiler, of its own choices. It sets its level when it is imported: that must not count.
    compiler = logging.getLogger("tilelang")
    compiler.setLevel(logging.ERROR)
    compiler.setLevel = lambda level: None  # type: ignore[method-assign]
    # That checkpointing with a policy is compiled; checkpointed blocks change nothing in place.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    # Products in float32 are those of routers, which are to be exact.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    warnings.filterwarnings("ignore", message="Argument aux_data")  # flash-attn-4's own, where it compiles
    # The thread of the first backward pass finds no context of the GPU yet, and takes the process's.
    warnings.filterwarnings("ignore", message="Attempting to run cuBLAS, but there was no current CUDA context")


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: allocated on the GPU since the last reset, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def expert_load(expert_counts: torch.Tensor) -> dict[str, float | int]:
    """How evenly a step's tokens were spread over the experts; expert_counts [L, E], of all ranks.

    The largest over the mean load of an expert in the worst layer, that layer's index from 0, and how many experts, of
    all layers, were given no token.
    """
    counts = expert_counts.double()
    largest, layer = (counts.amax(dim=1) / counts.mean(dim=1)).max(dim=0)
    return {
        "expert_load_max_over_mean": largest.item(),
        "expert_load_worst_layer": int(layer),
        "experts_without_tokens": int((expert_counts == 0).sum()),
    }


def data_quality(counts: Mapping[str, int]) -> dict[str, float | int]:
    """The data loaders' counts of all ranks since the start: how full rows are, samples skipped or cut by reason."""
    names = ("tokens", "real_tokens", *REASONS)
    tokens, real_tokens, *of_reasons = sum_over_ranks(
        torch.tensor([counts.get(name, 0) for name in names])  # on the host: no rank waits for its device
    ).tolist()
    fill = {"fill_rate": real_tokens / tokens} if real_tokens < tokens else {}
    return fill | {f"samples_{reason}": number for reason, number in zip(REASONS, of_reasons) if number}


class MetricsWriter:
    """Writes `metrics.jsonl` and `expert_load.jsonl` under `folder`, and tells the trackers; on rank 0 alone.

    None of it ends a run: what cannot be written, on a full disk say, is told once in the log, and left out.
    """

    def __init__(
        self,
        folder: Path,
        tensorboard: bool,
        start_step: int,
        total_steps: int,
        others: Sequence[Careful] = (),
    ) -> None:
        """Starts after `start_step`: lines of later steps, left by a run that was cut off, are dropped.
        `others`: trackers beside TensorBoard. Raises UserError where something else is in a file's place."""
        self._path, self._total_steps = folder / "metrics.jsonl", total_steps
        self._load_path = folder / "expert_load.jsonl"
        self._next_view = 0
        self._has_failed = False
        self._trackers = list(others)
        for path in (self._path, self._load_path):
            for its_place in (path, _damaged(path)):
                regular_file(its_place)
            with self._going_on():
                self._keep_lines_up_to(start_step, path)
        if tensorboard:
            self._trackers.append(Careful("TensorBoard", lambda: TensorBoard(folder, start_step)))

    @property
    def has_trackers(self) -> bool:
        """Whether anyone shows more than numbers."""
        return bool(self._trackers)

    def _keep_lines_up_to(self, step: int, path: Path) -> None:
        """Damaged lines are set aside, and it is said; the last may be half written, if the run was killed."""
        kept, damaged = [], []
        if path.exists() and step > 0:
            for line in path.read_bytes().split(b"\n"):
                try:
                    of_step = json.loads(line)["step"] if line else math.inf
                    if of_step <= step:
                        kept.append(line)
                except (ValueError, KeyError, TypeError, RecursionError):
                    damaged.append(line)
        if damaged:
            aside = _damaged(path)
            with aside.open("ab") as file:
                file.writelines(line + b"\n" for line in damaged)
            logger.warning(f"{path}: {len(damaged)} damaged lines are set aside in {aside.name}")
        path.write_bytes(b"".join(line + b"\n" for line in kept))

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._has_failed:
                logger.warning(f"cannot write metrics ({error.strerror or error}): the run goes on without them")
            self._has_failed = True

    def write(self, metrics: dict[str, Any]) -> None:
        """Records one step. `metrics` has "step", "loss", "grad_norm", "tokens_per_second" and more numbers."""
        # JSON has no NaN and no infinity.
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with self._going_on(), _append(self._path) as file:
            # A line that a full disk cut off is damaged; the one after it need not be.
            file.write((b"\n" if self._has_failed else b"") + json.dumps(finite, allow_nan=False).encode() + b"\n")
        values = {name: value for name, value in metrics.items() if name != "step"}
        for tracker in self._trackers:
            tracker.tell(lambda tracker: tracker.numbers(values, metrics["step"]))
        time_left = timedelta(seconds=round((self._total_steps - metrics["step"]) * metrics["step_seconds"]))
        mfu = f"  mfu {metrics['mfu']:.1%}" if "mfu" in metrics else ""
        fill = f"  rows {metrics['fill_rate']:.1%} full" if "fill_rate" in metrics else ""
        counted = {name.removeprefix("samples_"): n for name, n in metrics.items() if name.startswith("samples_")}
        skipped = sum(n for reason, n in counted.items() if reason not in WHOLE)
        fill += f"  {skipped:,} samples skipped or cut" if skipped else ""
        fill += f"  validation loss {metrics['validation_loss']:.4f}" if "validation_loss" in metrics else ""
        fill += f"  {metrics['mtp_acceptance']:.1%} of drafts accepted" if "mtp_acceptance" in metrics else ""
        logger.info(
            f"step {metrics['step']:>6}  loss {metrics['loss']:.4f}  grad norm {metrics['grad_norm']:.3f}  "
            f"lr {metrics['lr']:.2e}  {metrics['tokens_per_second']:,.0f} tok/s{mfu}  "
            f"memory {metrics['peak_memory_gib']:.2f} GiB  left {time_left}{fill}"
        )

    def write_lengths(self, lengths: list[int], step: int) -> None:
        """Of some documents, in tokens: a histogram, once a run."""
        for tracker in self._trackers:
            tracker.tell(lambda tracker: tracker.histogram("document_lengths", lengths, step))

    def write_view(self, step: int, expert_counts: torch.Tensor, samples: Callable[[], str]) -> None:
        """More than numbers, but ever more rarely, a hundred times in a million steps: the load of each expert,
        [L, E], and `samples`, text of what is trained."""
        if step < self._next_view:
            return
        self._next_view = step + 1 + step // 10
        counts = expert_counts.cpu().numpy()
        with self._going_on(), _append(self._load_path) as file:
            line = json.dumps({"step": step, "tokens": counts.tolist()}, separators=(",", ":")).encode()
            file.write((b"\n" if self._has_failed else b"") + line + b"\n")
        if not self._trackers:
            return
        pixels, text = expert_picture(counts), samples()
        for tracker in self._trackers:
            tracker.tell(lambda tracker: tracker.picture("expert_load", pixels, step))
            tracker.tell(lambda tracker: tracker.text("samples", text, step))

    def close(self) -> None:
        """Ends what the trackers write."""
        for tracker in self._trackers:
            tracker.tell(lambda tracker: tracker.close())


def _append(path: Path) -> BinaryIO:
    """The file, to go on with. A pipe that has come into its place is an OSError, and keeps no step waiting."""
    return open(path, "ab", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK, 0o666))


def _damaged(path: Path) -> Path:
    """Where its damaged lines are set aside."""
    return path.with_name(f"{path.stem}.damaged.jsonl")
