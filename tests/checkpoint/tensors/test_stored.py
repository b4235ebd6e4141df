"""Stored tensors: chunks that do not make one tensor, arrays that their files do not hold, and reading of any box."""

import itertools
import random
from pathlib import Path

import pytest
import torch

from checkpoint.tensors.stored import Chunk, StoredArray, StoredTensor
from errors import UserError

FLOAT = torch.float32


def array(folder: Path, *shape: int, start: int = 0, strides: tuple[int, ...] | None = None) -> StoredArray:
    """In a file of the numbers 0 to 99."""
    path = folder / "numbers"
    path.write_bytes(torch.arange(100.0).numpy().tobytes())
    strides = strides or torch.empty(shape, device="meta").stride()
    return StoredArray(path, 4 * start, 400, FLOAT, shape, strides)


def test_any_box_of_any_cut_reads_as_the_tensor(tmp_path: Path) -> None:
    chance = random.Random(0)
    whole = torch.arange(100.0)[: 6 * 5 * 3].view(6, 5, 3)
    stored = array(tmp_path, 6, 5, 3)
    for _ in range(50):
        cuts = [sorted({0, size, *chance.choices(range(size), k=2)}) for size in whole.shape]
        edges = [list(itertools.pairwise(cut)) for cut in cuts]
        boxes = [(a, b, c) for a in edges[0] for b in edges[1] for c in edges[2]]
        tensor = StoredTensor("t", (6, 5, 3), FLOAT, [Chunk(box, stored.part(box)) for box in boxes])
        box = tuple(tuple(sorted(chance.sample(range(size + 1), 2))) for size in whole.shape)
        assert torch.equal(tensor.read(box), whole[tuple(slice(*edges) for edges in box)])
        assert torch.equal(torch.cat(list(tensor.blocks(60))), whole)


@pytest.mark.parametrize(
    ("shape", "boxes", "message"),
    [
        ((4,), [((0, 2),)], "overlap or leave a hole"),
        ((4,), [((0, 3),), ((2, 4),)], "overlap or leave a hole"),
        ((4,), [((0, 4),), ((0, 4),)], "overlap or leave a hole"),
        ((4,), [((0, 5),)], "lies outside"),
        ((4,), [((-1, 4),)], "cannot have the shape"),
        ((4,), [((0, 2**60),)], "cannot have the shape"),
        ((4,), [((0.0, 4.0),)], "cannot have the shape"),
        ((4,), [((0, 4), (0, 1))], "number of dimensions"),
        ((True, 4), [((0, 1), (0, 4))], "cannot have the shape"),
        ((1,) * 99, [((0, 1),) * 99], "cannot have the shape"),
        ((), [], "overlap or leave a hole"),
        ((10**5, 10**5), [((i, i + 1), (i, i + 1)) for i in range(10**4)], "too many chunks"),
    ],
)
def test_chunks_that_make_no_tensor_are_refused(shape: tuple, boxes: list, message: str) -> None:
    def never() -> StoredArray:
        raise AssertionError("nothing is opened")

    with pytest.raises(UserError, match=message):
        StoredTensor("t", shape, FLOAT, [Chunk(box, never) for box in boxes])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stop": 404}, "truncated"),
        ({"stop": 399}, "too few"),
        ({"start": 4}, "too few"),
        ({"start": -4}, "are no array"),
        ({"strides": (10, 11)}, "too few"),
        ({"strides": (-10, 1)}, "are no array"),
        ({"strides": (10,)}, "are no array"),
        ({"strides": (10.0, 1)}, "are no array"),
        ({"shape": (10**6, 10), "strides": (0, 0)}, "too few"),
        ({"shape": (11, 10)}, "too few"),
    ],
)
@pytest.mark.parametrize("later", [False, True])
def test_arrays_that_their_file_does_not_hold_are_refused(
    tmp_path: Path, change: dict, message: str, later: bool
) -> None:
    bad = array(tmp_path, 10, 10)._replace(**change)
    box = tuple((0, size) for size in bad.shape)
    with pytest.raises(UserError, match=message):
        StoredTensor("t", bad.shape, FLOAT, [Chunk(box, (lambda: bad) if later else bad)]).read()


def test_another_shape_or_dtype_than_the_chunks_is_refused(tmp_path: Path) -> None:
    ten = array(tmp_path, 10)
    for chunk in (Chunk(((0, 9),), ten), Chunk(((0, 5), (0, 2)), ten)):
        shape = tuple(stop for _, stop in chunk.box)
        with pytest.raises(UserError, match="has shape"):
            StoredTensor("t", shape, FLOAT, [chunk])
    with pytest.raises(UserError, match=r"is of torch\.float32, not torch\.int32"):
        StoredTensor("t", (10,), torch.int32, [Chunk(((0, 10),), ten)])
    with pytest.raises(UserError, match=r"is of torch\.complex64: expected one of"):
        StoredTensor("t", (10,), torch.complex64, [Chunk(((0, 10),), ten)])
    expert = StoredTensor("t", (1, 10), FLOAT, [Chunk(((0, 1), (0, 10)), ten)])
    assert torch.equal(expert.read(((0, 1), (2, 5))), torch.tensor([[2.0, 3, 4]]))
