"""The recipe: `torchrun train.py --config X.toml` trains Qwen3.5-MoE. Read it from top to bottom."""

import dataclasses
import gc
import logging
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoint.checkpointer import Checkpointer, Progress
from checkpoint.hf_reader import load_hf_weights
from config.checks import check_config
from config.options import Config
from config.reading import load_config, model_config, resolved_toml
from config.unread import unread
from data.held_out import Side
from data.loader import TokenLoader
from data.media import media_settings
from data.samples import data_in_words
from errors import RunError, UserError, exit_on_error, regular_file
from models.ops.kernels import Kernels, import_ahead, select_kernels
from models.ops.precision import compute_dtype
from models.qwen35_moe.check_kernels import check_kernels
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.init import init_weights
from models.qwen35_moe.lora import add_adapters, is_adapter
from models.qwen35_moe.model import Qwen35Moe
from models.qwen35_moe.parts import freeze, frozen_parts
from models.qwen35_moe.slow_paths import slow_paths
from parallelisms.context_parallel import own_share
from parallelisms.degrees import shape_on_a_rank, work_out_degrees
from parallelisms.mesh import Meshes, build_meshes
from parallelisms.parallelize import local_region, parallelize_fn
from parallelisms.room import room_factor
from training.compile_cache import keep_compiled_in
from training.distributed import (
    check_same_options,
    init_distributed,
    keep_exit_status,
    most_over_ranks,
    name_missing_ranks,
    set_deterministic,
    set_timeout,
    sum_over_ranks,
    world_from_environment,
)
from training.first_step import FirstStep
from training.flops import flops_per_token, peak_flops_of_all
from training.gradients import last_nonfinite
from training.lock import RunLock
from training.metrics import MetricsWriter, data_quality, peak_memory_gib, setup_logging
from training.optimizer import build_optimizer, cut_short, lr_factor, set_learning_rate
from training.signals import StopRequest
from training.step import Stepper
from training.step_report import Logged, StepReport
from training.trackers import start_wandb
from training.validation import Validator
from training.vision_work import VisionWork

logger = logging.getLogger("train")


