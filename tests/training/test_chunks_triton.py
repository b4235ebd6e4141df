"""The tables by which a kernel finds its chunk of many tensors."""

import pytest
import torch

pytest.importorskip("triton")
from training.chunks_triton import CHUNK, are_aligned, chunks_of


def test_each_number_of_each_tensor_is_in_one_chunk() -> None:
    sizes = (1, 0, CHUNK, CHUNK + 1, 0, 3 * CHUNK - 1)
    places, of_each, ends = chunks_of(sizes, torch.device("cpu"))
    assert of_each.tolist() == list(sizes)
    assert places.tolist() == [[0, 0], [2, 0], [3, 0], [3, 1], [5, 0], [5, 1], [5, 2]]
    assert ends.tolist() == [1, 1, 2, 4, 4, 7]
    places, _, ends = chunks_of((0,), torch.device("cpu"))
    assert (places.shape, ends.tolist()) == ((0, 2), [0])


def test_are_aligned() -> None:
    assert are_aligned(32, 64, 1 << 40)
    for size, *addresses in ((33, 64), (32, 8), (32, 64, 65)):
        assert not are_aligned(size, *addresses)
