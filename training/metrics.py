"""What a run tells: one JSON object a logged step, TensorBoard scalars, and a log line."""

import json
import logging
import math
import os
import resource
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from data.packing import REASONS
from training.distributed import sum_over_ranks

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
    # TileLang's compiler, of its own choices. It sets its level when it is imported, so a filter has to do.
    logging.getLogger("tilelang").addFilter(lambda record: record.levelno >= logging.ERROR)
    # That checkpointing with a policy is compiled; checkpointed blocks change nothing in place.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    # Products in float32 are those of routers, which are to be exact.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")


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


def data_quality(counts: Mapping[str, int], device: torch.device) -> dict[str, float | int]:
    """The data loaders' counts of all ranks since the start: how full rows are, samples skipped or cut by reason."""
    names = ("tokens", "real_tokens", *REASONS)
    tokens, real_tokens, *of_reasons = sum_over_ranks(
        torch.tensor([counts.get(name, 0) for name in names], device=device)
    ).tolist()
    fill = {"fill_rate": real_tokens / tokens} if real_tokens < tokens else {}
    return fill | {f"samples_{reason}": number for reason, number in zip(REASONS, of_reasons) if number}


class MetricsWriter:
    """Writes `metrics.jsonl` and, if asked, TensorBoard events under `folder`; on rank 0 alone.

    Neither ends a run: what cannot be written, on a full disk say, is told once in the log, and left out.
    """

    def __init__(self, folder: Path, tensorboard: bool, start_step: int, total_steps: int) -> None:
        """Starts after `start_step`: lines of later steps, left by a run that was cut off, are dropped."""
        self._path, self._total_steps = folder / "metrics.jsonl", total_steps
        self._has_failed = False
        self._tensorboard = None
        with self._going_on():
            self._keep_lines_up_to(start_step)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, so only where it is used

            with self._going_on():
                self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def _keep_lines_up_to(self, step: int) -> None:
        """Damaged lines are set aside, and it is said; the last may be half written, if the run was killed."""
        kept, damaged = [], []
        if self._path.exists() and step > 0:
            for line in self._path.read_bytes().split(b"\n"):
                try:
                    of_step = json.loads(line)["step"] if line else math.inf
                    if of_step <= step:
                        kept.append(line)
                except (ValueError, KeyError, TypeError, RecursionError):
                    damaged.append(line)
        if damaged:
            aside = self._path.with_name("metrics.damaged.jsonl")
            with aside.open("ab") as file:
                file.writelines(line + b"\n" for line in damaged)
            logger.warning(f"{self._path}: {len(damaged)} damaged lines are set aside in {aside.name}")
        self._path.write_bytes(b"".join(line + b"\n" for line in kept))

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
        with self._going_on(), self._path.open("ab") as file:
            # A line that a full disk cut off is damaged; the one after it need not be.
            file.write((b"\n" if self._has_failed else b"") + json.dumps(finite, allow_nan=False).encode() + b"\n")
        if self._tensorboard is not None:
            with self._going_on():
                for name, value in metrics.items():
                    if name != "step":
                        self._tensorboard.add_scalar(name, value, metrics["step"])
        time_left = timedelta(seconds=round((self._total_steps - metrics["step"]) * metrics["step_seconds"]))
        mfu = f"  mfu {metrics['mfu']:.1%}" if "mfu" in metrics else ""
        fill = f"  rows {metrics['fill_rate']:.1%} full" if "fill_rate" in metrics else ""
        skipped = sum(value for name, value in metrics.items() if name.startswith("samples_"))
        fill += f"  {skipped:,} samples skipped or cut" if skipped else ""
        fill += f"  validation loss {metrics['validation_loss']:.4f}" if "validation_loss" in metrics else ""
        fill += f"  {metrics['mtp_acceptance']:.1%} of drafts accepted" if "mtp_acceptance" in metrics else ""
        logger.info(
            f"step {metrics['step']:>6}  loss {metrics['loss']:.4f}  grad norm {metrics['grad_norm']:.3f}  "
            f"lr {metrics['lr']:.2e}  {metrics['tokens_per_second']:,.0f} tok/s{mfu}  "
            f"memory {metrics['peak_memory_gib']:.2f} GiB  left {time_left}{fill}"
        )

    def close(self) -> None:
        """Flushes and closes TensorBoard's file."""
        if self._tensorboard is not None:
            with self._going_on():
                self._tensorboard.close()
