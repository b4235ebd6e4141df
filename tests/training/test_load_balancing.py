"""Losses on the router: against transformers and plain sums, with fillers, switched off, and in a run's metrics."""

from pathlib import Path

import pytest
import torch
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe

from config.options import MoE
from models.ops.documents import Documents
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.model import Qwen35Moe
from models.qwen35_moe.moe import Measure, MixtureOfExperts, RouterStatistics
from tests.checkpoint.runs import Run
from tests.models.qwen35_moe.shapes import random_model, random_stream, run_model, tiny_config
from tests.models.qwen35_moe.test_parity import reference_model
from training.load_balancing import RouterLosses, measure_for, router_losses
from training.metrics import expert_load

ROOT = Path(__file__).resolve().parents[2]
CONFIG = tiny_config()
TOP_K = CONFIG.num_experts_per_tok
BOTH = MoE(aux_loss_coef=0.1, z_loss_coef=0.1)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def unlike_layers(num_layers: int, num_tokens: int, dtype: torch.dtype = torch.float32):
    """Mixtures of experts with decided, unequal routers, and an input for each, made to need gradients."""
    generator = torch.Generator().manual_seed(0)
    layers, inputs = [], []
    for _ in range(num_layers):
        layer = MixtureOfExperts(CONFIG)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
        layers.append(layer.to(dtype))
        common = torch.randn(CONFIG.hidden_size, generator=generator)
        x = torch.randn(num_tokens, CONFIG.hidden_size, generator=generator) + common
        inputs.append(x.to(dtype).requires_grad_())
    return layers, inputs


def measured(layers: list[MixtureOfExperts], inputs: list[torch.Tensor], measure: Measure) -> RouterStatistics:
    """The layers' statistics, stacked as the model does."""
    return RouterStatistics.stack([layer.route(x, measure)[2] for layer, x in zip(layers, inputs)])


def test_scope_hf_equals_transformers_on_the_same_inputs() -> None:
    layers, inputs = unlike_layers(3, 500)
    variables = [*inputs, *(layer.gate.weight for layer in layers)]
    moe = MoE(aux_loss_coef=0.1, aux_loss_scope="hf")
    aux, _ = router_losses(measured(layers, inputs, measure_for(moe)), moe, TOP_K)
    logits = tuple(torch.nn.functional.linear(x, layer.gate.weight) for x, layer in zip(inputs, layers))
    expected = modeling_qwen3_5_moe.load_balancing_loss_func(logits, CONFIG.num_experts, TOP_K)
    assert expected > 1.1 * TOP_K  # far from the even load, whose loss is k
    assert aux.item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(torch.autograd.grad(aux, variables), torch.autograd.grad(expected, variables)):
        assert error(ours, theirs) < 1e-6


