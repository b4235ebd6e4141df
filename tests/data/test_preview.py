"""`python -m data.preview`: what it shows is what is trained on."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from transformers import AutoTokenizer

from config.reading import load_config, model_config
from data import preview
from data.batch import MicroBatch
from errors import UserError
from tests.browser import CHROMIUM, Browser

TOKENIZER = Path(__file__).resolve().parents[2] / "data" / "tiny" / "tokenizer"


def turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def shown(tmp_path, capsys, *options):
    path = tmp_path / "a.jsonl"
    chats = [turns("Hi?", "Ho."), turns("So?", "So. " * 7), turns("Ah?", "x " * 300), [turns("Hm?", "")[0]]]
    chats[0][0]["id"] = "x"
    path.write_text("".join(json.dumps({"messages": chat, "text": "x y " * 10}) + "\n" for chat in chats))
    preview.main(["--config", "qwen35moe_tiny.toml", "--data.path", str(path), "--data.shuffle=false", *options])
    return capsys.readouterr().out


def test_conversations(tmp_path, capsys):
    options = ["--training.sequence_length=64", "--training.global_batch_size=1", "--training.steps=6"]
    out = shown(tmp_path, capsys, "--data.format=chat", "--rows=1", *options)
    row = out.partition("\n")[2]
    first = "|<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n«Ho.<|im_end|>»\n"
    second = f"|<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n«{'So. ' * 7}<|im_end|>»\n"
    assert row.startswith(first + second)
    assert "fillers)" in row
    assert "skipped (nothing_to_train): 1, 25.00%" in out
    assert "skipped (too_long): 1, 25.00%" in out
    assert "used, but ignored_field: 1\n" in out
    assert "4 of 4 samples measured" in out
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    chats = [turns("Hi?", "Ho."), turns("So?", "So. " * 7)]
    num_tokens = sum(len(tokenizer.apply_chat_template(chat, return_dict=False)) for chat in chats)
    assert f"an epoch has {num_tokens} tokens, " in out


def test_text_and_colours(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    out = shown(tmp_path, capsys, "--training.sequence_length=30", "--rows=2", "--samples=2")
    assert "\033[32m" in out
    assert "\033[1;31m|" in out
    assert "2 of 4 samples measured" in out
    assert "an epoch has about" in out
    assert "rows are 100.0% full" in out


# ------------------------------------------------------------------------------------------------- pictures

INJECTED = "<script>window.injected = 1</script><img src=x onerror='window.injected = 1'>&amp;\x1b[2J\u202e"
SIGNS = str.maketrans({"\x1b": "␛", "\u202e": "[U+202E]"})


def ask(*parts, answer="Noise."):
    content = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def draw(path, height, width, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def chats_with_pictures(folder):
    """An image, a video, a picture that breaks while it is decoded, and one that is not there."""
    draw(folder / "a.png", 70, 90, 0)
    for number in range(3):
        draw(folder / f"{number}.png", 64, 64, number + 1)
    draw(folder / "cut.png", 70, 90, 0)
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:5000])
    image, video = (
        {"type": kind, kind: name} for kind, name in (("image", "a.png"), ("video", ["0.png", "1.png", "2.png"]))
    )
    return [
        ask("See ", image, INJECTED, answer=f"Seen: {INJECTED}"),
        ask(video, "What moves?"),
        ask({"type": "image", "image": "cut.png"}, "Well?"),
        ask({"type": "image", "image": "<b>no.png"}, "Well?"),
        ask("No picture."),
    ]


def shown_pictures(tmp_path, capsys, *options):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats_with_pictures(tmp_path)))
    keys = {
        "data.path": path,
        "data.image_folder": tmp_path,
        "data.shuffle": "false",
        "training.sequence_length": 223,  # as many as the samples have: one row has all of them, in order
        "training.global_batch_size": 1,
        "training.local_batch_size": 1,
    }
    given = [f"--{key}={value}" for key, value in keys.items()]
    preview.main(["--config", "qwen35moe_vision_tiny.toml", "--rows=1", *given, *options])
    return capsys.readouterr().out


def test_pictures_as_text(tmp_path, capsys):
    out = shown_pictures(tmp_path, capsys)
    assert f"See <|vision_start|>[image 96x64, 6 tokens]<|vision_end|>{INJECTED}<|im_end|>".translate(SIGNS) in out
    frame = "<|vision_start|>[2 video frames 64x64, 4 tokens]<|vision_end|>"
    assert f"user\n<0.0 seconds>{frame}<0.1 seconds>{frame}What moves?" in out
    assert "[image 96x64, 6 tokens, all grey]" in out
    assert "an epoch has 223 tokens, 1.0 steps" in out  # or the other tests have other rows than they think
    assert "_pad|>" not in out
    assert "skipped (missing_file): 1, 20.00%" in out
    assert "a sample has 0.50 images and 0.25 videos, 1 together at most" in out
    assert "sizes of images and pairs of video frames: 96x64 (2), 64x64 (2)\n" in out
    tokens = int(re.search(r"an epoch has ([\d,]+) tokens", out)[1].replace(",", ""))
    assert f"\n{(6 + 4 + 4 + 6) / tokens:.1%} of the tokens are vision tokens; " in out


@pytest.mark.parametrize("form", ["chat", "text"])
def test_nothing_is_decoded_to_be_measured(tmp_path, capsys, monkeypatch, form):
    load, loaded = ImageFile.ImageFile.load, []

    def counted(image):
        loaded.append(image)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", counted)
    draw(tmp_path / "a.png", 70, 90, 0)
    path = tmp_path / "a.jsonl"
    record = {"messages": ask({"type": "image"}, "Well?"), "text": "<image> is noise.", "images": ["a.png"]}
    path.write_text(f"{json.dumps(record)}\n" * 40)
    options = [
        "--validation.enable=false",
        "--data.format",
        form,
        f"--data.path={path}",
        f"--data.image_folder={tmp_path}",
    ]
    for rows, most in ((0, 0), (1, 256 // 6)):
        loaded.clear()
        preview.main(["--config", "qwen35moe_vision_tiny.toml", f"--rows={rows}", *options])
        out = capsys.readouterr().out
        assert "40 of 40 samples measured" in out
        assert "96x64 (40)" in out
        assert out.count("[image 96x64, 6 tokens]") == len({id(image) for image in loaded}) <= most
    assert loaded


class Page(HTMLParser):
    """The tags of a page, the texts of the spans by class, and the pictures."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.pictures, self.all_text = [], [], [], ""
        self.spans = {None: [], "trained": []}
        self._inside = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.addresses += [attributes[key] for key in ("src", "href") if key in attributes]
        assert not any(key.startswith("on") for key in attributes)
        if tag == "span":
            self._inside = self.spans[attributes.get("class")]
            self._inside.append("")
        if tag == "img":
            content = base64.b64decode(attributes["src"].removeprefix("data:image/png;base64,"), validate=True)
            self.pictures.append(np.asarray(Image.open(io.BytesIO(content))))

    def handle_endtag(self, tag):
        self._inside = None if tag == "span" else self._inside

    def handle_data(self, data):
        self.all_text += data
        if self._inside is not None:
            self._inside[-1] += data