def build_on_meta(shape: ModelConfig, kernels: Kernels, master_dtype: torch.dtype) -> Qwen35Moe:
    """The model without memory, its parameters in the master dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(master_dtype)
    try:
        with torch.device("meta"):
            return Qwen35Moe(shape, kernels)
    finally:
        torch.set_default_dtype(before)


def build_model(config: Config, shape: ModelConfig, meshes: Meshes, device: torch.device) -> Qwen35Moe:
    """The parallelised model on its device, its weights yet to be filled."""
    keep_compiled_in(config.compile.cache_dir)
    dtype = compute_dtype(config.training.dtype, device.type)
    kernels = select_kernels(dataclasses.asdict(config.kernels), device.type, dtype, *shape.kernel_sizes)
    model = build_on_meta(shape, kernels, getattr(torch, config.training.master_dtype))
    freeze(model, frozen_parts(config.model.freeze, config.mtp.train))
    if config.lora.rank:
        add_adapters(model, config.lora.rank, config.lora.alpha, config.lora.targets)
    for block in model.blocks:
        block.mlp.gate.dtype = getattr(torch, config.moe.router_dtype)
        block.mlp.gate.force_balanced = config.moe.force_balanced_routing
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = f", {num_trained / 1e6:,.1f} M of them trained" if num_trained < num_parameters else ""
    num_devices = meshes.data_parallel.size()
    logger.info(f"{num_parameters / 1e6:,.1f} M parameters{frozen}, {num_devices} x {device.type}, {dtype}, {kernels}")
    for slow in slow_paths(kernels, shape, device.type, dtype, config.compile.enable):
        logger.warning(f"SLOW, many times slower than it could be on a GPU: {slow}")
    if config.kernels.self_test and device.type == "cuda":
        on_a_rank, cache_dir = shape_on_a_rank(shape, meshes.degrees.context), config.compile.cache_dir
        wrong = check_kernels(kernels, on_a_rank, device, dtype, Path(cache_dir) if cache_dir else None)
        if wrong:
            raise RunError("; ".join(wrong))
    parallelize_fn(
        model,
        meshes,
        compute_dtype=dtype,
        activation_checkpoint=config.activation_checkpoint.mode,
        compile_blocks=config.compile.enable,
        reshard_after_forward=config.parallelism.reshard_after_forward,
    )
    model.to_empty(device=device)
    return model


def main(arguments: list[str]) -> None:
    # 1. Configuration: defaults < TOML < command line. A mistake ends in one line and exit code 2.
    rank, world_size = world_from_environment()
    config = load_config(arguments)
    check_config(config, world_size)
    training = config.training
    output_dir = Path(config.job.output_dir)
    setup_logging(rank)
    lock = RunLock(output_dir) if rank == 0 else None
    trackers = start_wandb(output_dir, config) if rank == 0 else []
    stop = StopRequest()

    # 2. Processes, devices, meshes.
    if config.job.deterministic:
        set_deterministic()
    device = init_distributed(config.job.collective_timeout_seconds)
    check_same_options(config)
    torch.manual_seed(config.job.seed)
    shape = model_config(config)
    degrees = work_out_degrees(config.parallelism, config.training, shape, world_size)
    if ignored := unread(config, shape, degrees):
        logger.warning(ignored)
    meshes = build_meshes(device.type, degrees, room_factor(config.parallelism, device.type))
    set_timeout(meshes.all, config.job.collective_timeout_seconds)

    # 3. Data: every data rank reads its own rows; where it is several ranks, the first tells of them.
    skipped_dir = output_dir / "skipped" if meshes.is_first_reader else None
    media = media_settings(config, shape.vision)
    ranks = (meshes.data_rank, meshes.num_data_ranks)
    mtp = config.mtp.train != "off"
    seed, side = config.job.seed, Side.of(config)
    loader = TokenLoader(config.data, training, *ranks, seed, media=media, mtp=mtp, side=side, skipped_dir=skipped_dir)
    if rank == 0:
        logger.info(data_in_words(config.data))
    validator = Validator(config, meshes, media) if config.validation.enable else None

    # 4. Model: built without memory, parallelised, then given its memory.
    model = build_model(config, shape, meshes, device)
    imports = import_ahead(model.kernels, device)  # seconds, beside those of the weights

    # 5. Optimizer.
    optimizer = build_optimizer(model, config.optimizer)

    # 6. Weights: those of an earlier run, which then goes on; of a Hugging Face directory; or random ones.
    checkpointer = Checkpointer(config, shape, model, optimizer, meshes)
    progress = checkpointer.resume()
    from_hf = config.model.initial_load == "hf"
    if from_hf and (progress is None or config.lora.rank):  # a checkpoint of adapters has not the weights they adapt
        load_hf_weights(model, Path(config.model.path), config.job.seed, local_region)
    if progress is None:
        progress = Progress()
        init_weights(model, config.job.seed, local_region, which=is_adapter if from_hf else lambda _: True)
    imports.join()
    if progress.data_cursors is not None:
        loader.load_cursors(progress.data_cursors)
    step, tokens_seen = progress.step, progress.tokens_seen
    total_steps = training.steps or step + most_over_ranks(loader.num_steps_left())

    # 7. What the run writes.
    tokens_per_step = training.global_batch_size * training.sequence_length
    writer = None
    if rank == 0:
        try:
            regular_file(output_dir / "config.toml").write_text(resolved_toml(config), encoding="utf-8")
        except OSError as error:
            raise UserError(f"job.output_dir = {str(output_dir)!r}: {error.strerror}: expected room to write") from None
        writer = MetricsWriter(output_dir, config.metrics.tensorboard, step, total_steps, trackers)
        if writer.has_trackers and step == 0:
            writer.write_lengths(loader.first_lengths(), step)
    vision_work = VisionWork(model, meshes)
    flops_of_token = flops_per_token(shape, training.sequence_length, config.lora, config.mtp.train != "head")
    speed = (flops_of_token, peak_flops_of_all(world_size, device))
    first_step = FirstStep(config, world_size, device)
    stepper = Stepper(model, optimizer, meshes, device, training, config.moe, config.mtp)
    # A CPU has done a step when the host has launched it.
    report = StepReport(config, device, writer, first_step, step, *speed, is_late=device.type == "cuda")
    logger.info(f"from step {step} to {total_steps}, {loader.num_micro_batches} micro-batches a rank and step")
    if missing := cut_short(total_steps, config.lr_scheduler):
        logger.info(missing)
    if loader.num_filler_rows:
        readers = "processes" if meshes.context_parallel is None else "groups of processes"
        rows = f"{meshes.num_data_ranks} {readers} in rows of {training.local_batch_size}"
        logger.info(
            f"training.global_batch_size = {training.global_batch_size} cannot be dealt evenly to {rows}: "
            f"{loader.num_filler_rows} more rows a step are computed for nothing"
        )

    # 8. The loop.
    if config.compile.enable and device.type == "cuda":
        logger.info("the first step compiles the model, whatever its depth: half a minute to a minute")
    data_seconds, data_step, stopping = 0.0, step, False
    while step < total_steps and not stopping:
        step += 1
        started = time.perf_counter()
        try:
            of_readers = [next(loader) for _ in range(loader.num_micro_batches)]
            micro_batches = [own_share(batch, meshes.context_parallel, shape.vision) for batch in of_readers]
            data_seconds += time.perf_counter() - started
            num_trained = sum(batch.num_trained for batch in micro_batches)
            num_drafted = sum(batch.num_drafted for batch in micro_batches)
            # The one place where ranks agree: how many tokens the global batch trains, whether anyone was told to stop,
            # and what the tower does. On the host, so that no rank waits here for its GPU to finish the step before.
            own = [num_trained, num_drafted, int(stop.requested), *vision_work.of(micro_batches)]
            num_trained, num_drafted, num_stops, *of_tower = sum_over_ranks(torch.tensor(own)).tolist()
        except (UserError, RunError, RuntimeError):  # of this rank, or of one that did not come
            report.tell_alone()
            raise
        vision_work.add(of_tower)
        stopping = num_stops > 0

        lr = config.optimizer.lr * lr_factor(step, total_steps, config.lr_scheduler)
        set_learning_rate(optimizer, lr)
        last = stopping or step == total_steps
        validates = validator is not None and step % config.validation.interval == 0
        saves = config.checkpoint.enable and (last or step % config.checkpoint.interval == 0)
        logs = last or validates or step % config.metrics.log_interval == 0
        by_part = logs and config.metrics.grad_norm_by_part
        launched = stepper.launch(micro_batches, num_trained, num_drafted, by_part=by_part, of_all_ranks=logs)
        tokens_seen += tokens_per_step
        if step == progress.step + 1:
            # Half a million objects of imports and compilation live as long as the run. A full collection that walks
            # over them takes 0.2 s, on each rank at another step, while the others wait.
            gc.collect()
            gc.freeze()

        logged = None
        if logs:
            of_vision, vision_flops = vision_work.read()
            metrics = {
                "lr": lr,
                "tokens_seen": tokens_seen,
                "data_seconds": data_seconds / (step - data_step),
                "peak_memory_gib": peak_memory_gib(device),
                **data_quality(loader.counts if meshes.is_first_reader else {}),
                **of_vision,
            }
            if config.checkpoint.enable:  # how long saves kept the training waiting since the last line
                metrics["checkpoint_seconds"], checkpointer.blocked_seconds = checkpointer.blocked_seconds, 0.0
            validate = partial(validator.measure, model, device) if validator is not None and validates else None
            logged = Logged(metrics, vision_flops, loader.show_rows(), validate, meshes.room)
            data_seconds, data_step = 0.0, step
        report.add(step, started, launched, logged, at_once=last or validates or saves)

        if saves:
            bad = last_nonfinite(dict(model.named_parameters()))
            if bad is not None:
                raise RunError(f"step {step}: no checkpoint is written, weights are not finite: {bad}")
            checkpointer.save(step, tokens_seen, loader.cursors, last)
            report.restart_clock(step)
            data_seconds, data_step = 0.0, step

    # 9. The end, of all ranks together.
    saved = checkpointer.wait()
    logger.info(f"stopped at step {step} of {total_steps}" if stopping else f"done: {total_steps} steps")
    loader.close()
    if writer is not None:
        writer.close()
    if lock is not None:
        lock.release()
    dist.destroy_process_group()
    if not saved:
        sys.exit(1)  # the reason has been logged


if __name__ == "__main__":
    with keep_exit_status(), exit_on_error(), name_missing_ranks():
        main(sys.argv[1:])
