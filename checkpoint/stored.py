"""Tensors that lie in files, in parts: what every reader here makes, and every converter and loader reads from.

A StoredTensor is assembled from rectangular chunks, wherever they come from (chunks of a DCP checkpoint, local tensors
of FSDP ranks, tensors of safetensors files), and read a box at a time, so that memory is bounded by the box.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from io import FileIO
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from errors import UserError
from models.qwen35_moe.parameters import Box, Shape, full_box


class StoredArray(NamedTuple):
    """Numbers in a file, uncompressed."""

    file: Path
    start: int
    """Byte at which the first element lies."""
    dtype: torch.dtype
    shape: Shape
    strides: Shape
    """In elements."""

    def part(self, box: Box) -> "StoredArray":
        """What lies in `box`, which names all dimensions; not read yet."""
        first = sum(start * stride for (start, _), stride in zip(box, self.strides))
        shape = tuple(stop - start for start, stop in box)
        return self._replace(start=self.start + first * self.dtype.itemsize, shape=shape)

    def read(self) -> torch.Tensor:
        """Its numbers, contiguous. Raises UserError if the file ends too early, OSError if it cannot be read."""
        with self.file.open("rb", buffering=0) as file:
            return self._read_from(file)

    def _read_from(self, file: FileIO) -> torch.Tensor:
        if len(self.shape) > 1 and self.strides[0] > prod(self.shape[1:]):
            # Not one run of bytes: what lies between the rows is not read.
            result = torch.empty(self.shape, dtype=self.dtype)
            for row, values in enumerate(result):
                start = self.start + row * self.strides[0] * self.dtype.itemsize
                one = self._replace(start=start, shape=self.shape[1:], strides=self.strides[1:])
                values.copy_(one._read_from(file))
            return result
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides))
        buffer = torch.empty(span, dtype=self.dtype)
        view = buffer.view(torch.uint8).numpy().data
        file.seek(self.start)
        done = 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise UserError(f"{self.file} ends too early: it is truncated")
            done += count
        strided = buffer.as_strided(self.shape, self.strides)
        return buffer.view(self.shape) if strided.is_contiguous() else strided.contiguous()


@dataclass
class Chunk:
    """A rectangular part of a tensor, the array that holds it, and copies that must be equal to it."""

    box: Box
    source: StoredArray | Callable[[], StoredArray]
    """The array, or what opens it when it is needed. One of fewer dimensions is one index of the first."""
    copies: list["Chunk"] = field(default_factory=list)

    @cached_property
    def array(self) -> StoredArray:
        return self.source if isinstance(self.source, StoredArray) else self.source()

    def read(self, box: Box) -> torch.Tensor:
        """What lies in `box`, in the coordinates of the whole tensor."""
        moved = [(start - own, stop - own) for (start, stop), (own, _) in zip(box, self.box)]
        missing = len(self.box) - len(self.array.shape)
        return self.array.part(tuple(moved[missing:])).read().view([stop - start for start, stop in box])


class StoredTensor(NamedTuple):
    """A tensor, not read yet."""

    name: str
    shape: Shape
    dtype: torch.dtype
    chunks: list[Chunk]

    def read(self, box: Box = ()) -> torch.Tensor:
        """The part in `box`, on the CPU. Raises UserError for bad bytes, and for copies that differ."""
        box = full_box(box, self.shape)
        parts = ((chunk, _overlap(box, chunk.box)) for chunk in self.chunks)
        parts_here = [(chunk, part) for chunk, part in parts if part is not None]
        if len(parts_here) == 1 and parts_here[0][1] == box:
            return self._read_chunk(parts_here[0][0], box)
        result = torch.empty([stop - start for start, stop in box], dtype=self.dtype)
        for chunk, part in parts_here:
            index = tuple(slice(lo - start, hi - start) for (lo, hi), (start, _) in zip(part, box))
            result[index] = self._read_chunk(chunk, part)
        return result

    def _read_chunk(self, chunk: Chunk, box: Box) -> torch.Tensor:
        first = None
        for copy in (chunk, *chunk.copies):
            try:
                values = copy.read(box)
            except (OSError, ValueError) as error:
                raise UserError(f"cannot read {self.name!r}: {error}") from error
            first = values if first is None else first
            if not torch.equal(_as_bytes(values), _as_bytes(first)):
                raise UserError(f"copies of {self.name!r} in {chunk.array.file} and {copy.array.file} differ")
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
        """Raises UserError unless each element lies in one chunk."""
        edges = [
            sorted({0, size, *(edge for chunk in self.chunks for edge in chunk.box[dim])})
            for dim, size in enumerate(self.shape)
        ]
        if any(edge[0] < 0 or edge[-1] > size for edge, size in zip(edges, self.shape)):
            raise UserError(f"a chunk of {self.name!r} lies outside of it")
        # Counts the chunks on each cell of the grid that all their edges draw.
        cells = [{position: cell for cell, position in enumerate(edge)} for edge in edges]
        count = torch.zeros([len(edge) - 1 for edge in edges], dtype=torch.int32)
        for chunk in self.chunks:
            count[tuple(slice(of[start], of[stop]) for of, (start, stop) in zip(cells, chunk.box))] += 1
        if (count != 1).any():
            raise UserError(f"the chunks of {self.name!r} overlap or leave a hole")


def whole(name: str, array: StoredArray) -> StoredTensor:
    """A tensor that is one array."""
    return StoredTensor(name, array.shape, array.dtype, [Chunk(full_box((), array.shape), array)])


def _overlap(a: Box, b: Box) -> Box | None:
    common = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b))
    return None if any(start >= stop for start, stop in common) else common


def _as_bytes(values: torch.Tensor) -> torch.Tensor:
    """As NaNs compare equal to themselves."""
    return values.view(-1).view(torch.uint8)
