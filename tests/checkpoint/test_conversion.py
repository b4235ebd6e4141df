"""DCP to Hugging Face and back: exact tensors, both expert layouts, sharded files, and what is refused."""

import io
import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import AutoModelForCausalLM

from checkpoint import convert_from_hf as from_hf
from checkpoint import convert_to_hf as to_hf
from checkpoint.dcp_reader import read_index
from models.qwen35_moe.hf_weights import hf_name, is_float32, parameter_shapes
from tests.distributed import run_ranks
from tests.models.qwen35_moe.shapes import tiny_config

CONFIG = tiny_config(vocab_size=4096)
TOKENIZER = Path(__file__).resolve().parents[2] / "data/tiny/tokenizer"


def random_weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(shape, generator=generator).to(dtype) for n, shape in parameter_shapes(CONFIG).items()}


def write_hf(folder: Path, weights: dict[str, torch.Tensor], num_files: int = 1) -> None:
    """A Hugging Face directory with these tensors (by their Hugging Face names)."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TOKENIZER / name).read_bytes())
    if num_files == 1:
        save_file(weights, folder / "model.safetensors")
        return
    weight_map = {key: f"model-{i % num_files:05}.safetensors" for i, key in enumerate(weights)}
    for file in set(weight_map.values()):
        save_file({k: weights[k].contiguous() for k in weights if weight_map[k] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def load_hf(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def per_expert(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors in the layout that transformers' save_pretrained writes."""
    out = {}
    for key, value in weights.items():
        folder, _, which = key.rpartition(".")
        for expert, matrix in enumerate(value if ".experts." in key else []):
            if which == "down_proj":
                out[f"{folder}.{expert}.down_proj.weight"] = matrix.clone()
            else:
                gate, up = matrix.chunk(2)
                out |= {
                    f"{folder}.{expert}.gate_proj.weight": gate.clone(),
                    f"{folder}.{expert}.up_proj.weight": up.clone(),
                }
        if ".experts." not in key:
            out[key] = value
    return out


@pytest.mark.parametrize("layout", ["stacked", "per expert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_files", [1, 3])
def test_from_hf_to_dcp_to_hf_is_the_identity(tmp_path: Path, layout: str, dtype: torch.dtype, num_files: int) -> None:
    weights = {hf_name(name): tensor for name, tensor in random_weights(dtype).items()}
    write_hf(tmp_path / "hf", per_expert(weights) if layout == "per expert" else weights, num_files)
    assert from_hf.main([str(tmp_path / "hf"), str(tmp_path / "dcp"), "--dtype=keep"]) == 0
    assert to_hf.main([str(tmp_path / "dcp"), str(tmp_path / "back"), "--dtype=keep"]) == 0
    back = load_file(tmp_path / "back/model.safetensors")
    expected = load_hf(tmp_path / "hf")
    assert back.keys() == expected.keys()
    for key, value in expected.items():
        assert back[key].dtype == value.dtype
        assert torch.equal(back[key], value), key


def test_export_in_shards_loads_with_transformers(tmp_path: Path) -> None:
    weights = {hf_name(name): tensor for name, tensor in random_weights().items()}
    write_hf(tmp_path / "hf", weights)
    assert from_hf.main([str(tmp_path / "hf"), str(tmp_path / "dcp")]) == 0
    assert to_hf.main([str(tmp_path / "dcp"), str(tmp_path / "out"), "--max-shard-size=900KB", "--dtype=float32"]) == 0
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all((tmp_path / "out" / file).stat().st_size < 910_000 for file in files)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, dtype="auto")
    assert not any(loading.values()), loading
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]), key
    assert model.config.eos_token_id is not None


