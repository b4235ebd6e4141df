"""Reads what `torch.save` wrote without running it: an allow-list unpickler, tensors as StoredArray, inert stand-ins.

A pickle can name any function and have it called. Here it gets what stands in a list of pairs of module and name,
compared as they are, and nothing else: a few plain types, and for classes of torch.distributed (DTensor, DeviceMesh,
DCP's metadata) a Stub that only keeps what the pickle says of it. No name is ever looked up in a module.
"""

import collections
import io
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import IO, Any, ClassVar

import torch

from checkpoint.files import file_size
from checkpoint.tensors.stored import StoredArray
from errors import UserError, reading
from torch_private import storage_types


class Stub:
    """Stands in for an object of a class that is not loaded: its name, constructor's arguments, and state."""

    name = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> "Stub":
        stub = super().__new__(cls)
        stub.args, stub.state = args, {}
        return stub

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):  # of a class with __slots__
            state = (state[0] or {}) | state[1]
        self.state = state

    def __getattr__(self, name: str) -> Any:
        if isinstance(self.state, dict) and name in self.state:
            return self.state[name]
        raise AttributeError(f"{type(self).name or 'a stub'} has no {name}")


def _rebuild_tensor(storage: StoredArray, offset: int, shape: Any, strides: Any, *_: Any) -> StoredArray:
    start = storage.start + offset * storage.dtype.itemsize
    array = storage._replace(start=start, shape=tuple(shape), strides=tuple(strides))
    if offset < 0:
        raise UserError(f"{storage.file}: a tensor begins before its data")
    array.check()
    return array


def _rebuild_from_type(function: Any, kind: type[Stub], args: Any, state: Any) -> Stub:
    stub = kind(*args)
    stub.__setstate__(state)
    return stub


def _member(kind: object, name: object) -> Stub:
    """Of an enum, as Python's first releases of 3.11 pickle it: by `getattr`, which is not what is called here."""
    if not (isinstance(kind, type) and issubclass(kind, Stub) and isinstance(name, str)):
        raise ValueError("its pickle asks for an attribute of something else than an enum")
    return kind(name)


