"""Which tokens travel to which rank: each once to every rank that holds any of its experts."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from models.ops.grouped_experts import Projection
from models.ops.permute import combine
from parallelisms.expert_parallel import _local, make_copies, plan_copies
from tests.distributed import run_ranks
from tests.models.ops.compare import assert_close, run

NUM_LOCAL = 3


@given(st.integers(1, 9), st.integers(1, 4), st.sampled_from([2, 3, 4, 8]), st.integers(0, 2**31))
def test_a_token_goes_once_to_each_rank_that_holds_any_of_its_experts(
    num_tokens: int, top_k: int, num_ranks: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, NUM_LOCAL * num_ranks, generator=generator)
    chosen = scores.topk(top_k, dim=1)[1]
    pairs = sorted({(int(e) // NUM_LOCAL, token) for token, experts in enumerate(chosen) for e in experts})
    _, ends, counts, places = plan_copies(chosen, num_ranks, NUM_LOCAL)
    of_ranks = [rank for rank, _ in pairs]
    rows_of_ranks = (chosen // NUM_LOCAL).flatten().tolist()
    assert counts.tolist() == [[of_ranks.count(rank), rows_of_ranks.count(rank)] for rank in range(num_ranks)]

    x = torch.randn(num_tokens, 2, generator=generator, dtype=torch.float64)
    weights = torch.rand(num_tokens, top_k, generator=generator, dtype=torch.float64)
    rest = chosen, ends, places, torch.arange(1, len(pairs) + 1)
    copies, packed, sources = make_copies(x, weights, *rest)
    tokens = torch.tensor([token for _, token in pairs])
    assert torch.equal(sources.long(), tokens)
    assert torch.equal(copies, x[tokens])
    assert torch.equal(packed, torch.cat([weights, chosen], dim=1)[tokens])
    assert places.shape == (num_tokens, min(top_k, num_ranks))
    for token, of_token in enumerate(places.tolist()):  # each of its copies stands there once
        assert sorted(place for place in of_token if place >= 0) == [i for i, (_, t) in enumerate(pairs) if t == token]

    # Gradients, too, against plain indexing; 1e-15: float64, sums of a token's copies in another order.
    made = run(lambda x: make_copies(x, weights, *rest)[0], [x])
    assert_close(made, run(lambda x: x[tokens], [x]), 1e-15)
    made = run(lambda w: make_copies(x, w, *rest)[1][:, :top_k], [weights])
    assert_close(made, run(lambda w: w[tokens], [weights]), 1e-15)
    added = run(lambda rows: combine(rows, sources, places), [copies])
    assert_close(added, run(lambda rows: torch.zeros_like(x).index_add(0, tokens, rows), [copies]), 1e-15)


@pytest.mark.parametrize("num_ranks", [2, 8])  # fewer than experts a token, and more
def test_the_plan_is_one_graph(num_ranks: int) -> None:
    chosen = torch.rand(5, 3 * num_ranks).topk(4, dim=1)[1]
    torch._dynamo.reset()
    compiled = torch.compile(plan_copies, fullgraph=True, backend="aot_eager")(chosen, num_ranks, 3)
    assert all(map(torch.equal, compiled, plan_copies(chosen, num_ranks, 3)))


def gradients_of_local_parts() -> list[tuple[torch.Tensor, tuple[int, ...], bool] | None]:
    """Of this rank's part of experts, of gradients that lie otherwise than it, by `DTensor.to_local` and by ours: the
    gradient, its strides, and whether it is sharded as the experts are. And of a part that no gradient comes to."""
    mesh, found = init_device_mesh("cpu", (2,)), []
    numbers = torch.arange(24.0).view(4, 2, 3)
    for to_local in (DTensor.to_local, lambda each: _local(Projection(each)).weight):
        experts = torch.nn.Parameter(distribute_tensor(numbers, mesh, [Shard(0)]))
        (to_local(experts).mT.contiguous() * torch.arange(12.0).view(2, 3, 2)).sum().backward()
        assert isinstance(experts.grad, DTensor)
        part = experts.grad.to_local()
        found.append((part, part.stride(), experts.grad.placements == (Shard(0),)))
    experts = torch.nn.Parameter(distribute_tensor(numbers, mesh, [Shard(0)]))
    torch.nn.functional.relu(WithoutGradient.apply(_local(Projection(experts)).weight)).sum().backward()
    return [*found, experts.grad]


class WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> None:
        return None


def test_a_local_parts_gradient_is_that_of_to_local() -> None:
    for of_torch, of_ours, of_none in run_ranks(gradients_of_local_parts, 2):
        assert torch.equal(of_torch[0], of_ours[0])
        assert of_torch[1:] == of_ours[1:] == ((6, 3, 1), True)
        assert of_none is None
