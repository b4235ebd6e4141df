"""Mixture of experts: router, stacked experts, shared expert."""

import torch
import torch.nn.functional as F
from torch import nn

from models.ops.grouped_experts import grouped_experts
from models.ops.permute import permute, unpermute
from models.ops.precision import at_least_float32
from models.qwen35_moe.config import ModelConfig

# Shapes: T tokens, H hidden, E experts, k experts a token, R = T * k routed rows, I expert hidden.


class Router(nn.Module):
    """Softmax over all experts, the k largest, renormalised to sum to one. `weight` [E, H] is float32 always."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, H] -> weights float32 [T, k], experts int64 [T, k]."""
        probabilities = F.linear(at_least_float32(x), self.weight).softmax(dim=-1)
        weights, experts = probabilities.topk(self.top_k, dim=-1)
        return weights / weights.sum(dim=-1, keepdim=True), experts


class Experts(nn.Module):
    """The routed experts' weights, stacked: gate_up_proj [E, 2I, H] (rows: gate, then up), down_proj [E, H, I]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        num_experts, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, inner))

    def forward(self, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """rows [R, H] sorted by expert, offsets int32 [E] (where each expert's rows end) -> [R, H]."""
        return grouped_experts(rows, self.gate_up_proj, self.down_proj, offsets)


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

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, H] -> output [T, H], and how many rows each expert was given: int32 [E]."""
        weights, experts = self.gate(x)
        num_tokens, top_k = experts.shape
        sorted_experts, order = experts.flatten().sort(stable=True)
        inverse = order.argsort()
        # Where each expert's rows end, by binary search: no atomics, no host synchronisation.
        ids = torch.arange(self.num_experts, device=x.device)
        offsets = torch.searchsorted(sorted_experts, ids, right=True, out_int32=True)  # [E]
        rows = self.experts(permute(x, order, inverse, top_k), offsets)
        rows = unpermute(rows, order, inverse).view(num_tokens, top_k, -1)
        routed = (rows * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)
        shared = self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)
        return routed + shared, offsets.diff(prepend=offsets.new_zeros(1))