def test_page(tmp_path, capsys):
    out = shown_pictures(tmp_path, capsys, f"--html={tmp_path / 'page.html'}")
    assert out.endswith(f"page.html: {(tmp_path / 'page.html').stat().st_size:,} bytes\n")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert all(address.startswith("data:image/png;") for address in page.addresses)
    assert page.tags.count("section") == 4
    with Image.open(tmp_path / "a.png") as image:
        expected = np.asarray(image.resize((96, 64), Image.Resampling.BICUBIC))
    # Two pictures share their patches; the third of the video stands for the missing fourth. What breaks is grey.
    frames = [np.asarray(Image.open(tmp_path / f"{number}.png")) for number in (0, 1, 2, 2)]
    for picture, drawn in zip(page.pictures, [expected, *frames, np.full_like(expected, 127)], strict=True):
        assert np.array_equal(picture, drawn)
    injected = INJECTED.translate(SIGNS)
    assert f"Seen: {injected}<|im_end|>" in page.spans["trained"]
    assert any(f"<|vision_end|>{injected}<|im_end|>" in text for text in page.spans[None])
    assert "<b>no.png" in page.all_text
    assert "it could not be decoded" in page.all_text
    assert "missing_file" in page.all_text
    assert "broken_image" in page.all_text


def test_titles_tell_positions(tmp_path, capsys):
    """They are those of the micro-batch that the model takes."""
    shown_pictures(tmp_path, capsys, f"--html={tmp_path / 'page.html'}")
    found = re.findall(
        r"tokens (\d+) to (\d+); (\d+) x (\d+) patches; positions \(time, height, width\) \((.*?)\) to \((.*?)\)",
        (tmp_path / "page.html").read_text(),
    )
    assert len(found) == 4
    rows = []
    page, preview.page = preview.page, lambda title, shown, *others: rows.extend(shown) or page(title, shown, *others)
    try:
        shown_pictures(tmp_path, capsys, f"--html={tmp_path / 'page.html'}")
    finally:
        preview.page = page
    vision = model_config(load_config(["--config", "qwen35moe_vision_tiny.toml"])).vision
    batch = MicroBatch.of(rows, True, vision)
    for begin, end, width, height, *positions in found:
        assert (int(end) - int(begin) + 1) * 4 == int(width) * int(height)
        assert set(batch.tokens[int(begin) : int(end) + 1].tolist()) <= {vision.image_token_id, vision.video_token_id}
        for place, told in zip((int(begin), int(end)), positions):
            assert batch.positions[:, place].tolist() == [int(number) for number in told.split(", ")]


