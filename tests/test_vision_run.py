"""Runs with images, from their options on: what they write, how transformers reads it, and starts from it."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from checkpoint.export import Options, export_to_hf
from checkpoint.hf_reader import load_hf_weights
from checkpoint.tensors.safetensors import read_safetensors
from config.options import Data
from data.batch import MicroBatch, Row
from data.images import PixelRules
from data.loader import Packer
from data.media import MediaSettings
from data.samples import open_samples
from data.tokenizer import load_tokenizer
from models.ops.kernels import Kernels
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.init import whole
from models.qwen35_moe.model import Qwen35Moe
from models.qwen35_moe.vision_config import VisionConfig
from tests.models.qwen35_moe.test_parity import error
from tests.test_train import ROOT, metrics, native_model, run

MODEL = ROOT / "data/tiny_vision/model"
TINY = ROOT / "train_configs/qwen35moe_vision_tiny.toml"
SHORT = ("--metrics.log_interval=1", "--validation.enable=false", "--checkpoint.export_hf=never")
RULES = PixelRules(min_pixels=1024, max_pixels=65536, video_max_pixels=65536)


def chats(folder: Path) -> Path:
    """Three conversations: with images, with a video of five pictures, and of text alone."""
    generator = np.random.default_rng(0)
    for number in range(5):
        pixels = generator.integers(0, 256, (64, 96, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    image = {"type": "image", "image": "0.png"}
    video = {"type": "video", "video": [f"{number}.png" for number in range(5)], "fps": 4}
    text = {"type": "text", "text": " What is it?"}
    asked = [[image, text, {**image, "image": "1.png"}], [text, video], [text]]
    path = folder / "chats.jsonl"
    answer = {"role": "assistant", "content": "A square."}
    lines = [{"messages": [{"role": "user", "content": content}, answer]} for content in asked]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read_row(path: Path, vision: VisionConfig) -> Row:
    """All samples of a file in one row."""
    data = Data(format="chat", path=(str(path),), tokenizer=str(MODEL), image_folder=str(path.parent), shuffle=False)
    settings = MediaSettings(vision, RULES)
    samples = open_samples(data, load_tokenizer(str(MODEL)), 512, 0, settings)
    packer = Packer(samples, data, 0, 1, epochs=1)
    row = packer.slot(packer.first_cursor(0)).next_row(512)
    assert row.notes == []
    return row


def logits_of_transformers(model: torch.nn.Module, row: Row, vision: VisionConfig) -> torch.Tensor:
    """Of each of the row's documents by itself, fillers left out."""
    logits, begin, pixels = [], 0, torch.from_numpy(row.pixels)
    pads = {vision.image_token_id: 1, vision.video_token_id: 2}
    for length in row.lengths[:-1]:
        tokens = torch.from_numpy(row.tokens[begin : begin + length]).long()
        types = torch.tensor([pads.get(token, 0) for token in tokens.tolist()])
        frames = [frame for frame in row.frames if begin <= frame.place < begin + length]
        num_patches = sum(height * width for _, height, width in frames)
        own, pixels = pixels.split([num_patches, len(pixels) - num_patches])
        extra = {}
        if frames:
            name, suffix = ("video", "_videos") if types.max() == 2 else ("image", "")
            grids = [(1, h, w) for _, h, w in frames] if name == "image" else [(len(frames), *frames[0][1:])]
            extra = {f"{name}_grid_thw": torch.tensor(grids), f"pixel_values{suffix}": own.float() / 127.5 - 1}
        logits.append(model(input_ids=tokens[None], mm_token_type_ids=types[None], **extra).logits[0])
        begin += length
    return torch.cat(logits)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps on four processes, tower and text from random weights."""
    out = tmp_path_factory.mktemp("trained") / "run"
    options = ("--training.steps=10", "--training.local_batch_size=2", "--parallelism.expert_parallel_degree=4")
    options += ("--data.num_workers=0",)
    run(TINY, out, *SHORT, *options, "--lr_scheduler.warmup_steps=3", ranks=4)
    return out


@torch.no_grad()
def test_transformers_computes_the_same_from_an_export(trained: Path, tmp_path: Path) -> None:
    lines = metrics(trained)
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
    export_to_hf(trained, tmp_path / "hf", Options(dtype=None, verify=True))
    assert {"preprocessor_config.json", "video_preprocessor_config.json", "chat_template.jinja"} <= {
        path.name for path in (tmp_path / "hf").iterdir()
    }
    hf, loading = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", output_loading_info=True, dtype="auto")
    assert not any(loading.values()), loading
    native = native_model(trained / "checkpoints/step-00000010", with_vision=True)
    vision = native.config.vision
    row = read_row(chats(tmp_path), vision)
    batch = MicroBatch.of([row], may_fill=True, vision=vision)
    expected = logits_of_transformers(hf, row, vision)
    actual, *_ = native(SimpleNamespace(**vars(batch) | {"labels": None}))
    assert [len({frame.height for frame in row.frames}), len(row.frames)] == [1, 5]  # two images, three pairs
    assert error(actual[: len(expected)], expected) < 1e-5

    # And back: what initial_load = "hf" reads is what was saved, all of it.
    shape = ModelConfig.from_pretrained(tmp_path / "hf", with_vision=True)
    again = Qwen35Moe(shape, Kernels())
    load_hf_weights(again, tmp_path / "hf", 0, whole)
    for name, parameter in native.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


def test_runs_go_on_from_an_image_text_model(trained: Path, tmp_path: Path) -> None:
    export_to_hf(trained, tmp_path / "hf")
    before = {key: tensor.read() for key, tensor in read_safetensors(tmp_path / "hf").items()}
    config = tmp_path / "run.toml"
    config.write_text(
        f"""[model]
