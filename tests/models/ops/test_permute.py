"""Permuting rows to their experts and back, against plain indexing."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.ops.permute import combine, permute, reorder
from tests.models.ops.compare import OperationLog, assert_close, run


def routing(num_tokens: int, top_k: int, num_experts: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """order and inverse of a random routing."""
    generator = torch.Generator().manual_seed(num_tokens * 31 + top_k)
    experts = torch.randint(num_experts, (num_tokens * top_k,), generator=generator)
    order = experts.argsort(stable=True)
    return order, order.argsort()


@settings(deadline=None)  # the first calls may be slow
@given(st.integers(0, 9), st.integers(1, 4))
def test_equals_plain_indexing(num_tokens: int, top_k: int) -> None:
    # 1e-15: float64; only the sums over a token's k choices may be ordered differently.
    order, inverse = routing(num_tokens, top_k)
    x = torch.randn(num_tokens, 3, dtype=torch.float64)
    rows = torch.randn(num_tokens * top_k, 3, dtype=torch.float64)
    permuted = run(lambda x: permute(x, order, inverse, top_k), [x])
    assert_close(permuted, run(lambda x: x.repeat_interleave(top_k, dim=0)[order], [x]), 1e-15)
    combined = run(lambda rows: combine(rows, order, inverse, top_k), [rows])
    assert_close(combined, run(lambda rows: rows[inverse].view(-1, top_k, 3).sum(dim=1), [rows]), 1e-15)
    reordered = run(lambda rows: reorder(rows, inverse, order), [rows])
    assert_close(reordered, run(lambda rows: rows[inverse], [rows]), 0.0)


def test_round_trip_gives_each_token_k_times() -> None:
    order, inverse = routing(17, 3)
    x = torch.randn(17, 4)
    back = reorder(permute(x, order, inverse, 3), inverse, order)
    assert torch.equal(back, x.repeat_interleave(3, dim=0))


def test_rows_are_sorted_by_expert_and_choices_come_back_in_order() -> None:
    experts = torch.tensor([[2, 0], [1, 2], [0, 1]])
    order = experts.flatten().argsort(stable=True)
    inverse = order.argsort()
    tokens = torch.arange(3.0).unsqueeze(-1)
    assert permute(tokens, order, inverse, 2).flatten().tolist() == [0, 2, 1, 2, 0, 1]
    sorted_experts = experts.flatten()[order].unsqueeze(-1)
    assert reorder(sorted_experts, inverse, order).view(3, 2).tolist() == experts.tolist()


def test_combine_sums_bfloat16_in_float32() -> None:
    order, inverse = routing(1, 3)
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)[order]  # 256 + 1 is 256 in bfloat16
    assert combine(rows, order, inverse, 3).item() == 258


@pytest.mark.parametrize("which", [permute, combine, reorder])
def test_backward_only_gathers(which: Callable[..., torch.Tensor]) -> None:
    """Scatters add atomically on a GPU, in another order every run."""
    order, inverse = routing(17, 3)
    x = torch.randn(17 if which is permute else 51, 4, requires_grad=True)
    out = which(x, order, inverse) if which is reorder else which(x, order, inverse, 3)
    with OperationLog() as log:
        out.backward(torch.randn_like(out))
    assert "index" in log.names
    assert not [name for name in log.names if "put" in name or "index_add" in name or "scatter" in name]


def test_one_graph() -> None:
    order, inverse = routing(17, 3)
    x = torch.randn(17, 4)

    def both(x: torch.Tensor) -> torch.Tensor:
        return combine(reorder(permute(x, order, inverse, 3), inverse, order)[order], order, inverse, 3)

    torch._dynamo.reset()
    assert_close(run(torch.compile(both, fullgraph=True, backend="aot_eager"), [x]), run(both, [x]), 0.0)
