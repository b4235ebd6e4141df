"""Moving rows to their experts and back, against plain indexing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from models.ops.permute import ExpertOrder, add_up_rows, combine, gather_rows, permute, sort_by_expert
from tests.models.ops.compare import OperationLog, assert_close, run

NUM_EXPERTS = 5


def choices(num_tokens: int, top_k: int) -> torch.Tensor:
    """Experts [N, k], among them NUM_EXPERTS for none."""
    generator = torch.Generator().manual_seed(num_tokens * 31 + top_k)
    return torch.randint(NUM_EXPERTS + 1, (num_tokens, top_k), generator=generator)


def sort(chosen: torch.Tensor) -> ExpertOrder:
    order = sort_by_expert(chosen, NUM_EXPERTS)
    return order._replace(order=order.order[: int(order.offsets[-1])])


@given(st.integers(0, 9), st.integers(1, 4))
def test_rows_are_sorted_by_expert_and_then_token(num_tokens: int, top_k: int) -> None:
    chosen = choices(num_tokens, top_k)
    order, places, offsets = sort(chosen)
    pairs = [(int(expert), choice) for choice, expert in enumerate(chosen.flatten()) if expert < NUM_EXPERTS]
    assert order.tolist() == [choice for _, choice in sorted(pairs)]
    row_of = {choice: row for row, (_, choice) in enumerate(sorted(pairs))}
    assert places.flatten().tolist() == [row_of.get(choice, -1) for choice in range(num_tokens * top_k)]
    assert offsets.tolist() == [sum(expert <= of for expert, _ in pairs) for of in range(NUM_EXPERTS)]


@given(st.integers(0, 9), st.integers(1, 4), st.booleans())
def test_equals_plain_indexing(num_tokens: int, top_k: int, all_have_rows: bool) -> None:
    # 1e-15: float64; only the sums over a token's choices may be ordered differently.
    chosen = choices(num_tokens, top_k)
    order = sort(chosen % NUM_EXPERTS if all_have_rows else chosen)
    indices, tokens = order.order.long(), order.order.long() // top_k
    x, weights = (torch.randn(num_tokens, size, dtype=torch.float64) for size in (3, top_k))
    rows = torch.randn(len(indices), 3, dtype=torch.float64)

    def gathered(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        of_rows, their_weights = gather_rows(x, weights, order)
        return torch.cat([of_rows, their_weights.unsqueeze(-1)], dim=-1)

    def indexed(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[tokens], weights.flatten()[indices].unsqueeze(-1)], dim=-1)

    assert_close(run(gathered, [x, weights]), run(indexed, [x, weights]), 1e-15)
    added = run(lambda rows: add_up_rows(rows, order), [rows])
    assert_close(added, run(lambda rows: torch.zeros_like(x).index_add(0, tokens, rows), [rows]), 1e-15)


def test_a_token_without_rows_is_zero_whatever_the_last_row_holds() -> None:
    order = sort(torch.tensor([[NUM_EXPERTS, NUM_EXPERTS], [0, NUM_EXPERTS]]))
    rows = torch.tensor([[torch.inf]])
    assert add_up_rows(rows, order).tolist() == [[0.0], [torch.inf]]
    x, weights = torch.ones(2, 1, requires_grad=True), torch.ones(2, 2)
    (gradient,) = torch.autograd.grad(gather_rows(x, weights, order)[0], x, rows)
    assert gradient.tolist() == [[0.0], [torch.inf]]


def test_as_many_rows_as_choices_though_some_choices_have_none() -> None:
    """Buffers of fixed sizes: what has no row is written nowhere, also not to the last one; others are any."""
    chosen = torch.tensor([[2, 0], [NUM_EXPERTS, 1], [0, NUM_EXPERTS]])
    order, places, offsets = sort_by_expert(chosen, NUM_EXPERTS)
    assert len(order) == places.numel()
    x = torch.tensor([[1.0], [2.0], [3.0]], requires_grad=True)
    rows = permute(x, order // 2, places)
    assert rows[: int(offsets[-1])].tolist() == [[1.0], [3.0], [2.0], [1.0]]
    (gradient,) = torch.autograd.grad(rows, x, torch.tensor([[1.0], [10], [100], [1000], [torch.nan], [torch.nan]]))
    assert gradient.tolist() == [[1001.0], [100.0], [10.0]]


def test_combine_sums_bfloat16_in_float32() -> None:
    order = sort(torch.tensor([[2, 0, 1]]))
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)  # 256 + 1 is 256 in bfloat16
    assert add_up_rows(rows, order).item() == 258


@pytest.mark.parametrize("which", ["permute's", "combine's"])
def test_backward_only_gathers(which: str) -> None:
    """Scatters that add do so atomically on a GPU, in another order every run."""
    order, places, _ = sort(choices(17, 3))
    x = torch.randn(17 if which == "permute's" else len(order), 4, requires_grad=True)
    out = (permute if which == "permute's" else combine)(x, order // 3, places)
    with OperationLog() as log:
        out.backward(torch.randn_like(out))
    assert "index" in log.names
    assert not [name for name in log.names if "put" in name or "index_add" in name or "scatter" in name]


def test_one_graph() -> None:
    order = sort(choices(17, 3))

    def both(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows, row_weights = gather_rows(x, weights, order)
        return add_up_rows(rows * row_weights.unsqueeze(-1), order)

    inputs = [torch.randn(17, size) for size in (4, 3)]
    torch._dynamo.reset()
    assert_close(run(torch.compile(both, fullgraph=True, backend="aot_eager"), inputs), run(both, inputs), 0.0)


@pytest.mark.parametrize(("num_rows", "dtype"), [(2**20, torch.int32), (2**20 + 1, torch.int64)])
def test_places_have_64_bits_where_the_rows_have_too_many_elements(num_rows: int, dtype: torch.dtype) -> None:
    with FakeTensorMode(), OperationLog() as log:
        rows = torch.empty(num_rows, 2047 if dtype == torch.int32 else 2048, dtype=torch.bfloat16)
        combine(rows, torch.zeros(2, dtype=torch.int32), torch.zeros(4, 2, dtype=torch.int32))
    assert ("_to_copy" in log.names[: log.names.index("index")]) == (dtype == torch.int64)
