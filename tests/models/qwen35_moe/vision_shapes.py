"""Small vision towers for tests: configurations, pictures of noise, weights that exercise every parameter."""

import torch

from models.qwen35_moe.init import init_weights
from models.qwen35_moe.model import Qwen35Moe
from models.qwen35_moe.patches import Grid, Patches
from models.qwen35_moe.vision_config import VisionConfig

TINY_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 48,
    "num_position_embeddings": 36,
    "image_token_id": 90,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}


def tiny_vision(**changes) -> VisionConfig:
    """The tiny tower, with some numbers changed."""
    return VisionConfig(**{**TINY_VISION, **changes})


def random_pixels(config: VisionConfig, grids: list[Grid], seed: int = 0) -> torch.Tensor:
    """uint8 [P, values of a patch]."""
    generator = torch.Generator().manual_seed(seed)
    num_patches = sum(height * width for height, width in grids)
    return torch.randint(256, (num_patches, config.patch_values), dtype=torch.uint8, generator=generator)


def random_patches(config: VisionConfig, grids: list[Grid], places: list[int] | None = None, seed: int = 0) -> Patches:
    """Frames of noise; `places`: of their tokens in a text, by default the first."""
    pixels = random_pixels(config, grids, seed)
    at = torch.arange(len(pixels) // config.patches_per_token) if places is None else torch.tensor(places).long()
    return Patches.of(pixels, grids, at, config.spatial_merge_size, max_patches=len(pixels))


def exercise(model: Qwen35Moe, seed: int = 0) -> Qwen35Moe:
    """Initial weights, then norms and biases off their constants and matrices larger, so that a slip would show."""
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.startswith("visual.") or name.endswith(("norm.weight", "dt_bias")):
                parameter += 0.1 * noise
    return model
