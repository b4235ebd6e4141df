"""Images and videos of records: each form of writing them gives the tokens, labels and pixels of the plain one, which
are transformers' own; what is refused, and why."""

import base64
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from config.options import Data
from data.batch import Sample
from data.media import MediaReader, has_media
from data.packing import BadSample
from data.samples import EncodeChat, EncodeText
from data.sources import open_sources
from errors import UserError
from models.ops.labels import IGNORED
from tests.data.media_shapes import (
    END,
    IMAGE,
    MODEL,
    SETTINGS,
    START,
    TOKENIZERS,
    VIDEO,
    check_sample,
    contents,
    encode,
    encode_text,
    picture,
    reader,
    write_lines,
)
from tests.data.test_videos import film, needs_av

QUESTION, ANSWER = "\nWhat are these?", "A cat and noise."
FILES = {"a.png": picture(64, 96, 1), "sub/b c.jpg": picture(130, 41, 2, "JPEG")}
A, B = FILES
CLIP = [f"clip/{number}.png" for number in range(5)]
FILES |= {name: picture(50, 60, 10 + number) for number, name in enumerate(CLIP)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def chat(*parts: Any, answer: Any = ANSWER, **fields: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **fields}


def image(source: str, **more: Any) -> dict[str, Any]:
    return {"type": "image", "image": source, **more}


def video(source: Any, **more: Any) -> dict[str, Any]:
    return {"type": "video", "video": source, **more}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


PLAIN = chat(image(A), image(B), text(QUESTION))


def encoded_text(content: bytes) -> str:
    return base64.b64encode(content).decode()


# -------------------------------------------------------------------- the plain form equals transformers


def rendered_by_hand(
    style: str, messages: list[Any], texts: list[tuple[str, str]], then: dict[str, str] | None = None
) -> list[int]:
    """transformers' tokens of a chat in which each placeholder of the template's is replaced by a text; as transformers
    does it by way of another one, so that what was put in is not replaced again."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=TOKENIZERS[style].chat_template)
    for placeholder, replacement in texts:
        assert placeholder in rendered
        rendered = rendered.replace(placeholder, replacement, 1)
    for stand_in, replacement in (then or {"\0": "<|image_pad|>"}).items():
        rendered = rendered.replace(stand_in, replacement)
    ids: list[int] = tokenizer(rendered, add_special_tokens=False).input_ids
    return ids


@pytest.mark.parametrize("style", ["chatml", "qwen35_style"])
def test_images_equal_transformers(folder: Path, style: str) -> None:
    """What Qwen3VLProcessor does: each pad becomes as many as the image has tokens; its pixels from the PIL class."""
    processor = Qwen2VLImageProcessorPil.from_pretrained(MODEL)
    messages = [
        *chat(text("Look. "), image(A), text(" and "), image(B), text("?"))["messages"],
        *chat(image(B))["messages"],
    ]
    sample = encode({"messages": messages}, folder, style)
    out = processor([Image.open(folder / name).convert("RGB") for name in (A, B, B)], return_tensors="np")
    sizes = out["image_grid_thw"].prod(axis=1) // 4
    pads = [("<|image_pad|>", "\0" * size) for size in sizes]
    assert sample.tokens.tolist() == rendered_by_hand(style, messages, pads)
    assert (sample.tokens == IMAGE).sum() == sizes.sum()
    assert [(1, height, width) for medium in sample.media for _, height, width in medium.frames] == [
        tuple(grid) for grid in out["image_grid_thw"].tolist()
    ]
    pixels = np.concatenate([medium.decode() for medium in sample.media])
    np.testing.assert_array_equal(pixels.astype(np.float32) / np.float32(127.5) - np.float32(1), out["pixel_values"])
    check_sample(sample)


@pytest.mark.parametrize("style", ["chatml", "qwen35_style"])
def test_videos_have_the_layout_of_the_processor_of_4_57(folder: Path, style: str) -> None:
    """Time, start, pads, end for each pair of frames, and no other start and end around them."""
    record = chat(text("Well?"), video(CLIP, fps=2), text("and"), video(CLIP[:2], fps=10.0))
    sample = encode(record, folder, style)
    frame = "<|vision_start|>" + "<|video_pad|>" * (sample.media[0].frames[0][1] * sample.media[0].frames[0][2] // 4)
    first, second = ("".join(f"<{t} seconds>{frame}<|vision_end|>" for t in times) for times in (
        ("0.2", "1.2", "2.0"), ("0.1",))
    )  # fmt: skip
    outer = "<|vision_start|><|video_pad|><|vision_end|>"
    by_hand = rendered_by_hand(style, record["messages"], [(outer, "\1"), (outer, "\2")], {"\1": first, "\2": second})
    assert sample.tokens.tolist() == by_hand
    assert [len(medium.frames) for medium in sample.media] == [3, 1]
    check_sample(sample)


@needs_av
def test_a_file_of_a_video_equals_the_same_frames(folder: Path, tmp_path: Path) -> None:
    clip = film(25)  # once: an encoder with threads need not write the same bytes again
    (tmp_path / "clip.mp4").write_bytes(clip)
    sample = encode(chat(video("clip.mp4"), text("?")), tmp_path)
    whole = TOKENIZERS["chatml"].decode(sample.tokens.tolist())
    assert [part.rpartition("<")[2] for part in whole.split(" seconds>")[:-1]] == ["0.2", "0.8"]
    assert sample.media[0].decode().shape == (2 * 4 * 6, 1536)
    for form in (
        {"messages": chat(text("<video>?"))["messages"], "videos": ["clip.mp4"]},
        {"messages": chat({"type": "video"}, text("?"))["messages"], "video": "clip.mp4"},
        chat({"type": "video_url", "video_url": {"url": f"file://{tmp_path}/clip.mp4"}}, text("?")),
        chat({"type": "video", "base64": encoded_text(clip)}, text("?")),
    ):
        assert contents(encode(form, tmp_path)) == contents(sample)
    check_sample(sample)


# -------------------------------------------------------------------------------- each form is the plain


def sources_of_a(folder: Path) -> dict[str, dict[str, Any]]:
    """Ways to write the first image as a content part."""
    path, data = str(folder / A), encoded_text(FILES[A])
    lines = "\n".join(data[start : start + 76] for start in range(0, len(data), 76))
    return {
        "image": image(A),
        "absolute": image(path),
        "without type": {"image": A},
        "nulls": {"type": "image", "image": A, "text": None, "video": None, "fps": None, "min_pixels": None},
        "empty": image(A, text="", detail=""),
        "cache": image(A, cache_control={"type": "ephemeral"}),
        "path": {"type": "image", "path": A},
        "url": {"type": "image", "url": f"file://{path}"},
        "localhost": image(f"file://localhost{path}"),
        "image_url": {"type": "image_url", "image_url": {"url": f"file://{path}", "detail": "auto"}},
        "image_url as text": {"type": "image_url", "image_url": A},
        "image_url without type": {"image_url": {"url": A}},
        "data": image(f"data:image/png;base64,{data}"),
        "data as url": {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        "base64": {"type": "image", "base64": data},
        "base64 in lines": {"type": "image", "base64": lines},
        "base64 of a data address": {"type": "image", "base64": f"data:image/png;base64,{data}"},
        "base64 inside": {"type": "image", "image": {"base64": data}},
        "dict of path": {"type": "image", "image": {"path": A, "bytes": None}},
        "dict of dict": {"type": "image", "image": {"url": {"path": A}}},
    }


@pytest.mark.parametrize("form", sources_of_a(Path("/")))
def test_every_way_to_write_a_content_part(folder: Path, tmp_path: Path, form: str) -> None:
    part = sources_of_a(folder)[form]
    record = chat(part, image(B), text(QUESTION))
    (source,) = open_sources(Data(format="chat", path=(str(write_lines(tmp_path / "x.jsonl", [record])),)))
    assert has_media(source[0], Data(format="chat"))
    assert contents(encode(source[0], folder)) == contents(encode(PLAIN, folder))


@pytest.mark.parametrize("content", ["dict", "part", "bare"])
def test_bytes_in_a_record(folder: Path, content: str) -> None:
    part = {
        "dict": {"type": "image", "image": {"bytes": FILES[A], "path": "elsewhere.png"}},
        "part": {"type": "image", "bytes": FILES[A]},
        "bare": {"type": "image", "image": FILES[A]},
    }[content]
    assert contents(encode(chat(part, image(B), text(QUESTION)), folder)) == contents(encode(PLAIN, folder))


@pytest.mark.parametrize("name", ["b c.jpg", "b%20c.jpg", "b#c?.jpg", "ü.jpg", "b c%.jpg"])
def test_names_of_files_in_addresses(tmp_path: Path, name: str) -> None:
    """As a path behind file://, which many write, and as the standard wants it."""
    (tmp_path / name).write_bytes(FILES[A])
    expected = contents(encode(chat(image(name)), tmp_path))
    assert contents(encode(chat(image(f"file://{tmp_path}/{name}")), tmp_path)) == expected
    assert contents(encode(chat(image((tmp_path / name).as_uri())), tmp_path)) == expected


TAGS = f"<image><image>{QUESTION}"
BOTH = [A, B]
COLUMNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # record, options
    "tags": ({"messages": [{"role": "user", "content": TAGS}, {"role": "assistant", "content": ANSWER}],
              "images": BOTH, "videos": []}, {}),
    "tags in a part": (chat(text(TAGS), images=BOTH, videos=None), {}),
    "tags over parts": (chat(text("<image>"), text("<image>\nWhat"), text(" are these?"), images=BOTH), {}),
    "tags of dicts": (chat(text(TAGS), images=[{"path": A}, {"bytes": None, "path": B}]), {}),
    "singular": (chat(text(TAGS), image=BOTH), {}),
    "singular beside nulls": (chat(text(TAGS), image=BOTH, images=[None], videos=[{}], video=""), {}),
    "another key": (chat(text(TAGS), pictures=BOTH, images="of another kind"), {"images_key": "pictures"}),
    "llava": ({"id": 1, "image": BOTH, "conversations": [{"from": "human", "value": TAGS},
               {"from": "gpt", "value": ANSWER}]}, {"messages_key": "conversations"}),
    "sharegpt": ({"images": BOTH, "conversations": [{"from": "user", "value": TAGS},
                  {"from": "assistant", "value": ANSWER}]}, {"messages_key": "conversations"}),
    "sharegpt of parts": ({"conversations": [
        {"from": "human", "value": [image(A), image(B), text(QUESTION)]}, {"from": "gpt", "value": ANSWER}]},
        {"messages_key": "conversations"}),
    "parts and column": (chat({"type": "image"}, {"type": "image", "text": None}, text(QUESTION), images=BOTH), {}),
    "indexed parts": (chat({"type": "image", "index": 0, "text": None}, {"type": "image", "index": 1, "text": None},
                           {"type": "text", "index": None, "text": QUESTION}, images=BOTH), {}),
    "tag and part": (chat(text("<image>"), {"type": "image"}, text(QUESTION), images=BOTH), {}),
    "own source and column": (chat(image(A), {"type": "image"}, text(QUESTION), images=[B]), {}),
}  # fmt: skip


