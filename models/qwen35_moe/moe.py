"""Mixture of experts: router, stacked experts, shared expert."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from models.ops.grouped_experts import Activation, grouped_experts, weighted_swiglu
from models.ops.permute import combine, permute, reorder
from models.ops.precision import at_least_float32
from models.qwen35_moe.config import ModelConfig

# Shapes: T tokens, H hidden, E experts, k experts a token, R = T * k routed rows, I expert hidden.


class Measure(NamedTuple):
    """Which statistics routers take beside the counts, and of which tokens."""

    is_real: torch.Tensor | None = None
    """bool [T]: False for fillers, which pass the experts like any token but are counted nowhere. None: all real."""
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

    @classmethod
    def stack(cls, of_layers: Sequence["RouterStatistics"]) -> "RouterStatistics":
        """Those of several layers, with the layers as first dimension."""
        return cls._make(None if kind[0] is None else torch.stack(kind) for kind in zip(*of_layers))


class Routing(NamedTuple):
    """Where the routed rows go; `order` and `inverse` as in permute.py."""

    weights: torch.Tensor
    """float32 [R], of the rows sorted by expert."""
    order: torch.Tensor
    """int32 [R]"""
    inverse: torch.Tensor
    """int32 [R]"""
    offsets: torch.Tensor
    """int32 [E]: where each expert's rows end."""


class Router(nn.Module):
    """Softmax over all experts, the k largest, renormalised to sum to one. `weight` [E, H] is float32 always."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.force_balanced = False  # benchmarks only
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [T, H] -> weights float32 [T, k], experts int64 [T, k], logits and probabilities float32 [T, E]."""
        logits = F.linear(at_least_float32(x), self.weight)
        probabilities = logits.softmax(dim=-1)
        weights, experts = probabilities.topk(self.top_k, dim=-1)
        if self.force_balanced:
            experts = torch.arange(experts.numel(), device=x.device).view_as(experts) % logits.shape[-1]
            weights = probabilities.gather(-1, experts)
        return weights / weights.sum(dim=-1, keepdim=True), experts, logits, probabilities


class Experts(nn.Module):
    """The routed experts' weights, stacked: gate_up_proj [E, 2I, H] (rows: gate, then up), down_proj [E, H, I]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        num_experts, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, inner))
        self.activation: Activation = weighted_swiglu

    def forward(self, rows: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """rows [R, H] sorted by expert, their weights float32 [R], offsets int32 [E] (where each expert's rows end) ->
        [R, H]."""
        return grouped_experts(rows, self.gate_up_proj, self.down_proj, weights, offsets, self.activation)

    def arrived(self, rows: torch.Tensor) -> torch.Tensor:
        """What `forward` handed back, once it can be read: experts elsewhere may have sent it and not waited."""
        return rows


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
    """Weighted sum of each token's k experts, plus sigmoid(shared_expert_gate(x)) * shared_expert(x).

    In parts, as expert parallelism stands between them: a block calls them in turn.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_expert = SharedExpert(config)
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def route(self, x: torch.Tensor, measure: Measure) -> tuple[Routing, RouterStatistics]:
        """Decides where each row of x [T, H] goes, and tells what the router did."""
        weights, experts, logits, probabilities = self.gate(x)
        top_k = experts.shape[-1]
        # The fewer bits a key has, the fewer passes a radix sort makes.
        sorted_experts, order = experts.flatten().to(torch.int16).sort(stable=True)
        places = torch.arange(order.shape[0], dtype=torch.int32, device=x.device)
        inverse = torch.empty_like(places).scatter_(0, order, places)
        order = order.int()  # 64-bit arithmetic on indices costs a GPU more than moving the rows
        # Where each expert's rows end, by binary search: no atomics, no host synchronisation.
        ids = torch.arange(self.num_experts, dtype=torch.int16, device=x.device)
        offsets = torch.searchsorted(sorted_experts, ids, right=True, out_int32=True)  # [E]
        ends = offsets
        if measure.is_real is not None:  # where they would end without the fillers
            real_rows = measure.is_real[order // top_k].cumsum(0, dtype=torch.int32)  # [R]
            ends = F.pad(real_rows, (1, 0))[offsets]
        statistics = RouterStatistics(
            ends.diff(prepend=ends.new_zeros(1)),
            _sum_of_real(probabilities, measure) if measure.probabilities else None,
            _sum_of_real(logits.logsumexp(dim=-1).square(), measure) if measure.logsumexp else None,
        )
        return Routing(reorder(weights.flatten(), order, inverse), order, inverse, offsets), statistics

    def run_experts(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """x [T, H] -> weighted results [R, H], sorted by expert; they may still be on their way: see `arrived`."""
        return self.experts(self.gather_rows(x, routing), routing.weights, routing.offsets)

    def gather_rows(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """x [T, H] -> each token once for each of its experts, sorted by expert [R, H]."""
        return permute(x, routing.order, routing.inverse, top_k=routing.order.shape[0] // x.shape[0])

    def run_shared_expert(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, H] -> [T, H]."""
        return self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)

    def add_up(self, rows: torch.Tensor, shared: torch.Tensor, routing: Routing) -> torch.Tensor:
        """The experts' rows [R, H] and the shared expert's result [T, H] -> the layer's output [T, H]."""
        return combine(rows, routing.order, routing.inverse, top_k=rows.shape[0] // shared.shape[0]) + shared


def _sum_of_real(values: torch.Tensor, measure: Measure) -> torch.Tensor:
    """[T, ...] summed over the real tokens."""
    if measure.is_real is not None:
        values = values.where(measure.is_real.view(-1, *[1] * (values.dim() - 1)), 0.0)
    return values.sum(dim=0)
