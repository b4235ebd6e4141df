"""DCP checkpoints: chunks of every layout that a run has, another version of torch, and pickles that ask for more."""

import enum
import io
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from checkpoint import convert_to_hf as to_hf
from checkpoint.tensors.dcp import read_dcp
from models.qwen35_moe.hf_weights import hf_name
from models.qwen35_moe.parameters import parameters
from tests.checkpoint.test_convert_to_hf import CONFIG, add_assets, random_weights
from tests.commands import status_of
from tests.distributed import run_ranks


def save_sharded(folder: str, replicate: int, efsdp: int, ep: int) -> None:
    """Every layout a run has: experts on (efsdp, ep), the rest uneven on fsdp, some plain, all maybe replicated."""
    mesh = init_device_mesh("cpu", (replicate, efsdp, ep), mesh_dim_names=("replicate", "efsdp", "ep"))
    flat = mesh["efsdp", "ep"]._flatten("fsdp")
    state = {}
    for name, tensor in random_weights().items():
        if ".experts." in name:
            state[name] = distribute_tensor(tensor, mesh, [Replicate(), Shard(1), Shard(0)])
        elif parameters(CONFIG)[name].is_float32:
            state[name] = tensor
        else:
            state[name] = distribute_tensor(tensor, flat, [Shard(0)])
    dcp.save({f"model.{name}": tensor for name, tensor in state.items()}, checkpoint_id=folder)
    assert any(isinstance(tensor, DTensor) for tensor in state.values())
    dist.barrier()


@pytest.mark.parametrize(("replicate", "efsdp", "ep"), [(1, 2, 2), (2, 1, 2), (1, 1, 4), (1, 4, 1)])
def test_reads_chunks_of_several_mesh_axes(tmp_path: Path, replicate: int, efsdp: int, ep: int) -> None:
    run_ranks(save_sharded, 4, str(tmp_path / "dcp"), replicate, efsdp, ep)
    index = read_dcp(tmp_path / "dcp")
    weights = random_weights()
    assert index.keys() == {f"model.{name}" for name in weights}
    grid = index["model.layers.0.mlp.experts.gate_up_proj"].chunks
    assert {tuple(stop - start for start, stop in chunk.box) for chunk in grid} == {(8 // ep, 48 // efsdp, 48)}
    for name, tensor in weights.items():
        assert torch.equal(index[f"model.{name}"].read(), tensor), name
    add_assets(tmp_path / "dcp")
    assert status_of(to_hf.main, [str(tmp_path / "dcp"), str(tmp_path / "out"), "--dtype=keep"]) == 0
    out = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(out[hf_name(name)], tensor) for name, tensor in weights.items())


def test_the_index_as_pythons_first_releases_of_3_11_pickle_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian 12 has 3.11.2, which names the member of an enum by `getattr`."""
    monkeypatch.setattr(enum.Enum, "__reduce_ex__", lambda member, _: (getattr, (type(member), member._name_)))
    dcp.save({"model.a": torch.arange(6.0)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    monkeypatch.undo()
    assert b"getattr" in (tmp_path / "dcp" / ".metadata").read_bytes()
    assert torch.equal(read_dcp(tmp_path / "dcp")["model.a"].read(), torch.arange(6.0))


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (eval, (f"open({str(self.path)!r}, 'w')",))


@pytest.mark.parametrize("where", ["index", "chunk", "per-rank file"])
def test_a_malicious_pickle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture, where: str) -> None:
    state = {f"model.{name}": tensor for name, tensor in random_weights().items()}
    marker, folder = tmp_path / "marker", tmp_path / "dcp"
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    add_assets(folder)
    if where == "index":
        file = folder / ".metadata"
        file.write_bytes(pickle.dumps(Touch(marker)))
    elif where == "chunk":
        file = folder / "__0_0.distcp"
        # In the place of the first chunk, padded to its length.
        buffer = io.BytesIO()
        torch.save([Touch(marker)], buffer)
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        (place,) = (p for i, p in metadata.storage_data.items() if i.fqn == "model.norm.weight")
        place.offset, place.length = file.stat().st_size, buffer.tell()
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        file.write_bytes(file.read_bytes() + buffer.getvalue())
    else:
        folder = tmp_path / "ranks"
        folder.mkdir()
        file = folder / "model_world_size_1_rank_0.pt"
        torch.save({**state, "model.norm.weight": Touch(marker)}, file)
        add_assets(folder)
    assert status_of(to_hf.main, [str(folder), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"{file} asks for " in error
    assert "eval, which no checkpoint needs: refused" in error
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_torch_2_11_is_read() -> None:
    index = read_dcp(Path(__file__).parents[1] / "fixtures/torch-2.11.0/dcp")
    assert torch.equal(index["model.a"].read(), torch.arange(48.0).view(8, 6))
    assert index["model.b"].read() == 3
