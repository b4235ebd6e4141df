"""Optimizer steps: the micro-batches' losses and gradients, their norm, the update. Nobody waits for the device."""

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


class Attempt(NamedTuple):
    """A step as the device has been told to make it."""

    has_ended: Callable[[], bool]
    """Whether its backward pass has been done."""
    on_host: Callable[[], StepResult]
    """Waits for that. Where not all is finite, `nonfinite` says no more."""
    describe: Callable[[], str]
    """Where it went wrong; all ranks together."""
    num_missed: Callable[[], int] = lambda: 0
    """How many rows of experts there was no room for, in it or in one before it that was not made anew yet: then it was
    not applied. Waits for its backward pass; the same on all ranks."""


class LaunchedStep:
    """A step that the device has yet to do.

    The host launches the next one before it asks how this one ended: a device that it kept waiting for its answer would
    have nothing to do until the next forward pass comes.
    """

    def __init__(self, attempt: Attempt, settle: Callable[[], None] = lambda: None) -> None:
        """settle: sees to it that `attempt` is the last one; all ranks together."""
        self.attempt, self._settle = attempt, settle

    def has_ended(self) -> bool:
        """Whether its backward pass has been done."""
        return self.attempt.has_ended()

    def why_not_applied(self) -> str:
        """By now; empty if it was. The host waits for the backward pass, and asks no other rank."""
        if self.attempt.on_host().nonfinite:
            return "not finite"
        return "experts had no room for all rows" if self.attempt.num_missed() else ""

    def result(self) -> StepResult:
        """On the host, which waits; all ranks together."""
        self._settle()
        result = self.attempt.on_host()
        return result._replace(nonfinite=self.attempt.describe()) if result.nonfinite else result


class _Work(NamedTuple):
    """What a step is made of, as often as it is made."""

    micro_batches: list[MicroBatch]
    num_trained: int
    num_drafted: int
    by_part: bool
    of_all_ranks: bool
    learning_rates: list[float]
    """Of the optimizer's groups."""


