"""The shipped pictures, the chats about them and the files of a tiny model that sees, and the script that makes them.

What a picture shows is found out from its pixels here, by other rules than those that drew it.
"""

import io
import json
import random
import re
import shutil
import socket
from collections import Counter
from pathlib import Path

import jinja2
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

from data.tokenizer import PROBES, load_tokenizer, verify_tokenizer
from scripts import make_tiny_vision as make

FOLDER = Path(__file__).resolve().parents[2] / "data" / "tiny_vision"
TINY_TOKENIZER = FOLDER.parent / "tiny" / "tokenizer"
NAMES = {200: "red", 10: "green", 2: "blue", 220: "yellow", 102: "purple", 0: "black"}  # in which third each channel is
SEGMENTS = (119, 18, 93, 91, 58, 107, 111, 82, 127, 123)  # of 0 to 9: seven bits, row by row
PICTURE, CLIP = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def digit_in(covered):
    """Read as a seven-segment display, row by row; a digit that is a bar alone is 1."""
    height, width = covered.shape
    if width < height / 3:
        return "1"
    middle, high, low, left, right = width // 2, height // 4, height * 3 // 4, 1, width - 2
    points = [
        (1, middle),
        (high, left),
        (high, right),
        (height // 2, middle),
        (low, left),
        (low, right),
        (height - 2, middle),
    ]
    return str(SEGMENTS.index(int("".join(str(int(covered[point])) for point in points), base=2)))


def shape_in(covered):
    """By the corners of the box around it, and how full that is."""
    bottom_left, top_left, share = covered[-1, 0], covered[0, 0], covered.mean()
    if top_left:
        assert share == 1
        return "square"
    assert (0.45 < share < 0.6) if bottom_left else (0.5 < share < 0.62 or 0.7 < share < 0.85)
    return "triangle" if bottom_left else "circle" if share > 0.7 else "cross"


def things_in(png):
    """The box around each thing of a picture, and the colour's name: things of one picture differ in colour."""
    thirds = pixels(png) // 86 @ (100, 10, 1)
    things = []
    for code in {*thirds.flat} - {thirds[0, 0]}:
        rows, columns = np.nonzero(thirds == code)
        box = (thirds == code)[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        things.append((box, NAMES[code]))
    return things


def right_answer(question, pictures, previous):
    """What a turn should be answered, from its text, the pictures so far and the question before it."""
    things = things_in(pictures[-1])
    if question == "And this one?":
        question = previous
    if "Which one is" in question:
        wanted = re.search(r"Which one is (\w+), the first or the second\?", question)[1]
        colours = [things_in(picture)[0][1] for picture in pictures]
        assert colours.count(wanted) == 1
        return ("first", "second")[colours.index(wanted)]
    if "How many shapes are there?" in question:
        return ("one", "two", "three")[len(things) - 1]
    if named := re.search(r"What colour is the (\w+)\?", question):
        (colour,) = [colour for box, colour in things if shape_in(box) == named[1]]
        return colour
    ((box, colour),) = things
    if re.search(r"hat colour is it\?", question):
        return colour
    if re.search(r"hat shape is it\?", question):
        return shape_in(box)
    assert "Which digit is it?" in question
    return digit_in(box)


def rows_of(name):
    return pq.read_table(FOLDER / name).to_pylist()


@pytest.fixture(scope="module")
def train():
    return rows_of("train.parquet")


@pytest.fixture(scope="module")
def held_out():
    return rows_of("held_out.parquet")


@pytest.fixture(scope="module")
def tokenizer():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was asked"))
        return AutoTokenizer.from_pretrained(FOLDER / "model")


def test_the_script_draws_the_same_pictures_and_asks_the_same(train, held_out):
    """Bytes of PNG and Parquet depend on the version of zlib and zstd; pixels and texts do not."""
    for shipped, drawn in zip((train, held_out), make.draw_chats(), strict=True):
        assert [row["messages"] for row in shipped] == [chat.messages for chat in drawn]
        for row, chat in zip(shipped, drawn, strict=True):
            assert [image["path"] for image in row["images"]] == [None] * len(chat.pictures)
            for image, picture in zip(row["images"], chat.pictures, strict=True):
                np.testing.assert_array_equal(pixels(image["bytes"]), pixels(picture))


def test_the_script_writes_the_same_bytes_each_time(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        _, held_out = make.draw_chats()
        make.write_chats(held_out, tmp_path / name / "held_out.parquet")
        make.write_examples(held_out, tmp_path / name)
        make.write_tokenizer(TINY_TOKENIZER, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert len(files) == 5
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_the_shipped_files_are_the_scripts(tmp_path, held_out):
    make.write_tokenizer(TINY_TOKENIZER, tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.read_bytes() == (FOLDER / "model" / path.name).read_bytes()
    shown = {pixels(image["bytes"]).tobytes() for row in held_out for image in row["images"]}
    examples = sorted((FOLDER.parents[1] / "docs").glob("vision_example_*.png"))
    assert len(examples) == 3
    assert {pixels(path.read_bytes())[1::3, 1::3].tobytes() for path in examples} <= shown


def test_it_is_small(train, held_out):
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if "__pycache__" not in path.parts) < 1e6
    assert (len(train), len(held_out)) == (3600, 300)


def test_no_picture_is_shown_twice_and_none_held_out_is_trained_on(train, held_out):
    files, seen = [], []
    for rows in (train, held_out):
        files.append({image["bytes"] for row in rows for image in row["images"]})
        seen.append([(pixels(png).shape, pixels(png).tobytes()) for png in files[-1]])
    assert not files[0] & files[1]
    assert len({*seen[0], *seen[1]}) == len(seen[0]) + len(seen[1])
    assert sum(len(row["images"]) for row in train + held_out) == len(seen[0]) + len(seen[1])


def test_pictures_are_of_four_sizes(train):
    shapes = Counter(pixels(image["bytes"]).shape for row in train for image in row["images"])
    assert shapes.keys() == {(64, 64, 3), (64, 96, 3), (96, 64, 3), (96, 96, 3)}
    assert 0.7 < shapes[64, 64, 3] / shapes.total() < 0.8


@pytest.mark.parametrize("name", ["train.parquet", "held_out.parquet"])
def test_each_answer_is_what_the_pictures_show(name):
    answers, rows = Counter(), rows_of(name)
    for row in rows:
        files, pictures, previous = [image["bytes"] for image in row["images"]], [], ""
        assert [message["role"] for message in row["messages"]] in (["user", "assistant"], ["user", "assistant"] * 2)
        for question, answer in zip(row["messages"][::2], row["messages"][1::2]):
            for part in question["content"]:
                assert part.keys() == {"type", "text"}
                if part["type"] == "image":
                    assert part["text"] is None
                    pictures.append(files.pop(0))
            asked = "".join(part["text"] or "" for part in question["content"]).strip()
            expected = right_answer(asked, pictures, previous)
            assert answer["content"] == [{"type": "text", "text": expected}]
            answers[expected], previous = answers[expected] + 1, asked
        assert not files
    kinds = ({*make.COLOURS}, {*make.SHAPES}, {*map(str, range(10))}, {"one", "two", "three"}, {"first", "second"})
    assert answers.keys() == set.union(*kinds)
    for kind in kinds:  # none is asked for so often that a guess would do
        counts = [answers[answer] for answer in kind]
        assert 0 < max(counts) < min(counts) * (2 if len(rows) > 1000 else 6)


def test_pictures_stand_before_after_and_within_questions(train):
    forms = Counter(
        tuple(part["type"] for part in message["content"])
        for row in train
        for message in row["messages"]
        if message["role"] == "user"
    )
    wanted = ["image text", "text image", "text image text", "image image text", "text image text image text text"]
    assert forms.keys() == {("text",), *(tuple(form.split()) for form in wanted)}
    assert min(forms.values()) > 20
    assert forms.most_common(1)[0][0] == ("image", "text")


def test_four_more_tokens_and_all_others_as_before(tokenizer):
    tiny = AutoTokenizer.from_pretrained(TINY_TOKENIZER)
    tokens = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    assert tokenizer.convert_tokens_to_ids(tokens) == [4096, 4097, 4098, 4099]
    assert len(tokenizer) == 4100
    assert tokenizer.get_vocab().items() - tiny.get_vocab().items() == set(zip(tokens, range(4096, 4100)))
    assert {*tokenizer.all_special_ids} == {4093, 4094, 4095, 4096, 4097, 4098, 4099}
    assert tokenizer("".join(tokens), add_special_tokens=False).input_ids == [4096, 4097, 4098, 4099]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|endoftext|>")
    for text in PROBES:
        assert tokenizer(text).input_ids == tiny(text).input_ids


def test_any_consumer_tokenises_it_the_same(tmp_path):
    """With a config.json of the family beside it, AutoTokenizer builds the family's own class."""
    shutil.copytree(FOLDER / "model", tmp_path / "export")
    (tmp_path / "export/config.json").write_text('{"model_type": "qwen3_5_moe"}')
    assert type(AutoTokenizer.from_pretrained(tmp_path / "export")).__name__.startswith("Qwen3_5")
    verify_tokenizer(str(FOLDER / "model"), str(tmp_path / "export"), PROBES)


def turn(role, text):
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a {{ b }}\n", "a {{ b }}\n"),
        ("", ""),
        (None, ""),
        ([], ""),
        ([{"type": "text", "text": " a"}, {"type": "text", "text": "b "}], " ab "),
        ([{"text": "a"}], "a"),
        ([{"type": "image"}, {"type": "text", "text": "a"}], PICTURE + "a"),
        (
            [{"type": "text", "text": "a"}, {"type": "image", "text": None}, {"type": "text", "text": "b"}],
            f"a{PICTURE}b",
        ),
        ([{"type": "image", "image": "x.png"}, {"image": "y.png"}], PICTURE * 2),
        ([{"type": "image_url", "image_url": {"url": "x.png"}}], PICTURE),
        ([{"type": "video"}, {"video": "x.mp4"}, {"type": "text", "text": "a"}], CLIP * 2 + "a"),
    ],
)
def test_contents_are_texts_or_lists_of_parts(tokenizer, role, content, expected):
    render = tokenizer.apply_chat_template
    chat = [{"role": "user", "content": "?"}, {"role": role, "content": content}]
    assert render(chat, tokenize=False) == turn("user", "?") + turn(role, expected)
    asked = render(chat, tokenize=False, add_generation_prompt=True)
    assert asked == turn("user", "?") + turn(role, expected) + "<|im_start|>assistant\n"


def test_results_of_tools_may_be_pictures(tokenizer):
    """As the family has it: results one after another are one turn of the user's."""
    result = {"role": "tool", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}
    chat = [result, {"role": "tool", "content": "b"}, {"role": "assistant", "content": "c"}, result]
    one, two = f"\n<tool_response>\n{PICTURE}a\n</tool_response>", "\n<tool_response>\nb\n</tool_response>"
    expected = f"<|im_start|>user{one}{two}<|im_end|>\n{turn('assistant', 'c')}<|im_start|>user{one}<|im_end|>\n"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == expected


def test_pictures_are_numbered_on_request(tokenizer):
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "video"}, {"type": "image"}]},
        {"role": "user", "content": [{"type": "image"}]},
    ]
    expected = f"Picture 1: {PICTURE}Video 1: {CLIP}Picture 2: {PICTURE}", f"Picture 3: {PICTURE}"
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_vision_id=True)
    assert rendered == turn("user", expected[0]) + turn("user", expected[1])


