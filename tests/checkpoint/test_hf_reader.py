"""Training straight from a Hugging Face directory: every layout, each rank its part, and what is refused."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from checkpoint.convert_from_hf import convert_from_hf
from checkpoint.export import Options, export_to_hf
from checkpoint.hf_reader import load_hf_weights, native_tensors
from checkpoint.tensors.safetensors import read_safetensors
from errors import UserError
from models.ops.kernels import Kernels
from models.qwen35_moe.hf_weights import hf_name
from models.qwen35_moe.model import Qwen35Moe
from parallelisms.degrees import Degrees
from parallelisms.mesh import build_meshes
from parallelisms.parallelize import local_region, parallelize_fn
from tests.checkpoint.test_convert_to_hf import CONFIG, per_expert, random_weights, write_hf
from tests.distributed import run_ranks
from tests.parallelisms.layouts import full


def load(folder: str, world_size: int, replicate: int, ep: int) -> tuple[dict[str, torch.Tensor], int, int]:
    """Every parameter whole, how many bytes this rank read, and how many numbers it holds."""
    meshes = build_meshes("cpu", Degrees(replicate, world_size // replicate, ep))
    with torch.device("meta"):
        model = Qwen35Moe(CONFIG, Kernels(attention="sdpa"))
    parallelize_fn(model, meshes, compute_dtype=torch.float32)
    model.to_empty(device="cpu")
    before = bytes_read()
    load_hf_weights(model, Path(folder), 0, local_region)
    read = bytes_read() - before
    held = sum(local_region(parameter)[0].numel() for parameter in model.parameters())
    return {name: full(parameter) for name, parameter in model.named_parameters()}, read, held


def bytes_read() -> int:
    """What this process has asked the system to read, so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="what a process reads is told by /proc")
@pytest.mark.parametrize(
    ("layout", "dtype", "num_files"), [("stacked", torch.float32, 1), ("per expert", torch.bfloat16, 3)]
)
def test_each_rank_reads_its_part_of_any_directory(
    tmp_path: Path, layout: str, dtype: torch.dtype, num_files: int
) -> None:
    weights = random_weights(dtype)
    stored = {hf_name(name).replace("model.", "model.language_model.", 1): t for name, t in weights.items()}
    stored |= {"model.visual.a": torch.zeros(3)}
    write_hf(tmp_path / "hf", per_expert(stored) if layout == "per expert" else stored, num_files)
    # In a model as small as this, headers are not small beside the weights. A file begins with its length.
    headers = sum(int.from_bytes(path.read_bytes()[:8], "little") for path in (tmp_path / "hf").glob("*.safetensors"))
    for world_size, replicate, ep in ((4, 1, 2), (2, 2, 1)):
        for loaded, read, held in run_ranks(load, world_size, str(tmp_path / "hf"), world_size, replicate, ep):
            assert read < 1.1 * dtype.itemsize * held + headers
            for name, tensor in weights.items():
                assert torch.equal(loaded[name], tensor.float()), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, "'model.norm.weight' is missing"),
        ({"model.odd": torch.zeros(2)}, "'model.odd' .* belong to no parameter"),
        ({"model.norm.weight": torch.zeros(47)}, r"'model.norm.weight' has shape \[47\], not \[48\]"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path: Path, change: dict, message: str) -> None:
    weights = {hf_name(name): tensor for name, tensor in random_weights().items()} | change
    write_hf(tmp_path / "hf", {key: tensor for key, tensor in weights.items() if tensor is not None})
    with pytest.raises(ValueError, match=message):
        load_hf_weights(Qwen35Moe(CONFIG, Kernels(attention="sdpa")), tmp_path / "hf", 0, lambda _: None)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    model = Qwen35Moe(CONFIG, Kernels(attention="sdpa"))
    write_hf(tmp_path / "hf", {hf_name(name): tensor for name, tensor in random_weights().items()}, num_files=2)
    path = tmp_path / "hf/model-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model-00001.safetensors is no complete safetensors file: it has"):
        load_hf_weights(model, tmp_path / "hf", 0, lambda _: None)
    path.unlink()
    with pytest.raises(ValueError, match=r"model-00001.safetensors is missing"):
        load_hf_weights(model, tmp_path / "hf", 0, lambda _: None)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e300])
def test_weights_that_are_no_numbers_are_named(tmp_path: Path, value: float) -> None:
    """At a start, a conversion, and its way back; what only float64 holds too."""
    weights = {hf_name(name): tensor for name, tensor in random_weights().items()}
    weights["model.norm.weight"] = weights["model.norm.weight"].double()
    weights["model.norm.weight"][5] = value
    write_hf(tmp_path / "hf", weights)
    model = Qwen35Moe(CONFIG, Kernels(attention="sdpa"))
    with pytest.raises(UserError, match=r"hf: 'model.norm.weight' has values that are not finite as torch.float32"):
        load_hf_weights(model, tmp_path / "hf", 0, local_region)
    with pytest.raises(UserError, match=r"hf: 'model.norm.weight' has values that are not finite as torch.float32"):
        convert_from_hf(tmp_path / "hf", tmp_path / "out", torch.float32)
    assert not (tmp_path / "out").exists()
    dcp.save({f"model.{n}": weights[hf_name(n)] for n in random_weights()}, checkpoint_id=tmp_path / "dcp")
    with pytest.raises(UserError, match=r"dcp: 'model.norm.weight' has values that are not finite as torch.bfloat16"):
        export_to_hf(tmp_path / "dcp", tmp_path / "out", Options(base=tmp_path / "hf"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float8_e4m3fn])
def test_quantised_weights_are_to_be_dequantised_first(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {hf_name(name): tensor for name, tensor in random_weights().items()}
    weights["model.norm.weight"] = weights["model.norm.weight"].to(dtype)
    weights["model.norm.weight_scale_inv"] = torch.ones(1)
    write_hf(tmp_path / "hf", weights)
    with pytest.raises(UserError, match=r"'model.norm.weight' is torch.\w+, quantised: dequantise the model"):
        load_hf_weights(Qwen35Moe(CONFIG, Kernels(attention="sdpa")), tmp_path / "hf", 0, lambda _: None)


@pytest.mark.parametrize("fault", [None, "value", "shape"])
def test_a_tied_models_own_head_must_equal_its_embedding(tmp_path: Path, fault: str | None) -> None:
    config = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    weights = {hf_name(name): t for name, t in random_weights().items() if name != "lm_head.weight"}
    head = weights["model.embed_tokens.weight"].clone()
    if fault == "value":
        head[-1, -1] += 1e-3
    weights["lm_head.weight"] = head[1:].clone() if fault == "shape" else head
    write_hf(tmp_path / "hf", weights)
    arrays = read_safetensors(tmp_path / "hf")
    if fault:
        with pytest.raises(UserError, match=r"'lm_head.weight' (differs from the embedding|has shape)"):
            native_tensors(config, arrays)
    else:
        assert "lm_head.weight" not in native_tensors(config, arrays)
