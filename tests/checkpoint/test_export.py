"""What an export consists of: a table of checkpoint, base and --architecture against class, vision tower and MTP."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

from checkpoint import export
from checkpoint.convert_from_hf import convert_from_hf
from checkpoint.export import Options, _vision_shapes, make_plan
from checkpoint.tensors.safetensors import read_safetensors
from errors import UserError
from models.qwen35_moe.hf_weights import MTP, VISION, hf_name, mtp_shapes
from models.qwen35_moe.parameters import parameters
from tests.checkpoint.test_convert_to_hf import CONFIG, VISION_CONFIG

TEXT = CONFIG.to_dict() | {"mtp_num_hidden_layers": 1}
IMAGE_TEXT = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "model_type": "qwen3_5_moe",
    "text_config": TEXT,
    "vision_config": VISION_CONFIG,
    "tie_word_embeddings": False,
}
CAUSAL, IMAGE = "causal_lm", "image_text_to_text"

# Parts beside the text: v a vision_config, T the tower itself, m MTP. The base: named by --base ("given"), recorded in
# the checkpoint, recorded but not there any more, or none.
TABLE = [
    # checkpoint  base               asked for  class   tower         MTP
    ("", "none", "", None, CAUSAL, None, None),
    ("", "none", "", CAUSAL, CAUSAL, None, None),
    ("", "none", "", IMAGE, "no vision_config", None, None),
    ("m", "none", "", None, CAUSAL, None, "checkpoint"),
    ("vT", "none", "", None, IMAGE, "checkpoint", None),
    ("vTm", "none", "", None, IMAGE, "checkpoint", "checkpoint"),
    ("vTm", "none", "", CAUSAL, CAUSAL, None, "checkpoint"),
    ("v", "none", "", None, CAUSAL, None, None),
    ("v", "none", "", IMAGE, "tower: 'model.visual.", None, None),
    ("", "given", "", None, CAUSAL, None, None),
    ("", "given", "m", None, CAUSAL, None, "base"),
    ("m", "given", "m", None, CAUSAL, None, "checkpoint"),
    ("", "given", "vTm", None, IMAGE, "base", "base"),
    ("", "given", "vTm", CAUSAL, CAUSAL, None, "base"),
    ("", "given", "vT", IMAGE, IMAGE, "base", None),
    ("", "given", "v", None, "tower: 'model.visual.", None, None),
    ("", "given", "m", IMAGE, "no vision_config", None, None),
    ("vT", "given", "vTm", None, IMAGE, "checkpoint", "base"),
    ("vTm", "given", "vTm", None, IMAGE, "checkpoint", "checkpoint"),
    ("v", "recorded", "vTm", None, IMAGE, "base", "base"),
    ("v", "recorded", "vTm", CAUSAL, CAUSAL, None, "base"),
    ("", "recorded", "m", None, CAUSAL, None, "base"),
    ("", "recorded", "vm", None, CAUSAL, None, "base"),
    ("v", "recorded", "v", None, CAUSAL, None, None),
    ("v", "recorded", "v", IMAGE, "tower: 'model.visual.", None, None),
    ("vT", "recorded", "v", None, IMAGE, "checkpoint", None),
    ("v", "gone", "vTm", None, "which is not there", None, None),
    ("v", "gone", "vTm", CAUSAL, CAUSAL, None, None),
    ("", "gone", "m", None, CAUSAL, None, None),
    ("vT", "gone", "vTm", None, IMAGE, "checkpoint", None),
]


def tensors(parts: str, value: float) -> dict[str, torch.Tensor]:
    """By their Hugging Face names, each filled with `value`."""
    shapes = {hf_name(n, IMAGE if "v" in parts else CAUSAL): p.shape for n, p in parameters(CONFIG).items()}
    shapes |= _vision_shapes(IMAGE_TEXT) if "T" in parts else {}
    shapes |= mtp_shapes(CONFIG, 1) if "m" in parts else {}
    return {key: torch.full(shape, value) for key, shape in shapes.items()}


def write(folder: Path, parts: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(IMAGE_TEXT if "v" in parts else TEXT))
    return folder


@pytest.mark.parametrize(("checkpoint", "kind", "base", "asked", "expected", "tower", "mtp"), TABLE)
def test_class_tower_and_mtp(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: str,
    kind: str,
    base: str,
    asked: str | None,
    expected: str,
    tower: str | None,
    mtp: str | None,
) -> None:
    ranks = write(tmp_path / "ranks", checkpoint)
    torch.save(tensors(checkpoint, 1.0), ranks / "model_world_size_1_rank_0.pt")
    if kind in ("given", "recorded"):
        save_file(tensors(base, 2.0), write(tmp_path / "base", base) / "model.safetensors")
    if kind in ("recorded", "gone"):  # as a run's checkpoint does in hf/base.json
        opened = export._open_checkpoint
        monkeypatch.setattr(export, "_open_checkpoint", lambda path: (*opened(path)[:3], tmp_path / "base"))
    config = json.loads((ranks / "config.json").read_text())
    config.get("text_config", config)["eos_token_id"] = [3, 5]  # as after training on chats
    (ranks / "config.json").write_text(json.dumps(config))
    options = Options(asked, base=tmp_path / "base" if kind == "given" else None)
    if expected not in (CAUSAL, IMAGE):
        with pytest.raises(UserError, match=expected):
            make_plan(ranks, options)
        return
    plan = make_plan(ranks, options)
    is_image = expected == IMAGE
    assert plan.config["architectures"] == [f"Qwen3_5MoeFor{'ConditionalGeneration' if is_image else 'CausalLM'}"]
    assert ("vision_config" in plan.config) == is_image
    assert plan.config.get("text_config", plan.config).get("mtp_num_hidden_layers") == (1 if mtp else 0)
    assert plan.config.get("text_config", plan.config)["eos_token_id"] == [3, 5]
    sources = {1.0: "checkpoint", 2.0: "base"}
    for prefix, source in ((VISION, tower), (MTP, mtp)):
        of_part = [e for e in plan.tensors if e.key.startswith(prefix)]
        assert {sources[e.stored.read().flatten()[0].item()] for e in of_part} == ({source} if source else set())
    text = {e.key for e in plan.tensors if not e.key.startswith((VISION, MTP))}
    assert text == {hf_name(name, expected) for name in parameters(CONFIG)}
    assert all(e.stored.read().flatten()[0] == 1 for e in plan.tensors if e.key in text)


@pytest.mark.parametrize(
    ("changed", "refused"), [(VISION, {IMAGE}), (MTP, {CAUSAL, IMAGE}), ("model.language_model.", set())]
)
@pytest.mark.parametrize("files", ["one byte", "no tensors"])
def test_what_was_left_in_the_base_is_what_it_was(tmp_path: Path, changed: str, refused: set[str], files: str) -> None:
    weights = tensors("vTm", 2.0)
    base = write(tmp_path / "base", "vTm")
    save_file(weights, base / "model.safetensors")
    convert_from_hf(base, tmp_path / "step", None)
    for architecture in (CAUSAL, IMAGE):
        make_plan(tmp_path / "step", Options(architecture))
    key = max(key for key in weights if key.startswith(changed))
    if files == "one byte":
        weights[key].view(-1)[-1] = 3
    else:
        del weights[key]
    save_file(weights, base / "model.safetensors")
    for architecture in (CAUSAL, IMAGE):
        if architecture in refused:
            message = rf"base: {changed}\* is not what it was when the model came from there: expected --base"
            with pytest.raises(UserError, match=message):
                make_plan(tmp_path / "step", Options(architecture))
        else:
            make_plan(tmp_path / "step", Options(architecture))
        if files == "one byte":
            make_plan(tmp_path / "step", Options(architecture, base=base))


@pytest.mark.parametrize("experts", ["stacked", "per_expert", "keep"])
@pytest.mark.parametrize("parts", ["", "m", "vT", "vTm"])
def test_both_auto_classes_load_experts_in_either_layout(tmp_path: Path, parts: str, experts: str) -> None:
    ranks = write(tmp_path / "ranks", parts)
    torch.save(tensors(parts, 0.5), ranks / "model_world_size_1_rank_0.pt")
    config = json.loads((ranks / "config.json").read_text())
    config.get("text_config", config)["eos_token_id"] = [3, 5]
    (ranks / "config.json").write_text(json.dumps(config))
    for architecture in (CAUSAL, IMAGE) if "v" in parts else (CAUSAL,):
        out = tmp_path / architecture
        export.export_to_hf(ranks, out, Options(architecture, None, experts))
        keys = read_safetensors(out).keys()
        assert any(".experts.0." in key for key in keys) == (experts == "per_expert")
        assert any(key.startswith(MTP) for key in keys) == ("m" in parts)
        auto = transformers.AutoModelForCausalLM if architecture == CAUSAL else AutoModelForImageTextToText
        model, loading = auto.from_pretrained(out, output_loading_info=True)
        assert not any(loading.values()), loading
        assert type(model).__name__ == json.loads((out / "config.json").read_text())["architectures"][0]
        assert (model.state_dict()["lm_head.weight"] == 0.5).all()
        assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [3, 5]}
        assert model.generation_config.eos_token_id == [3, 5]
