"""In a compiled backward pass the exchange is launched before the products that it can run beside."""

from unittest.mock import patch

import torch
import torch.distributed as dist

from parallelisms.exchange import Receive, Send
from parallelisms.overlap import OVERLAPPING
from tests.distributed import run_ranks
from tests.models.qwen35_moe.shapes import tiny_config
from tests.parallelisms.layouts import Layout, build

CONFIG = tiny_config(linear_num_key_heads=2, linear_num_value_heads=4)


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


def options_of_blocks(layouts: list[Layout]) -> list[set[bool]]:
    """Whether what holds exchanges is compiled for overlap."""
    found = []
    for layout in layouts:
        of_module, of_function = patch.object(torch.nn.Module, "compile"), patch.object(torch, "compile")
        with of_module as compile_module, of_function as compile_function:
            build(CONFIG, layout)
        calls = [*compile_module.call_args_list, *compile_function.call_args_list]
        found.append({call.kwargs["options"] is OVERLAPPING for call in calls if "options" in call.kwargs})
    return found


def test_exchanges_overlap_unless_tokens_are_shared_and_memory_is_short() -> None:
    expected = {
        Layout(world=2, compile=True): False,
        Layout(world=2, cp=2, compile=True): True,
        Layout(world=2, cp=2, activation_checkpoint="selective", compile=True): True,
        Layout(world=2, cp=2, activation_checkpoint="full", compile=True): False,
        Layout(world=2, ep=2, activation_checkpoint="full", compile=True): True,
        Layout(world=2, ep=2, cp=2, compile=True): True,
        Layout(world=2, ep=2, cp=2, room=8.0, activation_checkpoint="full", compile=True): False,
    }
    assert run_ranks(options_of_blocks, 2, list(expected)) == [[{each} for each in expected.values()]] * 2
