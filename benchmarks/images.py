"""Images of random pixels in the benchmarks' micro-batches: `--images 1080x1920:0.3`."""

import dataclasses
import functools

import torch

from data.batch import MAX_PATCHES, MicroBatch
from errors import UserError
from models.ops.labels import IGNORED
from models.qwen35_moe.patches import Patches
from models.qwen35_moe.positions import multimodal_positions
from models.qwen35_moe.vision_config import VisionConfig
from training.plan import Images

NONE = Images(32, 32, 0.0)


@functools.cache
def _noise(num_patches: int, patch_values: int) -> torch.Tensor:
    """uint8 [P, values of a patch]; made once, as a loader's workers would make it beside the training."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (num_patches, patch_values), dtype=torch.uint8, generator=generator)


def with_images(batch: MicroBatch, vision: VisionConfig, images: Images, number: int) -> MicroBatch:
    """The micro-batch of this number with images in the place of some tokens, which are not trained on. Each document
    has one at its second token at most; over many micro-batches they are as many as their share says."""
    height, width = images.grid(vision)
    num_tokens, merge = height * width // vision.patches_per_token, vision.spatial_merge_size
    lengths = batch.documents.lengths()
    wanted = images.share * len(batch.tokens) / num_tokens  # in a micro-batch, maybe a fraction
    count = round(wanted * (number + 1)) - round(wanted * number)
    positions, starts, begin = [], [], 0
    for length in lengths:
        is_shown = len(starts) < count and num_tokens < length
        starts += [begin + 1] if is_shown else []
        frames = [(1, height // merge, width // merge)] if is_shown else []
        positions.append(torch.from_numpy(multimodal_positions(length, frames)).long())
        begin += length
    if len(starts) < count:
        raise UserError(f"--images: {count} images of {num_tokens} tokens have no room in documents of {lengths}")
    grids = [(height, width)] * count or [(merge, merge)]
    pixels = _noise(sum(high * wide for high, wide in grids), vision.patch_values)
    places = torch.cat([torch.empty(0, dtype=torch.int64), *(torch.arange(s, s + num_tokens) for s in starts)])
    tokens, labels = batch.tokens.clone(), batch.labels.clone()
    tokens[places], labels[places - 1], labels[places] = vision.image_token_id, IGNORED, IGNORED
    patches = Patches.of(pixels, grids, places, merge, max_patches=MAX_PATCHES)
    return dataclasses.replace(batch, tokens=tokens, labels=labels, positions=torch.cat(positions, 1), patches=patches)
