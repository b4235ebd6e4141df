"""The FLOP count against the parameters it is about, and against a published figure of this model."""

import pytest
import torch

from models.ops.kernels import Kernels
from models.qwen35_moe.config import FULL, ModelConfig
from models.qwen35_moe.model import Qwen35Moe
from training.flops import flops_per_token, peak_flops


def test_counts_every_matrix_that_a_token_passes() -> None:
    config = ModelConfig.from_dict({"num_hidden_layers": 12, "num_experts": 32})
    with torch.device("meta"):
        model = Qwen35Moe(config, Kernels(attention="sdpa"))
    active = 0
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            active += parameter.numel() * config.num_experts_per_tok // config.num_experts
        elif parameter.dim() == 2 and name != "embed_tokens.weight":
            active += parameter.numel()
    attention = config.layer_types.count(FULL) * 6 * 4096 * config.num_attention_heads * config.head_dim
    delta_rule = 9 * 18 * 32 * 128 * 128
    assert flops_per_token(config, 4096) == 6 * active + attention + delta_rule
    # The figure that other stacks' throughput on this cut of 35B-A3B is stated with.
    assert flops_per_token(config, 4096) == pytest.approx(7.79e9, rel=1e-3)


def test_the_35b_model_to_the_digit() -> None:
    """The formula that its figures are stated with: 6 a parameter, and what attention and the delta rule cost."""
    full = 2048 * (2 * 4096 + 2 * 512 + 4096)
    linear = 2048 * (2 * 2048 + 4096 + 4096 + 2 * 32 + 4096)
    mixture = 2048 * (3 * 512 * (8 + 1) + 256 + 1)
    passed = 10 * full + 30 * linear + 40 * mixture + 2048 * 248320
    of_mixers = 10 * 6 * 4096 * 16 * 256 + 30 * 18 * 32 * 128 * 128
    assert flops_per_token(ModelConfig.from_dict({}), 4096) == 6 * passed + of_mixers == 18961367040


def test_peak_is_looked_up_by_name() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("some other device") is None
