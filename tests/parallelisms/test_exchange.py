"""Exchanges of rows between ranks: what arrives, and the gradients that go back, of either kind."""

import torch
import torch.distributed as dist

from parallelisms.exchange import Exchange, Receive, Send
from tests.distributed import run_ranks

SENT = ([2, 1], [0, 3])  # rows that each of two ranks sends to each


def exchange(even: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What this rank receives of rows 10 * rank + number, and its rows' gradients where rank r weighs by r + 1."""
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    sent = [2, 2] if even else list(SENT[rank])
    rows = (10.0 * rank + torch.arange(sum(sent))).view(-1, 1).requires_grad_()
    if even:
        received = Receive.apply(Send.apply(rows, group.group_name, 2), group.group_name, 2)
    else:
        of_sizes = Exchange(sent, [sent[rank] for sent in SENT], group)
        received = of_sizes.finish(of_sizes.start(rows))
    (received * (rank + 1)).sum().backward()
    assert rows.grad is not None
    return received.detach().flatten(), rows.grad.flatten()


def test_even_sizes() -> None:
    (first, of_first), (second, of_second) = run_ranks(exchange, 2, True)
    assert (first.tolist(), second.tolist()) == ([0, 1, 10, 11], [2, 3, 12, 13])
    assert of_first.tolist() == of_second.tolist() == [1, 1, 2, 2]


def test_sizes_that_the_host_knows() -> None:
    (first, of_first), (second, of_second) = run_ranks(exchange, 2, False)
    assert (first.tolist(), second.tolist()) == ([0, 1], [2, 10, 11, 12])
    assert (of_first.tolist(), of_second.tolist()) == ([1, 1, 2], [2, 2, 2])