_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_STUBS = {
    "torch": ("device",),
    "torch.serialization": ("_get_layout",),
    "torch._utils": ("_rebuild_wrapper_subclass",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath", "WindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "PurePosixPath", "WindowsPath"),
    "torch.distributed._mesh_layout": ("_FlatLayout", "_MeshLayout"),
    "torch.distributed.device_mesh": ("DeviceMesh",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.tensor": ("DTensor",),
    "torch.distributed.tensor._api": ("DTensor",),
    "torch.distributed.tensor._dtensor_spec": ("DTensorSpec", "ShardOrderEntry", "TensorMeta"),
    "torch.distributed.tensor.placement_types": ("Partial", "Replicate", "Shard", "_StridedShard"),
    # Before torch 2.5.
    "torch.distributed._tensor.api": ("DTensor",),
    "torch.distributed._tensor._dtensor_spec": ("DTensorSpec", "TensorMeta"),
    "torch.distributed._tensor.placement_types": ("DTensorSpec", "Replicate", "Shard", "TensorMeta", "_Partial"),
}
_ALLOWED: dict[tuple[str, str], Any] = {
    **{(module, name): Stub for module, names in _STUBS.items() for name in names},
    **{("torch", name): value for name, value in (_DTYPES | storage_types()).items()},
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("collections", "OrderedDict"): lambda items=(): collections.OrderedDict((_key(k), v) for k, v in items),
    ("builtins", "getattr"): _member,
    ("builtins", "set"): lambda items=(): {_key(item) for item in items},
}


def _key(value: Any) -> Any:
    """What is to be hashed. Tuples of tuples of tuples, each twice in the next, would take for ever."""
    if isinstance(value, tuple) and any(isinstance(part, tuple) for part in value):
        raise ValueError("a key of its pickle is a tuple of tuples")
    return value


_HASHING = {
    pickle.SETITEM: slice(-2, -1),
    **dict.fromkeys((pickle.SETITEMS, pickle.DICT), slice(0, None, 2)),
    **dict.fromkeys((pickle.ADDITEMS, pickle.FROZENSET), slice(None)),
}
"""The operations that hash, and which of the values on the stack."""


def _checking(keys: slice, load: Callable[[Any], None]) -> Callable[[Any], None]:
    def run(unpickler: Any) -> None:
        for value in unpickler.stack[keys]:
            _key(value)
        load(unpickler)

    return run


class _Unpickler(pickle._Unpickler):  # the one in Python, since that in C hashes without asking
    def __init__(self, file: IO[bytes], source: Path, storages: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(file)
        self._source, self._storages = source, storages

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise UserError(f"{self._source} asks for {module}.{name}, which no checkpoint needs: refused")
        value = _ALLOWED[module, name]
        # Classes and functions can be given attributes by a pickle: what it gets lives no longer than what it makes.
        if value is Stub:
            return type("Stub", (Stub,), {"name": name})
        return partial(value) if isinstance(value, FunctionType) else value

    def persistent_load(self, identity: Any) -> StoredArray:
        kind, dtype, key, *_ = identity
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise UserError(f"{self._source} has an unknown kind of storage")
        if not isinstance(key, str) or key not in self._storages:
            raise UserError(f"{self._source} lacks the data of a tensor")
        start, num_bytes = self._storages[key]
        return StoredArray(self._source, start, start + num_bytes, dtype, (num_bytes // dtype.itemsize,), (1,))

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    for _code, _keys in _HASHING.items():
        dispatch[_code[0]] = _checking(_keys, dispatch[_code[0]])


def load_pickle(data: bytes, source: Path, storages: Mapping[str, tuple[int, int]] | None = None) -> Any:
    """Unpickles. Raises UserError naming `source`, which `data` is of, for what is not allowed or damaged.

    storages: first byte in `source` and number of bytes of each storage that a tensor may name.
    """
    with reading(source):
        # The unpickler allocates what a number says. So first: all bytes that are announced are there, which this pass
        # finds out as it reads them, and no object has a higher number in the memo than there are bytes.
        for opcode, argument, _ in pickletools.genops(data):
            if "PUT" in opcode.name and int(argument or 0) >= len(data):
                raise ValueError(f"an object of its pickle has the number {argument}")
        return _Unpickler(io.BytesIO(data), source, storages or {}).load()


class _Window:
    """Part of an open file as a file of its own, for zipfile."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = max(offset + (0, self._position, self._length)[whence], 0)
        return self._position

    def read(self, size: int = -1) -> bytes:
        self._file.seek(self._start + self._position)
        left = max(self._length - self._position, 0)
        data = self._file.read(left if size < 0 else min(size, left))
        self._position += len(data)
        return data


def read_torch_file(path: Path, start: int = 0, length: int | None = None) -> Any:
    """What `torch.save` wrote to `path` (or to its bytes from `start` on), with each tensor a StoredArray.

    Raises UserError naming the file if it is truncated, of another format, or names what is not allowed.
    """
    size = file_size(path) - start
    if length is not None and length > size:
        raise UserError(f"{path} ends too early: it is truncated")
    with reading(path), path.open("rb") as file:
        window = _Window(file, start, size if length is None else length)
        try:
            archive = zipfile.ZipFile(window)
        except zipfile.BadZipFile as error:
            raise UserError(
                f"{path} is no archive ({error}): expected a file of torch.save as it writes since PyTorch 1.6, whole"
            ) from None
        entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if "byteorder" in entries and _read_small(archive, entries["byteorder"]) != b"little":
            raise UserError(f"{path} is big-endian")
        storages = {}
        for name, entry in entries.items():
            if name.startswith("data/") and entry.compress_type == zipfile.ZIP_STORED:
                # The local header is 30 bytes and two fields whose lengths it tells; then the data.
                window.seek(entry.header_offset)
                before_data = 30 + sum(struct.unpack("<26x2H", window.read(30)))
                position = start + entry.header_offset + before_data
                storages[name.removeprefix("data/")] = (position, entry.file_size)
        if "data.pkl" not in entries:
            raise UserError(f"{path} is no file of torch.save: it has no data.pkl")
        return load_pickle(_read_small(archive, entries["data.pkl"]), path, storages)


def _read_small(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """An entry as torch.save writes it: not compressed, so that it cannot become larger than its file."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise ValueError(f"{entry.filename!r} is compressed or encrypted")
    return archive.read(entry)
