"""What a run tells of its steps: each one step late on a GPU, which has the next one to do while the host waits."""

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from config.options import Config
from errors import RunError
from parallelisms.room import Room
from training.first_step import FirstStep
from training.metrics import MetricsWriter, expert_load
from training.step import LaunchedStep

logger = logging.getLogger("train")


_PATIENCE = 5.0
"""Seconds that a rank with an error waits for its device: a collective without the others does not end."""


class Logged(NamedTuple):
    """What a step's line has that is not the device's to tell."""

    metrics: dict[str, float]
    """Beside what StepReport adds: losses, norms, times and the experts' load."""
    vision_flops: float
    """Of the tower, in the mean over the steps since the last line."""
    samples: Callable[[], str]
    """Text of what is trained."""
    validate: Callable[[], dict[str, float]] | None
    """Gives more metrics; all ranks together. Such a step is told at once."""
    room: Room
    """Of experts: whether a step was made anew shows as it is told."""


class _Untold(NamedTuple):
    step: int
    started: float
    launched: LaunchedStep
    logged: Logged | None


class StepReport:
    """One of a run, on every rank; only the first has a writer."""

    def __init__(
        self,
        config: Config,
        device: torch.device,
        writer: MetricsWriter | None,
        first_step: FirstStep,
        start_step: int,
        flops_of_token: float,
        peak_flops: float | None,
        is_late: bool,
    ) -> None:
        """flops_of_token: without the vision tower's; peak_flops: a second, of all devices, if it is known; is_late:
        whether a step is told after the next has been launched."""
        self._config, self._device, self._writer = config, device, writer
        self._flops_of_token, self._peak_flops = flops_of_token, peak_flops
        self._first_step, self._is_late = first_step, is_late
        self._untold: _Untold | None = None
        self._num_skipped, self._start_step = 0, start_step
        self.restart_clock(start_step)

    def restart_clock(self, step: int) -> None:
        """What came after `step` until now belongs to no step's time."""
        self._clock, self._clock_step = time.perf_counter(), step

    def add(self, step: int, started: float, launched: LaunchedStep, logged: Logged | None, at_once: bool) -> None:
        """A step that was launched, from `started` on: tells the one before, and this one too if it must be `at_once`,
        or compiles, or if it, or the next, is the first that is logged, which is compared with the plan by itself.
        Raises RunError for a step that is not finite, if that stops the run."""
        self.tell()
        self._untold = _Untold(step, started, launched, logged)
        is_compared = logged is not None or (step + 1) % self._config.metrics.log_interval == 0
        by_itself = step == self._start_step + 1 or (self._first_step.waits and is_compared)
        if at_once or by_itself or not self._is_late:
            self.tell()

    def tell(self) -> None:
        """Waits for the step that is not told yet, if there is one, and tells it; all ranks together."""
        untold, self._untold = self._untold, None
        if untold is None:
            return
        result = untold.launched.result()
        own_seconds = time.perf_counter() - untold.started
        step, training, logged = untold.step, self._config.training, untold.logged
        if result.nonfinite:
            if training.nonfinite == "stop":
                raise RunError(f"step {step} is not applied: {result.nonfinite}")
            self._num_skipped += 1
            logger.warning(f"step {step} is skipped: {result.nonfinite}")
        if logged is None:
            return
        step_seconds = (time.perf_counter() - self._clock) / (step - self._clock_step)
        tokens = training.global_batch_size * training.sequence_length
        metrics = {
            "step": step,
            "loss": result.losses["loss"].item(),
            "grad_norm": result.grad_norm.item(),
            "tokens_per_second": tokens / step_seconds,
            "step_seconds": step_seconds,
            **logged.metrics,
            **logged.room.metrics,
            **expert_load(result.expert_counts),
            **{f"grad_norm_{part}": norm.item() for part, norm in result.norms_of_parts.items()},
        }
        if training.nonfinite == "skip":
            metrics["skipped_steps"] = self._num_skipped
        if self._config.mtp.train != "off":
            metrics["mtp_loss"] = result.losses["mtp"].item()
        for name in ("aux_loss", "z_loss"):
            if getattr(self._config.moe, f"{name}_coef") > 0:
                metrics[name] = result.losses[name].item()
        if self._peak_flops is not None:
            flops = self._flops_of_token * tokens + logged.vision_flops
            metrics["mfu"] = flops / step_seconds / self._peak_flops
        if logged.validate is not None:
            metrics |= logged.validate()
        if self._writer is not None:
            self._writer.write(metrics)
            self._writer.write_view(step, result.expert_counts, logged.samples)
        self._first_step.compare(metrics, own_seconds, self._device, compiles=step == self._start_step + 1)
        self.restart_clock(step)

    def tell_alone(self) -> None:
        """As this rank ends with an error: its last step, if the device comes to its end. Others may have gone, so
        nothing is asked of them."""
        deadline = time.perf_counter() + _PATIENCE
        while self._untold is not None and time.perf_counter() < deadline:
            if not self._untold.launched.has_ended():
                time.sleep(0.01)
            elif why := self._untold.launched.why_not_applied():
                logger.warning(f"step {self._untold.step} is not applied: {why}")
                self._untold = None
            else:
                self.tell()
