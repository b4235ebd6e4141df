"""Mixture of experts: router, stacked experts, shared expert."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from models.ops.grouped_experts import Projection, grouped_experts
from models.ops.permute import ExpertOrder, add_up_rows, gather_rows, sort_by_expert
from models.ops.precision import at_least_float32
from models.qwen35_moe.config import ModelConfig

# Shapes: T tokens, H hidden, E experts, k experts a token, I expert hidden.


class Measure(NamedTuple):
    """Which statistics routers take beside the counts, and of which tokens."""

    is_real: torch.Tensor | None = None
    """bool [T]: False for fillers, which pass the experts like any token but are counted nowhere. Nobody reads what
    comes of them: at ep > 1 they go to whichever expert. None: all real."""
    probabilities: bool = False
    logsumexp: bool = False


COUNTS_OF_ALL = Measure()


class RouterStatistics(NamedTuple):
    """What a router did with the real tokens. Sums over tokens, so that those of micro-batches and ranks add up."""

    expert_counts: torch.Tensor
    """int32 [E]: how many tokens chose each expert; k * tokens in all."""
    probability_sums: torch.Tensor | None
    """float32 [E]: each expert's probability, differentiable. None if not asked for."""
    squared_logsumexp_sum: torch.Tensor | None
    """float32 []: the square of the logits' logsumexp, differentiable. None if not asked for."""
    num_missed: torch.Tensor | None = None
    """int32 []: how many rows had no room, where buffers have fixed sizes: see parallelisms/expert_parallel.py."""

    @classmethod
    def stack(cls, of_layers: Sequence["RouterStatistics"]) -> "RouterStatistics":
        """Those of several layers, of each kind those that have it, with the layers as first dimension."""
        kinds = ([each for each in kind if each is not None] for kind in zip(*of_layers))
        return cls._make(torch.stack(kind) if kind else None for kind in kinds)


class Router(nn.Module):
    """Softmax over all experts, the k largest, renormalised to sum to one. `weight` [E, H] is float32 always."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.dtype = torch.float32  # of the logits' product
        self.force_balanced = False  # benchmarks only
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [T, H] -> weights float32 [T, k], experts int64 [T, k], logits and probabilities float32 [T, E]."""
        out = torch.promote_types(x.dtype, torch.float32)  # float64 of a float64 model, which has all its arithmetic so
        dtype = self.dtype if out == torch.float32 else out
        logits = at_least_float32(F.linear(x.to(dtype), self.weight.to(dtype)))
        probabilities = logits.softmax(dim=-1)
        weights, experts = probabilities.topk(self.top_k, dim=-1)
        if self.force_balanced:
            experts = torch.arange(experts.numel(), device=x.device).view_as(experts) % logits.shape[-1]
            weights = probabilities.gather(-1, experts)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(out), experts, logits.to(out), probabilities.to(out)


def routed_experts(
    x: torch.Tensor, weights: torch.Tensor, order: ExpertOrder, gate_up_proj: Projection, down_proj: Projection
) -> torch.Tensor:
    """x [T, H] -> [T, H]: for each token the sum of weight * expert(x) over those of its k choices that have a row.

    All have one where all experts are here; at ep > 1 only the choices of this rank's experts do.

    weights float32 [T, k]; `order`: which of the choices have a row, and which expert's; projections as in `Experts`.
    """
    rows, row_weights = gather_rows(x, weights, order)
    rows = grouped_experts(rows, gate_up_proj, down_proj, row_weights, order.offsets)
    return add_up_rows(rows, order)


class Experts(nn.Module):
    """The routed experts' weights, stacked: gate_up_proj [E, 2I, H] (rows: gate, then up), down_proj [E, H, I]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        num_experts, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, inner))

    def projections(self) -> tuple[Projection, Projection]:
        """gate_up_proj and down_proj, as `grouped_experts` takes them."""
        return Projection(self.gate_up_proj), Projection(self.down_proj)

    def forward(self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """x [T, H], weights float32 [T, k], experts chosen, integers [T, k] -> each token's weighted sum [T, H]."""
        order = sort_by_expert(chosen, len(self.gate_up_proj))
        return routed_experts(x, weights, order, *self.projections())


class SharedExpert(nn.Module):
    """The SwiGLU feed-forward that every token passes."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.shared_expert_intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MixtureOfExperts(nn.Module):
    """Weighted sum of each token's k experts, plus sigmoid(shared_expert_gate(x)) * shared_expert(x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_expert = SharedExpert(config)
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, x: torch.Tensor, measure: Measure) -> tuple[torch.Tensor, RouterStatistics]:
        """x [T, H] -> [T, H], and what the router did.

        Expert parallelism runs the same three parts, and moves tokens in between: parallelisms/expert_parallel.py.
        """
        weights, chosen, statistics = self.route(x, measure)
        routed = self.experts(x, weights, chosen)
        return routed + self.run_shared_expert(x), statistics

    def route(self, x: torch.Tensor, measure: Measure) -> tuple[torch.Tensor, torch.Tensor, RouterStatistics]:
        """x [T, H] -> weights float32 [T, k], the experts chosen, int64 [T, k], and what the router did."""
        weights, chosen, logits, probabilities = self.gate(x)
        ones = torch.ones_like(chosen, dtype=torch.int32)
        if measure.is_real is not None:
            ones = ones * measure.is_real.unsqueeze(-1)
        counts = ones.new_zeros(self.num_experts).scatter_add(0, chosen.flatten(), ones.flatten())
        statistics = RouterStatistics(
            counts,
            _sum_of_real(probabilities, measure) if measure.probabilities else None,
            _sum_of_real(logits.logsumexp(dim=-1).square(), measure) if measure.logsumexp else None,
        )
        return weights, chosen, statistics

    def run_shared_expert(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, H] -> [T, H]."""
        return self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)


def _sum_of_real(values: torch.Tensor, measure: Measure) -> torch.Tensor:
    """[T, ...] summed over the real tokens."""
    if measure.is_real is not None:
        values = values.where(measure.is_real.view(-1, *[1] * (values.dim() - 1)), 0.0)
    return values.sum(dim=0)
