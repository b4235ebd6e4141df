"""The FLOP count against the parameters it is about, and against a published figure of this model."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from config.options import Lora
from models.ops.kernels import Kernels
from models.qwen35_moe.config import FULL, ModelConfig
from models.qwen35_moe.lora import add_adapters
from models.qwen35_moe.model import Qwen35Moe
from models.qwen35_moe.vision import VisionTower
from models.qwen35_moe.vision_config import VisionConfig
from tests.models.qwen35_moe.vision_shapes import random_patches, tiny_vision
from training.flops import flops_per_token, peak_flops, vision_flops


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


def test_multi_token_prediction_of_the_35b_model_to_the_digit() -> None:
    config = replace(ModelConfig.from_dict({}), mtp_num_hidden_layers=1)
    full, mixture = 2048 * (2 * 4096 + 2 * 512 + 4096), 2048 * (3 * 512 * (8 + 1) + 256 + 1)
    own = 6 * (2 * 2048**2 + full + mixture) + 6 * 4096 * 16 * 256
    head = 2048 * 248320
    assert flops_per_token(config, 4096) == 18961367040 + own + 6 * head
    # The trunk forward alone, and of the head's product no gradient of its weights.
    assert flops_per_token(config, 4096, trains_trunk=False) == 18961367040 / 3 + own + 4 * head


def test_peak_is_looked_up_by_name() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("some other device") is None


@pytest.mark.parametrize(
    "config", [tiny_vision(), tiny_vision(depth=3, spatial_merge_size=1, num_heads=4, patch_size=6)], ids=str
)
def test_the_tower_is_as_torch_counts_it(config: VisionConfig) -> None:
    """With attention as matrix products: its CPU kernel is unknown to the counter. There is no gradient of pixels."""
    frames = [(2, 2), (4, 6), (6, 10), (6, 10)]
    patches = random_patches(config, frames)
    tower = VisionTower(config, "sdpa")
    lengths = [height * width for height, width in frames]
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            features = tower(patches)
        with FlopCounterMode(display=False) as backward:
            features.sum().backward()
    assert vision_flops(config, lengths, False, False) == forward.get_total_flops()
    of_pixels = 2 * sum(lengths) * config.patch_values * config.hidden_size
    both = forward.get_total_flops() + backward.get_total_flops() + of_pixels
    assert vision_flops(config, lengths, True, True) == both


def test_the_tower_of_the_35b_to_the_digit() -> None:
    lengths = [68 * 120]
    forward = 2 * (412839936 * 8160 + 30670848 * 2040) + 27 * 4 * 1152 * 8160**2
    assert vision_flops(VisionConfig(), lengths, False, False) == forward
    assert vision_flops(VisionConfig(), lengths, True, True) == 3 * forward == pytest.approx(45.4e12, rel=1e-3)
    of_merger = 2 * 30670848 * 2040
    assert vision_flops(VisionConfig(), lengths, False, True) == forward + 2 * of_merger


def test_frozen_weights_have_no_gradient_and_adapters_have() -> None:
    config = ModelConfig.from_dict({"num_hidden_layers": 4, "num_experts": 32})
    lora = Lora(rank=8, targets=("experts", "attention", "head"))
    with torch.device("meta"):
        model = Qwen35Moe(config, Kernels(attention="sdpa"))
    add_adapters(model, lora.rank, lora.alpha, lora.targets)
    passed = {True: 0, False: 0}  # whether trained
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            passed[parameter.requires_grad] += parameter.numel() * config.num_experts_per_tok // config.num_experts
        elif parameter.dim() == 2 and name != "embed_tokens.weight":
            passed[parameter.requires_grad] += parameter.numel()
    of_mixers = flops_per_token(config, 4096) - 6 * passed[False]
    assert passed[True] > 0
    assert flops_per_token(config, 4096, lora) == 4 * passed[False] + 6 * passed[True] + of_mixers
