"""The mixture of experts against a loop over tokens, and what its router counts."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTopKRouter

import train
from config.reading import load_config
from models.qwen35_moe.model import Qwen35Moe
from models.qwen35_moe.moe import Measure, MixtureOfExperts, Router
from tests.models.qwen35_moe.shapes import tiny_config


def mixture(**changes: int) -> MixtureOfExperts:
    module = MixtureOfExperts(tiny_config(**changes))
    for number, parameter in enumerate(module.parameters()):
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(number))
    return module.double()


def one_token(module: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    """As the formula says: softmax over all, the k largest, renormalised, and the shared expert behind its gate."""
    probabilities = (module.gate.weight @ x).softmax(0)
    weights, chosen = probabilities.topk(module.gate.top_k)
    out = torch.zeros_like(x)
    for weight, expert in zip(weights / weights.sum(), chosen):
        gate, up = (module.experts.gate_up_proj[expert] @ x).chunk(2)
        out = out + weight * (module.experts.down_proj[expert] @ (F.silu(gate) * up))
    shared = module.shared_expert
    inner = F.silu(shared.gate_proj.weight @ x) * (shared.up_proj.weight @ x)
    return out + torch.sigmoid(module.shared_expert_gate.weight @ x) * (shared.down_proj.weight @ inner)


@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_equals_a_loop_over_tokens(top_k: int, num_tokens: int) -> None:
    module = mixture(num_experts_per_tok=top_k)
    x = torch.randn(num_tokens, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    inputs = [x.requires_grad_(), *module.parameters()]
    out, _ = module(x, Measure())
    expected = torch.stack([one_token(module, row) for row in x])
    assert (out - expected).abs().max() < 1e-12
    gradients, wanted = (torch.autograd.grad(each.sin().sum(), inputs) for each in (out, expected))
    for actual, exact in zip(gradients, wanted):
        assert (actual - exact).abs().max() < 1e-11


def test_what_the_router_counts() -> None:
    module = mixture()
    x = torch.randn(9, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    is_real = torch.tensor([True] * 6 + [False] * 3)
    _, statistics = module(x, Measure(is_real, probabilities=True, logsumexp=True))
    logits = x[:6] @ module.gate.weight.T
    chosen = logits.topk(2)[1]
    assert statistics.expert_counts.tolist() == chosen.flatten().bincount(minlength=8).tolist()
    assert statistics.probability_sums is not None
    assert statistics.squared_logsumexp_sum is not None
    assert torch.allclose(statistics.probability_sums, logits.softmax(-1).sum(0))
    assert torch.allclose(statistics.squared_logsumexp_sum, logits.logsumexp(-1).square().sum())


def test_what_is_not_asked_for_is_not_measured() -> None:
    _, statistics = mixture()(torch.ones(3, 48, dtype=torch.float64), Measure())
    assert statistics.expert_counts.sum() == 6
    assert statistics.probability_sums is None
    assert statistics.squared_logsumexp_sum is None


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_routers_dtype(dtype: torch.dtype, compute: torch.dtype) -> None:
    """Logits as transformers' router makes them in that dtype, bit for bit; its softmax is float32 in any case."""
    config = tiny_config(num_experts=64, num_experts_per_tok=4)
    router = Router(config)
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    router.dtype = dtype
    theirs = Qwen3_5MoeTopKRouter(SimpleNamespace(num_experts_per_tok=4, num_experts=64, hidden_size=48)).to(dtype)
    theirs.weight.data.copy_(router.weight.data)
    x = torch.randn(200, 48, generator=torch.Generator().manual_seed(1)).to(compute)
    weights, chosen, logits, probabilities = router(x)
    expected_logits, expected_weights, expected = theirs(x.to(dtype))
    assert torch.equal(logits, expected_logits.float())
    assert torch.equal(chosen, expected)
    assert {weights.dtype, logits.dtype, probabilities.dtype} == {torch.float32}
    # transformers rounds the weights to that dtype, and logits of 20, with an error of 2e-6 of the weights, to float32.
    bound = {torch.bfloat16: 2**-7, torch.float32: 1e-6, torch.float64: 1e-5}[dtype]
    assert torch.allclose(weights.to(dtype), expected_weights, rtol=bound)
    # In bfloat16 two logits are often equal: the choice says which dtype it was.
    in_float32 = (x.float() @ router.weight.T).topk(4)[1]
    assert torch.equal(chosen, in_float32) == (dtype != torch.bfloat16)


def test_a_run_sets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Qwen35Moe] = []
    monkeypatch.setattr(train, "parallelize_fn", lambda model, *_, **__: built.append(model))
    config = load_config(["--config", "qwen35moe_tiny.toml", "--moe.router_dtype", "bfloat16"])
    meshes = SimpleNamespace(data_parallel=SimpleNamespace(size=lambda: 1))
    train.build_model(config, tiny_config(), meshes, torch.device("cpu"))  # type: ignore[arg-type]
    assert {block.mlp.gate.dtype for block in built[0].blocks} == {torch.bfloat16}


def test_balanced_routing_takes_the_experts_in_turn() -> None:
    module = mixture()
    module.gate.force_balanced = True
    _, chosen, _ = module.route(torch.ones(8, 48, dtype=torch.float64), Measure())
    assert chosen.flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7] * 2
