"""What a number of processes on this machine could not run: checked before they start, without torch where it can be.

python -m config.checks --world-size N --config FILE [--section.key value ...]
"""

import dataclasses
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

from checkpoint.directories import check_is_new, find_checkpoint
from checkpoint.files import unread_weights
from config.options import Config, Kernels, LRScheduler, Optimizer
from config.reading import load_config, model_config
from data.check import check_data
from errors import UserError, exit_on_error
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.parts import ADAPTABLE, check_frozen, check_present, parts_of_model
from parallelisms.degrees import Degrees, work_out_degrees

_LARGEST_BETA_IN_BFLOAT16 = 0.99
_FOLDERS = ("checkpoints", "hf", "skipped", "tensorboard")
"""What a run makes in its folder beside files."""


def check_config(config: Config, world_size: int) -> None:
    """Raises UserError for what `world_size` processes on this machine could not run."""
    shape = model_config(config)
    check_layout(config, shape, world_size)
    if config.metrics.wandb and getattr(importlib.util.find_spec("wandb"), "origin", None) is None:  # a folder is none
        raise UserError("metrics.wandb = true: the package wandb is missing: expected `pip install wandb`, or false")
    _check_kernels(config, shape)

    check_data(config, shape.vocab_size, shape.vision)
    _check_paths(config)


def check_layout(config: Config, shape: ModelConfig, world_size: int) -> Degrees:
    """What is the same on every machine: the degrees. Raises UserError for what `world_size` processes could not run
    anywhere."""
    training = config.training
    if (num_tokens := training.local_batch_size * training.sequence_length) >= 2**31:
        raise UserError(f"training.local_batch_size * sequence_length = {num_tokens}: expected less than 2**31 tokens")
    degrees = work_out_degrees(config.parallelism, training, shape, world_size)
    check_frozen(config.model.freeze, shape)
    _check_mtp(config)
    if config.lora.rank:
        _check_lora(config, shape, degrees)
    _check_ratios(config.optimizer, shape)
    _check_state(config)
    _check_schedule(config.lr_scheduler)
    return degrees


def _check_schedule(schedule: LRScheduler) -> None:
    # A rise that is longer than the run is no mistake: a first try of three steps is the commonest there is.
    key = f"lr_scheduler.decay_steps = {schedule.decay_steps}"
    if schedule.decay != "wsd":
        if schedule.decay_steps:
            raise UserError(f"{key}: expected 0 with lr_scheduler.decay = {schedule.decay!r}; only 'wsd' reads it")
    elif schedule.decay_steps < 1:
        raise UserError(f"{key}: with decay = 'wsd' expected at least 1")


def _check_lora(config: Config, shape: ModelConfig, degrees: Degrees) -> None:
    lora, model = config.lora, config.model
    rank = f"lora.rank = {lora.rank}"
    if lora.rank > shape.hidden_size:
        raise UserError(f"{rank}: expected at most the model's hidden_size = {shape.hidden_size}")
    present = parts_of_model(shape)
    check_present("lora.targets", lora.targets, [part for part in ADAPTABLE if part in present])
    if "experts" in lora.targets:
        if lora.rank % 8:
            raise UserError(
                f"{rank}: expected a multiple of 8 with 'experts' in lora.targets, as grouped products take it"
            )
        over = degrees.shard // degrees.expert
        if degrees.expert > 1 and shape.moe_intermediate_size % over:
            raise UserError(
                f"{rank}: shard degree {degrees.shard} / {degrees.expert} = {over} does not divide the model's "
                f"moe_intermediate_size = {shape.moe_intermediate_size}: expected degrees whose quotient does"
            )
    if config.mtp.train != "off":
        raise UserError(f"mtp.train = {config.mtp.train!r}: {rank} trains adapters alone: expected 'off'")
    if model.freeze:
        raise UserError(f"model.freeze = {list(model.freeze)}: {rank} freezes all weights already: expected []")
    for key in ("vision_lr_ratio", "merger_lr_ratio"):
        if getattr(config.optimizer, key) != 1:
            raise UserError(f"optimizer.{key} = {getattr(config.optimizer, key)}: {rank} trains no tower: expected 1.0")
    if model.initial_load != "hf" and config.checkpoint.enable:
        raise UserError(
            f"model.initial_load = {model.initial_load!r}: {rank} saves adapters alone, and refers to the weights that "
            "they belong to: expected 'hf' and their directory as model.path"
        )


