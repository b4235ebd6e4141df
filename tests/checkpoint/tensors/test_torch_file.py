"""No byte of a pickle runs code: gadgets in each kind of file, by every way in which a pickle names things."""

import contextlib
import io
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from checkpoint.tensors import torch_file
from checkpoint.tensors.dcp import read_dcp
from checkpoint.tensors.fsdp_shards import read_fsdp_shards
from checkpoint.tensors.torch_file import load_pickle
from errors import UserError


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def call(module: str, name: str, *arguments: str) -> bytes:
    """A global by its text opcode, called with strings."""
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(map(text, arguments)) + b"tR"


def stack_global(module: str, name: str, *arguments: str) -> bytes:
    return text(module) + text(name) + b"\x93(" + b"".join(map(text, arguments)) + b"tR"


def gadgets(marker: Path) -> dict[str, bytes]:
    """Each, run by an unpickler that believes it, makes the file `marker` or changes something of ours."""
    command, code = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    plain = {
        "os.system": ("os", "system", command),
        "posix.system": ("posix", "system", command),
        "subprocess.getoutput": ("subprocess", "getoutput", command),
        "eval": ("builtins", "eval", code),
        "exec": ("builtins", "exec", code),
        "old builtins": ("__builtin__", "eval", code),
        "open": ("builtins", "open", str(marker), "w"),
        "io.open": ("_io", "open", str(marker), "w"),
        "runpy": ("runpy", "run_path", str(marker)),
        "import": ("builtins", "__import__", "antigravity"),
        "dots through torch": ("torch", "os.system", command),
        "dots through torch.distributed": ("torch.distributed.run", "os.system", command),
        "dots through an allowed module": ("torch.distributed.checkpoint.metadata", "os.system", command),
        "dots from an allowed class": ("torch.distributed.checkpoint.metadata", "Metadata.__init__", command),
        "dots to globals": ("torch._utils", "_rebuild_tensor_v2.__globals__", command),
        "a file's class": ("pathlib", "Path.touch", str(marker)),
        "an allowed name elsewhere": ("os", "Path", command),
        "a process of torch.distributed": ("torch.distributed.elastic.multiprocessing", "SubprocessHandler", command),
        "a function of torch.distributed": ("torch.distributed.run", "main", command),
        "an unlisted class of torch.distributed": ("torch.distributed.checkpoint.filesystem", "FileSystemWriter", "x"),
        "torch.load": ("torch", "load", str(marker)),
        "torch.hub": ("torch.hub", "load", str(marker)),
        "getattr": ("builtins", "getattr", "x", "y"),
        "an empty module": ("", "eval", code),
        "a module of dots": ("builtins.eval", "", code),
        "ctypes": ("ctypes", "CDLL", str(marker)),
        "marshal": ("marshal", "loads", code),
        "nested pickle": ("pickle", "loads", code),
        "copyreg": ("copyreg", "add_extension", "os", "system", "1"),
    }
    made = {name: call(*what) for name, what in plain.items()}
    made |= {f"{name}, on the stack": stack_global(*what) for name, what in plain.items()}
    inner = call("os", "system", command)
    return made | {
        "as an argument": b"ccollections\nOrderedDict\n(" + inner + b"tR",
        "as a state": b"ctorch.distributed.checkpoint.metadata\nMetadata\n)R" + inner + b"b",
        "instance": b"(" + text(command) + b"ios\nsystem\n",
        "object": b"(cos\nsystem\n" + text(command) + b"o",
        "new object": b"cos\nsystem\n(" + text(command) + b"t\x81",
        "an extension code": b"\x82\x01" + b"(" + text(command) + b"tR",
        "a large extension code": b"\x84" + struct.pack("<i", 2**31 - 1) + b")R",
        "a persistent id": b"(" + inner + b"tQ",
        "a persistent id in text": b"Pos.system\n",
        "a foreign storage": b"(" + text("module") + text("os") + text("0") + text("cpu") + b"K\x01tQ",
        "set attributes of a class": b"ctorch\ndevice\nN}" + text("name") + text("evil") + b"s\x86b",
    }


NAMES = sorted(gadgets(Path("marker")))


def in_metadata(folder: Path, body: bytes) -> Callable[[], object]:
    dcp.save({"model.a": torch.zeros(2)}, checkpoint_id=folder, no_dist=True)
    (folder / ".metadata").write_bytes(b"\x80\x04" + body + b".")
    return lambda: read_dcp(folder)


