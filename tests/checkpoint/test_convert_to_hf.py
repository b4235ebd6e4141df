"""DCP to Hugging Face and back: exact tensors, both expert layouts, sharded files, and what is refused."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checkpoint import convert_from_hf as from_hf
from checkpoint import convert_to_hf as to_hf
from checkpoint import export
from checkpoint.export import _vision_shapes
from checkpoint.tensors.safetensors import read_safetensors
from checkpoint.tensors.stored import Chunk
from models.qwen35_moe.hf_weights import hf_name, is_published_in_float32, mtp_shapes
from models.qwen35_moe.parameters import parameters
from tests.commands import status_of
from tests.models.qwen35_moe.shapes import tiny_config

CONFIG = tiny_config(vocab_size=4096)
TOKENIZER = Path(__file__).resolve().parents[2] / "data/tiny/tokenizer"


def random_weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(p.shape, generator=generator).to(dtype) for n, p in parameters(CONFIG).items()}


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
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


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
    assert status_of(from_hf.main, [str(tmp_path / "hf"), str(tmp_path / "dcp"), "--dtype=keep"]) == 0
    assert status_of(to_hf.main, [str(tmp_path / "dcp"), str(tmp_path / "back"), "--dtype=keep"]) == 0
    back = load_file(tmp_path / "back/model.safetensors")
    expected = load_hf(tmp_path / "hf")
    assert back.keys() == expected.keys()
    for key, value in expected.items():
        assert back[key].dtype == value.dtype
        assert torch.equal(back[key], value), key


def test_export_in_shards_loads_with_transformers(tmp_path: Path) -> None:
    weights = {hf_name(name): tensor for name, tensor in random_weights().items()}
    write_hf(tmp_path / "hf", weights)
    assert status_of(from_hf.main, [str(tmp_path / "hf"), str(tmp_path / "dcp")]) == 0
    assert (
        status_of(
            to_hf.main, [str(tmp_path / "dcp"), str(tmp_path / "out"), "--max-shard-size=900KB", "--dtype=float32"]
        )
        == 0
    )
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
    assert status_of(to_hf.main, [str(tmp_path / "dcp"), str(tmp_path / "out")]) == 0
    out = load_file(tmp_path / "out/model.safetensors")
    for name, tensor in weights.items():
        kept = name.endswith(("A_log", "linear_attn.norm.weight"))  # float32 in the published checkpoints
        assert torch.equal(out[hf_name(name)], tensor if kept else tensor.bfloat16()), name
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def add_assets(checkpoint: Path) -> None:
    (checkpoint / "hf").mkdir()
    (checkpoint / "hf/config.json").write_text(json.dumps(CONFIG.to_dict()))


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
    assert status_of(to_hf.main, [str(tmp_path / "dcp"), str(tmp_path / "out")]) == 1
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
    assert status_of(to_hf.main, [str(tmp_path / "dcp"), str(tmp_path / "out")]) == 2
    assert "__0_0.distcp" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dcp"]


def test_mistakes_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").touch()
    for tool in (to_hf, from_hf):
        for arguments in (["nowhere", "out"], [".", "there"]):
            assert status_of(tool.main, [str(tmp_path / argument) for argument in arguments]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 2
    assert status_of(to_hf.main, [str(tmp_path), str(tmp_path / "out"), "--max-shard-size=0GB"]) == 2
    assert status_of(to_hf.main, [str(tmp_path / "there"), str(tmp_path / "out")]) == 2  # a folder without a checkpoint
    assert "expected a checkpoint" in capsys.readouterr().err


# Both classes, vision and MTP


VISION_CONFIG = {
    "model_type": "qwen3_5_moe",
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": CONFIG.hidden_size,
    "num_position_embeddings": 16,
}


def published(per_expert_text: bool, per_expert_mtp: bool, vision: bool) -> tuple[dict, dict[str, torch.Tensor]]:
    """config.json and tensors of a model as it is published: bfloat16 with some float32, MTP, maybe vision."""
    text_config = CONFIG.to_dict() | {"mtp_num_hidden_layers": 1}
    generator = torch.Generator().manual_seed(1)

    def random(shapes: dict) -> dict[str, torch.Tensor]:
        return {k: torch.randn(shape, generator=generator).bfloat16() for k, shape in shapes.items()}

    architecture = "image_text_to_text" if vision else "causal_lm"
    text = random({hf_name(n, architecture): p.shape for n, p in parameters(CONFIG).items()})
    text |= {key: tensor.float() for key, tensor in text.items() if is_published_in_float32(key)}
    mtp = random(mtp_shapes(CONFIG, 1))
    tensors = (per_expert(text) if per_expert_text else text) | (per_expert(mtp) if per_expert_mtp else mtp)
    if not vision:
        return text_config, tensors
    config = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "image_token_id": 5,
        "text_config": text_config,
        "vision_config": VISION_CONFIG,
        "tie_word_embeddings": False,
    }
    return config, tensors | random(_vision_shapes(config))


def write_published(folder: Path, *kind: bool) -> dict[str, torch.Tensor]:
    config, tensors = published(*kind)
    write_hf(folder, tensors, num_files=2)
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def convert(source: Path, out: Path, *options: str) -> dict[str, torch.Tensor]:
    assert status_of(to_hf.main, [str(source), str(out), "--verify", *options]) == 0
    return load_hf(out)


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype, key
        assert torch.equal(actual[key], tensor), key


@pytest.mark.parametrize("vision", [False, True], ids=["causal_lm", "image_text_to_text"])
@pytest.mark.parametrize(("per_expert_text", "per_expert_mtp"), [(False, True), (True, False)])
def test_there_and_back_is_the_identity(
    tmp_path: Path, vision: bool, per_expert_text: bool, per_expert_mtp: bool
) -> None:
    tensors = write_published(tmp_path / "hf", per_expert_text, per_expert_mtp, vision)
    for dtype in ("keep", "float32"):
        dcp_folder = tmp_path / f"dcp-{dtype}"
        assert status_of(from_hf.main, [str(tmp_path / "hf"), str(dcp_folder), f"--dtype={dtype}"]) == 0
        # Through float32 nothing is lost either: the default is the dtypes of the published checkpoints.
        back = convert(dcp_folder, tmp_path / f"out-{dtype}", *(["--dtype=keep"] if dtype == "keep" else []))
        assert_same(back, tensors)
    config = json.loads((tmp_path / "out-keep/config.json").read_text())
    assert config["architectures"] == [f"Qwen3_5MoeFor{'ConditionalGeneration' if vision else 'CausalLM'}"]
    assert config.get("text_config", config)["mtp_num_hidden_layers"] == 1


def test_the_other_class_and_the_other_layout_of_experts(tmp_path: Path) -> None:
    tensors = write_published(tmp_path / "hf", True, True, True)
    assert status_of(from_hf.main, [str(tmp_path / "hf"), str(tmp_path / "dcp"), "--dtype=keep"]) == 0
    out = convert(tmp_path / "dcp", tmp_path / "text", "--architecture=causal_lm", "--experts=stacked", "--dtype=keep")
    _, stacked = published(False, False, False)
    assert out.keys() == stacked.keys()
    as_image_text = {
        k.replace("model.", "model.language_model.", 1) if "mtp." not in k else k: t for k, t in out.items()
    }
    assert_same(per_expert(as_image_text), {k: t for k, t in tensors.items() if "visual" not in k})
    config = json.loads((tmp_path / "text/config.json").read_text())
    assert config["architectures"] == ["Qwen3_5MoeForCausalLM"]
    assert "vision_config" not in config

    # And back, with the vision tower from --base.
    assert status_of(from_hf.main, [str(tmp_path / "text"), str(tmp_path / "dcp2"), "--dtype=keep"]) == 0
    options = ["--architecture=image_text_to_text", f"--base={tmp_path / 'hf'}", "--dtype=keep"]
    assert_same(convert(tmp_path / "dcp2", tmp_path / "back", *options), tensors)
    out = convert(tmp_path / "dcp2", tmp_path / "per", "--experts=per_expert", "--dtype=keep")
    assert_same(out, per_expert(load_hf(tmp_path / "text")))


def test_experts_of_mtp_in_pieces_stay_as_they_are_or_ask_for_it(tmp_path: Path) -> None:
    """As FSDP cuts a checkpoint that has them one by one."""
    write_published(tmp_path / "hf", True, True, False)
    mtp = {key: tensor for key, tensor in read_safetensors(tmp_path / "hf").items() if key.startswith("mtp.")}
    key = min(key for key in mtp if ".experts." in key)
    rows, *others = mtp[key].shape
    array = mtp[key].open(mtp[key].chunks[0])
    boxes = [((start, stop), *((0, size) for size in others)) for start, stop in [(0, 3), (3, rows)]]
    mtp[key] = dataclasses.replace(mtp[key], chunks=[Chunk(box, array.part(box)) for box in boxes])
    exports = export._mtp_exports(CONFIG, mtp, "keep")
    (cut,) = [e.stored for e in exports if e.key == key]
    assert torch.equal(cut.read(), array.read())
    with pytest.raises(ValueError, match=f"'{re.escape(key)}' is in several pieces: expected --experts keep"):
        export._mtp_exports(CONFIG, mtp, "stacked")


def test_what_is_not_there_is_not_declared_and_what_is_needed_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_published(tmp_path / "hf", False, False, True)
    assert status_of(from_hf.main, [str(tmp_path / "hf"), str(tmp_path / "dcp")]) == 0
    (tmp_path / "hf").rename(tmp_path / "moved")
    out = convert(tmp_path / "dcp", tmp_path / "text", "--architecture=causal_lm")
    assert not any(key.startswith("mtp.") for key in out)
    assert json.loads((tmp_path / "text/config.json").read_text())["mtp_num_hidden_layers"] == 0

    def error(*options: str, status: int = 2) -> str:
        assert status_of(to_hf.main, [str(tmp_path / "dcp"), str(tmp_path / "out"), *options]) == status
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "which is not there: expected --base" in error()
    write_hf(tmp_path / "text only", {hf_name(n): t for n, t in random_weights().items()})
    assert "'model.visual." in error(f"--base={tmp_path / 'text only'}", "--architecture=image_text_to_text", status=1)
    for path in (tmp_path / "moved").glob("*.safetensors"):
        weights = {key: t for key, t in load_file(path).items() if not key.startswith("model.visual.blocks")}
        save_file(weights, path)
    assert ".safetensors lacks 'model.visual.blocks" in error(f"--base={tmp_path / 'moved'}")
    index = tmp_path / "moved/model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {k: f for k, f in weight_map.items() if "visual.blocks" not in k}}))
    assert "the vision tower: 'model.visual.blocks" in error(f"--base={tmp_path / 'moved'}", status=1)


def test_verify_finds_a_changed_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {f"model.{name}": tensor for name, tensor in random_weights().items()}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    add_assets(tmp_path / "dcp")
    plan = export.export_to_hf(tmp_path / "dcp", tmp_path / "out")
    export.verify(tmp_path / "out", plan)
    path = tmp_path / "out/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="differs from the checkpoint's"):
        export.verify(tmp_path / "out", plan)


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {f"model.{name}": tensor for name, tensor in random_weights().items()}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    add_assets(tmp_path / "dcp")

    def interrupted(*_):
        yield 1
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "write_file", interrupted)
    assert status_of(to_hf.main, [str(tmp_path / "dcp"), str(tmp_path / "out")]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["dcp"]


def test_a_base_that_is_none_is_a_mistake_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for base in (tmp_path, tmp_path / "missing"):
        assert status_of(to_hf.main, [str(tmp_path), str(tmp_path / "out"), f"--base={base}"]) == 2
        assert f"--base {base} has no config.json" in capsys.readouterr().err
