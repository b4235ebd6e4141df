"""Adapters in checkpoints, on any layout and on their base alone; their exports, loaded by peft, and merged."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe

from checkpoint import convert_to_hf as to_hf
from checkpoint.adapters import RECORD
from checkpoint.checkpointer import Checkpointer
from checkpoint.hf_reader import load_hf_weights
from checkpoint.tensors.dcp import read_dcp
from config.options import Checkpoint, Lora, Model
from errors import UserError
from models.qwen35_moe.hf_weights import hf_name
from models.qwen35_moe.lora import add_adapters, is_adapter
from models.qwen35_moe.parts import ADAPTABLE
from parallelisms.parallelize import local_region
from tests.checkpoint.test_checkpointer import run_config
from tests.checkpoint.test_convert_to_hf import CONFIG, load_hf, per_expert, write_hf
from tests.checkpoint.test_export import IMAGE_TEXT
from tests.commands import status_of
from tests.distributed import run_ranks
from tests.models.qwen35_moe.shapes import random_model, random_stream, run_model
from tests.models.qwen35_moe.test_parity import error
from tests.parallelisms.layouts import Layout, build, full

LORA = Lora(rank=8, alpha=12.0, targets=ADAPTABLE)
LAYOUTS = [Layout(), Layout(world=2), Layout(world=2, ep=2), Layout(world=2, replicate=2)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "base"
    weights = {hf_name(name): value.bfloat16() for name, value in random_model(CONFIG).state_dict().items()}
    write_hf(folder, weights, num_files=2)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run's folder, and the adapters and their state that it saved."""
    folder = tmp_path_factory.mktemp("run")
    return folder, run_ranks(save, 2, str(folder), str(base), Layout(world=2, ep=2))[0]


def start(folder: str, base: str, layout: Layout, lora: Lora = LORA, **checkpoint: str):
    model, meshes, optimizer = build(CONFIG, layout, lora=lora)
    config = dataclasses.replace(
        run_config(folder), model=Model(path=base, initial_load="hf"), lora=lora, checkpoint=Checkpoint(**checkpoint)
    )
    return model, optimizer, Checkpointer(config, CONFIG, model, optimizer, meshes)


