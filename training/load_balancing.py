"""Losses on the routers' choices, from a micro-batch's statistics: even load over experts, and small logits."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from config.options import MoE
from models.qwen35_moe.moe import Measure, RouterStatistics

# Shapes: L layers, E experts.


class RouterLosses(NamedTuple):
    """This rank's shares of a micro-step's losses, scalars that add up over all ranks; 0 for a loss that is off."""

    aux: torch.Tensor
    z: torch.Tensor


def measure_for(config: MoE, is_real: torch.Tensor | None = None) -> Measure:
    """What routers have to measure for the losses that are on; `is_real` as in Measure."""
    return Measure(is_real, probabilities=config.aux_loss_coef > 0, logsumexp=config.z_loss_coef > 0)


def router_losses(
    statistics: RouterStatistics,
    config: MoE,
    top_k: int,
    num_micro_batches: int = 1,
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
    sum_over_micro_batch: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
) -> RouterLosses:
    """The losses of the tokens of the `num_micro_batches` of this micro-step, without their coefficients.

    statistics: this rank's, of all layers. `sum_over_ranks` adds up an int64 [L, E] tensor that it may overwrite; it is
    called once at most, and never where both losses are off; `sum_over_micro_batch` the same over the ranks that share
    this rank's micro-batch, for the scope "hf" alone. Gradients flow through this rank's statistics alone.
    """
    counts, probability_sums, squared_logsumexp_sums, _ = statistics
    aux = z = torch.zeros((), device=counts.device)
    of_all_ranks = counts
    if squared_logsumexp_sums is not None or (probability_sums is not None and config.aux_loss_scope == "global"):
        of_all_ranks = sum_over_ranks(counts.long())  # each token counts k times: this tells how many there are, too
    if probability_sums is not None:
        if config.aux_loss_scope == "hf":
            of_micro_batch = sum_over_micro_batch(counts.long())
            aux = aux_loss(of_micro_batch, probability_sums, top_k, pooled=True) / num_micro_batches
        else:
            aux = aux_loss(of_all_ranks, probability_sums, top_k, pooled=False)
    if squared_logsumexp_sums is not None:
        z = z_loss(of_all_ranks, squared_logsumexp_sums, top_k)
    return RouterLosses(aux, z)


def aux_loss(counts: torch.Tensor, probability_sums: torch.Tensor, top_k: int, pooled: bool) -> torch.Tensor:
    """E * sum over experts of f * P (Fedus et al. 2021, arXiv 2101.03961); k where the load is even.

    counts int [L, E], probability_sums float [L, E] -> scalar. f: how many of the counted tokens chose the expert, over
    their number; P: the sum of its probabilities over that same number, so that with the counts of all ranks it is this
    rank's share. Not pooled: the mean over layers of each layer's loss. Pooled: f and P are means over layers and there
    is one loss, as in transformers.
    """
    if pooled:
        counts, probability_sums = counts.sum(dim=0, keepdim=True), probability_sums.sum(dim=0, keepdim=True)
    num_tokens = _num_tokens(counts, top_k).unsqueeze(-1)
    products = (counts.to(probability_sums.dtype) / num_tokens) * (probability_sums / num_tokens)
    return counts.shape[-1] * products.sum(dim=-1).mean()


def z_loss(counts: torch.Tensor, squared_logsumexp_sums: torch.Tensor, top_k: int) -> torch.Tensor:
    """Mean over tokens and layers of logsumexp(logits)^2 (Zoph et al. 2022, arXiv 2202.08906), this rank's share.

    counts int [L, E], of all ranks; squared_logsumexp_sums float [L], this rank's -> scalar.
    """
    return (squared_logsumexp_sums / _num_tokens(counts, top_k)).mean()


def _num_tokens(counts: torch.Tensor, top_k: int) -> torch.Tensor:
    """[L, E] -> [L]; 1 for none, as what it divides is then 0."""
    return (counts.sum(dim=-1) // top_k).clamp(min=1)
