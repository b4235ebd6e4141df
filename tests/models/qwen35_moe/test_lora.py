"""Adapters: where they are, that they begin as the base, and their gradients against peft's and explicit products."""

import functools

import peft
import pytest
import torch
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe

from models.ops.kernels import Kernels
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.init import init_weights
from models.qwen35_moe.lora import add_adapters, is_adapter
from models.qwen35_moe.model import Qwen35Moe
from models.qwen35_moe.parts import ADAPTABLE, part_of
from tests.models.qwen35_moe.shapes import random_model, random_stream, run_model, tiny_config
from tests.models.qwen35_moe.test_parity import error, reference_model
from tests.models.qwen35_moe.vision_shapes import tiny_vision

RANK, ALPHA = 8, 12.0
LENGTHS = [1, 40, 7, 64]
LINEAR_LAYERS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "linear_attention": ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"),
    "shared_expert": ("gate_proj", "up_proj", "down_proj"),
    "head": ("lm_head",),
}


def with_adapters(model: Qwen35Moe, targets: tuple[str, ...] = ADAPTABLE, zero: bool = False) -> Qwen35Moe:
    """The same model with initial adapters, or with a B that makes their product as large as the weights."""
    add_adapters(model, RANK, ALPHA, targets)
    init_weights(model, 0, which=is_adapter)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and not zero:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def loss_and_gradients(model: Qwen35Moe, stream) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """(logits, loss, gradients by name of what has one)."""
    with torch.no_grad():
        logits, _ = run_model(model, *stream[:3])
    loss, _ = run_model(model, *stream)
    loss.backward()
    return logits, loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("part", ADAPTABLE)
def test_what_is_adapted_and_trained(part: str) -> None:
    config = tiny_config(vision=tiny_vision())
    with torch.device("meta"):
        model = Qwen35Moe(config, Kernels())
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    add_adapters(model, RANK, ALPHA, (part,))
    now = dict(model.named_parameters())
    assert {name: tuple(now[name].shape) for name in shapes} == shapes
    adapters = {name: tuple(parameter.shape) for name, parameter in now.items() if name not in shapes}
    expected = {}
    for name, (*experts, out, width) in ((n, s) for n, s in shapes.items() if len(s) > 1 and part_of(n) == part):
        if part == "experts":
            expected[f"{name}_lora_A"], expected[f"{name}_lora_B"] = (*experts, RANK, width), (*experts, out, RANK)
        elif name.split(".")[-2] in LINEAR_LAYERS[part]:
            layer = name.removesuffix(".weight")
            expected[f"{layer}.lora_A.weight"], expected[f"{layer}.lora_B.weight"] = (RANK, width), (out, RANK)
    assert adapters == expected
    assert {name for name, parameter in now.items() if parameter.requires_grad} == adapters.keys()
    assert all(is_adapter(name) == (name in adapters) for name in now)
    assert all(part_of(name) == part for name in adapters)


def test_a_new_adapter_changes_nothing_and_is_drawn_by_name_and_expert() -> None:
    config = tiny_config()
    stream = random_stream(config, LENGTHS)
    logits, loss, _ = loss_and_gradients(random_model(config), stream)
    model = with_adapters(random_model(config), zero=True)
    found = loss_and_gradients(model, stream)
    assert torch.equal(found[0], logits)
    assert torch.equal(found[1], loss)
    drawn = {name: parameter for name, parameter in model.named_parameters() if "lora_A" in name}
    for name, values in drawn.items():
        bound = values.shape[-1] ** -0.5
        assert 0.9 * bound < values.abs().max() <= bound, name
        assert values.mean().abs() < 0.2 * bound, name
    assert len({values.flatten()[0].item() for values in drawn.values()}) == len(drawn)
    experts = drawn["layers.0.mlp.experts.down_proj_lora_A"]
    assert len({values.flatten()[0].item() for values in experts}) == config.num_experts


@functools.cache
def of_peft(targets: tuple[str, ...]):
    """Ours, and transformers' model under peft with the same weights and adapters."""
    config = tiny_config()
    base = random_model(config)
    reference = reference_model(config, base.state_dict())
    layers = [layer for part in targets for layer in LINEAR_LAYERS[part]]
    wrapped = peft.get_peft_model(reference, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=layers))
    ours = with_adapters(base, targets)
    state = {
        "base_model.model." + ("" if name.startswith("lm_head") else "model.") + name: parameter.detach().clone()
        for name, parameter in ours.named_parameters()
        if is_adapter(name)
    }
    loaded = peft.set_peft_model_state_dict(wrapped, state)
    assert not loaded.unexpected_keys
    assert not [key for key in loaded.missing_keys if "lora_" in key]
    return config, ours, wrapped