@pytest.mark.parametrize("form", COLUMNS)
def test_every_way_to_write_a_field(folder: Path, form: str) -> None:
    record, options = COLUMNS[form]
    assert has_media(record, Data(format="chat", **options))
    assert contents(encode(record, folder, **options)) == contents(encode(PLAIN, folder))


def test_one_image_stands_without_a_list(folder: Path) -> None:
    expected = contents(encode(chat(image(A), text(QUESTION)), folder))
    for value in (A, {"path": A}, {"bytes": FILES[A]}, FILES[A], [A]):
        for key in ("image", "images"):
            assert contents(encode(chat(text(f"<image>{QUESTION}"), **{key: value}), folder)) == expected


IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


@pytest.mark.parametrize("stored", ["bytes", "paths", "large", "one"])
@pytest.mark.parametrize("form", ["tags", "parts", "mixed parts"])
def test_parquet(folder: Path, tmp_path: Path, stored: str, form: str) -> None:
    """Arrow fills up the parts, and rows without images, with nulls."""
    media = [{"bytes": None if stored == "paths" else FILES[name], "path": name} for name in BOTH]
    kind: pa.DataType = IMAGES
    if stored == "large":
        kind = pa.large_list(pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())]))
    tags = TAGS
    if stored == "one":
        media, kind, tags = media[:1], IMAGES.value_type, f"<image>{QUESTION}"
    parts: list[Any] = [text(tags)]
    if form != "tags":
        parts = [*[{"type": "image"}] * len(media), text(QUESTION)]
    if form == "mixed parts":
        parts[0] = image(A)
        media = media[1:]
    answer = [text(ANSWER)]
    rows = [chat(*parts, answer=answer), chat(text("no image"), answer=answer)]
    value = (media[0] if media else None) if stored == "one" else media
    table = pa.table(
        {
            "messages": pa.array([row["messages"] for row in rows]),
            "images": pa.array([value, None], kind),
            "other": [1, 2],
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    (source,) = open_sources(Data(format="chat", path=(str(tmp_path / "x.parquet"),)))
    plain = PLAIN if stored != "one" else chat(image(A), text(QUESTION))
    for record in (source[0], next(source.head())[1]()):
        assert contents(encode(record, folder)) == contents(encode(plain, folder))
        assert has_media(record, Data(format="chat"))
    assert not has_media(source[1], Data(format="chat"))
    assert not encode(source[1], folder).media


@pytest.mark.parametrize("feature", ["opened", "not opened", "embedded"])
@pytest.mark.parametrize("one", [False, True])
def test_a_dataset_with_the_image_feature(folder: Path, tmp_path: Path, feature: str, one: bool) -> None:
    each = datasets.Image(decode=feature == "opened")
    names = [str(folder / name) for name in BOTH[: 1 if one else 2]]
    values = [{"bytes": Path(name).read_bytes(), "path": None} for name in names] if feature == "embedded" else names
    column = values[0] if one else values
    tags = f"<image>{QUESTION}" if one else TAGS
    table = datasets.Dataset.from_dict(
        {"messages": [chat(text(tags), answer=[text(ANSWER)])["messages"]], "images": [column]}
    )
    table = table.cast_column("images", each if one else datasets.List(each))
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "x.parquet")
    plain = chat(image(A), text(QUESTION)) if one else PLAIN
    for path in ("saved", "x.parquet"):
        (source,) = open_sources(Data(format="chat", path=(str(tmp_path / path),)))
        assert contents(encode(source[0], folder)) == contents(encode(plain, folder))


def test_turns_of_all_roles_but_the_systems(folder: Path) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image(A), text("Look.")]},
        {"role": "assistant", "content": [text("I look: "), image(B), text(" there.")], "tool_calls": [call]},
        {"role": "tool", "content": [text("seen"), image(B)]},
        {"role": "assistant", "content": [image(A), text("A cat.")]},
        {"role": "user", "content": [text("And"), video(CLIP[:2])]},
        {"role": "assistant", "content": [text("Noise"), image(B)]},
    ]
    sample = encode({"messages": messages}, folder, "qwen35_style")
    check_sample(sample)
    assert sample.tokens.tolist().count(START) == 6
    assert [len(medium.frames) for medium in sample.media] == [1] * 6
    runs = trained_runs(sample, "qwen35_style")
    assert runs[:2] == ["I look: ", " there.\n\n<tool_call>\n<function=look>\n</function>\n</tool_call><|im_end|>"]
    assert runs[2:] == ["A cat.<|im_end|>", "Noise", "<|im_end|>"]
    for role in ("system",):
        for style in ("chatml", "qwen35_style"):
            refused = {"messages": [{"role": role, "content": [text("a"), image(A)]}, *messages[1:2], *messages[4:5]]}
            assert reason_of(refused, folder, style)[0] == "template_error"
            tagged = {"messages": [{"role": role, "content": "<image>"}, *chat(text("?"))["messages"]], "images": [A]}
            assert reason_of(tagged, folder, style)[0] == "template_error"


