"""Saving, retention, resuming on other layouts, and what a resume refuses."""

import dataclasses
import hashlib
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import ANY

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

import checkpoint.checkpointer as checkpointer_module
from checkpoint.checkpointer import Checkpointer, Progress
from checkpoint.directories import complete_checkpoints, find_checkpoint, write_manifest
from checkpoint.hf_assets import read_base, read_base_parts
from config.options import Checkpoint, Config, Data, Job, Model, Optimizer, Training
from errors import UserError
from models.ops.kernels import Kernels
from models.qwen35_moe.hf_weights import MTP, VISION
from models.qwen35_moe.model import Qwen35Moe
from parallelisms.degrees import Degrees
from parallelisms.mesh import build_meshes
from parallelisms.parallelize import parallelize_fn
from tests.distributed import run_ranks
from tests.models.qwen35_moe.shapes import tiny_config
from tests.parallelisms.layouts import full, materialise
from training.optimizer import build_optimizer

CONFIG = tiny_config()
TOKENIZER = Path(__file__).resolve().parents[2] / "data/tiny/tokenizer"


def run_config(folder: str | Path, **checkpoint) -> Config:
    return Config(
        job=Job(output_dir=str(folder)),
        model=Model(config=CONFIG.to_dict()),
        data=Data(tokenizer=str(TOKENIZER)),
        training=Training(steps=10, sequence_length=8, global_batch_size=4),
        optimizer=Optimizer(lr=1e-3),
        checkpoint=Checkpoint(**checkpoint),
    )


