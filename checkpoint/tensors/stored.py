"""Tensors in files, not read yet: every reader here returns a table of them, `dict[str, StoredTensor]`.

A StoredTensor is made of chunks. A chunk is a box of the tensor, a range of each dimension, that lies in one file: a
chunk of a DCP checkpoint, what one FSDP rank held, or a whole tensor of a safetensors file. Any box can be read, and
memory is bounded by that box. Whatever the files, what they say is checked here: shapes, dtypes, that chunks cover each
element once, that bytes lie inside their file.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import FileIO
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoint.files import file_size
from errors import UserError
from models.qwen35_moe.parameters import Box, Shape, full_box

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What a tensor may consist of, by the names in safetensors files."""
PLAIN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MAX_DIMS, _MAX_CELLS = 16, 2**24


class StoredArray(NamedTuple):
    """Numbers in a file, uncompressed."""

    file: Path
    start: int
    """Byte at which the first element lies."""
    stop: int
    """Byte at which the last may end."""
    dtype: torch.dtype
    shape: Shape
    strides: Shape
    """In elements."""

    def part(self, box: Box) -> "StoredArray":
        """What lies in `box`, which names all dimensions; not read yet."""
        first = sum(start * stride for (start, _), stride in zip(box, self.strides))
        shape = tuple(stop - start for start, stop in box)
        return self._replace(start=self.start + first * self.dtype.itemsize, shape=shape)

    def check(self) -> None:
        """Raises UserError unless all elements lie between `start` and `stop` and in the file, no two in one place."""
        numbers = (self.start, self.stop, *self.shape, *self.strides)
        if not all(type(number) is int and number >= 0 for number in numbers) or len(self.shape) != len(self.strides):
            raise UserError(f"{self.file}: bytes {self.start} to {self.stop} are no array of shape {self.shape}")
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides))
        num_bytes = self.dtype.itemsize * (0 if 0 in self.shape else max(span, prod(self.shape)))
        if self.start + num_bytes > self.stop:
            raise UserError(f"{self.file}: {self.stop - self.start} bytes are too few for an array of {self.shape}")
        if self.stop > file_size(self.file):
            raise UserError(f"{self.file} ends too early: it is truncated")

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
    """A box of a tensor, the array that holds it, and copies that must be equal to it."""

    box: Box
    source: StoredArray | Callable[[], StoredArray]
    """The array, or a function that opens it when it is needed. It may lack a first dimension of size 1."""
    copies: list["Chunk"] = field(default_factory=list)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor, not read yet. Raises UserError unless its chunks hold each of its elements once."""

    name: str
    shape: Shape
    dtype: torch.dtype
    chunks: list[Chunk]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES.values():
            raise UserError(f"{self.name!r} is of {self.dtype}: expected one of {', '.join(DTYPES)}")
        boxes = [chunk.box for chunk in self.chunks]
        numbers = [*self.shape, *(edge for box in boxes for edges in box for edge in edges)]
        if not all(type(number) is int and 0 <= number < 2**48 for number in numbers) or len(self.shape) > _MAX_DIMS:
            raise UserError(f"{self.name!r} cannot have the shape {self.shape} or a chunk of it")
        if any(len(box) != len(self.shape) for box in boxes):
            raise UserError(f"a chunk of {self.name!r} has not its number of dimensions, {len(self.shape)}")
        if boxes != [full_box((), self.shape)]:
            self._check_cover(boxes)
        for chunk in self.chunks:
            if isinstance(chunk.source, StoredArray):
                for copy in (chunk, *chunk.copies):
                    self.open(copy)

    def open(self, chunk: Chunk) -> StoredArray:
        """The array of one of its chunks. Raises UserError unless it has the shape and dtype that it must."""
        if not isinstance(chunk.source, StoredArray):
            chunk.source = chunk.source()
        array, sizes = chunk.source, tuple(stop - start for start, stop in chunk.box)
        if array.shape != sizes and (1, *array.shape) != sizes:
            raise UserError(f"{array.file}: {self.name!r} has shape {list(array.shape)}, not {list(sizes)}")
        if array.dtype != self.dtype:
            raise UserError(f"{array.file}: {self.name!r} is of {array.dtype}, not {self.dtype}")
        array.check()
        return array

    def read(self, box: Box = ()) -> torch.Tensor:
        """The part in `box`, on the CPU. Raises UserError for bad bytes, and for copies that differ."""
        box = full_box(box, self.shape)
        parts_here = [(chunk, part) for chunk in self.chunks if (part := _overlap(box, chunk.box)) is not None]
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
                array = self.open(copy)
                moved = [(start - own, stop - own) for (start, stop), (own, _) in zip(box, copy.box)]
                missing = len(box) - len(array.shape)
                values = array.part(tuple(moved[missing:])).read().view([stop - start for start, stop in box])
            except (OSError, UserError) as error:
                raise UserError(f"cannot read {self.name!r}: {error}") from error
            first = values if first is None else first
            if not torch.equal(_as_bytes(values), _as_bytes(first)):
                raise UserError(f"copies of {self.name!r} in {self.open(chunk).file} and {array.file} differ")
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

    def _check_cover(self, boxes: list[Box]) -> None:
        """Raises UserError unless each element lies in exactly one box."""
        edges = [
            sorted({0, size, *(edge for box in boxes for edge in box[dim])}) for dim, size in enumerate(self.shape)
        ]
        if any(edge[-1] > size for edge, size in zip(edges, self.shape)):
            raise UserError(f"a chunk of {self.name!r} lies outside of it")
        # All edges together cut the tensor into a grid; counts the chunks on each of its cells.
        cells = [{position: cell for cell, position in enumerate(edge)} for edge in edges]
        sizes = [len(edge) - 1 for edge in edges]
        if prod(sizes) > _MAX_CELLS:
            raise UserError(f"{self.name!r} is cut into too many chunks")
        count = torch.zeros(sizes, dtype=torch.int32)
        for box in boxes:
            count[tuple(slice(of[start], of[stop]) for of, (start, stop) in zip(cells, box))] += 1
        if (count != 1).any():
            raise UserError(f"the chunks of {self.name!r} overlap or leave a hole")


def finite(tensor: StoredTensor, values: torch.Tensor) -> torch.Tensor:
    """`values`, which were read from `tensor` and maybe converted. Raises UserError if any is NaN or infinite: such
    weights compute nothing, and training mends none."""
    # A sum passes over them once, and shows them; but finite ones may add up to infinity.
    if values.dtype in PLAIN_DTYPES and not values.sum().isfinite() and not values.isfinite().all():
        folder = f"{tensor.open(tensor.chunks[0]).file.parent}: " if tensor.chunks else ""
        raise UserError(f"{folder}{tensor.name!r} has values that are not finite as {values.dtype}: expected numbers")
    return values


def whole(name: str, array: StoredArray) -> StoredTensor:
    """A tensor that is one array."""
    return StoredTensor(name, array.shape, array.dtype, [Chunk(full_box((), array.shape), array)])


def _overlap(a: Box, b: Box) -> Box | None:
    common = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b))
    return None if any(start >= stop for start, stop in common) else common


def _as_bytes(values: torch.Tensor) -> torch.Tensor:
    """What is compared in the place of numbers, as a NaN does not equal itself."""
    return values.view(-1).view(torch.uint8)
