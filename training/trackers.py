"""Where a run can be watched: TensorBoard's files, and Weights & Biases. Neither ever ends a run.

Shapes: L blocks, E experts.
"""

import dataclasses
import logging
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from config.options import Config
from errors import UserError, regular_file

logger = logging.getLogger("train")

_CELL = 8  # pixels of a picture along a side of what stands for one expert in one block
_COLOURS = np.array(
    [[33, 102, 172], [247, 247, 247], [178, 24, 43]]
)  # a quarter of the mean load, the mean, four times


class Tracker(Protocol):
    """What can be told at a step."""

    def numbers(self, values: dict[str, float], step: int) -> None: ...

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None: ...  # [height, width, 3]

    def histogram(self, name: str, values: list[int], step: int) -> None: ...

    def text(self, name: str, text: str, step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Events under `folder`/tensorboard; those of a run that was cut off, after `start_step`, are dropped."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, so only where it is used

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def numbers(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def histogram(self, name: str, values: list[int], step: int) -> None:
        self._writer.add_histogram(name, np.array(values), step)

    def text(self, name: str, text: str, step: int) -> None:
        indented = "\n".join(f"    {line}" for line in text.splitlines())  # as it is, in Markdown
        self._writer.add_text(name, indented, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the service, or, with WANDB_MODE=offline, a folder of it under `folder`/wandb for `wandb sync`.

    A resume goes on with the same run: its name is kept in `folder`/wandb_run. Steps that are made once more after a
    resume are told once more; the axis is the step, not the order.
    """

    def __init__(self, folder: Path, project: str, config: dict[str, Any]) -> None:
        """Raises UserError for a login that is missing or wrong."""
        import wandb

        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=project,
                id=_run_id(folder / "wandb_run"),
                resume="allow",
                name=folder.name,
                dir=str(folder),
                config=config,
                settings=wandb.Settings(console="off", silent=True),
            )
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise UserError(
                f"metrics.wandb = true: {error}: expected `wandb login`, WANDB_API_KEY, or WANDB_MODE=offline"
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _log(self, name: str, value: object, step: int) -> None:
        self._run.log({name: value, "step": step})

    def numbers(self, values: dict[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        self._log(name, self._wandb.Image(pixels), step)

    def histogram(self, name: str, values: list[int], step: int) -> None:
        self._log(name, self._wandb.Histogram(values), step)

    def text(self, name: str, text: str, step: int) -> None:
        self._log(name, self._wandb.Table(columns=["step", "text"], data=[[step, text]]), step)

    def close(self) -> None:
        self._run.finish()


def _run_id(path: Path) -> str:
    """The name of the run that is gone on with, or a new one."""
    known = regular_file(path).read_text(encoding="utf-8", errors="replace").strip() if path.exists() else ""
    if not re.fullmatch("[0-9a-f]{8}", known):
        known = uuid.uuid4().hex[:8]
        path.write_text(known + "\n", encoding="utf-8")
    return known


def start_wandb(folder: Path, config: Config) -> list["Careful"]:
    """What `config` asks for, on rank 0, before there are processes to wait for each other: a missing login is told at
    once. Raises UserError."""
    if not config.metrics.wandb:
        return []
    options = dataclasses.asdict(config)
    return [Careful("Weights & Biases", lambda: WeightsAndBiases(folder, config.metrics.wandb_project, options))]


class Careful:
    """A tracker whose failures, of a full disk or of the network, are told once."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        """Raises UserError."""
        self._name, self._has_failed = name, False
        self._tracker: Tracker | None = None
        try:
            self._tracker = make()
        except UserError:
            raise
        except Exception as error:
            self._tell(error)

    def tell(self, what: Callable[[Tracker], None]) -> None:
        """Calls it with the tracker, if there is one."""
        if self._tracker is None:
            return
        try:
            what(self._tracker)
        except Exception as error:  # whatever a library or a service makes of it: the run is worth more
            self._tell(error)

    def _tell(self, error: Exception) -> None:
        if not self._has_failed:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else f"{error}"
            logger.warning(f"{self._name} fails ({type(error).__name__}: {reason}): the run goes on without it")
        self._has_failed = True


def expert_picture(counts: NDArray[np.int64], cell: int = _CELL) -> NDArray[np.uint8]:
    """[L, E] -> [height, width, 3]: a line a block from the top, a square of `cell` pixels an expert.

    White: the block's mean load; red: more, up to four times as much; blue: less, down to a quarter; black: none.
    """
    load = counts / np.maximum(counts.mean(axis=1, keepdims=True), 1e-9)
    place = np.clip(np.log2(np.maximum(load, 1e-9)), -2, 2)[..., None] / 2
    low, middle, high = _COLOURS
    colours = np.where(place < 0, middle + (middle - low) * place, middle + (high - middle) * place)
    colours = np.where(counts[..., None] > 0, colours, 0)
    return np.rint(colours).astype(np.uint8).repeat(cell, axis=0).repeat(cell, axis=1)