def trained_runs(sample: Sample, style: str = "chatml") -> list[str]:
    """The texts that are trained on, decoded, one for each run of labels."""
    runs: list[list[int]] = [[]]
    for label in sample.labels.tolist():
        runs[-1] += [label] if label != IGNORED else []
        runs += [[]] if label == IGNORED and runs[-1] else []
    return [TOKENIZERS[style].decode(run) for run in runs if run]


@pytest.mark.parametrize("style", ["chatml", "qwen35_style"])
def test_an_answer_of_images_alone_is_not_trained_on(folder: Path, style: str) -> None:
    turns = chat(text("Draw."), answer=[image(A)])["messages"]
    sample = encode({"messages": [*turns, *chat(text("Name it."))["messages"]]}, folder, style)
    check_sample(sample)
    assert trained_runs(sample, style) == [f"{ANSWER}<|im_end|>"]
    assert reason_of({"messages": turns}, folder, style)[0] == "nothing_to_train"


def test_documents(folder: Path) -> None:
    """Tags and fields; a tag of a kind that the record has no field of is text."""
    sample = encode_text({"text": "a <image>\nb<image> c <video>d", "images": BOTH}, folder)
    check_sample(sample)
    pads = [f"<|vision_start|>{'<|image_pad|>' * (h * w // 4)}<|vision_end|>" for ((_, h, w),) in
            (medium.frames for medium in sample.media)]  # fmt: skip
    by_hand = AutoTokenizer.from_pretrained(MODEL)(f"a {pads[0]}\nb{pads[1]} c <video>d").input_ids
    assert sample.tokens.tolist() == [*by_hand, 4093]
    untrained = {place for medium in sample.media for place in range(medium.begin - 1, medium.end - 1)}
    assert {*np.flatnonzero(sample.labels == IGNORED).tolist()} == untrained | {len(by_hand)}
    pictures = [medium.decode().tobytes() for medium in encode(PLAIN, folder).media]
    assert [medium.decode().tobytes() for medium in sample.media] == pictures
    one = encode_text({"text": "<image>", "image": A}, folder, ending=None)
    assert len(one.tokens) == one.media[0].end - one.media[0].begin
    with_video = encode_text({"text": "x?<video><image>y", "images": A, "videos": [CLIP]}, folder)
    check_sample(with_video)
    assert [len(medium.frames) for medium in with_video.media] == [3, 1]
    assert contents(encode_text({"text": "<image> a"}, folder)) == contents(
        encode_text({"text": "<image> a", "image": None}, folder)
    )
    assert not encode_text({"text": "<image> a"}, folder).media


