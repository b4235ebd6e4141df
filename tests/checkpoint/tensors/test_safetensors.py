"""Headers of safetensors files: what the library refuses is refused here too, and what it reads is read the same."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from checkpoint.tensors.safetensors import read_safetensors
from errors import UserError

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4, dtype=torch.int16), "c": torch.ones(()).bfloat16()}


def write(folder: Path, header: object, data: bytes, length: int | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list, start: int, stop: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


GOOD = {"a": entry("F32", [2, 2], 0, 16), "b": entry("BF16", [4], 16, 24)}
DAMAGED = {
    "overlap": {**GOOD, "b": entry("BF16", [4], 8, 16)},
    "the same bytes twice": {**GOOD, "b": entry("F32", [2, 2], 0, 16)},
    "a hole": {**GOOD, "b": entry("BF16", [3], 18, 24)},
    "bytes of nothing": {"a": GOOD["a"]},
    "more than there is": {**GOOD, "b": entry("BF16", [8], 16, 32)},
    "before the data": {**GOOD, "a": entry("F32", [2, 2], -16, 0)},
    "backwards": {**GOOD, "b": entry("BF16", [4], 24, 16)},
    "another size than its shape": {**GOOD, "b": entry("BF16", [5], 16, 24)},
    "negative sizes": {**GOOD, "b": entry("BF16", [-2, -2], 16, 24)},
    "an unknown dtype": {**GOOD, "b": entry("X8", [8], 16, 24)},
    "a number for a dtype": {**GOOD, "b": entry(5, [8], 16, 24)},  # type: ignore[arg-type]
    "a shape in words": {**GOOD, "b": {"dtype": "BF16", "shape": "4", "data_offsets": [16, 24]}},
    "a fraction": {**GOOD, "b": entry("BF16", [4.0], 16, 24)},
    "truth values": {**GOOD, "b": {"dtype": "BF16", "shape": [4, True], "data_offsets": [16, 24]}},
    "a shape beyond any": {**GOOD, "b": entry("BF16", [2**70, 0], 16, 24)},
    "no offsets": {**GOOD, "b": {"dtype": "BF16", "shape": [4]}},
    "a list": [GOOD],
    "null": None,
    "no JSON": b"{" * 50,
    "deep JSON": b"[" * 100_000,
    "no text": b"\xff\xfe{}",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_header_is_refused_by_the_files_name(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "hf", DAMAGED[kind], bytes(24))
    with pytest.raises(SafetensorError), safe_open(path, "pt"):
        pass
    with pytest.raises(UserError, match=r"model\.safetensors") as raised:
        read_safetensors(tmp_path / "hf")
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("length", [0, 10**6, 2**40, 2**63 + 5, 2**64 - 1])
def test_a_header_of_another_length_is_refused(tmp_path: Path, length: int) -> None:
    write(tmp_path / "hf", GOOD, bytes(24), length)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        read_safetensors(tmp_path / "hf")


@pytest.mark.parametrize("seed", range(40))
def test_random_damage_is_refused_where_the_library_refuses_it(tmp_path: Path, seed: int) -> None:
    """Bytes of the header changed, cut off, or put in: what is read then is what the library reads."""
    chance = random.Random(seed)
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    data = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(end)
        if chance.random() < 0.7:
            data[place] = chance.choice([chance.randrange(256), *b'0123456789,:[]{}"-'])
        elif chance.random() < 0.5:
            del data[place:]
            end = min(end, max(place, 1))
        else:
            data[place:place] = b"7"
        data += b"" if data else b"\0"
    path.write_bytes(data)
    try:
        theirs = load_file(path)
    except SafetensorError:
        with pytest.raises(UserError, match=r"model\.safetensors"):
            read_safetensors(tmp_path)
        return
    ours = read_safetensors(tmp_path)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key].read().view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


def test_every_supported_dtype_and_empty_tensors_read_the_same(tmp_path: Path) -> None:
    values = torch.arange(-6, 6).view(3, 4)
    dtypes = (
        torch.float64,
        torch.float16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.int32,
        torch.int8,
    )
    tensors = {str(dtype): values.to(dtype) for dtype in (*dtypes, torch.uint8, torch.bool)} | TENSORS
    save_file(tensors | {"empty": torch.empty(0, 3)}, tmp_path / "model.safetensors")
    read = read_safetensors(tmp_path)
    assert read["empty"].read().shape == (0, 3)
    for key, tensor in tensors.items():
        assert read[key].dtype == tensor.dtype
        assert torch.equal(read[key].read().view(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), key


@pytest.mark.parametrize("name", ["../model.safetensors", "/dev/zero", "", 5, None, ["x"]])
def test_an_index_names_files_in_its_folder_alone(tmp_path: Path, name: object) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match=r"index\.json"):
        read_safetensors(folder)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors is no regular file"):
        read_safetensors(tmp_path)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "model.gguf"]
)
def test_weights_of_another_format_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "training_args.bin").touch()
    with pytest.raises(UserError, match=r"model\.safetensors is missing$"):
        read_safetensors(tmp_path)
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"is missing; {name} is there and is not read: expected safetensors"):
        read_safetensors(tmp_path)
