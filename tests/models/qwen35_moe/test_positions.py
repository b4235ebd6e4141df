"""Positions on three axes, against transformers' get_rope_index."""

import numpy as np
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from models.qwen35_moe.positions import multimodal_positions
from tests.models.qwen35_moe.test_vision_parity import CONFIGS, Item, positions_of, read_document

PICTURE = st.tuples(st.integers(1, 3), st.integers(1, 9).map(lambda n: 2 * n), st.integers(1, 9).map(lambda n: 2 * n))


@settings(max_examples=200)
@given(items=st.lists(st.one_of(st.integers(1, 12), PICTURE), min_size=1, max_size=8))
def test_positions_are_those_of_transformers(items: list[Item]) -> None:
    config = CONFIGS["tiny"]
    vision = config.vision
    assert vision is not None
    document = read_document(items, vision)
    with torch.device("meta"):
        hf = transformers.Qwen3_5MoeForConditionalGeneration(transformers.Qwen3_5MoeConfig(**config.to_dict()))
    expected, _ = hf.model.get_rope_index(
        torch.tensor([document.tokens]),
        torch.tensor([document.types]),
        image_grid_thw=torch.tensor(document.image_grids) if document.image_grids else None,
        video_grid_thw=torch.tensor(document.video_grids) if document.video_grids else None,
    )
    assert np.array_equal(positions_of(document, 2), expected[:, 0].numpy())


def test_frames_may_touch() -> None:
    """Two with no token between are two: transformers takes them for one and raises."""
    positions = multimodal_positions(7, [(1, 1, 2), (3, 2, 1)])
    assert positions.tolist() == [[0, 1, 1, 3, 3, 5, 6], [0, 1, 1, 3, 4, 5, 6], [0, 1, 2, 3, 3, 5, 6]]
