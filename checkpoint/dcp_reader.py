"""Reads a DCP checkpoint without a process group, a device mesh or trust: its index, and tensors one at a time.

Layout on disk: `.metadata` is a pickle of `torch.distributed.checkpoint.metadata.Metadata`. It tells, for each tensor,
its shape, dtype and chunks (offsets and sizes in the full tensor: a tensor sharded over two mesh axes is a grid), and
for each chunk the file and the bytes that hold it, in the format of `torch.save`.
"""

import io
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import torch

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


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise ValueError(f"checkpoint: .metadata asks for {module}.{name}, which no DCP checkpoint needs: refused")
        return super().find_class(module, name)


class Chunk(NamedTuple):
    """A rectangular part of a tensor, and where its bytes lie."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


class StoredTensor(NamedTuple):
    """A tensor of a checkpoint, not read yet."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[Chunk]

    def read(self) -> torch.Tensor:
        """The whole tensor, on the CPU; takes its size and one chunk's in memory. Raises ValueError for bad bytes."""
        full = torch.empty(self.shape, dtype=self.dtype)
        for chunk in self.chunks:
            region = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes))
            full[region] = self._read_chunk(chunk)
        return full

    def _read_chunk(self, chunk: Chunk) -> torch.Tensor:
        try:
            with chunk.file.open("rb") as file:
                file.seek(chunk.start)
                stored = torch.load(io.BytesIO(file.read(chunk.length)), map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"checkpoint: cannot read {self.name!r} from {chunk.file}: {reason}") from error
        if tuple(stored.shape) != chunk.sizes or stored.dtype != self.dtype:
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
    except (pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise ValueError(f"checkpoint: {folder / '.metadata'} cannot be read: {error}") from error
    places = {(index.fqn, tuple(index.offset or ())): info for index, info in metadata.storage_data.items()}
    tensors = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not hasattr(entry, "chunks"):
            raise ValueError(f"checkpoint: {name!r} is no tensor")
        chunks = []
        for chunk in entry.chunks:
            info = places[name, tuple(chunk.offsets)]
            file = folder / info.relative_path
            chunks.append(Chunk(tuple(chunk.offsets), tuple(chunk.sizes), file, info.offset, info.length))
        tensors[name] = StoredTensor(name, tuple(entry.size), entry.properties.dtype, chunks)
        _check_cover(tensors[name])
    return tensors


def _check_cover(tensor: StoredTensor) -> None:
    """Disjoint chunks inside the tensor whose volumes add up to its own cover it exactly."""
    volume = 0
    for i, chunk in enumerate(tensor.chunks):
        volume += torch.Size(chunk.sizes).numel()
        inside = all(o >= 0 and o + s <= n for o, s, n in zip(chunk.offsets, chunk.sizes, tensor.shape))
        overlaps = any(
            all(a < c + d and c < a + b for a, b, c, d in zip(chunk.offsets, chunk.sizes, other.offsets, other.sizes))
            for other in tensor.chunks[:i]
        )
        if not inside or (overlaps and 0 not in chunk.sizes):
            raise ValueError(f"checkpoint: chunks of {tensor.name!r} overlap or lie outside of it")
    if volume != torch.Size(tensor.shape).numel():
        raise ValueError(f"checkpoint: the chunks of {tensor.name!r} do not cover it")