def test_scope_hf_equals_transformers_in_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    # As in the parity tests: of transformers' two forms of the delta rule, the precise one.
    step_by_step = modeling_qwen3_5_moe.torch_recurrent_gated_delta_rule
    monkeypatch.setattr(modeling_qwen3_5_moe, "torch_chunk_gated_delta_rule", step_by_step)
    model = random_model(tiny_config(initializer_range=0.05))
    tokens, positions, documents, labels = random_stream(CONFIG, [60])
    reference = reference_model(model.config, model.state_dict())
    reference.router_aux_loss_coef = 0.1
    theirs = reference(tokens[None], labels=tokens[None], output_router_logits=True)
    theirs.loss.backward()

    moe = MoE(aux_loss_coef=0.1, aux_loss_scope="hf")
    loss_sum, statistics = run_model(model, tokens, positions, documents, labels, measure_for(moe))
    aux, _ = router_losses(statistics, moe, TOP_K)
    (loss_sum / 59 + 0.1 * aux).backward()
    assert aux.item() == pytest.approx(theirs.aux_loss.item(), rel=1e-6)
    expected = {name.removeprefix("model."): p.grad for name, p in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        # Tolerances of the parity tests; in absolute numbers all but the decays' are within 1e-6.
        assert error(parameter.grad, expected[name]) < (1e-3 if name.endswith(("A_log", "dt_bias")) else 1e-4), name
        if "mlp.gate" in name:
            assert (parameter.grad - expected[name]).abs().max() < 1e-6


def plain_losses(logits: list[torch.Tensor], pooled: bool) -> tuple[float, float]:
    """Aux and z loss from each layer's logits [T, E], by their definitions, an expert at a time."""
    probabilities = [layer.softmax(dim=-1) for layer in logits]
    chosen = [layer.argsort(dim=-1, descending=True)[:, :TOP_K] for layer in logits]
    z = torch.cat([layer.exp().sum(dim=-1).log() ** 2 for layer in logits]).mean().item()
    if pooled:
        probabilities, chosen = [torch.cat(probabilities)], [torch.cat(chosen)]
    losses = []
    for layer_probabilities, layer_chosen in zip(probabilities, chosen):
        fractions = [(layer_chosen == e).any(dim=-1).double().mean() for e in range(CONFIG.num_experts)]
        means = [layer_probabilities[:, e].mean() for e in range(CONFIG.num_experts)]
        losses.append(CONFIG.num_experts * sum(f * p for f, p in zip(fractions, means)))
    return (sum(losses) / len(losses)).item(), z


@pytest.mark.parametrize(("scope", "pooled"), [("global", False), ("hf", True)])
def test_equals_the_definitions(scope: str, pooled: bool) -> None:
    layers, inputs = unlike_layers(3, 200, torch.float64)
    moe = MoE(aux_loss_coef=0.1, aux_loss_scope=scope, z_loss_coef=0.1)
    logits = [torch.nn.functional.linear(x, layer.gate.weight).detach() for x, layer in zip(inputs, layers)]
    losses = router_losses(measured(layers, inputs, measure_for(moe)), moe, TOP_K)
    assert (losses.aux.item(), losses.z.item()) == pytest.approx(plain_losses(logits, pooled), rel=1e-12)
    other, _ = plain_losses(logits, not pooled)
    assert losses.aux.item() != pytest.approx(other, rel=1e-2)


@pytest.mark.parametrize("scope", ["global", "hf"])
def test_shares_of_ranks_add_up(scope: str) -> None:
    layers, inputs = unlike_layers(3, 200, torch.float64)
    moe = MoE(aux_loss_coef=0.1, aux_loss_scope=scope, z_loss_coef=0.1)
    measure = measure_for(moe)
    # Unequal ranks, so that a mean of their means is not the mean.
    parts = [measured(layers, [x[rows] for x in inputs], measure) for rows in (slice(0, 30), slice(30, 200))]

    def sum_over_ranks(counts: torch.Tensor) -> torch.Tensor:
        return torch.stack([part.expert_counts for part in parts]).sum(dim=0)

    shares = [router_losses(part, moe, TOP_K, 2, sum_over_ranks) for part in parts]
    whole = router_losses(measured(layers, inputs, measure), moe, TOP_K)
    expected_aux = (
        whole.aux if scope == "global" else torch.stack([router_losses(part, moe, TOP_K).aux for part in parts]).mean()
    )
    assert sum(share.aux for share in shares).item() == pytest.approx(expected_aux.item(), rel=1e-12)
    assert sum(share.z for share in shares).item() == pytest.approx(whole.z.item(), rel=1e-12)


def losses_and_gradients(
    model: Qwen35Moe, stream: tuple[torch.Tensor, torch.Tensor, Documents, torch.Tensor], is_real: torch.Tensor | None
) -> tuple[torch.Tensor, RouterLosses, dict[str, torch.Tensor]]:
    """Expert counts, losses, and the gradients of all losses together."""
    model.zero_grad()
    loss, statistics = run_model(model, *stream, measure_for(BOTH, is_real))
    losses = router_losses(statistics, BOTH, TOP_K)
    (loss / 50 + losses.aux + losses.z).backward()
    return statistics.expert_counts, losses, {name: p.grad.clone() for name, p in model.named_parameters()}


def test_fillers_count_nowhere() -> None:
    # Two rows of 40, each closed by a filler: one in the middle of the stream, one at its end.
    model = random_model(CONFIG)
    tokens, positions, documents, labels = random_stream(CONFIG, [30, 10, 33, 7])
    is_real = torch.tensor([True] * 30 + [False] * 10 + [True] * 33 + [False] * 7)
    labels[~is_real] = -100
    counts, losses, gradients = losses_and_gradients(model, (tokens, positions, documents, labels), is_real)
    without = (tokens[is_real], positions[is_real], Documents.from_lengths([30, 33]), labels[is_real])
    expected_counts, expected, expected_gradients = losses_and_gradients(model, without, None)
    assert torch.equal(counts, expected_counts)
    assert counts.dtype == expected_counts.dtype == torch.int32
    assert counts.sum(dim=1).tolist() == [63 * TOP_K] * CONFIG.num_hidden_layers
    assert torch.stack(losses).tolist() == pytest.approx(torch.stack(expected).tolist(), rel=1e-6)
    for name, gradient in expected_gradients.items():  # as in packing: groups of another size, other last bits
        assert error(gradients[name], gradient) < 1e-5, name
    counted, _, _ = losses_and_gradients(model, (tokens, positions, documents, labels), None)
    assert counted.sum(dim=1).tolist() == [80 * TOP_K] * CONFIG.num_hidden_layers


def test_fillers_alone_cost_nothing() -> None:
    stream = random_stream(CONFIG, [20])
    stream[3].fill_(-100)
    counts, losses, gradients = losses_and_gradients(random_model(CONFIG), stream, torch.zeros(20, dtype=torch.bool))
    assert counts.count_nonzero() == 0
    assert [loss.item() for loss in losses] == [0, 0]
    assert all(gradient.count_nonzero() == 0 for gradient in gradients.values())


@pytest.mark.parametrize("moe", [MoE(), MoE(aux_loss_coef=0.1), MoE(z_loss_coef=0.1), BOTH])
def test_nothing_is_measured_that_no_loss_needs(moe: MoE) -> None:
    model, stream = random_model(CONFIG), random_stream(CONFIG, [20, 30])
    loss, statistics = run_model(model, *stream, measure_for(moe))
    assert (statistics.probability_sums is not None) == (moe.aux_loss_coef > 0)
    assert (statistics.squared_logsumexp_sum is not None) == (moe.z_loss_coef > 0)
    # What is measured leaves the cross-entropy's gradients alone, bit for bit.
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    plain = torch.autograd.grad(run_model(model, *stream)[0], list(model.parameters()))
    assert all(map(torch.equal, gradients, plain))


def test_ranks_are_asked_once_or_not_at_all() -> None:
    layers, inputs = unlike_layers(2, 10)

    def num_sums(moe: MoE) -> int:
        asked = []
        statistics = measured(layers, inputs, measure_for(moe))
        router_losses(statistics, moe, TOP_K, 2, lambda counts: asked.append(counts) or counts)
        return len(asked)

    assert [num_sums(MoE()), num_sums(MoE(aux_loss_coef=1.0)), num_sums(BOTH)] == [0, 1, 1]
    assert num_sums(MoE(aux_loss_coef=1.0, aux_loss_scope="hf")) == 0


def test_expert_load_names_the_worst_layer() -> None:
    counts = torch.tensor([[2, 2, 2, 2], [0, 0, 6, 2], [3, 0, 2, 3]])
    assert expert_load(counts) == {
        "expert_load_max_over_mean": 3.0,
        "expert_load_worst_layer": 1,
        "experts_without_tokens": 3,
    }


SMALL = """
extends = "{root}/train_configs/qwen35moe_tiny.toml"
[model.config]
hidden_size = 64
num_hidden_layers = 2
full_attention_interval = 2
[training]
steps = 2
sequence_length = 64
local_batch_size = 2
global_batch_size = 4
[lr_scheduler]
warmup_steps = 1
[data]
num_workers = 0
[parallelism]
expert_parallel_degree = 1
[checkpoint]
enable = false
[metrics]
log_interval = 1
tensorboard = false
"""


def test_metrics_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(SMALL.format(root=ROOT))

    def run(name: str, *options: str) -> list[dict]:
        return Run(tmp_path / name, 1, f"--config={tmp_path / 'small.toml'}", *options, defaults=()).finish()

    off = run("off")
    on = run("on", "--moe.aux_loss_coef=0.1", "--moe.z_loss_coef=0.1")
    for line in on:
        assert 1.8 < line["aux_loss"] < 4  # k = 2 is even
        # Logits start near 0, where logsumexp is log(8).
        assert line["z_loss"] == pytest.approx(torch.tensor(8.0).log().square().item(), rel=0.2)
        assert 0 <= line["expert_load_worst_layer"] < 2
        assert line["expert_load_max_over_mean"] > 1
        assert 0 <= line["experts_without_tokens"] <= 2 * 8
    assert not {"aux_loss", "z_loss"} & off[0].keys()
    assert off[0]["expert_load_worst_layer"] == on[0]["expert_load_worst_layer"]
    assert on[0]["loss"] == off[0]["loss"]  # the cross-entropy alone
    assert on[0]["grad_norm"] != off[0]["grad_norm"]


def test_the_losses_balance_and_shrink() -> None:
    """What they are for: descending them alone evens the load and shrinks the logits."""
    config: ModelConfig = tiny_config(initializer_range=0.1)
    model, stream = random_model(config), random_stream(config, [100, 100])
    optimizer = torch.optim.SGD([block.mlp.gate.weight for block in model.blocks], lr=0.1)
    history = []
    for _ in range(20):
        _, statistics = run_model(model, *stream, measure_for(BOTH))
        aux, z = router_losses(statistics, BOTH, TOP_K)
        history.append((expert_load(statistics.expert_counts)["expert_load_max_over_mean"], z.item()))
        optimizer.zero_grad()
        (aux + z).backward()
        optimizer.step()
    assert history[-1][0] < history[0][0]
    assert history[-1][1] < history[0][1]
