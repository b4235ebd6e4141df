"""The plain operations on a GPU in bfloat16, as training runs them, against the same values in float64 on the CPU."""

from collections.abc import Callable

import pytest
import torch

from models.ops.documents import Documents
from models.ops.gated_delta_rule import gated_delta_rule
from models.ops.kernels import select_kernels
from models.ops.linear_cross_entropy import linear_cross_entropy
from models.ops.permute import ExpertOrder, add_up_rows, gather_rows, sort_by_expert
from models.ops.precision import at_least_float32
from tests.models.ops.compare import assert_close, run
from tests.models.ops.test_grouped_experts import plain

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

DEVICE = torch.device("cuda")
LENGTHS = [1, 64, 130, 5]
NUM_TOKENS = sum(LENGTHS)

# 2%: bfloat16 rounds at 0.4%, and the longest chains (two matrix products and SwiGLU, or the delta rule's inputs,
# gradients and result) round a few times.
TOLERANCE = 2e-2


def random(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def check(
    operation: Callable[..., torch.Tensor],
    inputs: list[torch.Tensor],
    *integers: torch.Tensor,
    compiled: bool,
    fullgraph: bool = True,
) -> None:
    """`operation(*inputs, *integers, documents)`, the floating-point inputs rounded to bfloat16 on both sides."""
    inputs = [x.bfloat16() for x in inputs]
    torch._dynamo.reset()
    function = torch.compile(operation, fullgraph=fullgraph) if compiled else operation
    documents = Documents.from_lengths(LENGTHS, DEVICE)
    on_device = [x.to(DEVICE) for x in integers]
    out, gradients = run(lambda *x: function(*x, *on_device, documents), [x.to(DEVICE) for x in inputs])
    documents = Documents.from_lengths(LENGTHS)
    expected = run(lambda *x: operation(*x, *integers, documents), [x.double() for x in inputs])
    assert_close((out.cpu(), [x.cpu() for x in gradients]), expected, TOLERANCE)


def test_gated_delta_rule() -> None:
    q, k, v, g, beta = random((NUM_TOKENS, 2, 32), (NUM_TOKENS, 2, 32), (NUM_TOKENS, 4, 32), *2 * [(NUM_TOKENS, 4)])

    def rule(*x: torch.Tensor) -> torch.Tensor:
        q, k, v, g, beta, documents = x
        return gated_delta_rule(q, k, v, -at_least_float32(g).exp(), beta, documents)

    check(rule, [q, k, v, g, beta.sigmoid()], compiled=False)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend", ["fla", "flash_qla"])
def test_gated_delta_rule_kernels(backend: str, compiled: bool) -> None:
    """The 35B model's heads, documents of one token up to several chunks, compiled as one graph."""
    try:
        select_kernels({"gated_delta_rule": backend}, "cuda", torch.bfloat16, (128, 128), 4, 256)
    except ValueError as error:
        pytest.skip(str(error))
    q, k, v, g, beta = random(
        (NUM_TOKENS, 16, 128), (NUM_TOKENS, 16, 128), (NUM_TOKENS, 32, 128), *2 * [(NUM_TOKENS, 32)]
    )

    def rule(*x: torch.Tensor) -> torch.Tensor:
        q, k, v, g, beta, documents = x
        decay = -at_least_float32(g).exp()
        return gated_delta_rule(q, k, v, decay, beta, documents, backend=backend if v.is_cuda else "torch")

    check(rule, [q, k, v, g, beta.sigmoid()], compiled=compiled)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("counts", [[3, 0, 70, 1], [0, 0, 0, 200]])
@pytest.mark.parametrize("inner", [32, 40, 1032])  # of a kernel's block: 1024 at most
@pytest.mark.parametrize("num_unread", [0, 9])
def test_grouped_experts(counts: list[int], inner: int, num_unread: int, compiled: bool) -> None:
    offsets, num_rows = torch.tensor(counts).cumsum(0).to(torch.int32), sum(counts)
    inputs = random((num_rows + num_unread, 64), (4, 2 * inner, 64), (4, 64, inner), (num_rows + num_unread,))

    def of_rows(*args: torch.Tensor) -> torch.Tensor:
        x, gate_up, down, weights, offsets, _ = args
        # What comes after the last expert's rows is any; its gradients, which are too, are read by nobody.
        reads = torch.arange(len(x), device=x.device) < num_rows
        x, weights = x.where(reads.unsqueeze(1), torch.nan), weights.where(reads, torch.nan)
        return plain(x, gate_up, down, weights, offsets)[:num_rows]

    check(
        of_rows,
        inputs,
        offsets,
        compiled=compiled,
    )


def test_grouped_experts_without_rows() -> None:
    offsets = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    inputs = [x.to(DEVICE, torch.bfloat16) for x in random((0, 64), (4, 64, 64), (4, 64, 32), (0,))]
    out, gradients = run(lambda *x: plain(*x, offsets), inputs)
    assert out.shape == (0, 64)
    assert not any(x.any() for x in gradients)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("all_have_rows", [False, True])
def test_permute(all_have_rows: bool, compiled: bool) -> None:
    chosen = torch.randint(4 if all_have_rows else 5, (NUM_TOKENS, 2), generator=torch.Generator().manual_seed(0))
    order = sort_by_expert(chosen, 4)
    order = order._replace(order=order.order[: int(order.offsets[-1])])  # choices of 4 have no row

    def both(
        x: torch.Tensor,
        weights: torch.Tensor,
        order: torch.Tensor,
        places: torch.Tensor,
        offsets: torch.Tensor,
        _: Documents,
    ) -> torch.Tensor:
        expert_order = ExpertOrder(order, places, offsets)
        rows, row_weights = gather_rows(x, weights, expert_order)
        return add_up_rows(rows * row_weights.unsqueeze(-1), expert_order)

    check(both, random((NUM_TOKENS, 64), (NUM_TOKENS, 2)), *order, compiled=compiled)


@pytest.mark.parametrize("compiled", [False, True])
def test_linear_cross_entropy(compiled: bool) -> None:
    labels = torch.arange(NUM_TOKENS) % 300
    labels[::3] = -100
    hidden, weight = random((NUM_TOKENS, 64), (300, 64))

    def loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, _: Documents) -> torch.Tensor:
        return linear_cross_entropy(hidden, weight, labels, 64, backend="compiled" if hidden.is_cuda else "torch")

    check(loss, [hidden, weight / 8], labels, compiled=compiled, fullgraph=False)
