"""Reads a DCP checkpoint without a process group, a device mesh or trust: its index, and tensors as StoredTensor.

Layout on disk: `.metadata` is a pickle of `torch.distributed.checkpoint.metadata.Metadata`. It tells, for each tensor,
its shape, dtype and chunks (offsets and sizes in the full tensor: a tensor sharded over two mesh axes is a grid), and
for each chunk the file and the bytes that hold it, in the format of `torch.save`.
"""

from functools import partial
from pathlib import Path

import torch

from checkpoint.stored import Chunk, StoredArray, StoredTensor
from checkpoint.torch_file import Stub, load_pickle, read_torch_file
from errors import UserError
from models.qwen35_moe.parameters import Shape


def read_index(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of the checkpoint in `folder`, by name.

    Raises UserError for a missing or foreign index, and for a tensor whose chunks overlap or leave a hole.
    """
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            metadata = load_pickle(file, path)
    except FileNotFoundError:
        raise UserError(f"{folder} has no .metadata: expected a complete DCP checkpoint") from None
    try:
        places = {(i.fqn, tuple(i.offset or ())): place for i, place in metadata.storage_data.items()}
        entries = metadata.state_dict_metadata
        return {name: _stored_tensor(folder, name, entry, places) for name, entry in entries.items()}
    except (AttributeError, TypeError, IndexError) as error:
        raise UserError(f"{path} is no index of a DCP checkpoint: {error}") from error


def _stored_tensor(folder: Path, name: str, entry: Stub, places: dict[tuple[str, Shape], Stub]) -> StoredTensor:
    if type(entry).name != "TensorStorageMetadata":
        raise UserError(f"{folder}: {name!r} is no tensor")
    shape, properties = tuple(entry.size), entry.properties.state
    dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
    chunks = []
    for chunk in entry.chunks:
        offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        if 0 in sizes and 0 not in shape:
            continue  # of a rank that has no part of this tensor
        place = places.get((name, offsets))
        if place is None or Path(place.relative_path).name != place.relative_path:
            raise UserError(f"{folder / '.metadata'} tells no file for {name!r} at {list(offsets)}")
        box = tuple((start, start + size) for start, size in zip(offsets, sizes))
        path = folder / place.relative_path
        chunks.append(Chunk(box, partial(_open_chunk, path, place.offset, place.length, sizes, dtype)))
    tensor = StoredTensor(name, shape, dtype, chunks)
    tensor.check_cover()
    return tensor


def _open_chunk(path: Path, start: int, length: int, sizes: Shape, dtype: torch.dtype) -> StoredArray:
    array = read_torch_file(path, start, length)
    if not isinstance(array, StoredArray) or (array.shape, array.dtype) != (sizes, dtype):
        raise UserError(f"what lies in {path} is not what the index says")
    return array
