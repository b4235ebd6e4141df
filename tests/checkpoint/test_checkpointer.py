"""Saving, retention, resuming on other layouts, and what a resume refuses."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import checkpoint.checkpointer as checkpointer_module
from checkpoint.checkpointer import Checkpointer, Progress, complete_checkpoints, find_checkpoint
from config import Checkpoint, Config, Data, Job, Model, Optimizer, Training
from models.ops.kernels import Kernels
from models.qwen35_moe.model import Qwen35Moe
from parallelisms.mesh import build_meshes
from parallelisms.parallelize import materialise, parallelize_fn
from tests.distributed import run_ranks
from tests.models.qwen35_moe.shapes import tiny_config
from tests.parallelisms.layouts import full
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


def build(folder: str, replicate: int, ep: int, seed: int, **checkpoint):
    """(model, optimizer, checkpointer) on all ranks, random weights by `seed`."""
    meshes = build_meshes("cpu", replicate, dist.get_world_size() // replicate, ep)
    with torch.device("meta"):
        model = Qwen35Moe(CONFIG, Kernels(attention="sdpa"))
    parallelize_fn(model, meshes, compute_dtype=torch.float32)
    materialise(model, torch.device("cpu"), seed)
    optimizer = build_optimizer(model, Optimizer(lr=1e-3))
    return model, optimizer, Checkpointer(run_config(folder, **checkpoint), CONFIG, model, optimizer)


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


def save_on(folder: str, replicate: int, ep: int) -> dict[str, torch.Tensor]:
    model, optimizer, checkpointer = build(folder, replicate, ep, seed=0)
    assert checkpointer.resume() == Progress()
    take_steps(model, optimizer, 3)
    slots = 4 // dist.get_world_size()
    first = dist.get_rank() * slots
    checkpointer.save(3, 300, torch.tensor([(slot, 10 * slot) for slot in range(first, first + slots)]))
    return contents(model, optimizer)


def resume_on(folder: str, replicate: int, ep: int) -> tuple[dict[str, torch.Tensor], Progress]:
    model, optimizer, checkpointer = build(folder, replicate, ep, seed=1)
    progress = checkpointer.resume()
    return contents(model, optimizer), progress


LAYOUTS = [(4, 1, 2), (4, 1, 4), (4, 2, 2), (2, 1, 1), (1, 1, 1)]  # world, replicate, ep


@pytest.mark.parametrize("saved", LAYOUTS[:3] + LAYOUTS[4:], ids=str)
def test_any_layout_resumes_any_other_bit_for_bit(tmp_path: Path, saved: tuple[int, int, int]) -> None:
    world, *degrees = saved
    expected = run_ranks(save_on, world, str(tmp_path), *degrees)[0]
    assert any(name.endswith("/exp_avg_sq") for name in expected)
    for other, *other_degrees in LAYOUTS[2:]:
        for state, progress in run_ranks(resume_on, other, str(tmp_path), *other_degrees):
            assert (progress.step, progress.tokens_seen) == (3, 300)
            assert progress.data_cursors.tolist() == [[slot, 10 * slot] for slot in range(4)]
            assert state.keys() == expected.keys()
            for name, tensor in expected.items():
                assert torch.equal(state[name], tensor), (other, name)


@pytest.fixture
def one_rank(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


CURSORS = torch.zeros(4, 2, dtype=torch.int64)


@pytest.mark.usefixtures("one_rank")
def test_keeps_the_newest_and_never_takes_the_one_just_written(tmp_path: Path) -> None:
    _, _, checkpointer = build(str(tmp_path), 1, 1, seed=0, keep=2)
    for step in (2, 4, 6):
        checkpointer.save(step, 0, CURSORS)
    names = [path.name for path in complete_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-00000004", "step-00000006"]
    checkpointer.save(1, 0, CURSORS)  # a run that went back
    names = [path.name for path in complete_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-00000001", "step-00000006"]
    assert find_checkpoint(tmp_path).name == "step-00000006"
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == set(names)


@pytest.mark.usefixtures("one_rank")
def test_a_save_that_dies_half_way_is_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, checkpointer = build(str(tmp_path), 1, 1, seed=0)
    checkpointer.save(2, 0, CURSORS)

    class Killed(Exception):
        pass

    def dies(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpointer_module, "resolved_toml", dies)  # after DCP has written its files
        with pytest.raises(Killed):
            checkpointer.save(4, 0, CURSORS)
    assert find_checkpoint(tmp_path).name == "step-00000002"
    assert build(str(tmp_path), 1, 1, seed=1)[2].resume().step == 2
    checkpointer.save(4, 0, CURSORS)  # what the dead one left is in nobody's way
    assert find_checkpoint(tmp_path).name == "step-00000004"


@pytest.mark.usefixtures("one_rank")
def test_resume_never_wants_a_fresh_folder_and_a_path_is_taken_exactly(tmp_path: Path) -> None:
    _, _, checkpointer = build(str(tmp_path), 1, 1, seed=0)
    for step in (2, 4):
        checkpointer.save(step, 0, CURSORS)
    with pytest.raises(ValueError, match=r"checkpoint.resume = 'never'.*step-00000004"):
        build(str(tmp_path), 1, 1, seed=0, resume="never")[2].resume()
    path = tmp_path / "checkpoints/step-00000002"
    assert build(str(tmp_path), 1, 1, seed=0, resume=str(path))[2].resume().step == 2
    assert build(str(tmp_path / "new"), 1, 1, seed=0, resume=str(tmp_path))[2].resume().step == 4
    with pytest.raises(ValueError, match="expected a checkpoint"):
        build(str(tmp_path / "new"), 1, 1, seed=0, resume=str(tmp_path / "hf"))[2].resume()


@pytest.mark.usefixtures("one_rank")
def test_another_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(str(tmp_path), 1, 1, seed=0)[2].save(2, 0, CURSORS)
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