def test_what_a_source_says_beside_its_place(folder: Path) -> None:
    question = [{"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "A cat."}]
    source = {"path": A, "detail": "high", "width": 60, "sha256": "0a", "caption": "A cat.", "start": None}
    image = [{"role": "user", "content": "<image>What?"}, question[1]]
    assert len(encode({"messages": image, "images": [source]}, folder).media) == 1
    for key in ("start", "resized_height", "crop"):
        record = {"messages": image, "images": [{**source, key: 1.5}]}
        assert reason_of(record, folder) == ("unused_field", f"has image with {key!r}, which is not read")
    for key in ("fps", "video_fps", "sample_fps"):
        record = {"messages": question, "videos": [CLIP], key: 2}
        message = f"has {key!r} beside videos of pictures: expected it in their parts"
        assert reason_of(record, folder) == ("unused_field", message)


@pytest.mark.parametrize(
    "nothing",
    [None, "", [], [None], [""], [{"path": ""}], {"bytes": b"", "path": None}, [{"bytes": b"", "path": None}]],
)
@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_tag_whose_field_is_empty_is_refused(folder: Path, kind: str, nothing: object) -> None:
    """As where a download failed; the rows of a table without a tag have an empty field too."""
    messages = [{"role": "user", "content": f"<{kind}>What?"}, {"role": "assistant", "content": "A cat."}]
    reason, message = reason_of({"messages": messages, f"{kind}s": nothing}, folder)
    assert (reason, message) == ("media_count", f"names more {kind}s than the 0 that it has")
    document = {"text": f"<{kind}> a", f"{kind}s": nothing}
    without_tower = EncodeText(Data(), TOKENIZERS["chatml"].backend_tokenizer, None, 1000)
    for encode_document in (without_tower, functools.partial(encode_text, folder=folder)):
        with pytest.raises(BadSample, match="names more") as caught:
            encode_document(document)
        assert caught.value.reason == "media_count"
    plain = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": f"Write <{kind}>."}]
    assert contents(encode({"messages": plain, f"{kind}s": nothing}, folder)) == contents(
        encode({"messages": plain}, folder)
    )


# ------------------------------------------------------------------------------------------- refusals


def reason_of(record: Any, folder: Path, style: str = "chatml", **options: Any) -> tuple[str, str]:
    with pytest.raises(BadSample) as caught:
        encode(record, folder, style, **options)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500
    return caught.value.reason, str(caught.value)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    (chat(text("<image>?"), images=BOTH), "media_count", "has 1 images more than its texts name by <image>"),
    (chat(text("<image><image>?"), images=[A]), "media_count", "names more images than the 1 that it has"),
    (chat(text("?"), images=[A]), "media_count", "has 1 images more"),
    (chat({"type": "image"}, text("?")), "media_count", "names more images than the 0"),
    (chat(text("<image>?"), images=[A], videos=[CLIP]), "media_count", "has 1 videos more"),
    (chat(text("<image>?"), images=[A], image=B), "unused_field", "has both 'images' and 'image'"),
    (chat(image(A, path=B)), "unused_field", "more than one image"),
    (chat(image(A, min_pixels=3)), "unused_field", "of type 'image' that has 'min_pixels'"),
    (chat(image(A, resized_height=3)), "unused_field", "'resized_height'"),
    (chat(image(A, text="what?")), "unused_field", "'text'"),
    (chat(image(A, fps=2)), "unused_field", "'fps'"),
    (chat(image(A, index=0)), "unused_field", "'index'"),
    (chat({"type": "image", "index": 1}, images=[A]), "unused_field", "'index'"),
    (chat(image(A, video="x.mp4")), "unused_field", "'video'"),
    (chat(video(CLIP, max_frames=3)), "unused_field", "'max_frames'"),
    (chat(video("x.mp4", fps=1.0)), "unused_field", "'fps'"),
    (chat(video(CLIP, fps="2")), "wrong_type", "fps '2'"),
    (chat(video(CLIP, fps=0)), "wrong_type", "fps 0"),
    (chat(video(CLIP, fps=float("nan"))), "wrong_type", "fps nan"),
    (chat(video(CLIP, fps=True)), "wrong_type", "fps True"),
    (chat({"type": "audio", "audio": "x.wav"}), "unused_field", "of type 'audio', expected 'text', 'image' or 'video'"),
    (chat({"type": "image_file", "image": A}), "unused_field", "'image_file'"),
    (chat({"type": {"image": A}, "image": A}), "unused_field", "of type {'image': 'a.png'}"),
    (chat({"type": ["image"], "image": A}), "unused_field", "of type ['image']"),
    (chat(image("https://example.org/a.jpg")), "missing_file", "nothing is fetched"),
    (chat(image("s3://bucket/a.jpg")), "missing_file", "nothing is fetched"),
    (chat(image("file://host/a.jpg")), "missing_file", "'file://host/a.jpg' as image"),
    (chat({"type": "image_url", "image_url": {"url": "HTTP://example.org/a.jpg"}}), "missing_file", "nothing is"),
    (chat(image("none.jpg")), "missing_file", "none.jpg"),
    (chat(image("sub")), "missing_file", "is no file"),
    (chat(image("a\0b.png")), "missing_file", "a\\x00b.png"),
    (chat(image("x" * 300_000)), "missing_file", "too long"),
    (chat(image("\ud800.png")), "missing_file", ""),
    (chat(image("")), "wrong_type", "has '' as image"),
    (chat({"type": "image", "image": 7}), "wrong_type", "has 7 as image"),
    (chat({"type": "image", "image": [A]}), "wrong_type", "as image"),
    (chat({"type": "image", "image": {"src": A}}), "wrong_type", "has None as image"),
    (chat({"type": "image", "base64": 5}), "wrong_type", "as image"),
    (chat({"type": "image", "base64": "no base 64!"}), "broken_image", "not base64"),
    (chat(image("data:image/png;base64,AAA")), "broken_image", "not base64"),
    (chat(image("data:image/png;base64,AAAA")), "broken_image", "no image"),
    (chat({"type": "image", "image": {"bytes": b""}}), "broken_image", "no image"),
    (chat(text("<image>"), images=[A, None]), "media_count", "1 images more"),
    (chat(text("<image><image>"), images=[A, None]), "wrong_type", "has None as image"),
    (chat(video([])), "broken_video", "without frames"),
    (chat(video([A])), "broken_video", "1 frame: expected 2"),
    (chat(video([A, B])), "broken_video", "expected one size"),
    (chat(video([A, "none.png"])), "missing_file", "none.png"),
    (chat(image(A), text("<|image_pad|>")), "special_token", "'<|image_pad|>' in a text"),
    (chat(image(A), text("?"), answer="<|vision_start|>"), "special_token", "'<|vision_start|>' in a text"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "reason", "message"), REFUSED)
def test_refused(folder: Path, record: dict[str, Any], reason: str, message: str) -> None:
    found, said = reason_of(record, folder)
    assert (found, message in said) == (reason, True), said


def test_a_template_of_texts_alone_refuses_images(folder: Path) -> None:
    assert reason_of(PLAIN, folder, "texts alone")[0] == "unrendered"


@pytest.mark.parametrize("record", [PLAIN, {"text": "<image>", "images": [A]}])
def test_a_model_without_a_tower_refuses_images_sample_by_sample(folder: Path, record: dict[str, Any]) -> None:
    tokenizer = TOKENIZERS["chatml"]
    encoders = (
        EncodeChat(Data(format="chat"), tokenizer, 1000) if "messages" in record
        else EncodeText(Data(), tokenizer.backend_tokenizer, None, 1000)
    )  # fmt: skip
    with pytest.raises(BadSample, match=r"built without its vision tower: expected model\.vision = 'on'") as caught:
        encoders(record)
    assert caught.value.reason == "no_vision"


def test_a_field_that_no_tag_of_a_document_names(folder: Path) -> None:
    """For a model that sees, an image would be lost; for another the field is one of many that say nothing to it."""
    record = {"text": "no tag", "image": A}
    with pytest.raises(BadSample, match="has 1 images more than its texts name by <image>"):
        encode_text(record, folder)
    encoder = EncodeText(Data(), TOKENIZERS["chatml"].backend_tokenizer, None, 1000)
    assert encoder(record).tokens.tolist() == encoder({"text": "no tag"}).tokens.tolist()
    assert not has_media(record, Data())
    assert has_media({"text": "a <image>", "image": A}, Data())


@pytest.mark.parametrize(
    "content", ["<|image_pad|>", "a<|vision_start|><|video_pad|><|vision_end|>", "<image><|image_pad|>"]
)
def test_literal_placeholders_of_documents_are_refused(folder: Path, content: str) -> None:
    with pytest.raises(BadSample) as caught:
        encode_text({"text": content, "images": [A] if "<image>" in content else None}, folder)
    assert caught.value.reason == "special_token"


def test_tokenised_corpora_too() -> None:
    tokenizer = TOKENIZERS["chatml"].backend_tokenizer
    encoder = EncodeText(Data(), tokenizer, None, 1000, reader())
    assert len(encoder(np.array([1, 2], np.uint16)).tokens) == 2
    with pytest.raises(BadSample, match="placeholder"):
        encoder(np.array([1, IMAGE], np.uint16))


def test_tags_without_a_field_are_text(folder: Path) -> None:
    plain = encode(
        {"messages": [{"role": "user", "content": "<image>? <video>"}, {"role": "assistant", "content": "a"}]}
    )
    assert not plain.media
    assert "<image>? <video>" in TOKENIZERS["chatml"].decode(plain.tokens.tolist())
    assert not has_media({"messages": [{"role": "user", "content": "<image>"}]}, Data(format="chat"))
    assert "<video>" in TOKENIZERS["chatml"].decode(
        encode(chat(text("<image> or <video>?"), images=[A]), folder).tokens.tolist()
    )


@pytest.mark.parametrize(
    "record",
    [
        {"messages": 5}, {"messages": None}, {"messages": "x"}, {"messages": [5, None]}, {}, [1], 5,
        {"messages": [{"content": [{"text": "a", "image": None}]}]}, {"images": [None, {}]}, {"image": ""},
        {"image": {"bytes": None, "path": None}}, {"image": False},
        {"messages": [{"content": [{"type": "text", "text": "a", "image": None}]}]},
    ],
)  # fmt: skip
def test_what_shows_nothing(record: Any) -> None:
    assert not has_media(record, Data(format="chat"))


def test_a_tokenizer_without_the_tokens_is_one_line() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL.parents[1] / "tiny" / "tokenizer")
    with pytest.raises(
        UserError, match="the model's image_token_id = 4098 is None: expected one of its special tokens"
    ):
        MediaReader(SETTINGS, ".", tokenizer)
    shifted = SETTINGS._replace(vision=replace(SETTINGS.vision, image_token_id=100))
    with pytest.raises(UserError, match="image_token_id = 100 is "):
        MediaReader(shifted, ".", TOKENIZERS["chatml"])