path = "{tmp_path / "hf"}"
initial_load = "hf"
[data]
format = "chat"
path = ["{ROOT / "data/tiny_vision/train.parquet"}"]
num_workers = 0
[training]
steps = 2
sequence_length = 256
global_batch_size = 4
[optimizer]
lr = 1e-3
weight_decay = 0.0
[metrics]
log_interval = 1
"""
    )
    # The tower frozen: it goes out as it came in; the rest moves. Images are read by the model's processor, and that is
    # what goes out, whatever stands beside the tokenizer.
    tokenizer = shutil.copytree(MODEL, tmp_path / "tokenizer")
    (tokenizer / "processor_config.json").write_text('{"image_processor": {"max_pixels": 2048, "min_pixels": 1024}}')
    run(config, tmp_path / "frozen", "--model.freeze=vision,merger", f"--data.tokenizer={tokenizer}", ranks=2)
    export_to_hf(tmp_path / "frozen", tmp_path / "frozen-hf")
    pixels = json.loads((tmp_path / "frozen/checkpoints/step-00000002/run.json").read_text())["options"]
    assert pixels["pixels.max_pixels"] == 65536
    assert not (tmp_path / "frozen-hf/processor_config.json").exists()
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        assert (tmp_path / "frozen-hf" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    after = {key: tensor.read() for key, tensor in read_safetensors(tmp_path / "frozen-hf").items()}
    for key, tensor in before.items():
        is_tower = key.startswith("model.visual.")
        if is_tower or tensor.dim() > 1:  # a step of 1e-3 is less than bfloat16 can tell of some vectors
            assert torch.equal(tensor, after[key]) == is_tower, key
    # Text alone: the tower is no part of the model, and the export takes it from the base.
    text = f"--data.path={ROOT / 'data/tiny/chat/*.jsonl'}"
    run(config, tmp_path / "text", text, ranks=1)
    export_to_hf(tmp_path / "text", tmp_path / "text-hf")
    after = {key: tensor.read() for key, tensor in read_safetensors(tmp_path / "text-hf").items()}
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        if key.startswith("model.visual."):
            assert torch.equal(tensor, after[key]), key


def test_a_model_of_100_m_parameters_reloads(tmp_path: Path) -> None:
    """Four processes with experts spread over all, five steps with images, and transformers' class loads the result."""
    config = tmp_path / "100m.toml"
    config.write_text(
        f"""extends = "{ROOT / "train_configs/qwen35moe_100m.toml"}"
[model.config]
vocab_size = 4112
image_token_id = 4098
video_token_id = 4099
vision_start_token_id = 4096
vision_end_token_id = 4097
[model.config.vision_config]
depth = 4
hidden_size = 256
intermediate_size = 512
num_heads = 4
[data]
format = "chat"
path = ["{ROOT / "data/tiny_vision/train.parquet"}"]
tokenizer = "{MODEL}"
num_workers = 0
[training]
steps = 5
sequence_length = 128
local_batch_size = 1
global_batch_size = 4
[lr_scheduler]
warmup_steps = 2
[compile]
enable = false
[checkpoint]
interval = 100
[metrics]
log_interval = 1
"""
    )
    run(config, tmp_path / "run", "--parallelism.expert_parallel_degree=4", ranks=4)
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 6))
    assert lines[-1]["loss"] < lines[0]["loss"] - 2
    assert all(line["vision_tokens"] > 0 for line in lines)
    export_to_hf(tmp_path / "run", tmp_path / "hf")
    model, loading = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "hf", output_loading_info=True, dtype="auto"
    )
    assert not any(loading.values()), loading
    assert 95e6 < sum(parameter.numel() for parameter in model.parameters()) < 105e6
    for layer in model.model.language_model.layers:
        assert layer.mlp.experts.gate_up_proj.shape == (32, 2 * 192, 512)  # (E, 2I, H)
