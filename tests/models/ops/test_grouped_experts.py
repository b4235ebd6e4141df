"""The grouped experts against one expert at a time."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from models.ops.grouped_experts import Projection, _grouped_mm_works, grouped_experts
from tests.models.ops.compare import OperationLog, assert_close, run

# What each dtype's rounding allows: sums of up to 64 products, two matrix products and SwiGLU. float64 rounds at 1e-16,
# float32 at 6e-8, bfloat16 at 4e-3 (rows, hidden rows and results are each rounded).
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def make_inputs(
    counts: list[int], hidden: int = 16, inner: int = 8, dtype: torch.dtype = torch.float64
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(x, gate_up_proj, down_proj, weights), offsets."""
    generator = torch.Generator().manual_seed(sum(counts))
    shapes = [(sum(counts), hidden), (len(counts), 2 * inner, hidden), (len(counts), hidden, inner), (sum(counts),)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return inputs, torch.tensor(counts).cumsum(0).to(torch.int32)


def plain(
    x: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """Without adapters."""
    return grouped_experts(x, Projection(gate_up_proj), Projection(down_proj), weights, offsets)


def loop(
    x: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor, weights: torch.Tensor, counts: list[int]
) -> torch.Tensor:
    outs = []
    for rows, gate_up, down in zip(x.split(counts), gate_up_proj, down_proj):
        gate, up = gate_up.split(gate_up.shape[0] // 2)
        outs.append(F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down))
    return torch.cat(outs) * weights.unsqueeze(-1)


Results = tuple[torch.Tensor, list[torch.Tensor]]


def both(counts: list[int], hidden: int, inner: int, dtype: torch.dtype) -> tuple[Results, Results]:
    """The grouped experts' result and gradients, and the loop's in float64."""
    inputs, offsets = make_inputs(counts, hidden, inner, dtype)
    actual = run(lambda *x: plain(*x, offsets), inputs)
    assert actual[0].dtype == dtype
    return actual, run(lambda *x: loop(*x, counts), [x.double() for x in inputs])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("counts", [[3], [5, 1, 7], [0, 4, 0], [4, 0, 0], [0, 0, 9], [0, 17, 1, 0, 0, 2], [1, 1, 1]])
def test_equals_loop(counts: list[int], dtype: torch.dtype) -> None:
    assert_close(*both(counts, 16, 8, dtype), TOLERANCES[dtype])


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.integers(1, 64),
    st.integers(1, 20),
    st.sampled_from([torch.float64, torch.float32]),
)
def test_any_width_and_counts(counts: list[int], hidden: int, inner: int, dtype: torch.dtype) -> None:
    # Sums may nearly cancel, in few rows with one inner number all of them. What is rounded is as large as without
    # signs.
    inputs, _ = make_inputs(counts, hidden, inner, dtype)
    sizes = run(lambda *x: loop(*x, counts), [x.double().abs() for x in inputs])
    of_all = (*both(counts, hidden, inner, dtype), sizes)
    for found, exact, size in zip(*([out, *gradients] for out, gradients in of_all), strict=True):
        assert found.shape == exact.shape
        assert (found - exact).norm() <= TOLERANCES[dtype] * size.norm()


def test_both_paths_are_taken() -> None:
    def works(hidden: int, inner: int, dtype: torch.dtype) -> bool:
        (x, gate_up_proj, *_), _ = make_inputs([2, 3], hidden, inner, dtype)
        return _grouped_mm_works(x, gate_up_proj)

    assert works(16, 8, torch.float32)
    assert works(16, 8, torch.bfloat16)
    assert not works(16, 8, torch.float64)
    assert not works(6, 8, torch.float32)  # rows of 24 bytes
    assert not works(12, 8, torch.bfloat16)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_no_rows(dtype: torch.dtype) -> None:
    """A rank that receives no rows still has gradients, zero, for its experts: a collective waits for them."""
    inputs, offsets = make_inputs([0, 0, 0], dtype=dtype)
    out, gradients = run(lambda *x: plain(*x, offsets), inputs)
    assert out.shape == (0, 16)
    assert [x.shape for x in gradients] == [x.shape for x in inputs]
    assert not any(x.any() for x in gradients)


def test_an_expert_without_rows_has_zero_gradients() -> None:
    inputs, offsets = make_inputs([3, 0, 4], dtype=torch.float32)
    _, (_, gate_up, down, _) = run(lambda *x: plain(*x, offsets), inputs)
    for gradient in (gate_up, down):
        assert [bool(x.any()) for x in gradient] == [True, False, True]


def test_gradient_without_strides_is_accepted() -> None:
    """`.sum()` hands back an expanded scalar."""
    inputs, offsets = make_inputs([3, 0, 4], dtype=torch.float32)
    inputs = [x.requires_grad_() for x in inputs]
    actual = torch.autograd.grad(plain(*inputs, offsets).sum(), inputs)
    expected = torch.autograd.grad((plain(*inputs, offsets) * torch.ones(7, 16)).sum(), inputs)
    for a, e in zip(actual, expected):
        assert torch.equal(a, e)


def test_weights_are_not_copied() -> None:
    inputs, offsets = make_inputs([1, 0, 2, 0, 0, 0], hidden=32, inner=16, dtype=torch.float32)
    with OperationLog() as log:
        plain(*inputs, offsets)
    views = {"transpose", "detach", "alias", "view", "split", "slice"}
    smaller_weight = inputs[2].numel()
    assert max(size for name, size in zip(log.names, log.sizes) if name not in views) < smaller_weight


def test_one_graph_whatever_the_rows() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(plain, fullgraph=True, backend=counter)
    for counts in ([2, 3, 0], [0, 9, 1], [4, 4, 5], [20, 0, 0]):
        inputs, offsets = make_inputs(counts, dtype=torch.bfloat16)
        actual = run(lambda *x, offsets=offsets: compiled(*x, offsets), inputs)
        expected = run(lambda *x, offsets=offsets: plain(*x, offsets), inputs)
        assert_close(actual, expected, TOLERANCES[torch.bfloat16])
    assert counter.frame_count <= 2  # the second graph takes any number of rows


def test_without_rows_nothing_reads_the_offsets_and_all_weights_have_gradients() -> None:
    # On a GPU the host would wait for them.
    inputs, offsets = make_inputs([0, 0, 0])
    with OperationLog() as log:
        out, gradients = run(lambda *x: plain(*x, offsets.to("meta")), inputs)
    assert out.shape == (0, 16)
    assert [g.shape for g in gradients] == [x.shape for x in inputs]
    assert not any(g.any() for g in gradients)
    assert "tensor_split" not in log.names


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0], [0, 0, 0, 20]])
def test_adapters_are_a_product_of_low_rank_added_to_each_experts_matrix(counts: list[int]) -> None:
    inputs, offsets = make_inputs(counts)
    generator = torch.Generator().manual_seed(0)
    experts = len(counts)
    shapes = [(experts, 4, 16), (experts, 16, 4), (experts, 4, 8), (experts, 16, 4)]
    adapters = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

    def low_rank(x, gate_up, down, weights, *factors: torch.Tensor) -> torch.Tensor:
        projections = Projection(gate_up, *factors[:2], 0.3), Projection(down, *factors[2:], 0.3)
        return grouped_experts(x, *projections, weights, offsets)

    def dense(x, gate_up, down, weights, *factors: torch.Tensor) -> torch.Tensor:
        a, b, c, d = factors
        return loop(x, gate_up + 0.3 * b @ a, down + 0.3 * d @ c, weights, counts)

    actual, expected = (run(function, [*inputs, *adapters]) for function in (low_rank, dense))
    assert_close(actual, expected, 1e-13)
