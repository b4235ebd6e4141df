"""Whether the tower is part of the model, and what is refused before a run that shows images, with status 2."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from config.checks import main
from config.reading import ROOT, load_config, model_config
from data import tokenize
from tests.commands import status_of

TINY_VISION = ROOT / "data" / "tiny_vision" / "model"
IDS = {"vision_start_token_id": 4096, "vision_end_token_id": 4097, "image_token_id": 4098, "video_token_id": 4099}
TEXT = {
    "model_type": "qwen3_5_moe_text", "vocab_size": 4112, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "linear_num_key_heads": 1,
    "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
}  # fmt: skip
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
NESTED = {"model_type": "qwen3_5_moe", "text_config": TEXT, "vision_config": VISION, **IDS}
TOML = """
[job]
output_dir = "out"
[model]
path = "model"
[data]
format = "chat"
path = "chats.jsonl"
image_folder = "pictures"
[training]
steps = 10
sequence_length = 256
global_batch_size = 2
[optimizer]
lr = 1e-3
"""


@pytest.fixture(autouse=True)
def vision_folder(folder: Path) -> None:
    """vision.toml, model/, pictures/a.png, and chats.jsonl without images."""
    (folder / "vision.toml").write_text(TOML)
    shutil.copytree(TINY_VISION, "model")
    write_model(NESTED)
    Path("pictures").mkdir()
    Image.new("RGB", (64, 96), "red").save("pictures/a.png")
    write("chats.jsonl", chat("What?"))


def write_model(config: dict[str, Any]) -> None:
    Path("model/config.json").write_text(json.dumps(config))


def chat(content: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}], **fields}


SHOWN = chat([{"type": "image", "image": "a.png"}])
FORMS = {
    "parts": SHOWN,
    "tags": chat("<image>", images=["a.png"]),
    "a part without a type": chat([{"image": "a.png"}]),
    "an address": chat([{"type": "image_url", "image_url": {"url": "a.png"}}]),
}


def write(name: str, *records: dict[str, Any]) -> None:
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))


def has_tower(*options: str) -> bool:
    return model_config(load_config(["--config", "vision.toml", *options])).vision is not None


def line_of(capsys: pytest.CaptureFixture[str], *options: str, status: int = 2) -> str:
    """What the command that run_train.sh runs first says, in one line."""
    assert status_of(main, ["--world-size", "1", "--config", "vision.toml", *options]) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (status == 2), lines
    return lines[0] if lines else ""


def fine(capsys: pytest.CaptureFixture[str], *options: str) -> None:
    line_of(capsys, *options, status=0)


def test_auto_is_what_the_data_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert not has_tower()
    fine(capsys)
    for form in FORMS.values():
        write("chats.jsonl", *[chat("What?")] * 20, form)
        assert has_tower()
        fine(capsys)
        assert not has_tower("--model.vision=off")
    write("chats.jsonl", chat([{"type": "text", "text": "a", "image": None}], images=[]), chat("<image>"))
    assert not has_tower()
    write("chats.jsonl", chat([{"type": "video", "video": ["a.png", "a.png"]}]))
    assert has_tower()
    fine(capsys)


def test_auto_knows_each_form_and_kind_of_source(capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a"}]
    write("llava.jsonl", {"conversations": turns, "image": "a.png"})
    llava = ("--data.path=llava.jsonl", "--data.messages_key=conversations")
    assert has_tower(*llava)
    fine(capsys, *llava)
    parts = [{"from": "human", "value": [{"type": "image", "image": "a.png"}]}, turns[1]]
    write("llava.jsonl", {"conversations": parts})
    assert has_tower(*llava)
    fine(capsys, *llava)

    bytes_ = {"bytes": Path("pictures/a.png").read_bytes(), "path": None}
    kind = pyarrow.list_(pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]))
    for images, shows in (
        ([[bytes_], None], True),
        ([None, [bytes_]], True),
        ([None, None], False),
        ([[None], []], False),
    ):
        answers = [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]
        rows = [[{"role": "user", "content": [{"type": "text", "text": "?" if not own else "<image>"}]}, *answers]
                for own in images]  # fmt: skip
        written = pyarrow.table({"messages": pyarrow.array(rows), "images": pyarrow.array(images, kind)})
        pyarrow.parquet.write_table(written, "x.parquet")
        assert has_tower("--data.path=x.parquet") == shows
        fine(capsys, "--data.path=x.parquet")

    write("text.jsonl", {"text": "a"}, {"text": "<image>", "pictures": ["a.png"]})
    text = ("--data.format=text", "--data.path=text.jsonl", "--data.end_of_document=false")
    assert not has_tower(*text)
    unrelated = [option.replace("text.jsonl", "unrelated.jsonl") for option in text]
    write("unrelated.jsonl", {"text": "a", "image": "https://example.org/a.jpg", "images": 3})
    assert not has_tower(*unrelated)
    fine(capsys, *unrelated)
    assert "has both" in line_of(capsys, *unrelated, "--model.vision=on")
    assert has_tower(*text, "--data.images_key=pictures")
    fine(capsys, *text, "--data.images_key=pictures")


def test_auto_looks_into_each_file_of_an_entry(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mixed").mkdir()
    for number in range(150):
        write(f"mixed/{number:03}.jsonl", *[chat("What?")] * (300 if not number else 3))
    assert not has_tower("--data.path=mixed/*.jsonl")
    write("mixed/020.jsonl", *[chat("What?")] * 9, SHOWN)
    assert has_tower("--data.path=mixed/*.jsonl")
    fine(capsys, "--data.path=mixed/*.jsonl")
    write("mixed/020.jsonl", chat("What?"))
    for number in range(100, 150):
        write(f"mixed/{number:03}.jsonl", SHOWN)
    assert has_tower("--data.path=mixed/*.jsonl")


def test_auto_without_a_tower_or_with_names_of_the_hub(capsys: pytest.CaptureFixture[str]) -> None:
    """What is on the Hub is not asked for: it may have to be fetched."""
    write("chats.jsonl", SHOWN)
    write_model(TEXT)
    assert not has_tower()
    write_model(NESTED)
    assert not has_tower("--data.path=owner/name:part")
    assert has_tower("--data.path=owner/name:part", "--model.vision=on")
    assert has_tower("--data.path=owner/name:part,chats.jsonl")


def test_auto_looks_at_validation_too(capsys: pytest.CaptureFixture[str]) -> None:
    write("held_out.jsonl", SHOWN)
    validation = ("--validation.enable", "--validation.path=held_out.jsonl")
    assert has_tower(*validation)
    fine(capsys, *validation)
    assert not has_tower("--validation.path=held_out.jsonl")


def test_off_and_nothing_but_images_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    write("chats.jsonl", SHOWN, chat("What?"))
    fine(capsys, "--model.vision=off")  # the second is trained on, the first skipped
    write("chats.jsonl", SHOWN, SHOWN)
    for options in (["--model.vision=off"], ["--model.vision=auto"]):
        if options[0].endswith("auto"):
            write_model(TEXT)
        line = line_of(capsys, *options)
        assert "line 1: has 1 images and videos, but the model is built without its vision tower" in line
        assert "model.vision = 'on'" in line
        assert line.endswith("(and none of the first 2 samples can be used)")


def test_on_without_a_tower_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    write_model(TEXT)
    assert "vision_config = None must be a table" in line_of(capsys, "--model.vision=on")
    write_model({key: value for key, value in NESTED.items() if key != "vision_config"})
    assert "vision_config = None must be a table" in line_of(capsys, "--model.vision=on")
    write_model(NESTED)
    fine(capsys, "--model.vision=on")
    Path("vision.toml").write_text(TOML.replace('path = "model"', "[model.config]\nnum_hidden_layers = 4"))
    assert "model.vision = 'on': expected a vision_config" in line_of(capsys, "--model.vision=on")


def test_a_tokenizer_without_the_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    write("chats.jsonl", SHOWN)
    tiny = ROOT / "data" / "tiny" / "tokenizer"
    line = line_of(capsys, f"--data.tokenizer={tiny}")
    assert "tokenizer" in line
    assert "image_token_id = 4098 is None: expected one of its special tokens" in line
    for name in IDS:
        write_model(NESTED | {name: 100})
        assert f"the model's {name} = 100 is " in line_of(capsys)
    write_model(NESTED | {"image_token_id": 4111})
    assert "image_token_id = 4111 is None" in line_of(capsys)
    write_model(NESTED | {"image_token_id": 4099})
    assert "must be four tokens" in line_of(capsys)
    write_model({key: value for key, value in NESTED.items() if key not in IDS})  # those of the published models
    assert "up to 248057, must be below vocab_size = 4112" in line_of(capsys)
    write_model(NESTED)
    fine(capsys)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("preprocessor_config.json", {"image_mean": [0.48, 0.46, 0.41]}, "image_mean = [0.48, 0.46, 0.41]: expected"),
        ("preprocessor_config.json", {"image_std": [0.3, 0.3, 0.3]}, "image_std = [0.3, 0.3, 0.3]: expected [0.5"),
        ("preprocessor_config.json", {"patch_size": 14}, "patch_size = 14: expected 16"),
        ("preprocessor_config.json", {"resample": 2}, "resample = 2: expected 3"),
        ("preprocessor_config.json", {"size": {"height": 3}}, "expected shortest_edge and longest_edge"),
        ("preprocessor_config.json", {"min_pixels": -1}, "min_pixels = -1: expected a whole number above 0"),
        ("preprocessor_config.json", {"min_pixels": 10**6, "max_pixels": 5}, "is below min_pixels"),
        ("video_preprocessor_config.json", {"do_sample_frames": False}, "do_sample_frames = false: expected true"),
        ("video_preprocessor_config.json", {"num_frames": 8}, "num_frames = 8: expected null"),
        ("video_preprocessor_config.json", {"fps": "2"}, 'fps = "2": expected a number above 0'),
        ("preprocessor_config.json", None, "cannot be read"),
    ],
)
def test_a_processor_of_another_arithmetic(
    capsys: pytest.CaptureFixture[str], file: str, changes: dict[str, Any] | None, message: str
) -> None:
    path = Path("model", file)
    values = json.loads(path.read_text())
    path.write_text("{" if changes is None else json.dumps(values | changes))
    fine(capsys)  # without images nobody asks it
    write("chats.jsonl", SHOWN)
    line = line_of(capsys)
    assert file in line
    assert message in line
    write("chats.jsonl", SHOWN, chat("?"))
    fine(capsys, "--model.vision=off")


def test_options_of_pixels(capsys: pytest.CaptureFixture[str]) -> None:
    write("chats.jsonl", SHOWN)
    fine(capsys, "--data.min_pixels=4096", "--data.max_pixels=8192")
    assert "max_pixels = 4096 is below min_pixels = 8192" in line_of(
        capsys, "--data.min_pixels=8192", "--data.max_pixels=4096"
    )
    assert "video_max_pixels = 100 is below" in line_of(capsys, "--data.max_video_pixels=100")
    assert "expected a number of at least 0" in line_of(capsys, "--data.video_fps=-1")


def test_a_folder_of_images_that_is_not_there(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    fine(capsys, "--data.image_folder=none")  # without images nobody asks for it
    write("chats.jsonl", SHOWN)
    assert f"data.image_folder = '{folder}/none': expected a folder" in line_of(capsys, "--data.image_folder=none")
    other = line_of(capsys, "--data.image_folder=.")
    assert f"line 1: '{folder}/a.png': No such file or directory: expected the path of an image" in other


def test_videos_without_what_decodes_them(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("pictures/a.mp4").write_bytes(b"no matter what")
    write("chats.jsonl", chat([{"type": "video", "video": "a.mp4"}]))
    monkeypatch.setitem(sys.modules, "av", None)
    assert "expected the package av, 18 or later" in line_of(capsys)
    write("chats.jsonl", chat([{"type": "video", "video": ["a.png", "a.png"]}]))
    fine(capsys)


def test_images_are_not_tokenised_ahead(capsys: pytest.CaptureFixture[str]) -> None:
    write("text.jsonl", {"text": "a <image>", "images": ["a.png"]}, {"text": "b"})
    options = ["--out", "tokens", "--workers", "1", "--config", "vision.toml", "--data.format=text"]
    options += ["--data.path=text.jsonl", "--data.end_of_document=false"]
    assert status_of(tokenize.main, options) == 2
    assert "which cannot be tokenised ahead: expected texts alone" in capsys.readouterr().err
    assert not Path("tokens").exists()


def test_the_command_itself(folder: Path) -> None:
    write("chats.jsonl", SHOWN)
    command = [sys.executable, "-m", "config.checks", "--world-size", "1", "--config", f"{folder}/vision.toml"]
    options = [f"--{key}={folder}/{value}" for key, value in
               (("model.path", "model"), ("data.path", "chats.jsonl"), ("data.image_folder", "pictures"))]  # fmt: skip
    for extra, status in (([], 0), (["--model.vision=off"], 2)):
        done = subprocess.run([*command, *options, *extra], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, len(done.stderr.splitlines())) == (status, status // 2), done.stderr
