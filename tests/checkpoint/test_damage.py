"""Damaged, lying and impossible files: one line with the file's name, exit code 2 (1: other tensors), and no OUT."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from checkpoint.convert_from_hf import convert_from_hf
from checkpoint.directories import complete_checkpoints, find_damage, new_directory, write_manifest
from checkpoint.export import Options, export_to_hf
from checkpoint.tensors.dcp import read_dcp
from checkpoint.tensors.fsdp_shards import read_fsdp_shards
from checkpoint.tensors.safetensors import read_safetensors
from errors import UserError
from models.qwen35_moe.hf_weights import hf_name
from tests.checkpoint.test_convert_to_hf import load_hf, random_weights, write_hf


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf: a Hugging Face directory; step-00000001: a checkpoint made from it."""
    folder = tmp_path_factory.mktemp("sources")
    write_hf(folder / "hf", {hf_name(name): tensor for name, tensor in random_weights().items()}, num_files=2)
    (folder / "hf/generation_config.json").write_text('{"temperature": 1.0}')
    convert_from_hf(folder / "hf", folder / "step-00000001", torch.float32)
    return folder


@pytest.fixture
def hf(sources: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sources / "hf", tmp_path / "hf"))


@pytest.fixture
def step(sources: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sources / "step-00000001", tmp_path / "step-00000001"))


def remade(step: Path) -> None:
    """The manifest anew, so that what else is wrong is met."""
    write_manifest(step)


