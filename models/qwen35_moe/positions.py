"""Positions of a document's tokens on three axes: time, height, width (MRoPE, Wang et al. 2024, arXiv 2409.12191)."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

# Shapes: n tokens of a document.


def multimodal_positions(length: int, frames: Iterable[tuple[int, int, int]]) -> NDArray[np.int32]:
    """[3, n]: time, height and width of each token of a document of `length` n.

    frames: (place of the first token, height, width in tokens) of each image, or pair of a video's pictures, in order.
    Text counts on by one on all axes. A frame's tokens have one time, that of the token that would follow, and to it
    their row and their column are added; after the frame text goes on behind its longer side. Nothing else, such as
    the pace of a video, counts.
    """
    positions = np.empty((3, length), np.int32)
    place, following = 0, 0

    def text_until(end: int) -> None:
        positions[:, place:end] = np.arange(following, following + end - place)

    for start, height, width in frames:
        end = start + height * width
        assert place <= start < end <= length, (place, start, height, width, length)
        text_until(start)
        following += start - place
        row, column = np.divmod(np.arange(height * width), width)
        positions[:, start:end] = following + np.stack([np.zeros_like(row), row, column])
        place, following = end, following + max(height, width)
    text_until(length)
    return positions
