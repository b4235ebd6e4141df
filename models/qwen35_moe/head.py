"""The head: from hidden states to logits, or to their loss without ever holding all of them."""

import torch
import torch.nn.functional as F
from torch import nn

from models.ops.linear_cross_entropy import linear_cross_entropy

# Shapes: T tokens, H hidden, V vocabulary, r rank of an adapter.


def read_out(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor | None,
    backend: str,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """hidden [T, H], weight [V, H], labels int64 [T] -> the sum of the losses in nats, a scalar; without labels the
    logits [T, V]. backend, low_rank: see linear_cross_entropy.py."""
    if labels is not None:
        return linear_cross_entropy(hidden, weight, labels, low_rank=low_rank, backend=backend)
    logits = F.linear(hidden, weight)
    return logits if low_rank is None else logits + F.linear(*low_rank)


class Head(nn.Linear):
    """A head with a weight of its own; one that is tied has the embedding's, and no module. All that its weight is read
    for is in its forward, so that it can be a unit of FSDP where that is called once (parallelisms/units.py)."""

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None, backend: str) -> torch.Tensor:  # type: ignore[override]
        """As `read_out`."""
        return read_out(hidden, self.weight, labels, backend)