# ------------------------------------------------------------------------------------------ properties

WORDS = st.lists(st.sampled_from([" red", " cat", " one", " the"]), min_size=1, max_size=4).map("".join)
SIZES = st.tuples(st.integers(20, 100), st.integers(20, 100))
IMAGES_OF = SIZES.map(lambda size: {"type": "image", "bytes": picture(*size)})
VIDEOS = st.tuples(SIZES, st.integers(2, 5), st.sampled_from([1, 2.5, 24])).map(
    lambda drawn: video([picture(*drawn[0], number) for number in range(drawn[1])], fps=drawn[2])
)
PARTS = st.lists(st.one_of(WORDS.map(text), IMAGES_OF, VIDEOS), max_size=5)


@st.composite
def chats(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A few questions and answers, with pictures anywhere in both."""
    messages = []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": [text("Q"), *draw(PARTS)]})
        answer = draw(PARTS)
        answer.insert(draw(st.integers(0, len(answer))), text(" so"))
        messages.append({"role": "assistant", "content": answer} | draw(st.sampled_from([{}, {"weight": 0}])))
    messages[-1].pop("weight", None)
    return messages


@settings(max_examples=60, deadline=None)
@given(chats(), st.sampled_from(["all", "last"]), st.sampled_from(["chatml", "qwen35_style"]))
def test_no_placeholder_is_ever_trained_on_and_all_else_is(messages: list[Any], train_on: str, style: str) -> None:
    sample = encode({"messages": messages}, ".", style, train_on=train_on)
    check_sample(sample)
    answers = [message for message in messages[1::2] if message.get("weight", 1)]
    answers = answers[-1:] if train_on == "last" else answers
    texts = ["".join(part.get("text", "") for part in message["content"]) + "<|im_end|>" for message in answers]
    expected = "".join(t.strip() for t in texts) if style == "qwen35_style" else "".join(texts)
    found = TOKENIZERS[style].decode(sample.labels[sample.labels != IGNORED].tolist())
    assert found.replace(" ", "") == expected.replace(" ", "")
    shown = [part for message in messages for part in message["content"] if part["type"] != "text"]
    assert len(sample.media) == len(shown)


@settings(max_examples=40, deadline=None)
@given(chats(), st.data())
def test_a_piece_is_never_cut_inside_of_an_image(messages: list[Any], data: st.DataObject) -> None:
    sample = encode({"messages": messages})
    room = data.draw(st.integers(1, len(sample.tokens)))
    piece = sample.piece(0, room)
    assert len(piece.tokens) <= room
    assert piece.tokens.tolist() == sample.tokens[: len(piece.tokens)].tolist()
    whole = [medium for medium in sample.media if medium.end <= len(piece.tokens)]
    assert [(medium.begin, medium.end) for medium in piece.media] == [(medium.begin, medium.end) for medium in whole]
    if len(piece.tokens) < room:  # an image begins there
        following = sample.media[len(whole)]
        assert following.begin == len(piece.tokens) < room < following.end
    is_pad = np.isin(piece.tokens, (IMAGE, VIDEO))
    assert is_pad.sum() == sum(h * w // 4 for medium in piece.media for _, h, w in medium.frames)
    assert not np.isin(piece.labels, (START, END, IMAGE, VIDEO)).any()