def test_page_of_text_alone(tmp_path, capsys):
    out = shown(tmp_path, capsys, "--training.sequence_length=30", "--rows=2", f"--html={tmp_path / 'page.html'}")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.pictures == []
    assert "x y " in page.spans["trained"][1]
    assert "vision tokens" not in out


@pytest.mark.parametrize("name", ["none/page.html", ".", "a.jsonl/page.html", "x" * 300, ""])
def test_a_page_that_cannot_be_written(tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--html '.*' cannot be written: .*: expected the name of a file"):
        shown(tmp_path, capsys, f"--html={name}")
    assert capsys.readouterr().out == ""


def test_a_failed_preview_leaves_files_as_they_are(tmp_path, capsys):
    page = tmp_path / "page.html"
    for before in (None, "something"):
        if before:
            page.write_text(before)
        with pytest.raises(UserError, match="line 1"):
            shown(tmp_path, capsys, f"--html={page}", "--data.text_key=none")
        assert (page.read_text() if page.exists() else None) == before


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on the PATH")
def test_page_in_a_browser(tmp_path, capsys):
    shown_pictures(tmp_path, capsys, f"--html={tmp_path / 'page.html'}")
    browser = Browser(tmp_path / "profile")
    try:
        colours = set()
        for width, scheme in ((1000, "light"), (1000, "dark"), (360, "dark"), (360, "light")):
            browser.show_as(width, scheme=scheme)
            browser.open(tmp_path / "page.html")
            widths = browser.evaluate("[...document.images].map(image => image.naturalWidth)")
            assert widths == [96, 64, 64, 64, 64, 96]
            assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
            style = "[...document.querySelectorAll('.document {}')].map(span => getComputedStyle(span).{})"
            on = {*browser.evaluate(style.format(".trained", "backgroundColor"))}
            off = {*browser.evaluate(style.format("span:not(.trained)", "backgroundColor"))}
            assert len(on) == len(off) == 1
            assert on != off
            colours.add((scheme, *on, browser.evaluate("getComputedStyle(document.body).backgroundColor")))
            assert browser.evaluate("window.injected === undefined && !document.scripts.length")
            text = browser.evaluate("document.querySelector('.trained[title*=trained]').textContent")
            assert text == f"Seen: {INJECTED}<|im_end|>".translate(SIGNS)
        assert len(colours) == 2
        assert len({page_colour for _, _, page_colour in colours}) == 2
        assert {url.partition(",")[0] for url in browser.requests} == {
            (tmp_path / "page.html").as_uri(),
            "data:image/png;base64",
        }
        assert browser.messages == []
        # The browser would tell: what somebody put into the page all the same is refused.
        (tmp_path / "bad.html").write_text(
            (tmp_path / "page.html").read_text() + "<script>window.injected = 1</script>"
        )
        browser.open(tmp_path / "bad.html")
        assert browser.evaluate("window.injected === undefined")
        assert any("Content Security Policy" in message for message in browser.messages)
    finally:
        browser.close()
