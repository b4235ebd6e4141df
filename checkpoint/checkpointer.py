"""Saves a run's whole state with DCP, keeps the newest checkpoints, and resumes from one on any layout.

    output_dir/checkpoints/step-00000010/
        .metadata, *.distcp      DCP: `model.<name>`, `optimizer.<name>.<exp_avg|exp_avg_sq|step>`, `train.<...>`
        config.toml              the resolved configuration
        hf/                      config.json and the tokenizer: all that an export needs beside the weights

A checkpoint is written under a name that starts with a dot and renamed when it is complete; names with a dot are
leftovers of a run that was killed.
"""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from checkpoint.dcp_reader import read_index
from checkpoint.directories import publish, remove
from checkpoint.hf_assets import write_hf_assets
from config import Config, resolved_toml
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.model import Qwen35Moe

logger = logging.getLogger("train")


class Progress(NamedTuple):
    """How far a run has come."""

    step: int = 0
    tokens_seen: int = 0
    data_cursors: torch.Tensor | None = None
    """int64 [global_batch_size, width], of all slots in order; None: from the data's beginning."""


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a run's `checkpoints` folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))


def find_checkpoint(path: Path) -> Path:
    """`path` itself if it is a checkpoint, else the newest of the run whose output_dir it is. Raises ValueError."""
    if (path / ".metadata").exists():
        return path
    found = complete_checkpoints(path / "checkpoints")
    if not found:
        raise ValueError(f"{path}: expected a checkpoint, or a run's output_dir with a complete one in checkpoints/")
    return found[-1]


class Checkpointer:
    """Saves to and resumes from `job.output_dir`. All ranks call `resume` and `save` together."""

    def __init__(self, config: Config, shape: ModelConfig, model: Qwen35Moe, optimizer: torch.optim.Optimizer) -> None:
        self._config, self._shape = config, shape
        self._model, self._optimizer = model, optimizer
        self._folder = Path(config.job.output_dir) / "checkpoints"

    def resume(self) -> Progress:
        """Loads what `checkpoint.resume` asks for into model, optimizer and RNG.

        A checkpoint that holds weights alone (see convert_from_hf.py) starts a run at step 0 with them. Raises
        ValueError naming what does not fit.
        """
        resume = self._config.checkpoint.resume
        existing = complete_checkpoints(self._folder)
        if resume == "never" and existing:
            raise ValueError(
                f"checkpoint.resume = 'never': {str(self._folder)!r} holds {existing[-1].name} of an earlier run: "
                "expected another job.output_dir"
            )
        if resume in ("auto", "never") and not existing:
            return Progress()
        path = existing[-1] if resume == "auto" else find_checkpoint(Path(resume))
        progress = self._load(path)
        logger.info(f"resumed from {path} at step {progress.step}")
        return progress

    def _load(self, path: Path) -> Progress:
        stored = read_index(path)
        weights_only = not any(name.startswith("train.") for name in stored)
        state = self._model_state()
        if not weights_only:
            # Cursors of another global batch size are loaded too: the data loader tells what is wrong with them.
            shape = stored["train.data_cursors"].shape if "train.data_cursors" in stored else (0, 2)
            state |= self._optimizer_state() | _train_state(0, 0, torch.zeros(shape, dtype=torch.int64))
        for name in sorted(state.keys() | stored.keys()):
            if name not in stored or name not in state:
                what = "lacks" if name not in stored else "has an unknown"
                raise ValueError(f"checkpoint {path} {what} tensor {name!r}: expected one of the same model")
            if stored[name].shape != tuple(state[name].shape):
                raise ValueError(
                    f"checkpoint {path}: {name!r} has shape {list(stored[name].shape)}, the model's has "
                    f"{list(state[name].shape)}"
                )
        dcp.load(state, checkpoint_id=path)
        if weights_only:
            return Progress()
        torch.set_rng_state(state["train.rng_state"])
        return Progress(
            int(state["train.step"]), int(state["train.tokens_seen"]), data_cursors=state["train.data_cursors"]
        )

    def save(self, step: int, tokens_seen: int, own_cursors: torch.Tensor) -> None:
        """Writes step `step` and then removes checkpoints beyond `checkpoint.keep`; `own_cursors` are this rank's."""
        final = self._folder / f"step-{step:08}"
        unfinished = self._folder / f".{final.name}"
        is_first = dist.get_rank() == 0
        if is_first:
            for leftover in self._folder.glob(".step-*"):
                shutil.rmtree(leftover)
            (unfinished / "hf").mkdir(parents=True)
        state = self._model_state() | self._optimizer_state()
        state |= _train_state(step, tokens_seen, _gather_cursors(own_cursors))
        dist.barrier()  # the folder is there
        dcp.save(state, checkpoint_id=unfinished)
        if is_first:
            (unfinished / "config.toml").write_text(resolved_toml(self._config), encoding="utf-8")
            self._write_hf_assets(unfinished / "hf")
            publish(unfinished, final)
            self._remove_old(final)
            logger.info(f"saved {final}")
        dist.barrier()  # nobody goes on, or ends, before the checkpoint has its name

    def _remove_old(self, newest: Path) -> None:
        """Leaves `checkpoint.keep`; never takes the one just written, which may not have the highest step."""
        keep = self._config.checkpoint.keep
        others = [path for path in complete_checkpoints(self._folder) if path != newest]
        for path in others[: max(len(others) + 1 - keep, 0)] if keep else []:
            remove(path)

    def _write_hf_assets(self, folder: Path) -> None:
        sources = [Path(self._config.data.tokenizer)]
        config = self._shape.to_dict()
        if self._config.model.path:  # it may say more than the shape
            sources.append(Path(self._config.model.path))
            config = json.loads((sources[-1] / "config.json").read_text(encoding="utf-8"))
        write_hf_assets(folder, config, *sources)

    def _model_state(self) -> dict[str, torch.Tensor]:
        return {f"model.{name}": parameter.detach() for name, parameter in self._model.named_parameters()}

    def _optimizer_state(self) -> dict[str, torch.Tensor]:
        """AdamW's state by parameter name; of an optimizer that has made no step yet, zeros to be loaded into."""
        state: dict[str, torch.Tensor] = {}
        for name, parameter in self._model.named_parameters():
            own = self._optimizer.state[parameter]
            if not own:
                own["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                own["exp_avg"], own["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state |= {f"optimizer.{name}.{key}": tensor.detach() for key, tensor in own.items()}
        return state


def _train_state(step: int, tokens_seen: int, data_cursors: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "train.step": torch.tensor(step),
        "train.tokens_seen": torch.tensor(tokens_seen),
        "train.data_cursors": data_cursors,
        "train.rng_state": torch.get_rng_state(),
    }


def _gather_cursors(own: torch.Tensor) -> torch.Tensor:
    """[slots of this rank, width] -> [global_batch_size, width]: ranks own consecutive slots, all as many."""
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    return torch.cat(gathered)