@pytest.mark.parametrize(
    ("role", "content", "message"),
    [
        ("system", [{"type": "image"}], "system message cannot contain images"),
        ("system", [{"type": "text", "text": "a"}, {"image": "x.png"}], "system message cannot contain images"),
        ("system", [{"type": "video"}], "system message cannot contain videos"),
        ("user", [{"type": "audio"}], "must be a text, an image or a video"),
        ("user", [{"type": "text", "text": None}], "must be a text, an image or a video"),
        ("user", ["image"], "must be a text, an image or a video"),
        ("user", {"type": "image"}, "a text or a list of parts"),
        ("user", 1, "a text or a list of parts"),
        ("painter", "a", "not painter"),
    ],
)
def test_what_the_template_refuses(tokenizer, role, content, message):
    with pytest.raises(jinja2.TemplateError, match=message):
        tokenizer.apply_chat_template([{"role": role, "content": content}], tokenize=False)
    tokenizer.apply_chat_template([{"role": "system", "content": [{"type": "text", "text": "a"}]}], tokenize=False)


def test_chats_are_rendered_by_the_recipes_own_reader_alike(tokenizer, train):
    ours = load_tokenizer(str(FOLDER / "model"))
    for row in random.Random(0).sample(train, 100):
        rendered = ours.apply_chat_template(row["messages"], tokenize=False)
        assert rendered == tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert rendered.count("<|image_pad|>") == len(row["images"])
        assert rendered.endswith(row["messages"][-1]["content"][0]["text"] + "<|im_end|>\n")