def archive_of(pickled: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
    return buffer.getvalue()


def in_rank_file(folder: Path, body: bytes) -> Callable[[], object]:
    folder.mkdir()
    (folder / "model_world_size_1_rank_0.pt").write_bytes(archive_of(b"\x80\x04" + body + b"."))
    return lambda: read_fsdp_shards(folder)


def in_chunk(folder: Path, body: bytes) -> Callable[[], object]:
    """In the place of a tensor's data, as the index says."""
    dcp.save({"model.a": torch.zeros(2)}, checkpoint_id=folder, no_dist=True)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    (place,) = metadata.storage_data.values()
    data = archive_of(b"\x80\x04" + body + b".")
    place.offset, place.length = 0, len(data)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / "__0_0.distcp").write_bytes(data)
    return lambda: read_dcp(folder)["model.a"].read()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", [in_metadata, in_rank_file, in_chunk])
def test_a_gadget_is_refused_in_one_line(tmp_path: Path, name: str, place: Callable) -> None:
    marker = tmp_path / "marker"
    read = place(tmp_path / "files", gadgets(marker)[name])
    allowed = dict(torch_file._ALLOWED)
    with pytest.raises(UserError, match=r"\.metadata|rank_0\.pt|\.distcp") as raised:
        read()
    assert len(str(raised.value).splitlines()) == 1
    assert not marker.exists()
    assert allowed == torch_file._ALLOWED
    assert torch_file.Stub.name == ""


def test_functions_that_a_pickle_gets_cannot_be_changed() -> None:
    body = b"ctorch._utils\n_rebuild_tensor_v2\nN}" + text("__defaults__") + b"N" + b"s\x86b"
    before = torch_file._rebuild_tensor.__dict__.copy(), torch_file._rebuild_tensor.__defaults__
    for state in (body, body.replace(b"__defaults__", b"other_things")):
        with pytest.raises(UserError):
            torch_file.load_pickle((b"\x80\x04" + state + b"."), Path("a pickle"))
    assert (torch_file._rebuild_tensor.__dict__, torch_file._rebuild_tensor.__defaults__) == before


@pytest.mark.parametrize("kind", [torch.Size, torch.float32, 3, "torch", pickle.loads])
def test_an_attribute_of_what_is_no_enum_is_refused(kind: object) -> None:
    with pytest.raises(ValueError, match="of something else than an enum"):
        torch_file._member(kind, "__class__")
    with pytest.raises(ValueError, match="of something else than an enum"):
        torch_file._member(torch_file.Stub, 3)
    assert type(torch_file._member(torch_file.Stub, "__class__")) is torch_file.Stub


def test_gadgets_do_run_where_they_are_believed(tmp_path: Path) -> None:
    """Else the tests above would show nothing."""
    for number, name in enumerate(("os.system", "eval, on the stack", "as an argument", "object")):
        marker = tmp_path / str(number)
        with contextlib.suppress(TypeError):  # of what is made with the gadget's result
            pickle.loads(b"\x80\x04" + gadgets(marker)[name] + b".")
        assert marker.exists(), name


HUGE = {
    "a memo index": b"]r" + struct.pack("<I", 2**24),
    "a memo index in text": b"]p16777216\n",
    "a text": b"\x8d" + struct.pack("<Q", 2**36) + b"x",
    "bytes": b"\x8e" + struct.pack("<Q", 2**36) + b"x",
    "a byte array": b"\x96" + struct.pack("<Q", 2**36) + b"x",
    "a number": b"\x8b" + struct.pack("<i", 2**31 - 1) + b"x",
    "a frame": b"\x95" + struct.pack("<Q", 2**40) + b"]",
}


@pytest.mark.parametrize("kind", HUGE)
@pytest.mark.parametrize("place", [in_metadata, in_rank_file, in_chunk])
def test_a_pickle_is_given_no_memory_for_what_it_announces(tmp_path: Path, kind: str, place: Callable) -> None:
    read = place(tmp_path / "files", HUGE[kind])
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"\.metadata|rank_0\.pt|\.distcp"):
            read()
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["deflated", "encrypted"])
def test_a_zip_member_that_is_not_stored_plainly_is_refused(tmp_path: Path, kind: str) -> None:
    data = bytearray(archive_of(b"\x80\x04]." + b" " * 99, zipfile.ZIP_DEFLATED if kind == "deflated" else 0))
    if kind == "encrypted":
        data[6] |= 1
        data[data.index(b"PK\x01\x02") + 8] |= 1
    path = tmp_path / "model_world_size_1_rank_0.pt"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"rank_0\.pt cannot be read: .*compressed or encrypted"):
        torch_file.read_torch_file(path)


@pytest.mark.parametrize("end", [b"}h\x40K\x01s.", b"}(h\x40K\x01u.", b"\x8f(h\x40\x90.", b"(h\x40\x91."])
def test_a_key_that_takes_for_ever_to_hash(tmp_path: Path, end: bytes) -> None:
    """t = (t, t), 64 times: as a key of a dictionary or a member of a set."""
    chain = b"\x80\x04)\x94" + b"".join(b"h%ch%c\x86\x94" % (number, number) for number in range(64))
    with pytest.raises(UserError, match="tuple of tuples"):
        load_pickle(chain + end, tmp_path / "x")
