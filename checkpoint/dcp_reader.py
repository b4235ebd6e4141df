"""Reads a DCP checkpoint without a process group, a device mesh or trust: its index, and tensors one at a time.

Layout on disk: `.metadata` is a pickle of `torch.distributed.checkpoint.metadata.Metadata`. It tells, for each tensor,
its shape, dtype and chunks (offsets and sizes in the full tensor: a tensor sharded over two mesh axes is a grid), and
for each chunk the file and the bytes that hold it, in the format of `torch.save`.
"""

import io
import pickle
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

# What DCP's index is made of; nothing else is let in, so that reading a checkpoint runs no code of its author.
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(str(d).removeprefix("torch.") for d in vars(torch).values() if isinstance(d, torch.dtype))},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}


class _Refused(ValueError):
    """The index names something that is not in `_ALLOWED`."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise _Refused(f"checkpoint: .metadata asks for {module}.{name}, which no DCP checkpoint needs: refused")
        return super().find_class(module, name)


class Chunk(NamedTuple):
    """A rectangular part of a tensor, and where its bytes lie."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


class _Window(io.RawIOBase):
    """The part of an open file that holds one chunk, as a file of its own: it is read in place, not copied first."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._position)
        view = memoryview(buffer).cast("B")
        count = self._file.readinto(view[: max(self._length - self._position, 0)])  # type: ignore[attr-defined]
        self._position += count
        return count


class StoredTensor(NamedTuple):
    """A tensor of a checkpoint, not read yet."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[Chunk]

    def read(self) -> torch.Tensor:
        """The whole tensor, on the CPU; takes its size and one chunk's in memory. Raises ValueError for bad bytes."""
        if len(self.chunks) == 1:
            return self._read_chunk(self.chunks[0])
        full = torch.empty(self.shape, dtype=self.dtype)
        for chunk in self.chunks:
            region = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes))
            full[region] = self._read_chunk(chunk)
        return full

    def _read_chunk(self, chunk: Chunk) -> torch.Tensor:
        try:
            with chunk.file.open("rb") as file:
                window: Any = _Window(file, chunk.start, chunk.length)
                stored = torch.load(window, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"checkpoint: cannot read {self.name!r} from {chunk.file}: {reason}") from error
        described = isinstance(stored, torch.Tensor) and (tuple(stored.shape), stored.dtype)
        if described != (chunk.sizes, self.dtype):
            raise ValueError(f"checkpoint: {self.name!r} in {chunk.file} is not what the index says")
        return stored


def read_index(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of the checkpoint in `folder`, by name.

    Raises ValueError for a missing or foreign index, and for a tensor whose chunks overlap or leave a hole.
    """
    try:
        with (folder / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
    except FileNotFoundError:
        raise ValueError(f"checkpoint: {folder} has no .metadata: expected a complete DCP checkpoint") from None
    except _Refused:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f"checkpoint: {folder / '.metadata'} cannot be read: {error}") from error
    if not isinstance(metadata, Metadata):
        raise ValueError(f"checkpoint: {folder / '.metadata'} is no index of a DCP checkpoint")
    places = {(index.fqn, tuple(index.offset or ())): info for index, info in (metadata.storage_data or {}).items()}
    tensors = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"checkpoint: {name!r} is no tensor")
        chunks = []
        for chunk in entry.chunks:
            if 0 in chunk.sizes and 0 not in entry.size:
                continue  # of a rank that has no part of this tensor
            info = places.get((name, tuple(chunk.offsets)))
            if info is None or Path(info.relative_path).name != info.relative_path:
                raise ValueError(f"checkpoint: the index tells no file of {folder} for {name!r} at {chunk.offsets}")
            file = folder / info.relative_path
            chunks.append(Chunk(tuple(chunk.offsets), tuple(chunk.sizes), file, info.offset, info.length))
        tensors[name] = StoredTensor(name, tuple(entry.size), entry.properties.dtype, chunks)
        _check_cover(tensors[name])
    return tensors


def _check_cover(tensor: StoredTensor) -> None:
    """Counts the chunks on each cell of the grid that all chunks' edges draw: there must be one."""
    edges = [
        sorted(
            {0, size, *(c.offsets[dim] for c in tensor.chunks), *(c.offsets[dim] + c.sizes[dim] for c in tensor.chunks)}
        )
        for dim, size in enumerate(tensor.shape)
    ]
    if any(edge[0] < 0 or edge[-1] > size for edge, size in zip(edges, tensor.shape)):
        raise ValueError(f"checkpoint: a chunk of {tensor.name!r} lies outside of it")
    cells = [{position: cell for cell, position in enumerate(edge)} for edge in edges]
    count = torch.zeros([len(edge) - 1 for edge in edges], dtype=torch.int32)
    for chunk in tensor.chunks:
        count[tuple(slice(of[o], of[o + size]) for of, o, size in zip(cells, chunk.offsets, chunk.sizes))] += 1
    if (count != 1).any():
        raise ValueError(f"checkpoint: the chunks of {tensor.name!r} overlap or leave a hole")
