"""The model by itself: rotary axes, initial weights, meta-device construction, what a config must say."""

import copy

import pytest
import torch
from transformers import Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTextRotaryEmbedding

from models.ops.kernels import Kernels
from models.qwen35_moe.config import FULL, LINEAR, ModelConfig
from models.qwen35_moe.init import init_weights
from models.qwen35_moe.model import Qwen35Moe
from models.qwen35_moe.rotary import rotary_embedding
from tests.models.qwen35_moe.shapes import random_model, random_stream, run_model, tiny_config


@pytest.mark.parametrize(
    ("head_dim", "section"), [(256, (11, 11, 10)), (64, (3, 3, 2)), (64, (2, 1, 5)), (32, (11, 11, 10))]
)
def test_rotary_axes_are_interleaved_as_in_transformers(head_dim: int, section: tuple[int, int, int]) -> None:
    config = tiny_config(head_dim=head_dim, mrope_section=section)
    reference = Qwen3_5MoeTextRotaryEmbedding(Qwen3_5MoeTextConfig(**config.to_dict()))
    positions = torch.randint(0, 50_000, (3, 40), generator=torch.Generator().manual_seed(0))
    cos, sin = reference(torch.zeros(1), positions[:, None])
    ours = rotary_embedding(config, positions)
    pairs = config.rotary_dim // 2
    assert torch.equal(ours.cos, cos[0, :, :pairs])
    assert torch.equal(ours.sin, sin[0, :, :pairs])


def test_equal_axes_are_text_positions() -> None:
    model = random_model(tiny_config())
    tokens, positions, documents, _ = random_stream(model.config, [5, 9])
    text, _ = run_model(model, tokens, positions, documents)
    three, _ = run_model(model, tokens, positions.expand(3, -1), documents)
    assert torch.equal(text, three)


def test_initial_weights_depend_on_seed_name_and_expert_alone() -> None:
    small, large = (random_weights(tiny_config(num_experts=n), seed=0) for n in (4, 8))
    for name in small:
        if ".experts." in name:
            assert torch.equal(small[name], large[name][:4])  # an expert does not know how many there are
            assert not torch.equal(small[name][0], small[name][1])
        elif "mlp.gate" not in name:
            assert torch.equal(small[name], large[name])
    other = random_weights(tiny_config(num_experts=4), seed=1)
    matrices = [name for name in small if small[name].dim() > 1]
    assert not any(torch.equal(small[name], other[name]) for name in matrices)
    assert len({small[name].flatten()[0].item() for name in matrices}) == len(matrices)


def random_weights(config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = Qwen35Moe(config, Kernels(attention="sdpa"))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)  # what init leaves out shows
    init_weights(model, seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_initial_values_are_those_of_the_table() -> None:
    weights = random_weights(tiny_config(linear_num_value_heads=64, initializer_range=0.03), seed=0)
    for name, weight in weights.items():
        assert weight.isfinite().all(), name
        if name.endswith("A_log"):
            assert weight.exp().min() >= 0.0099
            assert 10 < weight.exp().max() < 16.01
        elif name.endswith(("dt_bias", "linear_attn.norm.weight")):
            assert (weight == 1).all()
        elif name.endswith("norm.weight"):
            assert (weight == 0).all()
        elif weight.numel() > 2000:
            assert weight.std().item() == pytest.approx(0.03, rel=0.1), name


def test_tied_embeddings_have_no_head() -> None:
    tied = random_weights(tiny_config(tie_word_embeddings=True), seed=0)
    assert "lm_head.weight" not in tied
    assert "lm_head.weight" in random_weights(tiny_config(), seed=0)


def test_decays_and_router_stay_float32_in_a_bfloat16_model() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Qwen35Moe(tiny_config(), Kernels(attention="sdpa"))
    finally:
        torch.set_default_dtype(torch.float32)
    float32 = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert float32 == {n for n, _ in model.named_parameters() if n.endswith(("A_log", "dt_bias", "mlp.gate.weight"))}
    assert {id(p) for p in model.float32_parameters()} == {id(p) for n, p in model.named_parameters() if n in float32}
    init_weights(model, 0)
    tokens, positions, documents, labels = random_stream(model.config, [7, 70])
    loss, _ = run_model(model, tokens, positions, documents, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in model.parameters())


def test_config_is_read_from_both_forms() -> None:
    config = tiny_config(tie_word_embeddings=True)
    text_only = config.to_dict()
    nested = {"model_type": "qwen3_5_moe", "vision_config": {}, "text_config": copy.deepcopy(text_only)}
    nested["tie_word_embeddings"] = True
    assert ModelConfig.from_dict(text_only) == ModelConfig.from_dict(nested) == config
    outside = copy.deepcopy(nested)
    del outside["text_config"]["tie_word_embeddings"]
    outside["tie_word_embeddings"] = True
    assert ModelConfig.from_dict(outside) == config


def test_layer_types_follow_the_interval() -> None:
    config = ModelConfig.from_dict({"num_hidden_layers": 5, "full_attention_interval": 2})
    assert config.layer_types == (LINEAR, FULL, LINEAR, FULL, LINEAR)
    assert ModelConfig.from_dict({}).layer_types == (LINEAR, LINEAR, LINEAR, FULL) * 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3"}, "model_type = 'qwen3'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "num_attention_heads = 3"),
        ({"linear_num_value_heads": 3, "linear_num_key_heads": 2}, "linear_num_value_heads = 3"),
        ({"num_experts_per_tok": 500}, "num_experts_per_tok = 500"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type = 'yarn'"),
        ({"mrope_section": [1, 1, 1]}, "mrope_section"),
        ({"head_dim": 12}, "partial_rotary_factor"),
    ],
)
def test_impossible_configs_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_table(changes)
