"""Which tokens travel to which rank: each once to every rank that holds any of its experts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.ops.permute import combine
from parallelisms.expert_parallel import make_copies, plan_copies
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