def test_no_picture_is_resized(train):
    processor = AutoImageProcessor.from_pretrained(FOLDER / "model")
    by_shape = {pixels(image["bytes"]).shape: image["bytes"] for row in train for image in row["images"]}
    for (height, width, _), png in by_shape.items():
        read = processor(Image.open(io.BytesIO(png)).convert("RGB"), return_tensors="np")
        assert read["image_grid_thw"].tolist() == [[1, height // 16, width // 16]]
        first = read["pixel_values"][0].reshape(3, 2, 16, 16)[:, 0].transpose(1, 2, 0)
        np.testing.assert_allclose(first, pixels(png)[:16, :16] / 127.5 - 1, atol=1e-6)


def test_processor_files_have_the_familys_names():
    image = json.loads((FOLDER / "model/preprocessor_config.json").read_text())
    video = json.loads((FOLDER / "model/video_preprocessor_config.json").read_text())
    assert (image["image_processor_type"], image["size"]["shortest_edge"]) == ("Qwen2VLImageProcessorFast", 1024)
    assert (video["video_processor_type"], video["fps"]) == ("Qwen3VLVideoProcessor", 2)
    for each in (image, video):
        assert (each["patch_size"], each["merge_size"], each["temporal_patch_size"]) == (16, 2, 2)
        assert each["image_mean"] == each["image_std"] == [0.5] * 3