@pytest.mark.parametrize("targets", [("attention", "linear_attention", "shared_expert"), ("attention", "head")])
def test_equals_peft_where_it_reaches(targets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    # Its step-by-step rule, for the reason given in test_parity.py.
    step_by_step = modeling_qwen3_5_moe.torch_recurrent_gated_delta_rule
    monkeypatch.setattr(modeling_qwen3_5_moe, "torch_chunk_gated_delta_rule", step_by_step)
    config, ours, wrapped = of_peft(targets)
    stream = random_stream(config, LENGTHS)
    logits, loss, gradients = loss_and_gradients(ours, stream)
    expected_logits = torch.cat([wrapped(input_ids=part[None]).logits[0] for part in stream.tokens.split(LENGTHS)])
    parts = zip(expected_logits.split(LENGTHS), stream.tokens.split(LENGTHS))
    losses = [torch.nn.functional.cross_entropy(part[:-1], ids[1:], reduction="sum") for part, ids in parts]
    expected_loss = torch.stack(losses).sum()
    expected_loss.backward()
    expected = {
        name.removeprefix("base_model.model.").removeprefix("model.").replace(".default", ""): parameter.grad
        for name, parameter in wrapped.named_parameters()
        if parameter.grad is not None
    }
    # The bounds of test_parity.py.
    assert error(logits, expected_logits.detach()) < 1e-5
    assert error(loss, expected_loss.detach()) < 1e-6
    assert gradients.keys() == expected.keys()
    errors = {name: error(gradient, expected[name]) for name, gradient in gradients.items()}
    print(f"gradients within {max(errors.values()):.1e} of peft's")
    assert max(errors.values()) < 1e-4, max(errors, key=errors.__getitem__)


@pytest.mark.parametrize("config", [tiny_config(), tiny_config(num_experts=5, num_experts_per_tok=3)])
def test_equals_a_dense_weight_with_the_product_added(config: ModelConfig) -> None:
    stream = random_stream(config, LENGTHS)
    model = with_adapters(random_model(config, dtype=torch.float64))
    logits, loss, gradients = loss_and_gradients(model, stream)
    factors = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if is_adapter(n)}
    assert gradients.keys() == factors.keys()

    def dense(name: str, weight: torch.Tensor) -> torch.Tensor:
        layer = name.removesuffix(".weight")
        for a, b in ((f"{name}_lora_A", f"{name}_lora_B"), (f"{layer}.lora_A.weight", f"{layer}.lora_B.weight")):
            if a in factors:
                return weight + ALPHA / RANK * factors[b] @ factors[a]
        return weight

    base = random_model(config, dtype=torch.float64)
    weights = {name: dense(name, parameter.detach()) for name, parameter in base.named_parameters()}
    call = functools.partial(torch.func.functional_call, base, weights)
    with torch.no_grad():
        expected_logits, _ = run_model(call_as_model(call), *stream[:3])
    expected_loss, _ = run_model(call_as_model(call), *stream)
    expected_loss.backward()
    # float64, products in another order.
    assert error(logits, expected_logits) < 1e-12
    assert error(loss, expected_loss.detach()) < 1e-12
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        assert error(gradient, factors[name].grad) < 1e-11, name


def test_adapters_that_are_stored_wider_are_rounded_and_their_gradients_are_not() -> None:
    config = tiny_config()
    stream, found = random_stream(config, LENGTHS), {}
    for stored in (torch.bfloat16, torch.float32):
        model = with_adapters(random_model(config))
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.bfloat16()
            if is_adapter(name):
                parameter.data = parameter.data.to(stored)
        for parameter in model.float32_parameters():
            parameter.data = parameter.data.float()
        found[stored] = loss_and_gradients(model, stream)
    (logits, loss, gradients), (expected_logits, expected_loss, expected) = found[torch.float32], found[torch.bfloat16]
    assert torch.equal(logits, expected_logits)
    assert torch.equal(loss, expected_loss)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert gradient.any(), name
        assert torch.equal(gradient, expected[name].float()), name


def call_as_model(call):
    return lambda batch, measure: call((batch, measure))