def _check_ratios(optimizer: Optimizer, shape: ModelConfig) -> None:
    for key in ("vision_lr_ratio", "merger_lr_ratio"):
        if shape.vision is None and getattr(optimizer, key) != 1:
            raise UserError(f"optimizer.{key} = {getattr(optimizer, key)}: the model has no tower: expected 1.0")


def _check_state(config: Config) -> None:
    optimizer, master = config.optimizer, config.training.master_dtype
    key = f"optimizer.state_dtype = {optimizer.state_dtype!r}"
    if optimizer.state_dtype == "float32" and master == "bfloat16":
        raise UserError(f"{key}: expected 'auto' with training.master_dtype = 'bfloat16'")
    # bfloat16 has steps of 2^-8 to 2^-7 of a number. Where 1 - beta is less than half of one, a running mean of which
    # the new values are far smaller is rounded back to what it was, and so never falls.
    if optimizer.state_dtype == "bfloat16" and max(optimizer.betas) > _LARGEST_BETA_IN_BFLOAT16:
        raise UserError(
            f"optimizer.betas = {list(optimizer.betas)}: with {key} expected at most {_LARGEST_BETA_IN_BFLOAT16}: a "
            "slower mean would be rounded to what it was and stand still"
        )


def _check_mtp(config: Config) -> None:
    if config.mtp.train == "head" and "mtp" in config.model.freeze:
        frozen = f"model.freeze = {list(config.model.freeze)}"
        raise UserError(f"{frozen}: with mtp.train = 'head' nothing is left to train: expected it without 'mtp'")


def _check_kernels(config: Config, shape: ModelConfig) -> None:
    if config.kernels == Kernels():
        return  # "auto" is always possible; importing torch takes seconds
    import torch

    from models.ops.kernels import select_kernels
    from models.ops.precision import compute_dtype

    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = compute_dtype(config.training.dtype, device_type)
    select_kernels(dataclasses.asdict(config.kernels), device_type, dtype, *shape.kernel_sizes)


def _check_paths(config: Config) -> None:
    resume, start = config.checkpoint.resume, config.checkpoint.start_from
    if resume not in ("auto", "never") and not os.path.isdir(resume):
        raise UserError(f"checkpoint.resume = {resume!r}: expected 'auto', 'never' or a directory")
    if start and not os.path.isdir(start):
        raise UserError(f"checkpoint.start_from = {start!r}: expected a directory")
    if start and resume not in ("auto", "never"):
        raise UserError(f"checkpoint.start_from and checkpoint.resume = {resume!r}: expected one of them")
    if config.model.initial_load == "hf":
        if start and not config.lora.rank:  # of adapters, it is the adapters that start from there
            raise UserError("model.initial_load = 'hf' and checkpoint.start_from exclude each other: expected one")
        folder = Path(config.model.path or "/dev/null")
        if not list(folder.glob("*.safetensors")):
            raise UserError(
                f"model.initial_load = 'hf': expected model.path = {config.model.path!r} to hold safetensors files"
                f"{unread_weights(folder)}"
            )
    if resume == "never":
        check_is_new(Path(config.job.output_dir, "checkpoints"))
    for key, named in (("resume", resume), ("start_from", start)):
        if named and named not in ("auto", "never"):
            try:
                find_checkpoint(Path(named))
            except UserError as error:
                raise UserError(f"checkpoint.{key} = {error}") from None
    parent = config.job.output_dir
    while not os.path.lexists(parent):
        parent = os.path.dirname(parent)
    try:  # what the permissions say is not all: nobody can make a folder in /proc
        os.rmdir(tempfile.mkdtemp(prefix=".", dir=parent))
    except OSError as error:
        raise UserError(
            f"job.output_dir = {config.job.output_dir!r}: {error.strerror}: expected a folder that can be written in "
            f"{parent!r}"
        ) from None
    for path in (Path(config.job.output_dir, name) for name in _FOLDERS):
        if os.path.lexists(path) and not path.is_dir():
            raise UserError(f"{path} is no folder, or a link to none: expected the run's own, or nothing there")


def main(argv: list[str]) -> None:
    """`--world-size N` and then train.py's own arguments. Raises UserError."""
    if {"--help", "-h"} & set(argv):
        load_config(["--help"])
    if len(argv) < 2 or argv[0] != "--world-size" or not argv[1].isdecimal() or int(argv[1]) < 1:
        raise UserError("usage: python -m config.checks --world-size N --config FILE [--section.key value ...]")
    check_config(load_config(argv[2:]), int(argv[1]))


if __name__ == "__main__":
    with exit_on_error():
        main(sys.argv[1:])
