"""From Hugging Face to a checkpoint: what it holds, its dtypes, what is left out; and nothing after an interruption."""

import json
from pathlib import Path

import pytest
import torch

from checkpoint import convert_from_hf as from_hf
from checkpoint.directories import find_damage
from checkpoint.tensors.dcp import read_dcp
from models.qwen35_moe.hf_weights import MTP, VISION, hf_name
from models.qwen35_moe.vision_config import TOKEN_IDS
from tests.checkpoint.test_convert_to_hf import (
    assert_same,
    convert,
    per_expert,
    published,
    random_weights,
    write_hf,
)
from tests.commands import status_of


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "keep"])
@pytest.mark.parametrize("stacked", [True, False])
def test_what_a_checkpoint_holds(tmp_path: Path, dtype: str, stacked: bool, capsys: pytest.CaptureFixture) -> None:
    native = random_weights(torch.float16)
    weights = {hf_name(name): tensor for name, tensor in native.items()}
    weights = weights if stacked else per_expert(weights)
    write_hf(tmp_path / "hf", weights | {"mtp.norm.weight": torch.zeros(48)}, num_files=2)
    assert status_of(from_hf.main, [str(tmp_path / "hf"), str(tmp_path / "out"), f"--dtype={dtype}"]) == 0
    assert "1 tensors are no part of the model and were left out: mtp.norm.weight" in capsys.readouterr().out
    assert find_damage(tmp_path / "out") is None
    stored = read_dcp(tmp_path / "out")
    assert stored.keys() == {f"model.{name}" for name in native}
    for name, tensor in native.items():
        kept = {"float32": torch.float32, "bfloat16": torch.bfloat16, "keep": torch.float16}[dtype]
        if dtype != "keep" and name.endswith(("A_log", "dt_bias", "mlp.gate.weight")):
            kept = torch.float32
        assert stored[f"model.{name}"].dtype == kept, name
        assert torch.equal(stored[f"model.{name}"].read(), tensor.to(kept)), name


def test_the_tower_comes_and_goes_if_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config, tensors = published(True, True, True)
    config |= dict(zip(TOKEN_IDS, range(4)))
    tower = {key: tensor for key, tensor in tensors.items() if key.startswith(VISION)}
    no_tower = {key: tensor for key, tensor in tensors.items() if key not in tower}
    for name, weights in {"hf": tensors, "none": no_tower}.items():
        write_hf(tmp_path / name, weights)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    assert status_of(from_hf.main, [str(tmp_path / "hf"), str(tmp_path / "out"), "--dtype=keep", "--vision"]) == 0
    num_mtp = sum(key.startswith(MTP) for key in tensors)
    assert f"{num_mtp} tensors are no part of the model and were left out: mtp." in capsys.readouterr().out
    stored = read_dcp(tmp_path / "out")
    for key, tensor in tower.items():
        assert torch.equal(stored[key].read(), tensor), key
    (tmp_path / "hf").rename(tmp_path / "moved")  # from here on the tower is the checkpoint's
    back = convert(tmp_path / "out", tmp_path / "back", "--dtype=keep")
    assert_same({key: tensor for key, tensor in back.items() if key.startswith(VISION)}, tower)

    assert status_of(from_hf.main, [str(tmp_path / "none"), str(tmp_path / "refused"), "--vision"]) == 1
    said = capsys.readouterr().err
    assert "there is no vision tower: expected weights with one, or model.vision = 'off'" in said
    assert not (tmp_path / "refused").exists()


def test_an_interrupted_import_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(tmp_path / "hf", {hf_name(n): t for n, t in random_weights().items()})

    def interrupted(folder: Path, *_: object) -> None:
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(from_hf, "_write_dcp", interrupted)
    assert status_of(from_hf.main, [str(tmp_path / "hf"), str(tmp_path / "dcp")]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