class Stepper:
    """Makes a run's optimizer steps, one after the other; all ranks together.

    Where experts have missed rows (parallelisms/expert_parallel.py) a step is made anew. That too the host finds out
    when it has launched the next one: the device applies neither, and both are made anew in their order.
    """

    def __init__(
        self,
        model: Qwen35Moe,
        optimizer: NamedAdamW,
        meshes: Meshes,
        device: torch.device,
        training: Training,
        moe: MoE,
        mtp: Mtp,
    ) -> None:
        self._model, self._optimizer, self._meshes, self._device = model, optimizer, meshes, device
        self._training, self._moe, self._mtp = training, moe, mtp
        self._parameters, self._replicated = list(model.parameters()), model.float32_parameters()
        """Looked for once, sharded: a walk through all modules keeps the host for milliseconds."""
        self._unsettled: list[tuple[LaunchedStep, _Work]] = []
        """In their order; between two launches there is one at most."""
        self._num_missed: torch.Tensor | None = None
        """Float32 [], in the steps since the last one that was made anew."""

    def launch(
        self,
        micro_batches: list[MicroBatch],
        num_trained: int,
        num_drafted: int,
        *,
        by_part: bool = False,
        of_all_ranks: bool = False,
    ) -> LaunchedStep:
        """One optimizer step over this rank's micro-batches, with the learning rates that the optimizer has.

        `num_trained` counts the GLOBAL batch's trained tokens, `num_drafted` those of multi-token prediction.
        `by_part`: tell each part's gradient norm; `of_all_ranks`: tell the losses and expert counts of all ranks
        together, in one all-reduce.

        The host waits for no more than the backward pass of the step before.
        """
        rates = [group["lr"] for group in self._optimizer.param_groups]
        work = _Work(micro_batches, num_trained, num_drafted, by_part, of_all_ranks, rates)
        launched = LaunchedStep(self._attempt(work), self._settle)
        if self._meshes.room.factor:
            self._unsettled.append((launched, work))
            self._settle(all_but=1)
        return launched

    def _settle(self, all_but: int = 0) -> None:
        """Makes anew what has to be, of the steps launched so far but for so many of the last."""
        while len(self._unsettled) > all_but:
            (first, work), *later = self._unsettled
            if first.attempt.num_missed():
                self._num_missed = None
                with self._meshes.room.asking():
                    first.attempt = self._attempt(work)
                self._meshes.room.note_repeat(grows=not first.why_not_applied())
                for launched, of_later in later:
                    launched.attempt = self._attempt(of_later)
            self._unsettled = later

    def _attempt(self, work: _Work) -> Attempt:
        losses, expert_counts, num_missed = self._forward_backward(work)
        loss = losses["loss"]
        model, shards = self._model, self._meshes.dense.get_group("fsdp")
        own = [loss, torch.zeros_like(loss) if num_missed is None else num_missed.float()]
        shares = reduce_replicated_gradients(self._replicated, torch.stack(own), self._meshes.data_parallel)
        missed = shares[1]
        if num_missed is not None:
            missed = self._num_missed = missed if self._num_missed is None else missed + self._num_missed
        norm = gradient_norm(self._parameters, shards)
        norms_of_parts = gradient_norms(model.named_parameters(), shards) if work.by_part else {}
        told = torch.cat([torch.stack(list(losses.values())).double(), expert_counts.flatten()])
        if work.of_all_ranks:
            told = sum_over_ranks(told)
        on_its_way = ToHost(torch.stack([norm.total, *norms_of_parts.values(), shares[0], missed]), told)
        # The update does nothing where a value is not finite or a row was missed. All ranks know the same.
        skips = ~(shares[0] + norm.total).isfinite() | (missed > 0)
        for group, rate in zip(self._optimizer.param_groups, work.learning_rates):
            group["lr"] = rate
        step_clipped(self._optimizer, norm.total, self._training.max_grad_norm, skips)
        self._optimizer.zero_grad()

        def on_host() -> StepResult:
            (grad_norm, *of_parts, loss, _), told = on_its_way.wait()
            return StepResult(
                losses=dict(zip(losses, told)),
                expert_counts=told[len(losses) :].long().view_as(expert_counts),
                grad_norm=grad_norm,
                nonfinite="" if (grad_norm + loss).isfinite() else "somewhere",
                norms_of_parts=dict(zip(norms_of_parts, of_parts)),
            )

        describe = partial(describe_nonfinite, model, loss, norm)
        return Attempt(on_its_way.has_arrived, on_host, describe, lambda: int(on_its_way.wait()[0][-1]))

    def _forward_backward(self, work: _Work) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor | None]:
        """The micro-batches' gradients. As in StepResult the losses, the experts' counts; [] how many rows were missed,
        or None where none can be."""
        model, meshes, moe, mtp = self._model, self._meshes, self._moe, self._mtp
        shape = model.config
        losses = {name: torch.zeros((), device=self._device) for name in ("loss", "mtp", "aux_loss", "z_loss")}
        expert_counts = torch.zeros(len(model.blocks), shape.num_experts, dtype=torch.int64, device=self._device)
        num_missed = None
        num_micro_batches = len(work.micro_batches)
        for index, batch in enumerate(work.micro_batches, start=1):
            begin_micro_batch(model, is_first=index == 1, is_last=index == num_micro_batches)
            batch = batch.to(self._device)
            measure = measure_for(moe, batch.is_real)
            loss_sum, statistics, mtp_loss_sum, _ = model(batch, measure)
            # Divided by what all ranks and micro-batches train together, so that losses and gradients simply add up.
            share = loss_sum / max(work.num_trained, 1)
            total = share
            if mtp_loss_sum is not None:
                mtp_share = mtp_loss_sum / max(work.num_drafted, 1)
                total = total + mtp.loss_weight * mtp_share
                losses["mtp"] += mtp_share.detach()
            if measure.probabilities or measure.logsumexp:
                over = (meshes.num_data_ranks, sum_over_ranks, meshes.sum_over_context)
                aux, z = router_losses(statistics, moe, shape.num_experts_per_tok, *over)
                total = total + (moe.aux_loss_coef * aux + moe.z_loss_coef * z) / num_micro_batches
                losses["aux_loss"] += aux.detach() / num_micro_batches
                losses["z_loss"] += z.detach() / num_micro_batches
            total.backward()
            losses["loss"] += share.detach()
            expert_counts += statistics.expert_counts
            if statistics.num_missed is not None:
                num_missed = statistics.num_missed.sum() + (0 if num_missed is None else num_missed)
        return losses, expert_counts, num_missed
