"""Reads what `torch.save` wrote without running it: an allow-list unpickler, tensors as StoredArray, inert stand-ins.

A pickle can name any function and have it called. Here it gets a few plain types; of torch.distributed, whose private
classes (DTensor, DeviceMesh, DCP's metadata) change from version to version, it gets a Stub for whatever it names: that
only keeps what the pickle says of it.
"""

import collections
import pickle
import zipfile
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from checkpoint.stored import Shape, StoredArray


class Stub:
    """Stands in for an object of a class that is not loaded: its name, constructor's arguments, and state."""

    name = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Stub":
        stub = super().__new__(cls)
        stub.args, stub.state = args, {}
        return stub

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args: tuple[Any, ...]
        self.state: Any

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):  # of a class with __slots__
            state = (state[0] or {}) | state[1]
        self.state = state

    def __getattr__(self, name: str) -> Any:
        if isinstance(self.__dict__.get("state"), dict) and name in self.state:
            return self.state[name]
        raise AttributeError(f"{type(self).name or 'a stub'} has no {name}")


class Refused(ValueError):
    """A pickle names something that is not allowed."""


class _Storage(NamedTuple):
    """An entry of the archive, and the type of its numbers."""

    key: str
    dtype: torch.dtype


class _Local(NamedTuple):
    """A tensor before its storage is located."""

    storage: _Storage
    offset: int
    shape: Shape
    strides: Shape


def _rebuild_tensor(storage: _Storage, offset: int, size: Any, stride: Any, *_: Any) -> _Local:
    return _Local(storage, int(offset), tuple(map(int, size)), tuple(map(int, stride)))


def _rebuild_from_type(function: Any, kind: Any, args: Any, state: Any) -> Stub:
    stub = Stub(*args) if not isinstance(kind, type) or not issubclass(kind, Stub) else kind(*args)
    stub.__setstate__(state)
    return stub


_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_STORAGES = {
    f"{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}
_ALLOWED: dict[tuple[str, str], Any] = {
    **{("torch", name): value for name, value in (_DTYPES | _STORAGES).items()},
    ("torch", "Size"): torch.Size,
    ("torch", "device"): Stub,
    ("torch.serialization", "_get_layout"): Stub,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_wrapper_subclass"): Stub,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    **{
        (module, name): Stub
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath")
    },
}


class SafeUnpickler(pickle.Unpickler):
    """`source`: what is read, for messages."""

    def __init__(self, file: IO[bytes], source: Path) -> None:
        super().__init__(file)
        self._source = source

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module.startswith("torch.distributed."):
            return type("Stub", (Stub,), {"name": name})
        raise Refused(f"{self._source} asks for {module}.{name}, which no checkpoint needs: refused")

    def persistent_load(self, identity: Any) -> _Storage:
        kind, dtype, key, *_ = identity
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise Refused(f"{self._source} has an unknown kind of storage")
        return _Storage(str(key), dtype)


def load_pickle(file: IO[bytes], source: Path) -> Any:
    """Unpickles. Raises ValueError naming `source` for what is not allowed or damaged."""
    try:
        return SafeUnpickler(file, source).load()
    except Refused:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f"{source} cannot be read: {error}") from error


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

    Raises ValueError naming the file if it is truncated, of another format, or names what is not allowed.
    """
    size = path.stat().st_size - start
    if length is not None and length > size:
        raise ValueError(f"{path} ends too early: it is truncated")
    with path.open("rb") as file:
        try:
            archive = zipfile.ZipFile(_Window(file, start, size if length is None else length))
            entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
                raise ValueError(f"{path} is big-endian")
            with archive.open(entries["data.pkl"]) as pickled:
                loaded = load_pickle(pickled, path)
        except (zipfile.BadZipFile, KeyError, EOFError) as error:
            raise ValueError(f"{path} is no complete file of torch.save: {error}") from error

        def locate(local: _Local) -> StoredArray:
            entry = entries.get(f"data/{local.storage.key}")
            count = 1 + sum((n - 1) * stride for n, stride in zip(local.shape, local.strides))
            used = 0 if 0 in local.shape else (local.offset + count) * local.storage.dtype.itemsize
            if entry is None or entry.compress_type != zipfile.ZIP_STORED or used > entry.file_size:
                raise ValueError(f"{path} lacks the data of a tensor")
            # The local header is 30 bytes and two fields whose lengths it tells; then the data.
            header = _Window(file, start + entry.header_offset, 30).read()
            data = start + entry.header_offset + 30 + int.from_bytes(header[26:28], "little")
            data += int.from_bytes(header[28:30], "little") + local.offset * local.storage.dtype.itemsize
            return StoredArray(path, data, local.storage.dtype, local.shape, local.strides)

        seen: dict[int, Any] = {}

        def visit(value: Any) -> Any:
            if isinstance(value, _Local):
                return locate(value)
            if isinstance(value, dict):
                return {key: visit(item) for key, item in value.items()}
            if type(value) in (list, tuple):
                return type(value)(map(visit, value))
            if isinstance(value, Stub) and id(value) not in seen:
                seen[id(value)] = value
                value.args, value.state = visit(value.args), visit(value.state)
            return value

        return visit(loaded)
