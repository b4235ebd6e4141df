"""Reads and writes safetensors files a block at a time, and Hugging Face directories made of them.

The format: the header's length (8 bytes, little-endian), a JSON header with each tensor's dtype, shape and bytes, data.
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoint.files import file_size, read_json, unread_weights
from checkpoint.tensors.stored import DTYPES, StoredArray, StoredTensor, finite, whole
from errors import UserError, reading
from models.qwen35_moe.hf_weights import shape_of_box
from models.qwen35_moe.parameters import Box, Shape

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BLOCK_BYTES = 64 * 2**20
_MAX_HEADER_BYTES = 100 * 10**6  # what the safetensors library reads


def read_safetensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a Hugging Face directory, one file or several. Raises UserError naming a file that is bad."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not os.path.lexists(index):
        if not os.path.lexists(single) and (others := unread_weights(folder)):
            raise UserError(f"{single} is missing{others}: expected safetensors")
        return read_file(single)
    file_of = read_json(index).get("weight_map")
    if not isinstance(file_of, dict) or not all(
        isinstance(name, str) and name and Path(name).name == name for name in file_of.values()
    ):
        raise UserError(f"{index}: expected a weight_map with names of files in its folder")
    names = sorted(set(file_of.values()))
    if single.name not in names and os.path.lexists(single):
        raise UserError(f"{folder} has {index.name} and {single.name}, which it does not name: expected one of them")
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        arrays = _read_header(folder / name)
        if unknown := arrays.keys() - file_of.keys():
            raise UserError(f"{folder / name}: {min(unknown)!r} is not in {index.name}")
        tensors |= {key: whole(key, array) for key, array in arrays.items() if file_of[key] == name}
    if lacking := file_of.keys() - tensors.keys():
        raise UserError(f"{folder / file_of[min(lacking)]} lacks {min(lacking)!r}, which {index.name} says it has")
    return tensors


def read_file(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one file. Raises UserError if it is bad."""
    return {key: whole(key, array) for key, array in _read_header(path).items()}


def _read_header(path: Path) -> dict[str, StoredArray]:
    """By name. The library's own reader maps the whole file into memory: of a file of 1.3 GB read in blocks the peak is
    1,286 MiB instead of 134. So headers are checked here as it does: no byte belongs to two tensors or to none."""
    size = file_size(path)
    with reading(path), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise UserError(f"{path} is no complete safetensors file: its header does not end")
        header = json.loads(file.read(length), object_pairs_hook=_each_key_once)
        header.pop("__metadata__", None)
        entries = [
            (*_list(e["data_offsets"]), k, DTYPES.get(e["dtype"], e["dtype"]), tuple(_list(e["shape"])))
            for k, e in header.items()
        ]
        arrays, end = {}, 0
        for start, stop, key, dtype, shape in sorted(entries, key=lambda entry: entry[:2]):
            if not isinstance(dtype, torch.dtype):
                raise UserError(f"{path}: {key!r} has dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
            counts = all(type(number) is int and number >= 0 for number in (start, stop, *shape))
            if not counts or start != end or stop - start != prod(shape) * dtype.itemsize:
                raise UserError(f"{path}: the header's bytes {start} to {stop} of {key!r} do not fit")
            strides, end = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape))), stop
            arrays[key] = StoredArray(path, 8 + length + start, 8 + length + stop, dtype, shape, strides)
        if 8 + length + end != size:
            raise UserError(f"{path} is no complete safetensors file: it has {size} bytes, not {8 + length + end}")
    return arrays


def _each_key_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice in its header")
    return dict(pairs)


def _list(value: object) -> list[int]:
    if not isinstance(value, list):
        raise ValueError(f"its header has {value!r:.60} where a list of numbers belongs")
    return value


class Export(NamedTuple):
    """A tensor to be written: a stored one, or one expert of it, and of that the gate or the up projection."""

    key: str
    stored: StoredTensor
    dtype: torch.dtype
    box: Box = ()

    @property
    def shape(self) -> Shape:
        return shape_of_box(self.stored.shape, self.box)

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def blocks(self) -> Iterator[torch.Tensor]:
        """The data to be written, in order; memory stays within a few blocks."""
        blocks = iter([self.stored.read(self.box)]) if self.box else self.stored.blocks(_BLOCK_BYTES)
        return (finite(self.stored, block.to(self.dtype)).view(-1) for block in blocks)


def write_file(path: Path, tensors: list[Export]) -> Iterator[int]:
    """Writes one file, and yields the bytes of each block as it is written."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        name = _NAMES[tensor.dtype]
        header[tensor.key] = {"dtype": name, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data is aligned
    blocks = chain.from_iterable(tensor.blocks() for tensor in tensors)
    with path.open("wb") as file, ThreadPoolExecutor(1) as reader:
        file.write(len(text).to_bytes(8, "little") + text)
        # The next block is read while this one is written.
        following = reader.submit(next, blocks, None)
        while (block := following.result()) is not None:
            following = reader.submit(next, blocks, None)
            file.write(block.view(torch.uint8).numpy().data)
            yield block.nbytes
