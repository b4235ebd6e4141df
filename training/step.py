"""One optimizer step: the micro-batches' losses and gradients, their norm, the update. Nobody waits for the device."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from config.options import MoE, Mtp, Training
from data.batch import MicroBatch
from models.qwen35_moe.model import Qwen35Moe
from parallelisms.mesh import Meshes
from parallelisms.parallelize import begin_micro_batch, reduce_replicated_gradients
from training.distributed import ToHost, sum_over_ranks
from training.gradients import describe_nonfinite, gradient_norm, gradient_norms
from training.load_balancing import measure_for, router_losses
from training.optimizer import NamedAdamW, step_clipped


class StepResult(NamedTuple):
    """What one optimizer step tells, on the host; of this rank, or, if that was asked for, of all together. Shapes: L
    blocks, E experts."""

    losses: dict[str, torch.Tensor]
    """By name, each [] float64, a rank's share; shares add up. "loss": the mean over the global batch's trained tokens;
    "mtp": of multi-token prediction, the mean over its own; "aux_loss", "z_loss": the routers', means over micro-steps;
    0 if they are off."""
    expert_counts: torch.Tensor
    """[L, E] int64: how many tokens chose each expert."""
    grad_norm: torch.Tensor
    """[] float64, of the global gradient before clipping; the same on all ranks."""
    nonfinite: str
    """Where loss or gradients are not finite, so that the step was not applied; empty if all are."""
    norms_of_parts: dict[str, torch.Tensor]
    """As `grad_norm`, of each part of the model, if that was asked for."""


class LaunchedStep(NamedTuple):
    """A step that the device has yet to do.

    The host launches the next one before it asks how this one ended: a device that it kept waiting for its answer would
    have nothing to do until the next forward pass comes.
    """

    has_ended: Callable[[], bool]
    """Whether its backward pass has been done."""
    on_host: Callable[[], StepResult]
    """Waits for that. Where not all is finite, `nonfinite` says no more."""
    describe: Callable[[], str]
    """Where it went wrong; all ranks together."""

    def is_finite(self) -> bool:
        """Whether the step was applied, the same on all ranks. The host waits for the step's backward pass."""
        return self.on_host().nonfinite == ""

    def result(self) -> StepResult:
        """On the host, which waits; all ranks together."""
        result = self.on_host()
        return result._replace(nonfinite=self.describe()) if result.nonfinite else result


def forward_backward(
    model: Qwen35Moe,
    micro_batches: list[MicroBatch],
    num_trained: int,
    meshes: Meshes,
    device: torch.device,
    moe: MoE,
    mtp: Mtp,
    num_drafted: int,
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor | None]:
    """The micro-batches' gradients. As in StepResult the losses, the experts' counts; [] how many rows were missed, or
    None where none can be."""
    shape = model.config
    losses = {name: torch.zeros((), device=device) for name in ("loss", "mtp", "aux_loss", "z_loss")}
    expert_counts = torch.zeros(len(model.blocks), shape.num_experts, dtype=torch.int64, device=device)
    num_missed = None
    for index, batch in enumerate(micro_batches, start=1):
        begin_micro_batch(model, is_first=index == 1, is_last=index == len(micro_batches))
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
        total.backward()
        losses["loss"] += share.detach()
        expert_counts += statistics.expert_counts
        if statistics.num_missed is not None:
            num_missed = statistics.num_missed.sum() + (0 if num_missed is None else num_missed)
    return losses, expert_counts, num_missed


def launch_step(
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
    of_all_ranks: bool = False,
) -> LaunchedStep:
    """One optimizer step over this rank's micro-batches; `num_trained` counts the GLOBAL batch's trained tokens,
    `num_drafted` those of multi-token prediction, which `mtp` is for. `by_part`: tell each part's gradient norm;
    `of_all_ranks`: tell the losses and expert counts of all ranks together, in one all-reduce.

    The host waits for the device only where experts' rows may have been missed: it makes such a step anew.
    """
    losses, expert_counts, num_missed = forward_backward(
        model, micro_batches, num_trained, meshes, device, moe, mtp, num_drafted
    )
    loss = losses["loss"]
    own = [loss, torch.zeros_like(loss) if num_missed is None else num_missed.float()]
    shares = reduce_replicated_gradients(model.float32_parameters(), torch.stack(own), meshes.data_parallel)
    norm = gradient_norm(model.parameters(), meshes.dense.get_group("fsdp"))
    norms_of_parts = gradient_norms(model.named_parameters(), meshes.dense.get_group("fsdp")) if by_part else {}
    told = torch.cat([torch.stack(list(losses.values())).double(), expert_counts.flatten()])
    if of_all_ranks:
        told = sum_over_ranks(told)
    numbers = torch.stack([norm.total, *norms_of_parts.values(), *shares])
    on_its_way = ToHost(numbers, told)
    # The update does nothing where a value is not finite or a row was missed. All ranks know the same.
    skips = ~(shares[0] + norm.total).isfinite() | (shares[1] > 0)
    step_clipped(optimizer, norm.total, training.max_grad_norm, skips)
    optimizer.zero_grad()
    if num_missed is not None and on_its_way.wait()[0][-1]:
        with meshes.room.asking():
            launched = launch_step(
                model,
                optimizer,
                micro_batches,
                num_trained,
                meshes,
                device,
                training,
                moe,
                mtp,
                num_drafted,
                by_part,
                of_all_ranks,
            )
        meshes.room.note_repeat(grows=launched.is_finite())
        return launched

    def on_host() -> StepResult:
        (grad_norm, *of_parts), told = on_its_way.wait()
        loss = of_parts[len(norms_of_parts)]
        return StepResult(
            losses=dict(zip(losses, told)),
            expert_counts=told[len(losses) :].long().view_as(expert_counts),
            grad_norm=grad_norm,
            nonfinite="" if (grad_norm + loss).isfinite() else "somewhere",
            norms_of_parts=dict(zip(norms_of_parts, of_parts)),
        )

    return LaunchedStep(on_its_way.has_arrived, on_host, partial(describe_nonfinite, model, losses["loss"], norm))
