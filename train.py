"""The recipe: `torchrun train.py --config X.toml` trains Qwen3.5-MoE. Read it from top to bottom."""

import dataclasses
import gc
import logging
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from checkpoint.checkpointer import Checkpointer, Progress
from checkpoint.hf_reader import load_hf_weights
from config.checks import check_config
from config.options import Config, MoE, Mtp, Training
from config.reading import load_config, model_config, resolved_toml
from data.batch import MicroBatch
from data.held_out import Side
from data.loader import TokenLoader
from data.media import media_settings
from data.samples import data_in_words
from errors import RunError, UserError, exit_on_error, regular_file
from models.ops.kernels import Kernels, select_kernels
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
from parallelisms.parallelize import local_region, parallelize_fn, reduce_replicas_after, reduce_replicated_gradients
from parallelisms.room import room_factor
from training.compile_cache import keep_compiled_in
from training.distributed import (
    check_same_options,
    init_distributed,
    most_over_ranks,
    name_missing_ranks,
    set_deterministic,
    set_timeout,
    sum_over_ranks,
    to_host_later,
    world_from_environment,
)
from training.first_step import FirstStep
from training.flops import flops_per_token, peak_flops_of_all
from training.gradients import describe_nonfinite, gradient_norm, gradient_norms, last_nonfinite
from training.load_balancing import measure_for, router_losses
from training.lock import RunLock
from training.metrics import MetricsWriter, data_quality, expert_load, peak_memory_gib, setup_logging
from training.optimizer import NamedAdamW, build_optimizer, lr_factor, set_learning_rate, step_clipped
from training.signals import StopRequest
from training.trackers import start_wandb
from training.validation import Validator
from training.vision_work import VisionWork

logger = logging.getLogger("train")


class StepResult(NamedTuple):
    """What one optimizer step tells. Shapes: L blocks, E experts."""

    losses: dict[str, torch.Tensor]
    """By name, each [] float32, this rank's share; shares add up. "loss": the mean over the global batch's trained
    tokens; "mtp": of multi-token prediction, the mean over its own; "aux_loss", "z_loss": the routers', means over
    micro-steps; 0 if they are off."""
    expert_counts: torch.Tensor
    """[L, E] int64: how many of this rank's tokens chose each expert."""
    grad_norm: torch.Tensor
    """[] float64, of the global gradient before clipping; the same on all ranks."""
    nonfinite: str
    """Where loss or gradients are not finite, so that the step was not applied; empty if all are."""
    norms_of_parts: dict[str, torch.Tensor]
    """As `grad_norm`, of each part of the model, if that was asked for."""


