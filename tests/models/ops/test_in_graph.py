"""Plain loops as operations of a compiled block: the function's own values and gradients, of what wants one."""

from collections.abc import Callable

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from models.ops import attention, gated_delta_rule, grouped_experts

# Documents of one token and of many; experts without rows, and rows of none.
BOUNDS = torch.tensor([0, 1, 71, 76], dtype=torch.int32)
OFFSETS = torch.tensor([0, 30, 30, 70], dtype=torch.int32)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def of_attention() -> tuple[Callable, Callable, list[torch.Tensor], list]:
    return attention._sdpa, attention._each_by_itself, [draw(76, 4, 8), draw(76, 2, 8), draw(76, 2, 8)], [BOUNDS, True]


def of_delta_rule() -> tuple[Callable, Callable, list[torch.Tensor], list]:
    inputs = [draw(76, 2, 8), draw(76, 2, 8), draw(76, 4, 6), -draw(76, 4).abs(), draw(76, 4).sigmoid()]
    return gated_delta_rule._chunked, gated_delta_rule._in_chunks, inputs, [BOUNDS]


def of_experts() -> tuple[Callable, Callable, list[torch.Tensor], list]:
    return grouped_experts._loop, grouped_experts._each_by_itself, [draw(76, 5), draw(4, 3, 5)], [OFFSETS]


OPERATIONS = [of_attention, of_delta_rule, of_experts]


def gradients(function: Callable, inputs: list[torch.Tensor], others: list, frozen: int | None) -> list:
    """The result, and the gradient of each input; of the `frozen` one None."""
    inputs = [x.clone().requires_grad_(index != frozen) for index, x in enumerate(inputs)]
    out = function(*inputs, *others)
    out.backward(torch.ones((), dtype=out.dtype).expand_as(out))  # without strides of its own
    return [out.detach(), *(x.grad for x in inputs)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_graph_holds_it_and_computes_the_same(operation: Callable, dtype: torch.dtype) -> None:
    function, plain, inputs, others = operation()
    inputs = [x.to(dtype) for x in inputs]
    for frozen in (None, *range(len(inputs))):
        torch.compiler.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(lambda *arguments: function(*arguments), backend=counter, fullgraph=True)
        expected = gradients(plain, inputs, others, frozen)
        for called in (compiled, function):
            for found, other in zip(gradients(called, inputs, others, frozen), expected):
                assert (found is None and other is None) or torch.equal(found, other)  # the same arithmetic
        assert counter.frame_count == 1


@pytest.mark.parametrize("operation", OPERATIONS)
def test_it_is_what_torch_expects_of_an_operation(operation: Callable) -> None:
    function, _, inputs, others = operation()
    name = {attention._sdpa: "sdpa", gated_delta_rule._chunked: "chunked_delta_rule"}.get(function, "grouped_linear")
    tracked = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(getattr(torch.ops.qwen35_moe, name).default, (*tracked, *others))


def test_a_stream_without_rows_and_without_gradients() -> None:
    function, plain, (x, weight), _ = of_experts()
    nothing = torch.zeros(4, dtype=torch.int32)
    compiled = torch.compile(lambda *arguments: function(*arguments), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, weight, nothing), plain(x, weight, nothing))  # rows of no expert: zeros
    with torch.no_grad():
        assert torch.equal(compiled(x, weight, OFFSETS), plain(x, weight, OFFSETS))