def test_bfloat16_is_the_default_and_rounds_every_tensor(tmp_path: Path) -> None:
    weights = random_weights()
    dcp.save({f"model.{n}": t for n, t in weights.items()}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    add_assets(tmp_path / "dcp")
    assert to_hf.main([str(tmp_path / "dcp"), str(tmp_path / "out")]) == 0
    out = load_file(tmp_path / "out/model.safetensors")
    for name, tensor in weights.items():
        kept = name.endswith(("A_log", "linear_attn.norm.weight"))  # float32 in the published checkpoints
        assert torch.equal(out[hf_name(name)], tensor if kept else tensor.bfloat16()), name
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def add_assets(checkpoint: Path) -> None:
    (checkpoint / "hf").mkdir()
    (checkpoint / "hf/config.json").write_text(json.dumps(CONFIG.to_dict()))


def save_sharded(folder: str, replicate: int, efsdp: int, ep: int) -> None:
    """Every layout a run has: experts on (efsdp, ep), the rest uneven on fsdp, some plain, all maybe replicated."""
    mesh = init_device_mesh("cpu", (replicate, efsdp, ep), mesh_dim_names=("replicate", "efsdp", "ep"))
    flat = mesh["efsdp", "ep"]._flatten("fsdp")
    state = {}
    for name, tensor in random_weights().items():
        if ".experts." in name:
            state[name] = distribute_tensor(tensor, mesh, [Replicate(), Shard(1), Shard(0)])
        elif is_float32(name):
            state[name] = tensor
        else:
            state[name] = distribute_tensor(tensor, flat, [Shard(0)])
    dcp.save({f"model.{name}": tensor for name, tensor in state.items()}, checkpoint_id=folder)
    assert any(isinstance(tensor, DTensor) for tensor in state.values())
    dist.barrier()


@pytest.mark.parametrize(("replicate", "efsdp", "ep"), [(1, 2, 2), (2, 1, 2), (1, 1, 4), (1, 4, 1)])
def test_reads_chunks_of_several_mesh_axes(tmp_path: Path, replicate: int, efsdp: int, ep: int) -> None:
    run_ranks(save_sharded, 4, str(tmp_path / "dcp"), replicate, efsdp, ep)
    index = read_index(tmp_path / "dcp")
    weights = random_weights()
    assert index.keys() == {f"model.{name}" for name in weights}
    grid = index["model.layers.0.mlp.experts.gate_up_proj"].chunks
    assert {tuple(stop - start for start, stop in chunk.box) for chunk in grid} == {(8 // ep, 48 // efsdp, 48)}
    for name, tensor in weights.items():
        assert torch.equal(index[f"model.{name}"].read(), tensor), name
    add_assets(tmp_path / "dcp")
    assert to_hf.main([str(tmp_path / "dcp"), str(tmp_path / "out"), "--dtype=keep"]) == 0
    out = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(out[hf_name(name)], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, "'norm.weight' is missing"),
        ({"model.extra.weight": torch.zeros(3)}, "'extra.weight' is unknown"),
        ({"model.norm.weight": torch.zeros(47)}, r"'norm.weight' has shape [47], not [48]"),
    ],
)
def test_a_wrong_checkpoint_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture, change: dict, message: str
) -> None:
    state = {f"model.{name}": tensor for name, tensor in random_weights().items()} | change
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    add_assets(tmp_path / "dcp")
    assert to_hf.main([str(tmp_path / "dcp"), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dcp"]


def test_damaged_data_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    state = {f"model.{name}": tensor for name, tensor in random_weights().items()}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    add_assets(tmp_path / "dcp")
    data = tmp_path / "dcp/__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-5000])
    assert to_hf.main([str(tmp_path / "dcp"), str(tmp_path / "out")]) == 1
    assert "__0_0.distcp" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dcp"]


def test_mistakes_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").touch()
    for tool in (to_hf, from_hf):
        for arguments in (["nowhere", "out"], [".", "there"]):
            with pytest.raises(SystemExit, match="2"):
                tool.main([str(tmp_path / argument) for argument in arguments])
        assert len(capsys.readouterr().err.splitlines()) == 2
    with pytest.raises(SystemExit, match="2"):
        to_hf.main([str(tmp_path), str(tmp_path / "out"), "--max-shard-size=0GB"])
    assert to_hf.main([str(tmp_path / "there"), str(tmp_path / "out")]) == 1  # a folder without a checkpoint
    assert "expected a checkpoint" in capsys.readouterr().err


def test_a_malicious_index_is_refused(tmp_path: Path) -> None:
    dcp.save({"model.a": torch.zeros(2)}, checkpoint_id=tmp_path, no_dist=True)
    marker = tmp_path / "marker"

    class Touch:
        def __reduce__(self):
            return (eval, (f"open({str(marker)!r}, 'w')",))

    buffer = io.BytesIO()
    pickle.dump(Touch(), buffer)
    (tmp_path / ".metadata").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=r"builtins.eval.*refused"):
        read_index(tmp_path)
    assert not marker.exists()