def contents(model: torch.nn.Module, optimizer) -> dict[str, torch.Tensor]:
    state = {name: full(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad}
    return state | {f"state of {name}": full(tensor) for name, tensor in optimizer.named_state().items()}


def save(folder: str, base: str, layout: Layout, lora: Lora = LORA) -> dict[str, torch.Tensor]:
    model, optimizer, checkpointer = start(folder, base, layout, lora)
    assert checkpointer.resume() is None
    load_hf_weights(model, Path(base), 0, local_region)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = parameter.detach().sin()
    optimizer.step()
    checkpointer.save(3, 300, torch.zeros(4 // dist.get_world_size(), 2, dtype=torch.int64))
    assert checkpointer.wait()
    return contents(model, optimizer)


def resume(folder: str, base: str, layout: Layout, lora: Lora = LORA, options: dict[str, str] | None = None):
    """What was loaded, or what was said."""
    model, optimizer, checkpointer = start(folder, base, layout, lora, **(options or {}))
    try:
        progress = checkpointer.resume()
    except UserError as error:
        return str(error)
    return contents(model, optimizer), progress.step


def test_a_checkpoint_holds_adapters_alone_and_any_layout_resumes(saved: tuple[Path, dict], base: Path) -> None:
    folder, expected = saved
    assert all(is_adapter(name) for name in expected)
    step = folder / "checkpoints/step-00000003"
    assert {n for n in read_dcp(step) if n.startswith("model.")} == {
        f"model.{name}" for name in expected if not name.startswith("state of")
    }
    for layout in LAYOUTS:
        for state, number in run_ranks(resume, layout.world, str(folder), str(base), layout):
            assert number == 3
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[name], tensor) for name, tensor in expected.items()), layout


def test_adapters_start_another_run(saved: tuple[Path, dict], base: Path, tmp_path: Path) -> None:
    options = {"start_from": str(saved[0])}
    ((state, number),) = run_ranks(resume, 1, str(tmp_path), str(base), Layout(), LORA, options)
    assert number == 0
    assert all(torch.equal(state[name], tensor) for name, tensor in saved[1].items() if not name.startswith("state of"))
    assert not any(tensor.any() for name, tensor in state.items() if name.startswith("state of"))


def flip_a_byte(base: Path) -> None:
    path = max(base.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def as_one_file(base: Path) -> None:
    weights = load_hf(base)
    shutil.rmtree(base)
    write_hf(base, weights)


CHANGES: dict[str, tuple[Callable[[Path], None], Lora, str]] = {
    "one byte": (flip_a_byte, LORA, "model-00001.safetensors has changed: expected the files that were in "),
    "other files": (as_one_file, LORA, "is not the model that the adapters were trained on: model-00000.safetensors"),
    "alpha": (lambda _: None, dataclasses.replace(LORA, alpha=16.0), "lora.alpha = 16.0: checkpoint "),
    "rank": (lambda _: None, dataclasses.replace(LORA, rank=16), "lora.rank = 16: checkpoint "),
    "targets": (lambda _: None, dataclasses.replace(LORA, targets=("head",)), "lora.targets = ('head',): checkpoint "),
    "none": (lambda _: None, Lora(), "lora.rank = 0: checkpoint "),
    "moved": (lambda _: None, LORA, ""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_base_and_other_adapters_are_refused(
    saved: tuple[Path, dict], base: Path, tmp_path: Path, change: str
) -> None:
    shutil.copytree(base, tmp_path / "base")
    act, lora, message = CHANGES[change]
    act(tmp_path / "base")
    (found,) = run_ranks(resume, 1, str(saved[0]), str(tmp_path / "base"), Layout(), lora)
    if not message:
        assert found[1] == 3
        return
    assert message in found
    assert "\n" not in found


def test_whole_weights_are_not_taken_for_adapters(base: Path, tmp_path: Path) -> None:
    run_ranks(save, 1, str(tmp_path), str(base), Layout(), Lora())
    (found,) = run_ranks(resume, 1, str(tmp_path), str(base), Layout())
    assert found.startswith("lora.rank = 8: checkpoint ")
    assert "holds whole weights: expected 0, or their export" in found
    assert status_of(to_hf.main, [str(tmp_path), str(tmp_path / "out"), "--merge"]) == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("rank", value) for value in (0, "8", True, 10**30)),
        *(("alpha", value) for value in ("x", float("nan"), -1)),
        *(("targets", value) for value in (["norms"], 3, [], [[]])),
        *(("base", value) for value in (5, "x" * 5000)),
        *(("files", value) for value in (7, {"a": 1})),
    ],
)
def test_a_record_that_is_wrong_is_refused_with_its_name(
    saved: tuple[Path, dict], tmp_path: Path, key: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    step = tmp_path / "step"
    shutil.copytree(saved[0] / "checkpoints/step-00000003", step)
    path = step / "hf" / RECORD
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert status_of(to_hf.main, [str(step), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(path) in said
    assert not (tmp_path / "out").exists()


def with_saved(state: dict[str, torch.Tensor], lora: Lora = LORA):
    """Our model with the saved adapters on the base's weights, in float32."""
    model = random_model(CONFIG).bfloat16().float()
    add_adapters(model, lora.rank, lora.alpha, lora.targets)
    model.load_state_dict({name: tensor for name, tensor in state.items() if is_adapter(name)}, strict=False)
    return model


def test_peft_loads_the_export_and_computes_the_same(
    saved: tuple[Path, dict], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its step-by-step rule, for the reason given in test_parity.py.
    step_by_step = modeling_qwen3_5_moe.torch_recurrent_gated_delta_rule
    monkeypatch.setattr(modeling_qwen3_5_moe, "torch_chunk_gated_delta_rule", step_by_step)
    folder, state = saved
    assert status_of(to_hf.main, [str(folder), str(tmp_path / "out"), "--verify"]) == 0
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert config["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "out")
    written = load_file(tmp_path / "out/adapter_model.safetensors")
    loaded = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    assert loaded.keys() == written.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in written.items())

    stream = random_stream(CONFIG, [40])
    own = with_saved(state)
    with torch.no_grad():
        logits, _ = run_model(own, *stream[:3])
        expected = wrapped(input_ids=stream.tokens[None]).logits[0]
        of_base, _ = run_model(random_model(CONFIG).bfloat16().float(), *stream[:3])
    assert error(logits, of_base) > 1e-2  # the adapters do something
    print(f"logits within {error(logits, expected):.1e} of peft's")
    assert error(logits, expected) < 1e-5

    # Weight by weight, so that no transposed product can hide.
    assert status_of(to_hf.main, [str(folder), str(tmp_path / "merged"), "--merge", "--dtype", "float32"]) == 0
    merged, of_peft = load_hf(tmp_path / "merged"), wrapped.merge_and_unload().state_dict()
    for key, tensor in merged.items():
        assert torch.allclose(tensor.float(), of_peft[key], rtol=0, atol=1e-6), key


def test_keys_of_an_image_text_model_are_those_of_its_class(saved: tuple[Path, dict], tmp_path: Path) -> None:
    step = tmp_path / "step"
    shutil.copytree(saved[0] / "checkpoints/step-00000003", step)
    for name in ("manifest.json", "config.toml", "hf/base.json"):  # as if no run had written it
        (step / name).unlink()
    config = IMAGE_TEXT | {"text_config": CONFIG.to_dict()}
    (step / "hf/config.json").write_text(json.dumps(config))
    assert status_of(to_hf.main, [str(step), str(tmp_path / "out")]) == 0
    written = load_file(tmp_path / "out/adapter_model.safetensors")
    model = Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeConfig(**config))
    loaded = peft.get_peft_model_state_dict(
        peft.PeftModel.from_pretrained(model, tmp_path / "out"), save_embedding_layers=False
    )
    assert loaded.keys() == written.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in written.items())
    assert status_of(to_hf.main, [str(step), str(tmp_path / "causal"), "--architecture", "causal_lm"]) == 0
    keys = set(load_file(tmp_path / "causal/adapter_model.safetensors"))
    assert keys == {key.replace("language_model.", "") for key in written}


@pytest.mark.parametrize("experts", ["stacked", "per_expert"])
def test_merged_weights_are_rounded_once_and_all_others_the_bases(base: Path, tmp_path: Path, experts: str) -> None:
    weights = load_hf(base)
    if experts == "per_expert":
        weights = per_expert(weights)
    write_hf(tmp_path / "base", weights)
    lora = dataclasses.replace(LORA, targets=("attention", "experts"))
    (state,) = run_ranks(save, 1, str(tmp_path / "run"), str(tmp_path / "base"), Layout(), lora)
    assert status_of(to_hf.main, [str(tmp_path / "run"), str(tmp_path / "out"), "--merge", "--verify"]) == 0
    merged = load_hf(tmp_path / "out")
    assert merged.keys() == weights.keys()
    exact = {hf_name(n): p.detach().double() for n, p in random_model(CONFIG).bfloat16().named_parameters()}
    changed = {}
    for name, a in state.items():
        if not name.startswith("state of") and "lora_A" in name:
            key = hf_name(name.replace("_lora_A", "").replace(".lora_A", ""))
            b = state[name.replace("lora_A", "lora_B")]
            changed[key] = exact[key] + lora.alpha / lora.rank * b.double() @ a.double()
    changed = per_expert(changed) if experts == "per_expert" else changed
    assert changed.keys() < merged.keys()
    for key, tensor in merged.items():
        assert tensor.dtype == torch.bfloat16
        if key in changed:
            # Half a bfloat16 step of the exact sum, and what float32 sums may be off.
            half_step = torch.ldexp(torch.tensor(2.0**-9), changed[key].frexp().exponent).double()
            off = (tensor.double() - changed[key]).abs() - half_step
            assert off.max() < 1e-7, key
            assert not torch.equal(tensor, weights[key]), key
        else:
            assert torch.equal(tensor, weights[key]), key


def test_the_base_is_looked_at_before_a_merge(
    saved: tuple[Path, dict], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(base, tmp_path / "base")
    arguments = [str(saved[0]), str(tmp_path / "out"), "--merge", "--base", str(tmp_path / "base")]
    flip_a_byte(tmp_path / "base")
    assert status_of(to_hf.main, arguments) == 2
    assert "model-00001.safetensors has changed" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "base")
    shutil.copytree(base, tmp_path / "base")
    assert status_of(to_hf.main, arguments) == 0
