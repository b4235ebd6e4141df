"""In a compiled backward pass the exchange is launched before the products that it can run beside."""

import torch
import torch.distributed as dist

from parallelisms.exchange import Receive, Send
from parallelisms.overlap import OVERLAPPING
from tests.distributed import run_ranks


def order_of_backward_pass() -> list[str]:
    """Which exchanges and products follow each other, of a product with rows that have travelled."""
    assert dist.group.WORLD is not None
    name = dist.group.WORLD.group_name

    def compute(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return Receive.apply(Send.apply(rows * 2, name, 1), name, 1) @ weight

    rows, weight = (torch.randn(16, 16, requires_grad=True) for _ in range(2))
    compiled = torch.compile(compute, options=OVERLAPPING, fullgraph=True)
    compiled(rows, weight).square().sum().backward()  # compiles both passes
    result = compiled(rows, weight)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result.square().sum().backward()
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    names = [each.name.split("::")[-1] for each in events]
    return [name for name in names if name in ("mm", "all_to_all_single", "wait_tensor")]


def test_an_exchange_is_launched_before_what_it_can_run_beside() -> None:
    (order,) = run_ranks(order_of_backward_pass, 1)
    products = [index for index, name in enumerate(order) if name == "mm"]
    # The rows' gradients are made and launched; and while they travel, the weight's.
    assert products[0] < order.index("all_to_all_single") < products[-1] < order.index("wait_tensor"), order
