"""Low-rank adapters: weight + alpha / rank * B A, of which A and B alone train (Hu et al. 2021, arXiv 2106.09685).

They are put on a model without memory, from outside, before any parallelism. The weights keep their names. B is zero at
first, so that the model begins as its base; init.py has A's initial values. Adapters may be stored wider than the
weights: they are cast where they are used.

part (lora.targets)    what is adapted                      adapters, by peft's names where it has some
----------------------------------------------------------------------------------------------------------------------
attention,             every linear layer of the part,      <layer>.lora_A.weight [r, in],
linear_attention,      but not the shared expert's gate     <layer>.lora_B.weight [out, r]
shared_expert, head
experts                gate_up_proj and down_proj of each   <projection>_lora_A [E, r, in],
                                                            <projection>_lora_B [E, out, r]
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import nn

from models.ops.grouped_experts import Projection
from models.qwen35_moe.head import Head, read_out
from models.qwen35_moe.moe import Experts
from models.qwen35_moe.parts import part_of

# Shapes: T tokens, E experts, r rank.


def is_adapter(name: str) -> bool:
    """Whether the parameter of this name is an adapter's."""
    return "lora_" in name


def add_adapters(model: nn.Module, rank: int, alpha: float, targets: Collection[str]) -> None:
    """Puts adapters on these parts of the model, and has nothing else require a gradient."""
    model.requires_grad_(False)
    scale = alpha / rank
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | Experts) or part_of(f"{name}.") not in targets:
            continue
        if name.endswith("shared_expert_gate"):  # it has a single output: no rank is below its own
            continue
        adapted: nn.Module
        if isinstance(module, Experts):
            adapted = LoraExperts(module, rank, scale)
        else:
            adapted = (LoraHead if isinstance(module, Head) else LoraLinear)(module, rank, scale)
        parent, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(parent), own_name, adapted)


class LoraLinear(nn.Linear):
    """A linear layer, whose weight it takes over, with an adapter."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make another weight
        assert base.bias is None
        self.in_features, self.out_features = base.in_features, base.out_features
        self.scale: float = scale
        self.weight, self.bias = base.weight, None
        place = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A: nn.Linear = nn.Linear(base.in_features, rank, bias=False, **place)
        self.lora_B: nn.Linear = nn.Linear(rank, base.out_features, bias=False, **place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> [T, out]."""
        rows, matrix = self.low_rank(x)
        return F.linear(x, self.weight) + F.linear(rows, matrix)

    def low_rank(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, in] -> rows [T, r] and a matrix [out, r], whose product rows @ matrix^T is added to the result."""
        return F.linear(x, self.lora_A.weight.to(x.dtype)) * self.scale, self.lora_B.weight.to(x.dtype)


class LoraHead(LoraLinear):
    """The head with an adapter."""

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None, backend: str) -> torch.Tensor:  # type: ignore[override]
        """As `Head`."""
        return read_out(hidden, self.weight, labels, backend, self.low_rank(hidden))


class LoraExperts(Experts):
    """The routed experts, whose weights it takes over, each with adapters."""

    def __init__(self, base: Experts, rank: int, scale: float) -> None:
        nn.Module.__init__(self)  # Experts' own would make other weights
        self.scale = scale
        for name, weight in list(base.named_parameters()):
            num_experts, width_out, width_in = weight.shape
            self.register_parameter(name, weight)
            for factor, shape in (("A", (rank, width_in)), ("B", (width_out, rank))):
                values = torch.empty(num_experts, *shape, dtype=weight.dtype, device=weight.device)
                self.register_parameter(f"{name}_lora_{factor}", nn.Parameter(values))

    def projections(self) -> tuple[Projection, Projection]:
        """gate_up_proj and down_proj, as `grouped_experts` takes them."""
        return self._projection("gate_up_proj"), self._projection("down_proj")

    def _projection(self, name: str) -> Projection:
        weight, lora_A, lora_B = (self.get_parameter(name + of) for of in ("", "_lora_A", "_lora_B"))
        return Projection(weight, lora_A, lora_B, self.scale)
