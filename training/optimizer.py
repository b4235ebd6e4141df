"""The optimizer, its step with clipped gradients, and its learning-rate schedule."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from config.options import LRScheduler, Optimizer
from models.qwen35_moe.parts import part_of
from training.gradients import local_part


class Tensors(NamedTuple):
    """Of one parameter what an update reads, and all but the gradient what it writes."""

    parameter: torch.Tensor
    mean: torch.Tensor
    square: torch.Tensor
    gradient: torch.Tensor


class Hyperparameters(NamedTuple):
    """AdamW's, of a group of parameters, in this step."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


class NamedAdamW(torch.optim.AdamW):
    """AdamW that names its state, and whose kernels take each rank's shards as plain tensors.

    The states remain DTensors for checkpoints. But the update is elementwise, and finding that out anew for each of
    hundreds of DTensors keeps a GPU waiting.

    state_dtype: of the running means; None: each parameter's. A CPU has torch's kernels then. A GPU has one of its own:
    torch's reach half of the memory's rate.
    """

    def __init__(self, params: list[dict[str, Any]], state_dtype: torch.dtype | None = None, **options: Any) -> None:
        super().__init__(params, **options)
        self.state_dtype = state_dtype
        # The names by which torch's fused optimizers take them from a GradScaler: float32 scalars on the device.
        self.grad_scale: torch.Tensor | None = None
        self.found_inf: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient; gradients stay, divided by `grad_scale` or not. None at
        all where `found_inf` is 1."""
        first = next(parameter for group in self.param_groups for parameter in group["params"])
        if self.state_dtype is None and not first.is_cuda:
            super().step(closure)
            return
        for group in self.param_groups:
            trained = [each for each in group["params"] if each.grad is not None]
            if not trained:
                continue
            states = [self._state_of(parameter) for parameter in trained]
            steps = [state["step"] for state in states]
            # In a list: a tensor alone would be asked for its number, and the host would wait for the device.
            torch._foreach_add_(steps, 1 if self.found_inf is None else [1 - self.found_inf] * len(steps))
            made = torch.stack(steps).double()
            corrections = torch.stack([1 - beta**made for beta in group["betas"]]).float()
            tensors = [
                Tensors(*map(local_part, (parameter, state["exp_avg"], state["exp_avg_sq"], parameter.grad)))
                for parameter, state in zip(trained, states)
            ]
            of_group = Hyperparameters(*(group[name] for name in Hyperparameters._fields))
            if first.is_cuda:
                from training import adamw_triton  # a CPU has no Triton

                adamw_triton.update(tensors, corrections, self.grad_scale, self.found_inf, of_group)
            else:
                adamw_updates(tensors, corrections, self.grad_scale, self.found_inf, of_group)

    def named_state(self) -> dict[str, torch.Tensor]:
        """`<parameter>.<exp_avg | exp_avg_sq | step>`; zeros, to be loaded into, where no step has been made yet."""
        named: dict[str, torch.Tensor] = {}
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"]):
                named |= {f"{name}.{key}": tensor.detach() for key, tensor in self._state_of(parameter).items()}
        return named

    def _state_of(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        own = self.state[parameter]
        if not own:
            own["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for mean in ("exp_avg", "exp_avg_sq"):
                own[mean] = torch.zeros_like(parameter, dtype=self.state_dtype)
        return own

    def _init_group(self, group: dict[str, Any], *lists: list[Any]) -> bool:
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = map(local_part, tensors)
        return has_complex


def adamw_updates(
    tensors: Sequence[Tensors],
    corrections: torch.Tensor,
    divisor: torch.Tensor | None,
    skips: torch.Tensor | None,
    hyperparameters: Hyperparameters,
) -> None:
    """AdamW in float32, in place, with running means that may be bfloat16, which are rounded as they are stored: all of
    one parameter are of one shape. corrections: 1 - beta^step, float32 [2, number of parameters]; the gradients'
    divisor, and `skips`, 1 for no update or 0, float32 scalars. (torch's fused kernels want one dtype for all.)
    """
    lr, betas, eps, weight_decay = hyperparameters
    for (parameter, mean, square, gradient), (correction, correction_of_squares) in zip(tensors, corrections.T):
        wide = gradient.float() if divisor is None else gradient.float() / divisor
        new_mean = betas[0] * mean.float() + (1 - betas[0]) * wide
        new_square = betas[1] * square.float() + (1 - betas[1]) * wide.square()
        root = (new_square / correction_of_squares).sqrt() + eps
        new = parameter.float() * (1 - lr * weight_decay) - lr * (new_mean / correction) / root
        for old, value in ((parameter, new), (mean, new_mean), (square, new_square)):
            old.copy_(value if skips is None else torch.where(skips > 0, old.float(), value))


def build_optimizer(model: nn.Module, config: Optimizer) -> NamedAdamW:
    """Fused AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) of what requires a gradient. Matrices decay, vectors
    (norms, biases, decays) do not. Parts of the model with a learning rate of their own are groups of their own, whose
    "lr_ratio" is to the rate of all others."""
    assert config.name == "adamw"  # the one there is
    ratios = {"vision": config.vision_lr_ratio, "merger": config.merger_lr_ratio}
    groups: dict[tuple[float, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (ratios.get(part_of(name), 1.0), parameter.dim() > 1)
            groups.setdefault(key, []).append((name, parameter))
    return NamedAdamW(
        [
            {
                "params": named,
                "weight_decay": config.weight_decay if decays else 0.0,
                "lr": config.lr * lr_ratio,
                "lr_ratio": lr_ratio,
            }
            for (lr_ratio, decays), named in groups.items()
        ],
        state_dtype=torch.bfloat16 if config.state_dtype == "bfloat16" else None,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


@torch.no_grad()
def step_clipped(
    optimizer: NamedAdamW, grad_norm: torch.Tensor, max_norm: float, skips: torch.Tensor | None = None
) -> None:
    """A step with all gradients divided, where their global 2-norm, `grad_norm` [], is above `max_norm`, so that it
    becomes that. The fused optimizer divides them as it reads them: a pass of its own would read and write all of them
    once more. Some it leaves divided.

    skips: bool [], no step if it is true. Nobody waits here for the device to know either of the two.
    """
    optimizer.grad_scale = None if math.isinf(max_norm) else (grad_norm / max_norm).clamp(min=1).float()
    optimizer.found_inf = None if skips is None else skips.float()
    optimizer.step()


def lr_factor(step: int, total_steps: int, config: LRScheduler) -> float:
    """What the peak learning rate is multiplied by at optimizer step `step` (1 is the first).

    Linear warm-up, then a decay to `min_lr_ratio` at the last step: "cosine" (Loshchilov & Hutter 2017, arXiv
    1608.03983), "linear", "wsd" (constant until the last `decay_steps`, then linear: arXiv 2404.06395; at the earliest
    from the warm-up's end) or "constant".
    """
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    if config.decay == "constant":
        return 1.0
    start = config.warmup_steps
    if config.decay == "wsd":
        start = max(start, total_steps - config.decay_steps)
    progress = min(max((step - start) / max(total_steps - start, 1), 0.0), 1.0)
    remaining = (1 + math.cos(math.pi * progress)) / 2 if config.decay == "cosine" else 1 - progress
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * remaining


def cut_short(total_steps: int, config: LRScheduler) -> str:
    """What of the schedule has no room in so many steps, in words; nothing if all has."""
    left = total_steps - config.warmup_steps
    if left < 0:
        return f"lr_scheduler.warmup_steps = {config.warmup_steps}: the rise is not finished in {total_steps} steps"
    if left == 0:
        return f"lr_scheduler.warmup_steps = {config.warmup_steps}: the rise takes all {total_steps} steps"
    if config.decay == "wsd" and config.decay_steps > left:
        return f"lr_scheduler.decay_steps = {config.decay_steps}: the rise leaves {left} of {total_steps} for the fall"
    return ""


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets every group's learning rate, `lr` times the ratio that it was built with."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]
