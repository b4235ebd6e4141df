"""Reads and writes safetensors files a block at a time, and Hugging Face directories made of them.

The format: the header's length (8 bytes, little-endian), a JSON header with each tensor's dtype, shape and bytes, data.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoint.stored import StoredArray, StoredTensor
from errors import UserError
from models.qwen35_moe.hf_weights import shape_of_box
from models.qwen35_moe.parameters import Box, Shape

_DTYPES = {
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
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_BLOCK_BYTES = 64 * 2**20


def read_headers(folder: Path) -> dict[str, StoredArray]:
    """Every tensor of a Hugging Face directory, one file or several. Raises UserError naming a file that is bad."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{index} is no index of safetensors files: {error}") from error
    arrays: dict[str, StoredArray] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise UserError(f"{folder}: {name} is missing")
        try:
            arrays |= _read_header(path)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no complete safetensors file: {error}") from error
    return arrays


def _read_header(path: Path) -> dict[str, StoredArray]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size:
            raise UserError("its header does not end")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    arrays = {}
    for key, entry in header.items():
        shape, dtype, (start, end) = tuple(entry["shape"]), _DTYPES[entry["dtype"]], entry["data_offsets"]
        if end - start != prod(shape) * dtype.itemsize or 8 + length + end > size:
            raise UserError(f"the data of {key!r} is cut off")
        strides = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
        arrays[key] = StoredArray(path, 8 + length + start, dtype, shape, strides)
    return arrays


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
        return (block.to(self.dtype).view(-1) for block in blocks)


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