def build(folder: str, replicate: int, ep: int, seed: int, cp: int = 1, state_dtype: str = "auto", **checkpoint):
    """(model, optimizer, checkpointer) on all ranks, random weights by `seed`."""
    meshes = build_meshes("cpu", Degrees(replicate, dist.get_world_size() // replicate, ep, cp))
    with torch.device("meta"):
        model = Qwen35Moe(CONFIG, Kernels(attention="sdpa"))
    parallelize_fn(model, meshes, compute_dtype=torch.float32)
    materialise(model, torch.device("cpu"), seed)
    optimizer = build_optimizer(model, Optimizer(lr=1e-3, state_dtype=state_dtype))
    return model, optimizer, Checkpointer(run_config(folder, **checkpoint), CONFIG, model, optimizer, meshes)


def take_steps(model: Qwen35Moe, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
    """Steps whose gradients are functions of the weights, so that every layout makes the same ones."""
    for _ in range(num_steps):
        for parameter in model.parameters():
            parameter.grad = parameter.detach().sin()
        optimizer.step()


def contents(model: Qwen35Moe, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = {name: full(parameter) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        state |= {f"{name}/{key}": full(value) for key, value in optimizer.state[parameter].items()}
    return state


def save_on(folder: str, replicate: int, ep: int, cp: int) -> dict[str, torch.Tensor]:
    model, optimizer, checkpointer = build(folder, replicate, ep, seed=0, cp=cp)
    assert checkpointer.resume() is None
    take_steps(model, optimizer, 3)
    slots = 4 * cp // dist.get_world_size()
    first = dist.get_rank() // cp * slots  # all that read the same rows tell where they stand
    checkpointer.save(3, 300, torch.tensor([(slot, 10 * slot) for slot in range(first, first + slots)]))
    state = contents(model, optimizer)
    take_steps(model, optimizer, 1)  # while the save is under way
    assert checkpointer.wait()
    return state


def resume_on(folder: str, replicate: int, ep: int, cp: int) -> tuple[dict[str, torch.Tensor], Progress]:
    model, optimizer, checkpointer = build(folder, replicate, ep, seed=1, cp=cp)
    progress = checkpointer.resume()
    return contents(model, optimizer), progress


# world, replicate, ep, cp
LAYOUTS = [(4, 1, 2, 1), (4, 1, 4, 1), (2, 1, 1, 2), (4, 2, 2, 1), (2, 1, 2, 1), (1, 1, 1, 1), (4, 1, 4, 2)]


@pytest.mark.parametrize("saved", LAYOUTS[:4] + LAYOUTS[5:6], ids=str)
def test_any_layout_resumes_any_other_bit_for_bit(tmp_path: Path, saved: tuple[int, ...]) -> None:
    world, *degrees = saved
    expected = run_ranks(save_on, world, str(tmp_path), *degrees)[0]
    assert any(name.endswith("/exp_avg_sq") for name in expected)
    for other, *other_degrees in LAYOUTS[3:]:
        for state, progress in run_ranks(resume_on, other, str(tmp_path), *other_degrees):
            assert (progress.step, progress.tokens_seen) == (3, 300)
            assert progress.data_cursors.tolist() == [[slot, 10 * slot] for slot in range(4)]
            assert state.keys() == expected.keys()
            for name, tensor in expected.items():
                assert torch.equal(state[name], tensor), (other, name)


CURSORS = torch.zeros(4, 2, dtype=torch.int64)


def save(checkpointer: Checkpointer, step: int) -> None:
    checkpointer.save(step, 0, CURSORS)
    assert checkpointer.wait()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("saved", ["float32", "bfloat16"])
def test_means_go_on_in_the_dtype_of_the_run(tmp_path: Path, saved: str) -> None:
    resumed = {"float32": "bfloat16", "bfloat16": "float32"}[saved]
    model, optimizer, checkpointer = build(str(tmp_path), 1, 1, seed=0, state_dtype=saved)
    take_steps(model, optimizer, 3)
    save(checkpointer, 3)
    expected = contents(model, optimizer)
    model, optimizer, checkpointer = build(str(tmp_path), 1, 1, seed=1, state_dtype=resumed)
    assert checkpointer.resume().step == 3
    dtype = getattr(torch, resumed)
    for name, tensor in contents(model, optimizer).items():
        is_mean = "/exp_avg" in name
        assert tensor.dtype == (dtype if is_mean else torch.float32)
        assert torch.equal(tensor, expected[name].to(dtype) if is_mean else expected[name]), name
    before = {name: tensor.clone() for name, tensor in contents(model, optimizer).items()}
    take_steps(model, optimizer, 1)
    after = contents(model, optimizer)
    assert all(tensor.dtype == before[name].dtype for name, tensor in after.items())
    moved = [name for name in after if "/exp_avg" in name and before[name].any()]
    assert moved
    assert not any(torch.equal(after[name], before[name]) for name in moved)


@pytest.mark.usefixtures("one_rank")
def test_keeps_the_newest_and_never_takes_the_one_just_written(tmp_path: Path) -> None:
    _, _, checkpointer = build(str(tmp_path), 1, 1, seed=0, keep=2)
    for step in (2, 4, 6):
        save(checkpointer, step)
    names = [path.name for path in complete_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-00000004", "step-00000006"]
    save(checkpointer, 1)  # a run that went back
    names = [path.name for path in complete_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-00000001", "step-00000006"]
    assert find_checkpoint(tmp_path).name == "step-00000006"
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == set(names)


@pytest.mark.usefixtures("one_rank")
def test_every_checkpoint_tells_what_was_left_in_the_base(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_file({"mtp.norm.weight": torch.ones(3), "model.norm.weight": torch.ones(3)}, base / "model.safetensors")
    _, _, checkpointer = build(str(tmp_path / "run"), 1, 1, seed=0)
    checkpointer._base = base  # as with model.initial_load = "hf"
    assert checkpointer.resume() is None
    shutil.rmtree(base)
    save(checkpointer, 1)
    _, _, checkpointer = build(str(tmp_path / "run"), 1, 1, seed=0)
    assert checkpointer.resume().step == 1
    save(checkpointer, 2)
    first, second = (read_base_parts(path) for path in complete_checkpoints(tmp_path / "run/checkpoints"))
    assert first.keys() == {VISION, MTP}
    assert first[VISION] == hashlib.sha256().hexdigest() != first[MTP]
    assert second == first


@pytest.mark.usefixtures("one_rank")
def test_what_the_resume_found_damaged_goes_before_any_good_one(tmp_path: Path) -> None:
    def names() -> list[int]:
        return [int(path.name[5:]) for path in complete_checkpoints(tmp_path / "checkpoints")]

    _, _, checkpointer = build(str(tmp_path), 1, 1, seed=0, keep=0)
    for step in (2, 4, 6, 8):
        save(checkpointer, step)
    for step in (6, 8):
        flip_a_bit(tmp_path / f"checkpoints/step-{step:08}/__0_0.distcp")
    _, _, checkpointer = build(str(tmp_path), 1, 1, seed=1, keep=3)
    assert checkpointer.resume().step == 4
    save(checkpointer, 5)
    assert names() == [2, 4, 5]
    flip_a_bit(tmp_path / "checkpoints/step-00000005/__0_0.distcp")
    _, _, checkpointer = build(str(tmp_path), 1, 1, seed=1, keep=3)
    assert checkpointer.resume().step == 4
    save(checkpointer, 5)  # in the place of the damaged one: it is a good one now
    save(checkpointer, 6)
    assert names() == [4, 5, 6]


@pytest.mark.usefixtures("one_rank")
def test_a_save_that_fails_half_way_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, _, checkpointer = build(str(tmp_path), 1, 1, seed=0)
    save(checkpointer, 2)
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpointer_module, "resolved_toml", lambda _: Path("/nowhere/at/all").read_text()
        )  # DCP's files are there
        checkpointer.save(4, 0, CURSORS)
        assert not checkpointer.wait()
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "cannot save" in record.message
    assert "/nowhere/at/all: No such file or directory" in record.message
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    assert build(str(tmp_path), 1, 1, seed=1)[2].resume().step == 2
    save(checkpointer, 4)
    assert find_checkpoint(tmp_path).name == "step-00000004"


def checkpoint_in(folder: Path, step: int, seed: int = 0) -> Path:
    save(build(str(folder), 1, 1, seed=seed)[2], step)
    return folder / f"checkpoints/step-{step:08}"


@pytest.mark.usefixtures("one_rank")
def test_what_a_kill_leaves_is_cleared_or_completed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    checkpoint_in(tmp_path, 2)
    # In the middle of a save, of a deletion, and of the replacement of a checkpoint by one of the same step.
    shutil.copytree(folder / "step-00000002", folder / ".step-00000003")
    (folder / ".step-00000003/manifest.json").unlink()
    shutil.copytree(folder / "step-00000002", folder / ".step-00000001.removed")
    shutil.copytree(folder / "step-00000002", folder / ".step-00000002.removed")
    (folder / "step-00000002").rename(folder / ".step-00000002")
    assert build(str(tmp_path), 1, 1, seed=1)[2].resume().step == 2
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "hf/config.json", "manifest.json"])
def test_damage_is_named_and_auto_falls_back(
    tmp_path: Path, damage: Callable, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (checkpoint_in(tmp_path, step) for step in (2, 4))
    damage(second / name)
    # A bit of the manifest makes it wrong about some file.
    told = "" if (damage, name) == (flip_a_bit, "manifest.json") else name
    for path in (second, tmp_path):
        with pytest.raises(ValueError, match=f"checkpoint.resume = .*{told}"):
            build(str(tmp_path / "new"), 1, 1, seed=0, resume=str(path))[2].resume()
    assert build(str(tmp_path), 1, 1, seed=1)[2].resume().step == 2
    assert any(record.levelname == "WARNING" and told in record.message for record in caplog.records)
    damage(first / name)
    with pytest.raises(ValueError, match="none of the 2 checkpoints"):
        build(str(tmp_path), 1, 1, seed=1)[2].resume()


@pytest.mark.usefixtures("one_rank")
def test_starting_from_weights_alone_and_under_another_name(tmp_path: Path) -> None:
    model, optimizer, checkpointer = build(str(tmp_path / "old"), 1, 1, seed=0)
    take_steps(model, optimizer, 2)
    checkpointer._base = TOKENIZER  # as if it had been loaded from there
    save(checkpointer, 2)
    expected = contents(model, optimizer)
    (tmp_path / "old").rename(tmp_path / "renamed")
    model, optimizer, checkpointer = build(str(tmp_path / "renamed"), 1, 1, seed=1)
    assert checkpointer.resume().step == 2
    assert all(torch.equal(tensor, expected[name]) for name, tensor in contents(model, optimizer).items())

    new = {"folder": str(tmp_path / "new"), "replicate": 1, "ep": 1, "seed": 1, "start_from": str(tmp_path / "renamed")}
    model, optimizer, checkpointer = build(**new)
    assert checkpointer.resume() == Progress()
    assert not optimizer.state
    assert all(torch.equal(full(parameter), expected[name]) for name, parameter in model.named_parameters())
    take_steps(model, optimizer, 1)
    save(checkpointer, 1)
    assert build(**new)[2].resume().step == 1  # from now on its own checkpoints count
    assert read_base(tmp_path / "new/checkpoints/step-00000001") == TOKENIZER  # handed on


@pytest.mark.usefixtures("one_rank")
def test_resume_never_wants_a_fresh_folder_and_a_path_is_taken_exactly(tmp_path: Path) -> None:
    _, _, checkpointer = build(str(tmp_path), 1, 1, seed=0)
    for step in (2, 4):
        save(checkpointer, step)
    with pytest.raises(ValueError, match=r"checkpoint.resume = 'never'.*step-00000004"):
        build(str(tmp_path), 1, 1, seed=0, resume="never")[2].resume()
    path = tmp_path / "checkpoints/step-00000002"
    assert build(str(tmp_path), 1, 1, seed=0, resume=str(path))[2].resume().step == 2
    assert build(str(tmp_path / "new"), 1, 1, seed=0, resume=str(tmp_path))[2].resume().step == 4
    with pytest.raises(ValueError, match="expected a checkpoint"):
        build(str(tmp_path / "new"), 1, 1, seed=0, resume=str(tmp_path / "hf"))[2].resume()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("option", ["auto", "resume", "start_from"])
def test_nothing_that_believes_a_pickle_reads_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    path = checkpoint_in(tmp_path / "run", 2)
    folder = tmp_path / ("run" if option == "auto" else "new")
    _, _, checkpointer = build(str(folder), 1, 1, seed=1, **({} if option == "auto" else {option: str(path)}))

    def believe(*_: object, **__: object) -> None:
        raise AssertionError("a checkpoint is unpickled by a reader that runs what it names")

    for module in (pickle, torch):
        monkeypatch.setattr(module, "load", believe)
    monkeypatch.setattr(pickle, "loads", believe)
    assert checkpointer.resume() == (Progress() if option == "start_from" else Progress(2, 0, ANY))
    marker = tmp_path / "marker"
    (path / ".metadata").write_bytes(b"ctorch.distributed.run\nos.system\n(Vtouch " + bytes(marker) + b"\ntR.")
    write_manifest(path)
    with pytest.raises(ValueError, match=r"metadata asks for torch\.distributed\.run\.os\.system"):
        checkpointer.resume()
    assert not marker.exists()


@pytest.mark.usefixtures("one_rank")
def test_another_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint_in(tmp_path, 2)
    for change, message in (
        ({"tie_word_embeddings": True}, "unknown tensor 'model.lm_head.weight'"),
        (
            {"num_hidden_layers": 5, "layer_types": (*CONFIG.layer_types, "full_attention")},
            "lacks tensor 'model.layers.4",
        ),
        ({"vocab_size": 96}, r"'model.embed_tokens.weight' has shape \[97, 48\], the model's has \[96, 48\]"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr("tests.checkpoint.test_checkpointer.CONFIG", dataclasses.replace(CONFIG, **change))
            with pytest.raises(ValueError, match=message):
                build(str(tmp_path), 1, 1, seed=0)[2].resume()


def errors_of_rank_0() -> str:
    def action() -> None:
        raise KeyError("cursors")

    checkpointer = object.__new__(Checkpointer)
    checkpointer._group = dist.group.WORLD
    with pytest.raises(ValueError, match="cursors") as error:
        checkpointer._from_rank_0(action)
    return str(error.value)


def test_any_error_of_rank_0_reaches_the_ranks_that_wait_for_it() -> None:
    assert run_ranks(errors_of_rank_0, 2) == ["'cursors'"] * 2


IMPOSSIBLE = {
    "step": torch.tensor(-1),
    "tokens_seen": torch.tensor(-(2**62)),
    "data_cursors": torch.full((4, 2), -5),
    "rng_state": torch.full_like(torch.get_rng_state(), 255),
    "step in fractions": torch.tensor(2.0),
    "data_cursors in three dimensions": torch.zeros(4, 2, 1, dtype=torch.int64),
}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_an_impossible_state_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    original = checkpointer_module._train_state
    with monkeypatch.context() as patch:
        lie = {f"train.{kind.split()[0]}": IMPOSSIBLE[kind]}
        patch.setattr(checkpointer_module, "_train_state", lambda *arguments: original(*arguments) | lie)
        checkpoint_in(tmp_path, 2)
    with pytest.raises(UserError) as raised:
        build(str(tmp_path), 1, 1, seed=1)[2].resume()
    assert len(str(raised.value).splitlines()) == 1
