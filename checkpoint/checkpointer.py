"""Saves a run's whole state with DCP, keeps the newest checkpoints, and resumes from one on any layout.

    output_dir/checkpoints/step-00000010/
        .metadata, *.distcp      DCP: `model.<name>`, `optimizer.<name>.<exp_avg|exp_avg_sq|step>`, `train.<...>`;
                                 of a run that trains adapters, of them alone
        config.toml              the resolved configuration
        run.json                 the data that the cursors point into, and the model
        hf/                      config.json and the tokenizer: all that an export needs beside the weights
        manifest.json            every other file's size and CRC-32

A checkpoint is written under a name that starts with a dot and renamed when it is complete; names with a dot are
leftovers of a run that was killed. docs/checkpoints.md has the guarantees.
"""

import functools
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from checkpoint import directories
from checkpoint.adapters import check_adapters, hash_base, serving_note, write_adapter
from checkpoint.export import Options, export_to_hf
from checkpoint.hf_assets import Files, name_base, read_base, read_base_parts, write_files
from checkpoint.hf_reader import begin_mtp, fill, hash_parts
from checkpoint.identity import RUN, Run, describe_run, difference, read_run
from checkpoint.run_assets import assets_of_run
from checkpoint.tensors.dcp import read_dcp
from checkpoint.tensors.safetensors import read_safetensors
from checkpoint.writer import Writer, one_line
from config.options import Config
from config.reading import resolved_toml
from errors import UserError, reading
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.hf_weights import MTP, TOWER, left_out
from models.qwen35_moe.lora import is_adapter
from models.qwen35_moe.model import Qwen35Moe
from parallelisms.mesh import Meshes
from parallelisms.parallelize import local_region
from training.optimizer import NamedAdamW

logger = logging.getLogger("train")

_MAX_CURSORS = 2**24  # numbers in them


class Progress(NamedTuple):
    """How far a run has come."""

    step: int = 0
    tokens_seen: int = 0
    data_cursors: torch.Tensor | None = None
    """int64 [global_batch_size, width], of all slots in order; None: from the data's beginning."""


