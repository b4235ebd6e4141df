"""The tower against transformers: features, and the gradients of pixels and of every parameter."""

import pytest
import torch
import transformers
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe

from models.ops.kernels import Kernels
from models.qwen35_moe.init import init_weights
from models.qwen35_moe.model import Qwen35Moe
from models.qwen35_moe.patches import Grid
from models.qwen35_moe.vision import VisionTower
from models.qwen35_moe.vision_config import VisionConfig
from tests.models.qwen35_moe.shapes import tiny_config
from tests.models.qwen35_moe.vision_shapes import random_patches, tiny_vision

# Grids in patches: one token, a row, a column, sizes of nothing in common, and videos as frames of one size.
GRIDS = [(2, 2), (4, 34), (34, 2), (6, 10), (6, 10), (6, 10), (12, 14), (2, 2)]

CONFIGS = {
    "tiny": tiny_vision(),
    "one head": tiny_vision(num_heads=1, depth=3),
    "heads of 12": tiny_vision(hidden_size=36, num_heads=3, intermediate_size=17),
    "one patch a token": tiny_vision(spatial_merge_size=1),
    "nine patches a token": tiny_vision(spatial_merge_size=3),
    "one picture a patch": tiny_vision(temporal_patch_size=1, patch_size=6),
    "one position": tiny_vision(num_position_embeddings=1, out_hidden_size=20),
    "theta": tiny_vision(rope_theta=100.0, depth=1, num_position_embeddings=100),
    "35B widths": VisionConfig(depth=2, out_hidden_size=2048),
}


def grids_for(config: VisionConfig) -> list[Grid]:
    """GRIDS in multiples of the merge size."""
    merge = config.spatial_merge_size
    return [(height // 2 * merge, width // 2 * merge) for height, width in GRIDS]


def make_tower(config: VisionConfig, seed: int = 0) -> VisionTower:
    """Weights of unit scale, so that each of the steps shows in the result."""
    tower = VisionTower(config, "sdpa")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 and "pos_embed" not in name else 0.3
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(offset + scale * torch.randn(parameter.shape, generator=generator))
    return tower


def reference(config: VisionConfig, tower: VisionTower, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """transformers' tower with the same weights."""
    values, _ = config.to_dict()
    hf_config = transformers.models.qwen3_5_moe.Qwen3_5MoeVisionConfig(**values)
    hf_config._attn_implementation = "sdpa"
    model = modeling_qwen3_5_moe.Qwen3_5MoeVisionModel(hf_config)
    model.load_state_dict(tower.state_dict(), strict=True)
    return model.to(dtype)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "35B widths" else []) for name in CONFIGS]
)
def test_equals_transformers(name: str) -> None:
    config = CONFIGS[name]
    grids = grids_for(config)
    tower = make_tower(config)
    model = reference(config, tower)
    patches = random_patches(config, grids)
    values = (patches.pixels.float() / 127.5 - 1).requires_grad_()
    expected = model(values, grid_thw=torch.tensor([(1, height, width) for height, width in grids])).pooler_output
    actual = tower(patches)
    assert actual.shape == (sum(h * w for h, w in grids) // config.patches_per_token, config.out_hidden_size)
    # Bounds: as for the text. Measured 1e-6 and 3e-6; a wrong constant or order costs 1e-4 and more.
    assert error(actual, expected) < 1e-5
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * weight).sum().backward()
    (actual * weight).sum().backward()
    of_reference = dict(model.named_parameters())
    for key, parameter in tower.named_parameters():
        assert parameter.grad is not None, key
        assert error(parameter.grad, of_reference[key].grad) < 1e-4, key


def test_no_further_from_float64_than_transformers() -> None:
    config = CONFIGS["tiny"]
    grids = grids_for(config)
    tower, patches = make_tower(config), random_patches(config, grids)
    model, exact = reference(config, tower), reference(config, tower, torch.float64)
    grid_thw = torch.tensor([(1, height, width) for height, width in grids])
    values = patches.pixels.float() / 127.5 - 1
    expected = exact(values.double(), grid_thw=grid_thw).pooler_output
    ours, theirs = error(tower(patches), expected), error(model(values, grid_thw=grid_thw).pooler_output, expected)
    assert ours < 2 * theirs


def test_a_video_is_its_frames() -> None:
    """transformers' grid of three pairs of pictures, and three images."""
    config = CONFIGS["tiny"]
    tower = make_tower(config)
    patches = random_patches(config, [(4, 6)] * 3)
    values = patches.pixels.float() / 127.5 - 1
    video = reference(config, tower)(values, grid_thw=torch.tensor([(3, 4, 6)])).pooler_output
    assert error(tower(patches), video) < 1e-5


@pytest.mark.parametrize("changed", range(len(GRIDS)))
def test_an_image_changes_nothing_of_another_bit_for_bit(changed: int) -> None:
    config = CONFIGS["tiny"]
    tower = make_tower(config)
    patches = random_patches(config, GRIDS)
    lengths = [height * width for height, width in GRIDS]
    before = tower(patches)
    patches.pixels.split(lengths)[changed].bitwise_not_()
    after = tower(patches)
    for number, (old, new) in enumerate(zip(*(x.split([n // 4 for n in lengths]) for x in (before, after)))):
        assert torch.equal(old, new) == (number != changed), number


def test_initial_values_are_those_of_transformers() -> None:
    """By kind: what is constant there is the same constant here, what is drawn has the same spread."""
    vision = tiny_vision(hidden_size=64, intermediate_size=128, num_position_embeddings=400, initializer_range=0.04)
    native = Qwen35Moe(tiny_config(vision=vision, initializer_range=0.01), Kernels())
    init_weights(native, seed=0)
    assert native.visual is not None
    values, _ = vision.to_dict()
    hf = modeling_qwen3_5_moe.Qwen3_5MoeVisionModel(transformers.models.qwen3_5_moe.Qwen3_5MoeVisionConfig(**values))
    expected = hf.state_dict()
    for name, weight in native.visual.state_dict().items():
        if expected[name].std(correction=0) == 0:
            assert torch.equal(weight, expected[name]), name
        else:
            assert weight.std().item() == pytest.approx(expected[name].std().item(), rel=0.15), name
            assert weight.mean().abs() < 0.01, name
    assert {name: w.shape for name, w in native.visual.state_dict().items()} == {
        n: w.shape for n, w in expected.items()
    }
