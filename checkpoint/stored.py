"""Tensors that lie in files, in parts: what every reader here makes, and every converter and loader reads from.

A StoredTensor is assembled from rectangular chunks, wherever they come from (chunks of a DCP checkpoint, local tensors
of FSDP ranks, tensors of safetensors files), and read a region at a time, so that memory is bounded by the region.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

Shape = tuple[int, ...]
Box = tuple[tuple[int, int], ...]
"""(start, stop) of a tensor's first dimensions; those not named are whole."""


class StoredArray(NamedTuple):
    """Numbers in a file, uncompressed."""

    file: Path
    start: int
    """Byte at which the first element lies."""
    dtype: torch.dtype
    shape: Shape
    strides: Shape
    """In elements."""

    def read(self, box: Box = ()) -> torch.Tensor:
        """The part of it in `box`. Raises ValueError if the file ends too early, OSError if it cannot be read."""
        box = (*box, *((0, size) for size in self.shape[len(box) :]))
        shape = tuple(stop - start for start, stop in box)
        result = torch.empty(shape, dtype=self.dtype)
        if result.numel():
            with self.file.open("rb", buffering=0) as file:
                self._read_into(file, result, box)
        return result

    def _read_into(self, file, result: torch.Tensor, box: Box) -> None:  # type: ignore[no-untyped-def]
        inner = prod(stop - start for start, stop in box[1:])
        if len(box) > 1 and box[0][1] - box[0][0] > 1 and inner < prod(self.shape[1:]):
            # Not one run of bytes: what lies between is not read.
            for row in range(*box[0]):
                position = row - box[0][0]
                self._read_into(file, result[position : position + 1], ((row, row + 1), *box[1:]))
            return
        first = sum(start * stride for (start, _), stride in zip(box, self.strides))
        span = 1 + sum((stop - start - 1) * stride for (start, stop), stride in zip(box, self.strides))
        in_place = span == result.numel() and result.is_contiguous() and _is_dense(result.shape, self.strides)
        buffer = result.view(-1) if in_place else torch.empty(span, dtype=self.dtype)
        view = buffer.view(torch.uint8).numpy().data
        file.seek(self.start + first * self.dtype.itemsize)
        done = 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise ValueError(f"{self.file} ends too early: it is truncated")
            done += count
        if not in_place:
            result.copy_(buffer.as_strided(result.shape, self.strides))


def _is_dense(shape: Shape, strides: Shape) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


class Chunk:
    """A rectangular part of a tensor, the part of an array that holds it, and copies that must be equal to it."""

    def __init__(self, box: Box, source: StoredArray | Callable[[], StoredArray], array_starts: Shape = ()) -> None:
        """`source`: the array, or what opens it when it is needed; `array_starts`: where the part begins in it."""
        self.box, self._source, self._starts = box, source, array_starts or (0,) * len(box)
        self.copies: list[Chunk] = []

    @cached_property
    def array(self) -> StoredArray:
        return self._source if isinstance(self._source, StoredArray) else self._source()

    def read(self, box: Box) -> torch.Tensor:
        """What lies in `box`, in the coordinates of the whole tensor. An array of fewer dimensions is one index."""
        moved = [(lo - p[0] + s, hi - p[0] + s) for (lo, hi), p, s in zip(box, self.box, self._starts)]
        array = self.array
        extra = len(self.box) - len(array.shape)
        return array.read(tuple(moved[extra:])).view([hi - lo for lo, hi in box])


class StoredTensor(NamedTuple):
    """A tensor, not read yet."""

    name: str
    shape: Shape
    dtype: torch.dtype
    chunks: list[Chunk]

    def read(self, box: Box = ()) -> torch.Tensor:
        """The part in `box`, on the CPU. Raises ValueError for bad bytes, and for copies that differ."""
        box = (*box, *((0, size) for size in self.shape[len(box) :]))
        parts = ((chunk, _overlap(box, chunk.box)) for chunk in self.chunks)
        parts_here = [(chunk, part) for chunk, part in parts if part is not None]
        if len(parts_here) == 1 and parts_here[0][1] == box:
            return self._read_chunk(parts_here[0][0], box)
        result = torch.empty([stop - start for start, stop in box], dtype=self.dtype)
        for chunk, part in parts_here:
            region = tuple(slice(lo - start, hi - start) for (lo, hi), (start, _) in zip(part, box))
            result[region] = self._read_chunk(chunk, part)
        return result

    def _read_chunk(self, chunk: Chunk, box: Box) -> torch.Tensor:
        first = None
        for copy in (chunk, *chunk.copies):
            try:
                values = copy.read(box)
            except (OSError, ValueError, KeyError) as error:
                raise ValueError(f"cannot read {self.name!r}: {error}") from error
            if values.dtype != self.dtype:
                raise ValueError(f"{self.name!r} in {copy.array.file} is {values.dtype}, elsewhere {self.dtype}")
            first = values if first is None else first
            if not torch.equal(_as_bytes(values), _as_bytes(first)):
                raise ValueError(f"copies of {self.name!r} in {chunk.array.file} and {copy.array.file} differ")
        assert first is not None
        return first

    def blocks(self, max_bytes: int) -> Iterator[torch.Tensor]:
        """The whole tensor as consecutive ranges of its first dimension, each of at most `max_bytes` or of one row."""
        if not self.shape:
            yield self.read()
            return
        rows = max(1, max_bytes // max(prod(self.shape[1:]) * self.dtype.itemsize, 1))
        for start in range(0, self.shape[0], rows):
            yield self.read(((start, min(start + rows, self.shape[0])),))

    def check_cover(self) -> None:
        """Raises ValueError unless each element lies in one chunk."""
        edges = [
            sorted({0, size, *(edge for chunk in self.chunks for edge in chunk.box[dim])})
            for dim, size in enumerate(self.shape)
        ]
        if any(edge[0] < 0 or edge[-1] > size for edge, size in zip(edges, self.shape)):
            raise ValueError(f"a chunk of {self.name!r} lies outside of it")
        # Counts the chunks on each cell of the grid that all their edges draw.
        cells = [{position: cell for cell, position in enumerate(edge)} for edge in edges]
        count = torch.zeros([len(edge) - 1 for edge in edges], dtype=torch.int32)
        for chunk in self.chunks:
            count[tuple(slice(of[start], of[stop]) for of, (start, stop) in zip(cells, chunk.box))] += 1
        if (count != 1).any():
            raise ValueError(f"the chunks of {self.name!r} overlap or leave a hole")


def whole(name: str, array: StoredArray) -> StoredTensor:
    """A tensor that is one array."""
    return StoredTensor(name, array.shape, array.dtype, [Chunk(tuple((0, n) for n in array.shape), array)])


def _overlap(a: Box, b: Box) -> Box | None:
    common = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b))
    return None if any(start >= stop for start, stop in common) else common


def _as_bytes(values: torch.Tensor) -> torch.Tensor:
    """As NaNs compare equal to themselves."""
    return values.contiguous().view(-1).view(torch.uint8)
