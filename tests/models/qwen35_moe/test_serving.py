"""docs/serving.md against what an export lists: every key and tensor that a serving program reads is there."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoint.convert_from_hf import main as convert_from_hf
from checkpoint.export import Options, Plan, make_plan
from models.qwen35_moe.config import FULL, LINEAR
from models.qwen35_moe.hf_weights import PREFIXES, hf_name, mtp_shapes
from models.qwen35_moe.parameters import parameters
from tests.checkpoint.test_convert_to_hf import CONFIG, TOKENIZER, random_weights
from tests.models.qwen35_moe.test_config import nested, reference

PAGE = Path(__file__).resolve().parents[3] / "docs/serving.md"
KEYS, TENSORS = PAGE.read_text(encoding="utf-8").split("## Keys of config.json")[1].split("## Tensors")
FULL_ONLY, LINEAR_ONLY = "self_attn.", "linear_attn."


def rows(section: str) -> dict[str, list[str]]:
    """A table's rows: what stands in backticks first, and all cells."""
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return {re.match(r"\| `([^`]+)`", line)[1]: [c.strip() for c in line.strip("|").split("|")] for line in lines}


def write_source(folder: Path, architecture: str) -> None:
    """A Hugging Face directory of a tiny model with MTP, and with a vision tower if the class has one."""
    folder.mkdir()
    text = CONFIG.to_dict()
    config = text if architecture == "causal_lm" else nested(text)
    if "vision_config" in config:
        config["vision_config"]["model_type"] = "qwen3_5_moe"  # as published; transformers changes it in place
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TOKENIZER / name).read_bytes())
    weights = {hf_name(name, architecture): tensor for name, tensor in random_weights().items()}
    weights |= {name: torch.zeros(shape) for name, shape in mtp_shapes(CONFIG, 1).items()}
    if architecture == "image_text_to_text":
        tower = reference(config).state_dict()
        weights |= {name: tensor.contiguous() for name, tensor in tower.items() if "visual" in name}
    save_file(weights, folder / "model.safetensors")


@pytest.fixture(scope="module", params=PREFIXES)
def plan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp(request.param)
    write_source(folder / "hf", request.param)
    convert_from_hf([str(folder / "hf"), str(folder / "dcp")])
    return make_plan(folder / "dcp", Options(architecture=request.param, base=folder / "hf"))


def test_every_key_of_the_table_is_in_an_exports_config(plan: Plan) -> None:
    config: dict[str, Any] = plan.config
    text = config.get("text_config", config)
    table = rows(KEYS)
    assert len(table) > 30
    for key, cells in table.items():
        if "(image-text)" in cells[0]:
            if "text_config" not in config:
                continue
            level = config
        else:
            level = config if key == "architectures" else text
        for part in key.split("."):
            assert part in level, key
            assert level[part] is not None, key
            level = level[part]


def test_the_tables_tensors_are_exactly_an_exports(plan: Plan) -> None:
    architecture = "image_text_to_text" if "text_config" in plan.config else "causal_lm"
    expected = set()
    for name in rows(TENSORS):
        if "layers.N." not in name:
            expected.add(hf_name(name, architecture))
        for layer, kind in enumerate(CONFIG.layer_types if "layers.N." in name else ()):
            if (FULL_ONLY in name and kind != FULL) or (LINEAR_ONLY in name and kind != LINEAR):
                continue
            expected.add(hf_name(name.replace("N", str(layer), 1), architecture))
    listed = {export.key for export in plan.tensors}
    assert {key for key in listed if not key.startswith(("mtp.", "model.visual."))} == expected
    assert len(expected) == len(parameters(CONFIG))


def test_the_tensors_of_mtp_and_vision_are_those_that_the_page_tells(plan: Plan) -> None:
    listed = {export.key for export in plan.tensors}
    fixed = set(re.findall(r"`(mtp\.[a-z_.]+weight)`", TENSORS))
    block = {
        name.replace("layers.N", "mtp.layers.0")
        for name in rows(TENSORS)
        if "layers.N" in name and "linear" not in name
    }
    assert {key for key in listed if key.startswith("mtp.")} == fixed | block
    assert any(key.startswith("model.visual.") for key in listed) == ("text_config" in plan.config)


def test_the_vision_config_comes_out_as_it_went_in(plan: Plan) -> None:
    if "vision_config" in plan.config:
        assert plan.config["vision_config"]["model_type"] == "qwen3_5_moe"


def test_the_page_names_no_key_twice() -> None:
    for section in (KEYS, TENSORS):
        assert len(rows(section)) == sum(line.startswith("| `") for line in section.splitlines())
