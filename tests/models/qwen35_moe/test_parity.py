"""The model against transformers: logits at all positions, loss, and the gradient of every parameter."""

import pytest
import torch
import transformers
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe

from models.qwen35_moe.config import FULL, LINEAR, ModelConfig
from tests.models.qwen35_moe.shapes import random_model, random_stream, run_model, tiny_config

CONFIGS = {
    "tiny": tiny_config(),
    "heads": tiny_config(
        num_attention_heads=6, num_key_value_heads=3, linear_num_key_heads=3, linear_num_value_heads=9
    ),
    "nothing divides": tiny_config(
        num_hidden_layers=5, layer_types=(FULL, LINEAR, LINEAR, FULL, LINEAR), num_experts=7, num_experts_per_tok=3
    ),
    "top 1": tiny_config(num_experts_per_tok=1),
    "tied": tiny_config(tie_word_embeddings=True),
    "conv kernel 2": tiny_config(linear_conv_kernel_dim=2),
    "conv kernel 5": tiny_config(linear_conv_kernel_dim=5, linear_value_head_dim=24),
    "unaligned": tiny_config(hidden_size=30, moe_intermediate_size=9, shared_expert_intermediate_size=7),
    "all experts": tiny_config(num_experts=4, num_experts_per_tok=4, num_key_value_heads=4, linear_num_value_heads=2),
    "35B heads": tiny_config(
        num_hidden_layers=2,
        layer_types=(LINEAR, FULL),
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        mrope_section=(11, 11, 10),
    ),
}

# Document lengths around the chunk of 64, and one-token documents; transformers runs them one by one.
LENGTHS = [1, 64, 37, 130, 1]


def reference_model(config: ModelConfig, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """transformers' model with our weights, float32, experts as a plain loop."""
    hf_config = transformers.Qwen3_5MoeTextConfig(**config.to_dict())
    hf_config._attn_implementation, hf_config._experts_implementation = "sdpa", "eager"
    model = transformers.Qwen3_5MoeForCausalLM(hf_config)
    state = {name if name.startswith("lm_head") else f"model.{name}": tensor for name, tensor in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    model.tie_weights()
    return model


def reference_run(model: torch.nn.Module, tokens: torch.Tensor, lengths: list[int]):
    """transformers on each document by itself: (logits of all, sum of the losses, gradients by our names)."""
    model.zero_grad()
    logits = torch.cat([model(document[None]).logits[0] for document in tokens.split(lengths)])
    losses = [
        torch.nn.functional.cross_entropy(part[:-1], document[1:], reduction="sum")
        for part, document in zip(logits.split(lengths), tokens.split(lengths))
    ]
    loss = torch.stack(losses).sum()
    loss.backward()
    return logits.detach(), loss.detach(), {n.removeprefix("model."): p.grad for n, p in model.named_parameters()}


def native_run(model: torch.nn.Module, stream):
    """Our model on the packed stream: (logits, sum of the losses, gradients)."""
    tokens, positions, documents, labels = stream
    model.zero_grad()
    with torch.no_grad():
        logits, _ = run_model(model, tokens, positions, documents)
    loss, _ = run_model(model, tokens, positions, documents, labels)
    loss.backward()
    return logits, loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tolerances: transformers differs from itself (delta rule in chunks of 16 or 64) by up to 1.2e-6 in the logits and
    # 6e-5 in gradients; those of dt_bias and A_log are sums that cancel. There its chunked rule alone is off by up to
    # 2e-2 from float64 at these shapes, so its own step-by-step rule is the oracle; the test below has the chunked one.
    step_by_step = modeling_qwen3_5_moe.torch_recurrent_gated_delta_rule
    monkeypatch.setattr(modeling_qwen3_5_moe, "torch_chunk_gated_delta_rule", step_by_step)
    config = CONFIGS[name]
    model, stream = random_model(config), random_stream(config, LENGTHS)
    reference = reference_model(config, model.state_dict())
    logits, loss, gradients = native_run(model, stream)
    expected_logits, expected_loss, expected_gradients = reference_run(reference, stream[0], LENGTHS)
    assert error(logits, expected_logits) < 1e-5
    assert error(loss, expected_loss) < 1e-6
    assert gradients.keys() == expected_gradients.keys()
    for parameter, gradient in gradients.items():
        if config.num_experts_per_tok == 1 and parameter.endswith("mlp.gate.weight"):
            # The one weight, renormalised, is 1 whatever the router says: its gradient is zero but for rounding.
            assert max(g[parameter].abs().max() for g in (gradients, expected_gradients)) < 1e-6, parameter
            continue
        tolerance = 1e-3 if parameter.endswith(("A_log", "dt_bias")) else 1e-4
        assert gradient.abs().max() > 0, parameter
        assert error(gradient, expected_gradients[parameter]) < tolerance, parameter


@pytest.mark.parametrize("name", ["tiny", "nothing divides", "35B heads"])
def test_no_further_from_float64_than_transformers(name: str) -> None:
    # The oracle of the oracle: the same model in float64, its experts as a loop. A fixed rounding error in one of the
    # two implementations would show as a ratio; 2 leaves room for sums in another order.
    config = CONFIGS[name]
    model, stream = random_model(config), random_stream(config, LENGTHS)
    reference = reference_model(config, model.state_dict())
    logits, loss, gradients = native_run(model, stream)
    reference_logits, _, reference_gradients = reference_run(reference, stream[0], LENGTHS)
    exact_logits, exact_loss, exact_gradients = native_run(random_model(config, dtype=torch.float64), stream)
    assert exact_logits.dtype == torch.float64
    decays = [n for n in gradients if n.endswith(("A_log", "dt_bias"))]
    print(f"\n{name}: error against float64, relative to the largest value (ours | transformers)")
    print(f"  logits               {error(logits, exact_logits):.1e} | {error(reference_logits, exact_logits):.1e}")
    for label, names in (("decay gradients", decays), ("all other gradients", gradients.keys() - decays)):
        worst = [max(error(g[n], exact_gradients[n]) for n in names) for g in (gradients, reference_gradients)]
        print(f"  {label:20} {worst[0]:.1e} | {worst[1]:.1e}   (worst parameter)")
    assert error(logits, exact_logits) <= 2 * error(reference_logits, exact_logits)
    assert error(loss, exact_loss) < 1e-6

    def distance(gradients: dict[str, torch.Tensor]) -> float:
        """Root mean square over the parameters of each gradient's relative error by norm."""
        errors = [
            torch.linalg.vector_norm(gradients[n] - exact) / torch.linalg.vector_norm(exact)
            for n, exact in exact_gradients.items()
        ]
        return torch.stack(errors).square().mean().sqrt().item()

    assert distance(gradients) <= 2 * distance(reference_gradients)