def forward_backward(
    model: Qwen35Moe,
    micro_batches: list[MicroBatch],
    num_trained: int,
    meshes: Meshes,
    device: torch.device,
    moe: MoE,
    mtp: Mtp,
    num_drafted: int,
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """The micro-batches' gradients. As in StepResult the losses, the experts' counts; [] how many rows were missed."""
    shape = model.config
    losses = {name: torch.zeros((), device=device) for name in ("loss", "mtp", "aux_loss", "z_loss")}
    expert_counts = torch.zeros(len(model.blocks), shape.num_experts, dtype=torch.int64, device=device)
    num_missed = torch.zeros((), dtype=torch.int64, device=device)
    for index, batch in enumerate(micro_batches, start=1):
        batch = batch.to(device)
        measure = measure_for(moe, batch.is_real)
        loss_sum, statistics, mtp_loss_sum, _ = model(batch, measure)
        # Divided by what all ranks and micro-batches train together, so that losses and gradients simply add up.
        share = loss_sum / max(num_trained, 1)
        total = share
        if mtp_loss_sum is not None:
            mtp_share = mtp_loss_sum / max(num_drafted, 1)
            total = total + mtp.loss_weight * mtp_share
            losses["mtp"] += mtp_share.detach()
        if measure.probabilities or measure.logsumexp:
            over = (meshes.num_data_ranks, sum_over_ranks, meshes.sum_over_context)
            aux, z = router_losses(statistics, moe, shape.num_experts_per_tok, *over)
            total = total + (moe.aux_loss_coef * aux + moe.z_loss_coef * z) / len(micro_batches)
            losses["aux_loss"] += aux.detach() / len(micro_batches)
            losses["z_loss"] += z.detach() / len(micro_batches)
        reduce_replicas_after(model, this_micro_batch=index == len(micro_batches))
        total.backward()
        losses["loss"] += share.detach()
        expert_counts += statistics.expert_counts
        num_missed += 0 if statistics.num_missed is None else statistics.num_missed.sum()
    return losses, expert_counts, num_missed


def train_step(
    model: Qwen35Moe,
    optimizer: NamedAdamW,
    micro_batches: list[MicroBatch],
    num_trained: int,
    meshes: Meshes,
    device: torch.device,
    training: Training,
    moe: MoE,
    mtp: Mtp,
    num_drafted: int,
    by_part: bool = False,
) -> StepResult:
    """One optimizer step over this rank's micro-batches; `num_trained` counts the GLOBAL batch's trained tokens,
    `num_drafted` those of multi-token prediction, which `mtp` is for. `by_part`: tell each part's gradient norm."""
    own_losses, expert_counts, num_missed = forward_backward(
        model, micro_batches, num_trained, meshes, device, moe, mtp, num_drafted
    )
    shares = torch.stack([own_losses["loss"], num_missed.float()])
    loss_of_all, missed_of_all = reduce_replicated_gradients(model.float32_parameters(), shares, meshes.data_parallel)
    grad_norm = gradient_norm(model.parameters(), meshes.dense.get_group("fsdp"))
    norms_of_parts = gradient_norms(model.named_parameters(), meshes.dense.get_group("fsdp")) if by_part else {}
    # The host waits for the device here, once a step, and for the backward pass alone: the update is on its way then,
    # and does nothing where a value is not finite or a row was missed. All ranks know the same.
    on_host = to_host_later(torch.stack([loss_of_all, grad_norm, missed_of_all]))
    skips = ~(loss_of_all + grad_norm).isfinite() | (missed_of_all > 0)
    step_clipped(optimizer, grad_norm, training.max_grad_norm, skips)
    loss, norm, missed = on_host()
    if missed:
        optimizer.zero_grad()
        with meshes.room.asking():
            result = train_step(
                model, optimizer, micro_batches, num_trained, meshes, device, training, moe, mtp, num_drafted, by_part
            )
        meshes.room.note_repeat(grows=not result.nonfinite)
        return result
    nonfinite = "" if math.isfinite(loss + norm) else describe_nonfinite(model, own_losses["loss"], grad_norm)
    optimizer.zero_grad()
    return StepResult(own_losses, expert_counts, grad_norm, nonfinite, norms_of_parts)


def reduce_result(result: StepResult) -> StepResult:
    """The losses and expert counts of all ranks together, in one all-reduce."""
    losses = torch.stack(list(result.losses.values())).double()
    reduced = sum_over_ranks(torch.cat([losses, result.expert_counts.flatten()]))
    expert_counts = reduced[len(losses) :].long().view_as(result.expert_counts)
    return result._replace(losses=dict(zip(result.losses, reduced)), expert_counts=expert_counts)


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
        block.mlp.gate.force_balanced = config.moe.force_balanced_routing
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = f", {num_trained / 1e6:,.1f} M of them trained" if num_trained < num_parameters else ""
    num_devices = meshes.data_parallel.size()
    logger.info(f"{num_parameters / 1e6:,.1f} M parameters{frozen}, {num_devices} x {device.type}, {dtype}, {kernels}")
    for slow in slow_paths(kernels, shape, device.type, dtype):
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
    flops_of_token = flops_per_token(shape, training.sequence_length, config.lora, config.mtp.train != "head")
    peak = peak_flops_of_all(world_size, device)
    vision_work = VisionWork(model, meshes)
    first_step = FirstStep(config, world_size, device)
    logger.info(f"from step {step} to {total_steps}, {loader.num_micro_batches} micro-batches a rank and step")
    if (warmup_steps := config.lr_scheduler.warmup_steps) > total_steps:
        logger.info(f"lr_scheduler.warmup_steps = {warmup_steps}: the rise is not finished in {total_steps} steps")
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
    clock, clock_step, data_seconds = time.perf_counter(), step, 0.0
    num_skipped, stopping = 0, False
    while step < total_steps and not stopping:
        step += 1
        data_clock = step_clock = time.perf_counter()
        of_readers = [next(loader) for _ in range(loader.num_micro_batches)]
        micro_batches = [own_share(batch, meshes.context_parallel, shape.vision) for batch in of_readers]
        data_seconds += time.perf_counter() - data_clock
        num_trained = sum(batch.num_trained for batch in micro_batches)
        num_drafted = sum(batch.num_drafted for batch in micro_batches)
        # The one place where ranks agree: how many tokens the global batch trains, whether anyone was told to stop, and
        # what the tower does. On the host, so that no rank waits here for its GPU to finish the step before.
        own = [num_trained, num_drafted, int(stop.requested), *vision_work.of(micro_batches)]
        num_trained, num_drafted, num_stops, *of_tower = sum_over_ranks(torch.tensor(own)).tolist()
        vision_work.add(of_tower)
        stopping = num_stops > 0

        lr = config.optimizer.lr * lr_factor(step, total_steps, config.lr_scheduler)
        set_learning_rate(optimizer, lr)
        last = stopping or step == total_steps
        validates = validator is not None and step % config.validation.interval == 0
        logs = last or validates or step % config.metrics.log_interval == 0
        of_losses = (training, config.moe, config.mtp, num_drafted, logs and config.metrics.grad_norm_by_part)
        result = train_step(model, optimizer, micro_batches, num_trained, meshes, device, *of_losses)
        if result.nonfinite:
            if training.nonfinite == "stop":
                raise RunError(f"step {step} is not applied: {result.nonfinite}")
            num_skipped += 1
            logger.warning(f"step {step} is skipped: {result.nonfinite}")
        if step == progress.step + 1:
            # Half a million objects of imports and compilation live as long as the run. A full collection that walks
            # over them takes 0.2 s, on each rank at another step, while the others wait.
            gc.collect()
            gc.freeze()
        tokens_seen += tokens_per_step
        own_seconds = time.perf_counter() - step_clock

        if logs:
            result = reduce_result(result)
            step_seconds = (time.perf_counter() - clock) / (step - clock_step)
            of_vision, vision_flops = vision_work.read()
            metrics = {
                "step": step,
                "loss": result.losses["loss"].item(),
                "grad_norm": result.grad_norm.item(),
                "lr": lr,
                "tokens_seen": tokens_seen,
                "tokens_per_second": tokens_per_step / step_seconds,
                "step_seconds": step_seconds,
                "data_seconds": data_seconds / (step - clock_step),
                "peak_memory_gib": peak_memory_gib(device),
                **expert_load(result.expert_counts),
                **data_quality(loader.counts if meshes.is_first_reader else {}, device),
                **of_vision,
                **meshes.room.metrics,
                **{f"grad_norm_{part}": norm.item() for part, norm in result.norms_of_parts.items()},
            }
            if training.nonfinite == "skip":
                metrics["skipped_steps"] = num_skipped
            if mtp:
                metrics["mtp_loss"] = result.losses["mtp"].item()
            if config.moe.aux_loss_coef > 0:
                metrics["aux_loss"] = result.losses["aux_loss"].item()
            if config.moe.z_loss_coef > 0:
                metrics["z_loss"] = result.losses["z_loss"].item()
            if peak is not None:
                metrics["mfu"] = (flops_of_token * tokens_per_step + vision_flops) / step_seconds / peak
            if config.checkpoint.enable:  # how long saves kept the training waiting since the last line
                metrics["checkpoint_seconds"], checkpointer.blocked_seconds = checkpointer.blocked_seconds, 0.0
            if validator is not None and validates:
                metrics |= validator.measure(model, device)
            if writer is not None:
                writer.write(metrics)
                first_step.compare(metrics, own_seconds, device, compiles=step == progress.step + 1)
                writer.write_view(step, result.expert_counts, loader.show_rows)
            clock, clock_step, data_seconds = time.perf_counter(), step, 0.0

        if config.checkpoint.enable and (last or step % config.checkpoint.interval == 0):
            bad = last_nonfinite(dict(model.named_parameters()))
            if bad is not None:
                raise RunError(f"step {step}: no checkpoint is written, weights are not finite: {bad}")
            checkpointer.save(step, tokens_seen, loader.cursors, last)
            clock, clock_step, data_seconds = time.perf_counter(), step, 0.0

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
    with exit_on_error(), name_missing_ranks():
        main(sys.argv[1:])
