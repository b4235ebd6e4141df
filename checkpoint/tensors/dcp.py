"""Reads a DCP checkpoint without a process group, a device mesh or trust.

Layout on disk: `.metadata` is a pickle of `torch.distributed.checkpoint.metadata.Metadata`. It tells, for each tensor,
its shape, dtype and chunks (offsets and sizes in the full tensor: a tensor sharded over two mesh axes is a grid), and
for each chunk the file and the bytes that hold it, in the format of `torch.save`.
"""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import cast

import torch

from checkpoint.files import file_size
from checkpoint.tensors.stored import Chunk, StoredArray, StoredTensor
from checkpoint.tensors.torch_file import Stub, load_pickle, read_torch_file
from errors import UserError, reading
from models.qwen35_moe.parameters import Shape

Places = dict[tuple[str, Shape], tuple[str, int, int]]
"""Of each chunk, by its tensor's name and its offsets: its file's name, first byte, and number of bytes."""


def read_dcp(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of the checkpoint in `folder`, by name. Raises UserError for a missing, foreign or damaged index."""
    path = folder / ".metadata"
    if not path.exists():
        raise UserError(f"{folder} has no .metadata: expected a complete DCP checkpoint")
    file_size(path)
    with reading(path):
        metadata = load_pickle(path.read_bytes(), path)
        places = {
            (_text(at.fqn), _numbers(at.offset or ())): (_text(place.relative_path), place.offset, place.length)
            for at, place in metadata.storage_data.items()
            if _numbers((place.offset, place.length))
        }
        entries = {_text(name): _parse(name, entry) for name, entry in metadata.state_dict_metadata.items()}
    return {name: _stored_tensor(folder, name, *entry, places) for name, entry in entries.items()}


def _parse(name: str, entry: Stub) -> tuple[Shape, torch.dtype, list[tuple[Shape, Shape]]]:
    """A tensor's shape, its dtype, and its chunks' offsets and sizes."""
    if type(entry).name != "TensorStorageMetadata":
        raise ValueError(f"{name!r} is no tensor")
    properties = entry.properties.state
    dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
    return _numbers(entry.size), dtype, [(_numbers(chunk.offsets), _numbers(chunk.sizes)) for chunk in entry.chunks]


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("a name in it is no text")
    return value


def _numbers(values: Iterable[object]) -> tuple[int, ...]:
    numbers = tuple(values)
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ValueError("it has something else where numbers of bytes or elements belong")
    return cast(tuple[int, ...], numbers)


def _stored_tensor(
    folder: Path, name: str, shape: Shape, dtype: torch.dtype, parts: list[tuple[Shape, Shape]], places: Places
) -> StoredTensor:
    chunks = []
    for offsets, sizes in parts:
        if 0 in sizes and 0 not in shape:
            continue  # of a rank that has no part of this tensor
        file, start, length = places.get((name, offsets), ("", 0, 0))
        if not file or Path(file).name != file:
            raise UserError(f"{folder / '.metadata'} tells no file for {name!r} at {list(offsets)}")
        box = tuple((first, first + size) for first, size in zip(offsets, sizes))
        chunks.append(Chunk(box, partial(_open_chunk, folder / file, start, length)))
    return StoredTensor(name, shape, dtype, chunks)


def _open_chunk(path: Path, start: int, length: int) -> StoredArray:
    array = read_torch_file(path, start, length)
    if not isinstance(array, StoredArray):
        raise UserError(f"what lies in {path} is no tensor")
    return array
