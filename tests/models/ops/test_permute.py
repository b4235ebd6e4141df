"""Moving rows to their experts and back, against plain indexing."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code

from models.ops.permute import ExpertOrder, combine, permute, permute_weighted, sort_by_expert
from tests.models.ops.compare import OperationLog, assert_close, run

NUM_EXPERTS = 5


def choices(num_tokens: int, top_k: int) -> torch.Tensor:
    """Experts [N, k], among them NUM_EXPERTS for none."""
    generator = torch.Generator().manual_seed(num_tokens * 31 + top_k)
    return torch.randint(NUM_EXPERTS + 1, (num_tokens, top_k), generator=generator)


def sort(chosen: torch.Tensor) -> tuple[ExpertOrder, int]:
    """Their order, and how many rows there are."""
    return sort_by_expert(chosen, NUM_EXPERTS), int((chosen < NUM_EXPERTS).sum())


def sources(places: torch.Tensor, num_rows: int) -> torch.Tensor:
    """int64 [R]: which choice each row is."""
    found = [places.flatten().tolist().index(row) for row in range(num_rows)]
    return torch.tensor(found, dtype=torch.int64)


@settings(deadline=None)  # the first calls may be slow
@given(st.integers(0, 9), st.integers(1, 4))
def test_rows_are_sorted_by_expert_and_then_token(num_tokens: int, top_k: int) -> None:
    chosen = choices(num_tokens, top_k)
    (places, offsets), _ = sort(chosen)
    pairs = [(int(expert), choice) for choice, expert in enumerate(chosen.flatten()) if expert < NUM_EXPERTS]
    row_of = {choice: row for row, (_, choice) in enumerate(sorted(pairs))}
    assert places.flatten().tolist() == [row_of.get(choice, -1) for choice in range(num_tokens * top_k)]
    assert offsets.tolist() == [sum(expert <= of for expert, _ in pairs) for of in range(NUM_EXPERTS)]


@settings(deadline=None)
@given(st.integers(0, 9), st.integers(1, 4))
def test_equals_plain_indexing(num_tokens: int, top_k: int) -> None:
    # 1e-15: float64; only the sums over a token's choices may be ordered differently.
    (places, _), num_rows = sort(choices(num_tokens, top_k))
    chosen = sources(places, num_rows)
    x, weights = (torch.randn(num_tokens, size, dtype=torch.float64) for size in (3, top_k))
    rows = torch.randn(num_rows, 3, dtype=torch.float64)

    def permuted(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        of_rows, their_weights = permute_weighted(x, weights, places, num_rows)
        return torch.cat([of_rows, their_weights.unsqueeze(-1)], dim=-1)

    def indexed(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[chosen // top_k], weights.flatten()[chosen].unsqueeze(-1)], dim=-1)

    assert_close(run(permuted, [x, weights]), run(indexed, [x, weights]), 1e-15)
    combined = run(lambda rows: combine(rows, places), [rows])
    assert_close(combined, run(lambda rows: torch.zeros_like(x).index_add(0, chosen // top_k, rows), [rows]), 1e-15)


def test_a_token_without_rows_is_zero_whatever_the_last_row_holds() -> None:
    (places, _), num_rows = sort(torch.tensor([[NUM_EXPERTS, NUM_EXPERTS], [0, NUM_EXPERTS]]))
    rows = torch.tensor([[torch.inf]])
    assert combine(rows, places).tolist() == [[0.0], [torch.inf]]
    x = torch.ones(2, 1, requires_grad=True)
    (gradient,) = torch.autograd.grad(permute(x, places, num_rows), x, rows)
    assert gradient.tolist() == [[0.0], [torch.inf]]


def test_combine_sums_bfloat16_in_float32() -> None:
    (places, _), _ = sort(torch.tensor([[2, 0, 1]]))
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)  # 256 + 1 is 256 in bfloat16
    assert combine(rows, places).item() == 258


@pytest.mark.parametrize("which", [permute, combine])
def test_backward_adds_nothing_up_in_memory(which: Callable[..., torch.Tensor]) -> None:
    """Such additions are atomic on a GPU, in another order every run."""
    (places, _), num_rows = sort(choices(17, 3))
    x = torch.randn(17 if which is permute else num_rows, 4, requires_grad=True)
    out = permute(x, places, num_rows) if which is permute else combine(x, places)
    with OperationLog() as log:
        out.backward(torch.randn_like(out))
    assert ("index" if which is permute else "index_put_") in log.names
    assert not [name for name in log.names if "add_" in name or "scatter" in name or "accumulate" in name]


def test_one_graph() -> None:
    (places, _), num_rows = sort(choices(17, 3))

    def both(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows, row_weights = permute_weighted(x, weights, places, num_rows)
        return combine(rows * row_weights.unsqueeze(-1), places)

    inputs = [torch.randn(17, size) for size in (4, 3)]
    torch._dynamo.reset()
    assert_close(run(torch.compile(both, fullgraph=True, backend="aot_eager"), inputs), run(both, inputs), 0.0)


def test_compiled_permute_writes_each_row_once_and_nothing_before() -> None:
    (places, _), num_rows = sort(choices(17, 3))
    torch._dynamo.reset()
    x = torch.randn(17, 4)
    out, (code, *_) = run_and_get_code(torch.compile(permute), x, places, num_rows)
    assert torch.equal(out, permute(x, places, num_rows))
    # One kernel with one store: neither a fill before nor a copy after.
    assert (code.count('extern "C"'), code.count(".store(out_ptr")) == (1, 1), code