class Checkpointer:
    """Saves to and resumes from `job.output_dir`. All ranks call `resume`, `save` and `wait` together."""

    def __init__(
        self, config: Config, shape: ModelConfig, model: Qwen35Moe, optimizer: NamedAdamW, meshes: Meshes
    ) -> None:
        self._config, self._shape, self._meshes = config, shape, meshes
        self._model, self._optimizer = model, optimizer
        self._folder = Path(config.job.output_dir) / "checkpoints"
        self._base = Path(config.model.path) if config.model.initial_load == "hf" else None
        self._files_of_base: dict[str, str] = {}
        self._parts_of_base: dict[str, str] = {}
        self._damaged: set[Path] = set()
        # Saves run beside the training's collectives, which must not wait for each other: they have a group of their
        # own. A slow disk, or the export of a large model, is no dead peer: hours pass before it gives up.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(hours=4))
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[bool] | None = None
        # On a GPU the copy goes to pinned memory, which is kept for the next one. (DefaultStager of torch 2.11 fails.)
        self._stager = BlockingAsyncStager(cache_staged_state_dict=next(model.parameters()).is_cuda)
        self.blocked_seconds = 0.0
        """For how long saves have kept the training waiting, since whoever reads it last set it to 0."""

    # Resuming

    def resume(self) -> Progress | None:
        """Loads what `[checkpoint]` asks for into model, optimizer and RNG; None if the run has nothing to start from.

        Raises UserError naming what does not fit, the file that is damaged, or that no checkpoint can be used.
        """
        options = self._config.checkpoint
        if self._config.lora.rank and self._base:
            self._files_of_base = self._hash_base(self._base)
            logger.info(serving_note(self._config.lora.targets))
        if options.enable:
            self._check_folder()
            # The data, and what accompanies the weights, as they are now are what every save records.
            self._from_rank_0(lambda: self._run and self._assets and None)
        if options.resume == "never":
            self._from_rank_0(lambda: directories.check_is_new(self._folder))
        existing = self._from_rank_0(lambda: directories.complete_checkpoints(self._folder))
        if options.resume not in ("auto", "never"):
            return self._load(self._undamaged(Path(options.resume), "resume"))
        for path in reversed(existing):
            if (damage := self._find_damage(path)) is None:
                return self._load(path)
            logger.warning(f"cannot resume from {path}: {damage}")
            self._damaged.add(path)
        if existing:
            raise UserError(
                f"checkpoint.resume = 'auto': none of the {len(existing)} checkpoints in {str(self._folder)!r} can be "
                f"used ({damage}): expected one to be restored, or another job.output_dir to start afresh in"
            )
        if options.start_from:
            return self._load(self._undamaged(Path(options.start_from), "start_from"), weights_only=True)
        if options.enable and not self._config.lora.rank and (base := self._base):
            self._parts_of_base = self._from_rank_0(lambda: hash_parts(read_safetensors(base), left_out(self._shape)))
        return None

    def _check_folder(self) -> None:
        """Clears what a killed run left, and makes sure that all ranks see one folder."""
        seen = self._from_rank_0(self._open_folder)
        if not all(self._on_all_ranks(lambda: os.path.exists(seen))):
            raise UserError(
                f"job.output_dir = {self._config.job.output_dir!r}: expected a folder that the processes of all nodes "
                "share and can write to"
            )
        self._from_rank_0(Path(seen).rmdir)

    def _open_folder(self) -> str:
        self._folder.mkdir(parents=True, exist_ok=True)
        directories.tidy(self._folder)
        return tempfile.mkdtemp(prefix=".shared-", dir=self._folder)

    def _undamaged(self, path: Path, key: str) -> Path:
        path = self._from_rank_0(lambda: directories.find_checkpoint(path))
        if damage := self._find_damage(path):
            raise UserError(f"checkpoint.{key} = {str(path)!r}: {damage}: expected an undamaged checkpoint")
        return path

    def _find_damage(self, path: Path) -> str | None:
        """The ranks share the reading; all have the same answer."""
        share, num_shares = dist.get_rank(), dist.get_world_size()
        return next(filter(None, self._on_all_ranks(lambda: directories.find_damage(path, share, num_shares))), None)

    def _hash_base(self, base: Path) -> dict[str, str]:
        """The ranks share the reading; all have the same answer."""
        share, num_shares = dist.get_rank(), dist.get_world_size()
        of_ranks = self._on_all_ranks(lambda: hash_base(base, share, num_shares))
        return {name: value for files in of_ranks for name, value in files.items()}

    def _load(self, path: Path, weights_only: bool = False) -> Progress:
        run = (self._config.lora, self._base, self._files_of_base)
        self._from_rank_0(lambda: check_adapters(path, *run))
        stored = read_dcp(path)
        weights_only |= not any(name.startswith("train.") for name in stored)
        state = self._model_state()
        if weights_only:
            stored = {name: tensor for name, tensor in stored.items() if name.startswith("model.")}
            if self._model.mtp is not None and not any(name.startswith(f"model.{MTP}") for name in stored):
                begin_mtp(self._model, path, self._config.job.seed, local_region)
                state = {name: tensor for name, tensor in state.items() if not name.startswith(f"model.{MTP}")}
        else:
            # Cursors of another global batch size are loaded too: the data loader tells what is wrong with them.
            shape = stored["train.data_cursors"].shape if "train.data_cursors" in stored else (0, 2)
            if len(shape) != 2 or prod(shape) > _MAX_CURSORS:
                raise UserError(f"checkpoint {path}: train.data_cursors cannot have shape {list(shape)}")
            state |= self._optimizer_state() | _train_state(0, 0, torch.zeros(shape, dtype=torch.int64))
        for name in sorted(state.keys() | stored.keys()):
            if name not in stored or name not in state:
                what = "lacks" if name not in stored else "has an unknown"
                hints = {
                    "optimizer.": " with the same model.freeze, or checkpoint.start_from for the weights alone",
                    f"model.{TOWER}": f", or model.vision = {'off' if name not in stored else 'on'!r}",
                    f"model.{MTP}": f", or mtp.train = {'off' if name not in stored else 'joint'!r}",
                }
                hint = next((hint for prefix, hint in hints.items() if name.startswith(prefix)), "")
                raise UserError(f"checkpoint {path} {what} tensor {name!r}: expected one of the same model{hint}")
            if stored[name].shape != tuple(state[name].shape):
                raise UserError(
                    f"checkpoint {path}: {name!r} has shape {list(stored[name].shape)}, the model's has "
                    f"{list(state[name].shape)}"
                )
            same = (stored[name].dtype == state[name].dtype, stored[name].dtype.is_floating_point)
            if not same[name.startswith(("model.", "optimizer."))]:
                raise UserError(f"checkpoint {path}: {name!r} is of {stored[name].dtype}")
        new_data = not weights_only and self._from_rank_0(lambda: self._has_new_data(path))
        # DCP itself would unpickle the checkpoint's index, and trust it.
        self._on_all_ranks(lambda: fill(state, stored, local_region))
        if not self._config.lora.rank:
            self._base, self._parts_of_base = read_base(path), read_base_parts(path)
        if weights_only:
            logger.info(f"starts with the weights of {path}")
            return Progress()
        step, tokens_seen, cursors = (state[f"train.{name}"] for name in ("step", "tokens_seen", "data_cursors"))
        # After the first, a cursor's numbers may be NO_SAMPLE.
        if step < 0 or tokens_seen < 0 or (cursors[:, :1] < 0).any() or (cursors < -1).any():
            raise UserError(f"checkpoint {path}: its step, tokens_seen or data_cursors are negative")
        if self._config.training.steps is not None and step > self._config.training.steps:
            raise UserError(
                f"training.steps = {self._config.training.steps}: {path} is at step {int(step)} already: expected more"
            )
        with reading(path):
            torch.set_rng_state(state["train.rng_state"])
        logger.info(f"resumed from {path} at step {int(step)}")
        return Progress(int(step), int(tokens_seen), data_cursors=None if new_data else cursors)

    @functools.cached_property
    def _run(self) -> Run:
        return describe_run(self._config, self._shape)

    @functools.cached_property
    def _assets(self) -> Files:
        return assets_of_run(self._config, self._shape)

    def _has_new_data(self, path: Path) -> bool:
        """Whether the data are to be read from their beginning. Raises UserError naming what must not differ."""
        wanted, before = self._config.checkpoint.data, read_run(path)
        if before is None:
            logger.warning(f"{path} does not tell which data and model it was saved with: they cannot be compared")
            return wanted == "from_start"
        if what := difference(before, self._run, "model"):
            raise UserError(
                f"checkpoint {path}: the model's {what}: expected the same model, or checkpoint.start_from for the "
                "weights alone"
            )
        what = difference(before, self._run, "options") or difference(before, self._run, "sources")
        if what and wanted == "same":
            raise UserError(
                f"checkpoint {path}: other data: {what}: expected the same, or checkpoint.data = 'from_start' to read "
                "the new ones from their beginning"
            )
        if what:
            logger.info(f"other data, read from their beginning: {what}")
        return bool(what)

    # Saving

    def save(self, step: int, tokens_seen: int, own_cursors: torch.Tensor, last: bool = False) -> None:
        """Saves step `step`, and then removes checkpoints beyond `checkpoint.keep`; `own_cursors` are this rank's.

        With `checkpoint.async` it returns once the state is copied and the rest happens in the background; not so for
        the last save. A save that fails is logged and leaves nothing behind. `wait` tells how it went.
        """
        started = time.perf_counter()
        self.wait()
        final = self._folder / f"step-{step:08}"
        unfinished = self._folder / f".{final.name}"
        saving: object
        try:
            self._from_rank_0(lambda: directories.make_afresh(unfinished))
            state = self._model_state() | self._optimizer_state()
            state |= _train_state(step, tokens_seen, self._gather_cursors(own_cursors))
            writer = Writer(unfinished)
            if self._config.checkpoint.async_ and not last:
                # It returns when the state is copied.
                saving = dcp.async_save(
                    state, storage_writer=writer, process_group=self._group, async_stager=self._stager
                )
            else:
                saving = self._thread.submit(dcp.save, state, storage_writer=writer, process_group=self._group)
        except UserError as error:
            saving = Future()
            saving.set_exception(error)
        assert isinstance(saving, Future)
        self._pending = self._thread.submit(self._complete, saving, unfinished, final, last)
        if last or not self._config.checkpoint.async_:
            self.wait()
        self.blocked_seconds += time.perf_counter() - started

    def wait(self) -> bool:
        """Waits until the save under way, if there is one, has ended. Whether the last one succeeded."""
        return self._pending is None or self._pending.result()

    def _complete(self, saving: Future[object], unfinished: Path, final: Path, last: bool) -> bool:
        """Waits for DCP's files, then publishes them; in the background, on all ranks. Whether all went well."""

        def own_files() -> dict[str, dict[str, int]]:
            saving.result()
            return directories.describe_files(unfinished, sorted(unfinished.glob(f"__{dist.get_rank()}_*")))

        def export_hf() -> None:
            out = self._folder.parent / "hf" / final.name
            shutil.rmtree(out, ignore_errors=True)
            lora = self._config.lora
            export_to_hf(final, out, Options(dtype=None) if lora.rank else None)
            logger.info(f"exported {out}" + (f": {serving_note(lora.targets)}" if lora.rank else ""))

        doing = "save"
        try:
            files = {name: file for own in self._on_all_ranks(own_files) for name, file in own.items()}
            self._from_rank_0(lambda: self._publish(unfinished, final, files))
            doing = "export"
            if self._config.checkpoint.export_hf == "all" or (self._config.checkpoint.export_hf == "last" and last):
                self._from_rank_0(export_hf)
        except UserError as error:
            if dist.get_rank() == 0:
                shutil.rmtree(unfinished, ignore_errors=True)  # what was written takes up room
                free = shutil.disk_usage(self._folder).free / 2**20 if self._folder.exists() else 0
                left = f"{free:,.0f} MiB free); earlier checkpoints are untouched"
                logger.error(f"cannot {doing} {final}: {error} ({left}")
            return False
        if dist.get_rank() == 0:
            logger.info(f"saved {final}")
        return True

    def _publish(self, unfinished: Path, final: Path, files: dict[str, dict[str, int]]) -> None:
        """Adds the files that are not DCP's, gives the checkpoint its name, and removes the oldest beyond `keep`,
        those that the resume found damaged before all others."""
        (unfinished / "config.toml").write_text(resolved_toml(self._config), encoding="utf-8")
        (unfinished / RUN).write_text(json.dumps(self._run, indent=1) + "\n", encoding="utf-8")
        assets = unfinished / "hf"
        assets.mkdir()
        write_files(assets, self._assets | (name_base(self._base, self._parts_of_base) if self._base else {}))
        if self._config.lora.rank and self._base:
            write_adapter(assets, self._config.lora, self._base, self._files_of_base)
        directories.write_manifest(unfinished, files)
        directories.publish(unfinished, final)
        # Never the one just written, which may not have the highest step.
        keep, older = self._config.checkpoint.keep, directories.complete_checkpoints(self._folder)
        older.remove(final)
        self._damaged.discard(final)
        older.sort(key=lambda path: path not in self._damaged)
        for path in older[: max(len(older) + 1 - keep, 0)] if keep else []:
            try:
                directories.remove(path)
            except OSError as error:
                logger.warning(f"cannot remove {path}: {error}")

    # What ranks do together

    def _on_all_ranks(self, action: Callable[[], Any]) -> list[Any]:
        """Runs `action` on every rank; all get the results of all, or the first error there is as a UserError."""
        result = error = None
        try:
            result = action()
        except (Exception, CheckpointException) as raised:
            error = one_line(raised)
        outcomes = [(result, error)] * dist.get_world_size()
        dist.all_gather_object(outcomes, outcomes[0], group=self._group)
        if error := next((error for _, error in outcomes if error), None):
            raise UserError(error)
        return [result for result, _ in outcomes]

    def _from_rank_0(self, action: Callable[[], Any]) -> Any:
        """Runs `action` on rank 0 alone; all get its result, or its error as a UserError."""
        return self._on_all_ranks(lambda: action() if dist.get_rank() == 0 else None)[0]

    def _gather_cursors(self, own: torch.Tensor) -> torch.Tensor:
        """[slots of this rank, C] -> [global_batch_size, C]: data ranks own consecutive slots, all as many."""
        of_data_ranks = dict(self._on_all_ranks(lambda: (self._meshes.data_rank, own)))
        return torch.cat([cursors for _, cursors in sorted(of_data_ranks.items())])

    # What a checkpoint holds

    def _model_state(self) -> dict[str, torch.Tensor]:
        of_adapters = bool(self._config.lora.rank)  # their base is referred to, not saved
        return {
            f"model.{name}": parameter.detach()
            for name, parameter in self._model.named_parameters()
            if is_adapter(name) or not of_adapters
        }

    def _optimizer_state(self) -> dict[str, torch.Tensor]:
        return {f"optimizer.{name}": tensor for name, tensor in self._optimizer.named_state().items()}


def _train_state(step: int, tokens_seen: int, data_cursors: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "train.step": torch.tensor(step),
        "train.tokens_seen": torch.tensor(tokens_seen),
        "train.data_cursors": data_cursors,
        "train.rng_state": torch.get_rng_state(),
    }
