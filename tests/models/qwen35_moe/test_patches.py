"""The stream of patches: order, sizes and places, of frames of any size."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.qwen35_moe.patches import Patches
from tests.models.qwen35_moe.vision_shapes import random_patches, tiny_vision

SIDES = st.integers(1, 5)


@given(merge=st.integers(1, 3), squares=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=4))
def test_patches_come_square_by_square(merge: int, squares: list[tuple[int, int]]) -> None:
    grids = [(height * merge, width * merge) for height, width in squares]
    patches = random_patches(tiny_vision(spatial_merge_size=merge), grids)
    assert patches.frames.lengths() == [height * width for height, width in grids]
    for part, (height, width) in zip(patches.grid.split(patches.frames.lengths(), dim=1), grids):
        rows, columns, heights, widths = part.numpy()
        assert (heights == height).all()
        assert (widths == width).all()
        assert len({*zip(rows.tolist(), columns.tolist())}) == height * width  # each place once
        # The same square for merge * merge patches, squares and patches in them by row and column.
        key = np.stack([rows // merge, columns // merge, rows % merge, columns % merge])
        assert key.T.tolist() == sorted(key.T.tolist())


def test_a_frame_that_fits_no_square_is_no_frame() -> None:
    with pytest.raises(AssertionError):
        random_patches(tiny_vision(), [(2, 3)])


def test_the_grey_frame_stands_nowhere() -> None:
    config = tiny_vision()
    patches = Patches.grey(config.patch_values, 2, max_patches=64)
    assert (patches.num_shown, patches.frames.lengths(), patches.frames.max_seqlen) == (0, [4], 64)
    assert torch.equal(patches.pixels, torch.full((4, config.patch_values), 127, dtype=torch.uint8))