def error_of(action: Callable[[Path], object], tmp_path: Path, code: int = 2) -> str:
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UserError) as raised:
        action(tmp_path / "out")
    assert raised.value.exit_code == code
    assert len(str(raised.value).splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == before
    return str(raised.value)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    path.write_bytes(data)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def out_of_the_folder(path: Path) -> None:
    moved = path.parents[2] / "elsewhere" if path.parent.name == "hf" else path.parents[1] / "elsewhere"
    shutil.move(path, moved)
    path.symlink_to(moved)


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


FILES = [".metadata", "__0_0.distcp", "hf/config.json", "hf/base.json", "hf/tokenizer.json", "manifest.json"]


@pytest.mark.parametrize("damage", [cut, flip, fifo, out_of_the_folder, loop, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_a_conversion_finds_any_damaged_file(tmp_path: Path, step: Path, name: str, damage: Callable) -> None:
    """Without --verify too. What lies behind the weights, and what is not needed, is no exception."""
    if (name, damage) == ("manifest.json", out_of_the_folder):
        pytest.skip("its contents are what is compared")
    (tmp_path / "elsewhere").touch()
    damage(step / name)
    message = error_of(lambda out: export_to_hf(step, out), tmp_path)
    assert name in message or "manifest.json" in message or name == "manifest.json"


MANIFESTS: dict[str, Any] = {
    "a list": [],
    "null": None,
    "files is a list": {"files": []},
    "an absolute name": {"/dev/zero": {"size": 0, "crc32": 0}},
    "a name above": {"../hf/config.json": {"size": 0, "crc32": 0}},
    "a name that comes back": {"hf/../hf/config.json": {"size": 0, "crc32": 0}},
    "no size": {"a": {"crc32": 0}},
    "a size in words": {"a": {"size": "1", "crc32": 0}},
    "a negative size": {"a": {"size": -1, "crc32": 0}},
    "a truth value": {"a": {"size": True, "crc32": 0}},
    "a long name": {"a" * 5000: {"size": 0, "crc32": 0}},
    "a NUL": {"a\0b": {"size": 0, "crc32": 0}},
    "an entry of null": {"a": None},
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_lying_manifest_is_refused(tmp_path: Path, step: Path, kind: str) -> None:
    path, value = step / "manifest.json", MANIFESTS[kind]
    files = json.loads(path.read_text())["files"]
    is_whole = value is None or isinstance(value, list) or "files" in value
    path.write_text(json.dumps(value if is_whole else {"files": files | value}))
    assert "manifest.json" in error_of(lambda out: export_to_hf(step, out), tmp_path)
    assert "manifest.json" in (find_damage(step) or "")


NOT_LISTED = [
    "__1_0.distcp",
    "hf/generation_config_2.json",
    "hf/additional_chat_templates/tool.jinja",
    "hf/a/b/c",
    ".metadata",
    "run.json",
]


@pytest.mark.parametrize("name", NOT_LISTED)
def test_what_a_manifest_does_not_list_is_not_read(tmp_path: Path, step: Path, name: str) -> None:
    (step / name).parent.mkdir(parents=True, exist_ok=True)
    (step / name).touch()
    path = step / "manifest.json"
    files = json.loads(path.read_text())["files"]
    files.pop(name, None)
    path.write_text(json.dumps({"files": files}))
    assert f"does not list {name!r}" in error_of(lambda out: export_to_hf(step, out), tmp_path)


@pytest.mark.parametrize("inside", [False, True])
def test_a_folder_that_is_a_link_is_not_listed(tmp_path: Path, step: Path, inside: bool) -> None:
    elsewhere = step / ".elsewhere" if inside else tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "tool.jinja").touch()
    (step / "hf/additional_chat_templates").symlink_to(elsewhere)
    assert "does not list 'hf/additional_chat_templates'" in (find_damage(step) or "")


def test_a_tokenizer_with_files_in_folders_comes_along(tmp_path: Path, hf: Path) -> None:
    (hf / "additional_chat_templates").mkdir()
    (hf / "additional_chat_templates/tool.jinja").write_text("x")
    convert_from_hf(hf, tmp_path / "step-00000001", None)
    assert find_damage(tmp_path / "step-00000001") is None
    export_to_hf(tmp_path / "step-00000001", tmp_path / "out")
    assert (tmp_path / "out/additional_chat_templates/tool.jinja").read_text() == "x"
    (tmp_path / "step-00000001/hf/additional_chat_templates/tool.jinja").write_text("y")
    assert "tool.jinja is corrupted" in (find_damage(tmp_path / "step-00000001") or "")


JSON = {
    "a list": b"[]",
    "null": b"null",
    "a number": b"5",
    "nothing": b"",
    "half": b'{"model_type": ',
    "deep": b'{"a": ' + b"[" * 100_000,
    "no text": b"\xff\xfe\x00",
    "many digits": b'{"a": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("kind", JSON)
@pytest.mark.parametrize("name", ["hf/config.json", "hf/base.json", "hf/tokenizer_config.json", "hf/tokenizer.json"])
def test_json_of_a_checkpoint_that_is_something_else(tmp_path: Path, step: Path, name: str, kind: str) -> None:
    (step / name).write_bytes(JSON[kind])
    remade(step)
    assert name in error_of(lambda out: export_to_hf(step, out), tmp_path)


@pytest.mark.parametrize("kind", JSON)
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_json_of_a_directory_that_is_something_else(tmp_path: Path, hf: Path, name: str, kind: str) -> None:
    (hf / name).write_bytes(JSON[kind])
    assert name in error_of(lambda out: convert_from_hf(hf, out, None), tmp_path)


@pytest.mark.parametrize("value", [5, None, "", "a/b", "../a", "/dev/zero", "a\0", "a" * 5000, ["a"]])
def test_an_index_that_names_no_file_of_its_folder(tmp_path: Path, hf: Path, value: object) -> None:
    path = hf / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    path.write_text(json.dumps({"weight_map": weight_map | {min(weight_map): value}}))
    error_of(lambda out: convert_from_hf(hf, out, None), tmp_path)


def test_an_index_decides_where_a_tensor_is_and_two_models_in_a_folder_are_refused(hf: Path) -> None:
    expected = load_hf(hf)
    weight_map = json.loads((hf / "model.safetensors.index.json").read_text())["weight_map"]
    key = min(weight_map)
    other = next(file for file in weight_map.values() if file != weight_map[key])
    save_file(load_file(hf / other) | {key: torch.full_like(expected[key], 7)}, hf / other)
    assert torch.equal(read_safetensors(hf)[key].read(), load_file(hf / weight_map[key])[key])
    save_file(load_file(hf / other) | {"model.extra": torch.zeros(2)}, hf / other)
    with pytest.raises(UserError, match=r"'model.extra' is not in model\.safetensors\.index\.json"):
        read_safetensors(hf)
    save_file(expected, hf / "model.safetensors")
    with pytest.raises(UserError, match=r"index\.json and model\.safetensors.*expected one of them"):
        read_safetensors(hf)


def test_another_set_of_tensors_has_exit_code_1(tmp_path: Path, step: Path, hf: Path) -> None:
    weights = load_hf(hf)
    (hf / "model.safetensors.index.json").unlink()
    save_file({key: t for key, t in weights.items() if key != "model.norm.weight"}, hf / "model.safetensors")
    assert "norm.weight" in error_of(lambda out: convert_from_hf(hf, out, None), tmp_path, code=1)
    state = {f"model.{name}": tensor for name, tensor in random_weights().items() if name != "norm.weight"}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    shutil.copytree(step / "hf", tmp_path / "dcp/hf")
    assert "norm.weight" in error_of(lambda out: export_to_hf(tmp_path / "dcp", out), tmp_path, code=1)


def test_an_export_that_fails_its_verification_does_not_appear(
    tmp_path: Path, step: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(path: Path, tensors: list) -> list[int]:
        save_file({t.key: t.stored.read(t.box).to(t.dtype) + 1 for t in tensors}, path)
        return []

    monkeypatch.setattr("checkpoint.export.write_file", damaged)
    message = error_of(lambda out: export_to_hf(step, out, Options(verify=True)), tmp_path)
    assert "differs from the checkpoint's" in message


def test_exports_and_checkpoints_name_no_code(tmp_path: Path, hf: Path) -> None:
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        values = json.loads((hf / name).read_text())
        (hf / name).write_text(json.dumps(values | {"auto_map": {"AutoConfig": "evil.Evil"}}))
    convert_from_hf(hf, tmp_path / "dcp", None)
    export_to_hf(tmp_path / "dcp", tmp_path / "out", Options(verify=True))
    for path in (*(tmp_path / "dcp/hf").glob("*.json"), *(tmp_path / "out").glob("*.json")):
        assert "auto_map" not in path.read_text(), path


@pytest.mark.parametrize("kind", ["inside", "itself", "a loop", "a long name", "a file", "in a file"])
def test_impossible_places_for_the_output(tmp_path: Path, step: Path, kind: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    places = {
        "inside": step / "new/out",
        "itself": step,
        "a loop": tmp_path / "loop",
        "a long name": tmp_path / ("a" * 252),
    }
    out = (places | {"a file": tmp_path / "file", "in a file": tmp_path / "file/out"})[kind]
    before = sorted(step.rglob("*"))
    error_of(lambda _: export_to_hf(step, out), tmp_path)
    assert sorted(step.rglob("*")) == before


def test_steps_are_ordered_by_their_number(tmp_path: Path) -> None:
    steps = [99_999_999, 100_000_000, 1_000_000_000, 2]
    for number in steps:
        (tmp_path / f"step-{number:08}").mkdir()
    for name in ("step-1", "step-000000001", "step-0000000x", "step-00000003.old"):
        (tmp_path / name).mkdir()
    assert [int(path.name[5:]) for path in complete_checkpoints(tmp_path)] == sorted(steps)


def test_a_step_without_a_manifest_is_refused(tmp_path: Path, step: Path) -> None:
    (step / "manifest.json").unlink()
    assert "manifest.json is missing" in error_of(lambda out: export_to_hf(step, out), tmp_path)


INDEXES: dict[str, Callable[[Any], object]] = {
    "another file": lambda m: [setattr(p, "relative_path", "../a") for p in m.storage_data.values()],
    "a file in numbers": lambda m: [setattr(p, "relative_path", 5) for p in m.storage_data.values()],
    "a negative offset": lambda m: [setattr(p, "offset", -9) for p in m.storage_data.values()],
    "a fraction": lambda m: [setattr(p, "length", 1.5) for p in m.storage_data.values()],
    "beyond the end": lambda m: [setattr(p, "offset", 2**60) for p in m.storage_data.values()],
    "a shape in words": lambda m: [setattr(e, "size", "ab") for e in m.state_dict_metadata.values()],
    "a huge shape": lambda m: [setattr(e, "size", torch.Size([2**50])) for e in m.state_dict_metadata.values()],
    "no chunks": lambda m: [setattr(e, "chunks", None) for e in m.state_dict_metadata.values()],
    "chunks of text": lambda m: [setattr(e.chunks[0], "offsets", ("a",)) for e in m.state_dict_metadata.values()],
    "more dimensions": lambda m: [
        setattr(e.chunks[0], "sizes", torch.Size([1, 2, 3])) for e in m.state_dict_metadata.values()
    ],
    "names in numbers": lambda m: setattr(m, "state_dict_metadata", dict(enumerate(m.state_dict_metadata.values()))),
    "nothing": lambda m: setattr(m, "storage_data", None),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_an_impossible_index_of_a_checkpoint(tmp_path: Path, kind: str) -> None:
    dcp.save({"model.a": torch.zeros(4, 2)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    metadata = pickle.loads((tmp_path / "dcp/.metadata").read_bytes())
    INDEXES[kind](metadata)
    (tmp_path / "dcp/.metadata").write_bytes(pickle.dumps(metadata))
    error_of(lambda _: [tensor.read() for tensor in read_dcp(tmp_path / "dcp").values()], tmp_path)


@pytest.mark.parametrize(
    "values",
    [[], 5, {1: torch.zeros(2)}, {"a": 5}, {"a": None}, {("a", "b"): torch.zeros(2)}, {"a": [torch.zeros(2)]}],
    ids=str,
)
def test_a_per_rank_file_that_holds_something_else(tmp_path: Path, values: object) -> None:
    (tmp_path / "ranks").mkdir()
    torch.save(values, tmp_path / "ranks/model_world_size_1_rank_0.pt")
    assert "rank_0.pt" in error_of(lambda _: read_fsdp_shards(tmp_path / "ranks"), tmp_path)


@pytest.mark.parametrize("name", ["model_world_size_999999999_rank_0.pt", "model_world_size_2_rank_5.pt"])
def test_an_impossible_world(tmp_path: Path, name: str) -> None:
    (tmp_path / "ranks").mkdir()
    torch.save({"a": torch.zeros(2)}, tmp_path / "ranks" / name)
    assert "is missing" in error_of(lambda _: read_fsdp_shards(tmp_path / "ranks"), tmp_path)


def test_a_new_directory_is_left_to_nobody_when_the_work_in_it_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyError), new_directory(tmp_path / "out", tmp_path / "source"):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_two_that_make_one_directory_do_not_mix(tmp_path: Path) -> None:
    (tmp_path / ".out.unfinished").mkdir()  # left by a killed one
    with new_directory(tmp_path / "out", tmp_path / "source") as folder:
        (folder / "file").write_text("first")
        message = "is being written by another process"
        with pytest.raises(UserError, match=message), new_directory(tmp_path / "out", tmp_path / "source"):
            raise AssertionError
    assert (tmp_path / "out/file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
