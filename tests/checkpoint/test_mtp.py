"""Multi-token prediction in and out: loaded from either layout of experts, exported as the base has it, or refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoint import convert_from_hf as from_hf
from checkpoint.hf_reader import load_hf_weights
from errors import UserError
from models.ops.kernels import Kernels
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.hf_weights import MTP, find_pieces, hf_name
from models.qwen35_moe.init import whole
from models.qwen35_moe.model import Qwen35Moe
from tests.checkpoint.test_convert_to_hf import CONFIG, assert_same, convert, published, write_hf, write_published
from tests.commands import status_of
from tests.models.qwen35_moe.shapes import initial_weights

WITH_MTP = replace(CONFIG, mtp_num_hidden_layers=1)
LAYOUTS = pytest.mark.parametrize("per_expert", [False, True], ids=["stacked", "per expert"])


def build(config: ModelConfig) -> Qwen35Moe:
    return Qwen35Moe(config, Kernels(attention="sdpa"))


@LAYOUTS
@pytest.mark.parametrize("vision", [False, True], ids=["causal_lm", "image_text_to_text"])
def test_loads_either_layout_of_experts(tmp_path: Path, per_expert: bool, vision: bool) -> None:
    write_published(tmp_path / "hf", False, per_expert, vision)
    model = build(ModelConfig.from_pretrained(tmp_path / "hf", with_mtp=True))
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    load_hf_weights(model, tmp_path / "hf", 0, whole)
    _, expected = published(False, False, vision)  # the same numbers, stacked
    found = {name: parameter for name, parameter in model.named_parameters() if name.startswith(MTP)}
    assert found.keys() == {key for key in expected if key.startswith(MTP)}
    for name, parameter in found.items():
        assert torch.equal(parameter, expected[name].float()), name
    assert not any(parameter.isnan().any() for parameter in model.parameters())


@LAYOUTS
@pytest.mark.parametrize("dtype", ["keep", "float32"])
def test_there_and_back_is_the_identity(tmp_path: Path, per_expert: bool, dtype: str) -> None:
    """As of a run that trains it, and whose checkpoint so has it: bfloat16 in, through float32, bfloat16 out."""
    tensors = write_published(tmp_path / "hf", not per_expert, per_expert, False)
    options = [f"--dtype={dtype}", "--mtp"]
    assert status_of(from_hf.main, [str(tmp_path / "hf"), str(tmp_path / "dcp"), *options]) == 0
    asked = ["--dtype=keep"] if dtype == "keep" else []
    assert_same(convert(tmp_path / "dcp", tmp_path / "out", *asked), tensors)
    assert json.loads((tmp_path / "out/config.json").read_text())["mtp_num_hidden_layers"] == 1


@LAYOUTS
def test_what_was_trained_is_exported_and_not_the_base(tmp_path: Path, per_expert: bool) -> None:
    write_published(tmp_path / "hf", False, False, False)
    assert status_of(from_hf.main, [str(tmp_path / "hf"), str(tmp_path / "dcp"), "--mtp"]) == 0
    base = {key: torch.zeros_like(tensor) for key, tensor in published(False, per_expert, False)[1].items()}
    config = (tmp_path / "hf/config.json").read_text()
    write_hf(tmp_path / "zeros", base)
    (tmp_path / "zeros/config.json").write_text(config)
    out = convert(tmp_path / "dcp", tmp_path / "out", f"--base={tmp_path / 'zeros'}", "--dtype=float32")
    _, expected = published(False, per_expert, False)
    of_mtp = {key: tensor for key, tensor in out.items() if key.startswith(MTP)}
    assert_same(of_mtp, {key: tensor.float() for key, tensor in expected.items() if key.startswith(MTP)})


def test_what_is_refused(tmp_path: Path) -> None:
    _, tensors = published(False, False, False)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    none = {key: shape for key, shape in shapes.items() if not key.startswith(MTP)}
    assert find_pieces(CONFIG, shapes).keys() == find_pieces(CONFIG, none).keys()
    with pytest.raises(UserError, match=r"'mtp\.fc\.weight' is missing"):
        find_pieces(WITH_MTP, none)
    with pytest.raises(UserError, match=r"'mtp\.norm\.weight' is missing"):
        find_pieces(WITH_MTP, {key: shape for key, shape in shapes.items() if key != "mtp.norm.weight"})
    with pytest.raises(UserError, match=r"'mtp.layers.0.mlp.experts.0.down_proj.weight' \(and 0 more\) belong to no"):
        find_pieces(WITH_MTP, shapes | {"mtp.layers.0.mlp.experts.0.down_proj.weight": (1,)})  # both layouts
    with pytest.raises(UserError, match=r"'mtp.layers.1.input_layernorm.weight' \(and 0 more\) belong to no"):
        find_pieces(WITH_MTP, shapes | {"mtp.layers.1.input_layernorm.weight": (48,)})


def test_weights_without_any_of_it_begin_anew_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, tensors = published(False, False, False)
    write_hf(tmp_path / "hf", {key: tensor for key, tensor in tensors.items() if not key.startswith(MTP)})
    model, expected = build(WITH_MTP), initial_weights(WITH_MTP, 7)
    with caplog.at_level("WARNING"):
        load_hf_weights(model, tmp_path / "hf", 7, whole)
    assert f"{tmp_path / 'hf'} has no multi-token prediction: it begins with random weights" in caplog.text
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name] if name.startswith(MTP) else tensors[hf_name(name)].float()), name
    # A part of it is a mistake.
    write_hf(tmp_path / "part", {key: tensor for key, tensor in tensors.items() if key != "mtp.fc.weight"})
    with pytest.raises(UserError, match=r"'mtp\.fc\.weight' is missing"):
        load_hf_weights(model, tmp_path / "part", 7, whole)
    # A conversion has nothing to begin with.
    (tmp_path / "hf/config.json").write_text(json.dumps(CONFIG.to_dict()))
    assert status_of(from_hf.main, [str(tmp_path / "hf"), str(tmp_path / "dcp"), "--mtp"]) == 1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mtp_num_hidden_layers", 2, "mtp_num_hidden_layers = 2 cannot be trained: expected 1, or mtp.train = 'off'"),
        ("mtp_num_hidden_layers", True, "mtp_num_hidden_layers = True cannot be trained"),
        ("mtp_num_hidden_layers", [1], r"mtp_num_hidden_layers = \[1\] cannot be trained"),
        ("mtp_use_dedicated_embeddings", True, "mtp_use_dedicated_embeddings = True cannot be trained: expected False"),
    ],
)
def test_modules_that_are_computed_otherwise_are_refused_where_they_train(
    key: str, value: object, message: str
) -> None:
    config = CONFIG.to_dict() | {key: value}
    assert ModelConfig.from_dict(config) == CONFIG
    with pytest.raises(UserError, match=message):
        ModelConfig.from_dict(config, with_mtp=True)


@pytest.mark.parametrize("declared", [{}, {"mtp_num_hidden_layers": 0}, {"mtp_num_hidden_layers": 1}])
def test_a_new_module_is_one_layer_whatever_the_file_declares(declared: dict[str, int]) -> None:
    assert ModelConfig.from_dict(CONFIG.to_dict() | declared, with_mtp=True) == WITH_MTP
    assert ModelConfig.from_dict(WITH_MTP.to_dict()) == CONFIG
    assert WITH_MTP.to_dict() == CONFIG.to_dict() | {"mtp_num_hidden_layers": 1}
