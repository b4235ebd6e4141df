"""Rows with images: the same on any layout and after any interruption, whatever files break, early or late."""

import collections
import functools
import itertools
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from config.options import Data, Training
from data.batch import MicroBatch
from data.loader import Packer, TokenLoader
from data.packing import NUM_PENDING, BadSample
from data.samples import open_samples
from data.tokenizer import load_tokenizer
from errors import UserError
from models.ops.labels import IGNORED
from tests.data.media_shapes import END, IMAGE, MODEL, SETTINGS, START, TOKENIZERS, encode, encode_text, noise, picture
from tests.data.media_shapes import write_lines as write

NUM_SLOTS, SEQUENCE_LENGTH, GREY = 4, 128, 127
NUM_RECORDS = 60
BROKEN = {6, 13, 24, 33}  # images whose header is good and whose pixels break
SIZES = [(40, 40), (64, 96), (120, 33), (150, 150), (33, 64)]
KINDS = ("chat", "text")


def images_of(number: int) -> list[int]:
    """Of a record: none, one, two or three of the images of its own."""
    return [3 * number + each for each in range((0, 1, 2, 1, 3)[number % 5])]


def chat_of(number: int) -> dict[str, Any]:
    names = images_of(number)
    user = {"role": "user", "content": [*({"type": "image", "image": f"{n}.jpg"} for n in names),
                                        {"type": "text", "text": f"Number {number}?"}]}  # fmt: skip
    answer = {"role": "assistant", "content": f"{number} " * (1 + number % 13)}
    return {"messages": [user, answer]}


def document_of(number: int) -> dict[str, Any]:
    names = images_of(number)
    text = f"Document {number} " + " so ".join(f"shows <image> {n}" for n in names) + " and ends." * (number % 7)
    return {"text": text, "images": [f"{n}.jpg" for n in names]}


RECORDS = {"chat": [chat_of(n) for n in range(NUM_RECORDS)], "text": [document_of(n) for n in range(NUM_RECORDS)]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """good/ and broken/ with the images, chat.jsonl and text.jsonl."""
    folder = tmp_path_factory.mktemp("media")
    for name in ("good", "broken"):
        (folder / name).mkdir()
    for number in itertools.chain.from_iterable(map(images_of, range(NUM_RECORDS))):
        content = picture(*SIZES[number % len(SIZES)], number, "JPEG")
        (folder / "good" / f"{number}.jpg").write_bytes(content)
        (folder / "broken" / f"{number}.jpg").write_bytes(
            content[: len(content) * 2 // 3] if number in BROKEN else content
        )
    for kind in KINDS:
        write(folder / f"{kind}.jsonl", RECORDS[kind])
    return folder


@pytest.fixture(autouse=True, scope="module")
def _one_tokenizer() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.loader.load_tokenizer", functools.cache(load_tokenizer))
        yield


def make_loader(
    path: Path, images: Path, rank: int = 0, ranks: int = 1, *, workers: int = 0, micro: int = 1,
    slots: int = NUM_SLOTS, sequence_length: int = SEQUENCE_LENGTH, one_epoch: bool = False,
    skipped_dir: Path | None = None, **data: Any,
) -> TokenLoader:  # fmt: skip
    training = Training(steps=1, sequence_length=sequence_length, local_batch_size=micro, global_batch_size=slots)
    data = {"format": path.stem if path.stem in KINDS else "chat", "num_workers": workers, **data}
    options = Data(path=(str(path),), image_folder=str(images), tokenizer=str(MODEL), **data)
    return TokenLoader(
        options, training, rank, ranks, 5, media=SETTINGS, one_epoch=one_epoch, skipped_dir=skipped_dir
    )  # fmt: skip


def test_pictures_that_come_or_change_are_counted_anew(folder: Path, tmp_path: Path) -> None:
    """As where some are fetched when a preview has named them: epochs have other lengths then."""

    def read(images: Path) -> tuple[int, int]:
        """How many steps there are, and how many tokens of images in them."""
        training = Training(epochs=1, sequence_length=SEQUENCE_LENGTH, global_batch_size=NUM_SLOTS)
        data = Data(path=(str(folder / "chat.jsonl"),), format="chat", image_folder=str(images), tokenizer=str(MODEL),
                    num_workers=0)  # fmt: skip
        loader = TokenLoader(data, training, 0, 1, 5, media=SETTINGS)
        num_steps = loader.num_steps_left()
        batches = [next(loader) for _ in range(loader.num_micro_batches * (num_steps + 1))]
        assert all((batch.labels == IGNORED).all() for batch in batches[-loader.num_micro_batches :])
        return num_steps, sum(int((batch.tokens == IMAGE).sum()) for batch in batches)

    expected = read(folder / "good")
    images = tmp_path / "some"
    images.mkdir()
    assert read(images)[1] == 0
    for path in (folder / "good").iterdir():
        (images / path.name).write_bytes(path.read_bytes())
    assert read(images) == expected
    (images / "3.jpg").write_bytes(picture(256, 256, 1, "JPEG"))
    larger = read(images)
    assert larger[1] > expected[1]
    (images / "3.jpg").unlink()
    assert read(images)[1] < expected[1]


def content_of(batches: list[MicroBatch]) -> dict[str, Any]:
    """A global batch, laid end to end; what stands at no place is left out."""
    shown: list[Any] = []
    for batch in batches:
        patches = batch.patches
        assert patches is not None
        places = patches.places.tolist()
        assert places == (batch.tokens == IMAGE).nonzero().flatten().tolist()
        if places:
            frames = patches.frames.lengths()
            shown += [(len(pixels), pixels.numpy().tobytes()) for pixels in patches.pixels.split(frames)]
    return {
        "tokens": torch.cat([batch.tokens for batch in batches]).tolist(),
        "labels": torch.cat([batch.labels for batch in batches]).tolist(),
        "positions": torch.cat([batch.positions for batch in batches], dim=1).tolist(),
        "is_real": torch.cat([batch.is_real for batch in batches]).tolist(),
        "lengths": [length for batch in batches for length in batch.documents.lengths()],
        "shown": shown,
    }


def run(
    path: Path, images: Path, num_steps: int, ranks: int = 1, cursors: torch.Tensor | None = None, **options: Any
) -> tuple[list[dict[str, Any]], list[torch.Tensor]]:
    """The global batches, and all cursors before the first and after each."""
    loaders = [make_loader(path, images, rank, ranks, **options) for rank in range(ranks)]
    try:
        for loader in loaders:
            if cursors is not None:
                loader.load_cursors(cursors)
        steps, all_cursors = [], [torch.cat([loader.cursors for loader in loaders])]
        for _ in range(num_steps):
            steps.append(content_of([next(loader) for loader in loaders for _ in range(loader.num_micro_batches)]))
            all_cursors.append(torch.cat([loader.cursors for loader in loaders]))
        return steps, all_cursors
    finally:
        for loader in loaders:
            loader.close()


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[tuple[str, str], Any]:
    """Of each kind and folder of images: five steps of one process."""
    return {(kind, images): run(folder / f"{kind}.jsonl", folder / images, 5) for kind in KINDS
            for images in ("good", "broken")}  # fmt: skip


# ------------------------------------------------------------------------------------- order and resume


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ranks", "workers", "micro"), [(1, 0, 4), (2, 0, 1), (4, 0, 1), (1, 3, 2), (2, 1, 2)])
def test_rows_are_the_same_on_any_layout(
    folder: Path, references: dict[Any, Any], kind: str, ranks: int, workers: int, micro: int
) -> None:
    steps, cursors = run(
        folder / f"{kind}.jsonl", folder / "broken", 5, ranks, workers=workers, micro=micro
    )  # fmt: skip
    expected, all_cursors = references[kind, "broken"]
    assert steps == expected
    assert torch.equal(torch.stack(cursors), torch.stack(all_cursors))
    assert sum(len(step["shown"]) for step in steps) > 20


LAYOUTS = st.sampled_from([(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(interruptions=st.lists(st.tuples(st.integers(0, 3), LAYOUTS), min_size=1, max_size=3), last=LAYOUTS)
def test_interrupted_anywhere(
    folder: Path, references: dict[Any, Any], kind: str, interruptions: list[Any], last: tuple[int, int]
) -> None:
    path, images = folder / f"{kind}.jsonl", folder / "broken"
    steps, cursors = list[Any](), None
    for num_steps, (ranks, micro) in interruptions:
        more, all_cursors = run(path, images, num_steps, ranks, cursors, micro=micro)
        steps, cursors = steps + more, all_cursors[-1]
    more, _ = run(path, images, max(0, 5 - len(steps)), last[0], cursors, micro=last[1])
    assert (steps + more)[:5] == references[kind, "broken"][0]


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_with_workers(folder: Path, references: dict[Any, Any], kind: str) -> None:
    path, images = folder / f"{kind}.jsonl", folder / "broken"
    first, cursors = run(path, images, 2, 1, workers=3, micro=2)
    rest, _ = run(path, images, 3, 2, cursors[-1], workers=1)
    assert first + rest == references[kind, "broken"][0]


# ------------------------------------------------------------------ what breaks while it is decoded


def documents_in(step: dict[str, Any]) -> Iterator[tuple[list[int], list[int], int]]:
    """Tokens and labels of each document of a step, and how many images it shows."""
    begin = 0
    for length in step["lengths"]:
        tokens = step["tokens"][begin : begin + length]
        yield tokens, step["labels"][begin : begin + length], tokens.count(START)
        begin += length


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_body_changes_no_row_but_its_labels_and_pixels(
    folder: Path, references: dict[Any, Any], kind: str
) -> None:
    """Rows, cursors and all other samples are those of the good files."""
    (good, good_cursors), (broken, cursors) = references[kind, "good"], references[kind, "broken"]
    assert torch.equal(torch.stack(good_cursors), torch.stack(cursors))
    pixels_of = {
        medium.decode().tobytes(): number
        for record, own in zip(RECORDS[kind], map(images_of, range(NUM_RECORDS)))
        for medium, number in zip((encode if kind == "chat" else encode_text)(record, folder / "good").media, own)
    }
    assert len(pixels_of) == len({*itertools.chain.from_iterable(map(images_of, range(NUM_RECORDS)))})
    num_broken = 0
    for step, other in zip(good, broken):
        for key in ("tokens", "positions", "is_real", "lengths"):
            assert other[key] == step[key]
        shown = iter(zip(step["shown"], other["shown"]))
        for (_, labels, num_images), (_, other_labels, _) in zip(documents_in(step), documents_in(other)):
            pairs = [next(shown) for _ in range(num_images)]
            names = [pixels_of[pixels] for (_, pixels), _ in pairs]
            if not BROKEN & {*names}:
                assert other_labels == labels
                assert all(before == after for before, after in pairs)
                continue
            num_broken += 1
            assert {*other_labels} == {IGNORED}
            first = next(place for place, name in enumerate(names) if name in BROKEN)
            for place, ((_, pixels), (_, others)) in enumerate(pairs):
                assert others == (pixels if place < first else bytes([GREY]) * len(pixels))
        assert next(shown, None) is None
    assert num_broken >= 2


@pytest.mark.parametrize("workers", [0, 2])
def test_it_is_counted_and_listed_with_its_place(folder: Path, tmp_path: Path, workers: int) -> None:
    loader = make_loader(
        folder / "chat.jsonl", folder / "broken", workers=workers, micro=4, one_epoch=True, skipped_dir=tmp_path
    )  # fmt: skip
    while next(loader).is_real.any():
        pass
    loader.close()
    assert {key: count for key, count in loader.counts.items() if "tokens" not in key} == {"broken_image": 4}
    lines = [json.loads(line) for line in (tmp_path / "rank-00000.jsonl").read_text().splitlines()]
    lost = sorted({number for number in range(NUM_RECORDS) if BROKEN & {*images_of(number)}})
    assert len(lost) == len(BROKEN)
    for line, number in zip(sorted(lines, key=place_of), lost, strict=True):
        assert line["reason"] == "broken_image"
        assert line["sample"].startswith(f"{folder}/chat.jsonl, line {number + 1}: {folder}/broken/")


def test_a_sample_with_several_broken_images_is_one(folder: Path, tmp_path: Path) -> None:
    """And nothing more of it is decoded."""
    half = (folder / "broken" / f"{min(BROKEN)}.jpg").read_bytes()
    parts = []
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(half)
        parts.append({"type": "image", "image": f"{number}.jpg"})
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]
    path = write(tmp_path / "chat.jsonl", [{"messages": turns}])
    loader = make_loader(path, tmp_path, micro=4, one_epoch=True)
    while next(loader).is_real.any():
        pass
    assert loader.counts["broken_image"] == 1


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_on_request_it_stops_the_run_in_one_line(folder: Path, kind: str, workers: int) -> None:
    path = folder / f"{kind}.jsonl"
    loader = make_loader(path, folder / "broken", workers=workers, shuffle=False, on_bad_sample="error")
    with pytest.raises(UserError, match=rf"{kind}\.jsonl, line \d+: .*/broken/\d+\.jpg cannot be decoded: ") as caught:
        collections.deque(itertools.islice(loader, 1000), maxlen=0)
    assert len(str(caught.value).splitlines()) == 1
    loader.close()


def test_a_header_that_is_bad_is_passed_over(folder: Path, tmp_path: Path) -> None:
    """Missing, empty, no image: these have no place in the rows, which are those of the data without them."""
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no image")
    good = [chat_of(number) for number in (0, 5, 10)]
    bad = [{"messages": [{"role": "user", "content": [{"type": "image", "image": f"{tmp_path}/{name}.jpg"}]},
                         {"role": "assistant", "content": "a"}]} for name in ("empty", "text", "missing")]  # fmt: skip
    mixed = write(tmp_path / "mixed.jsonl", [good[0], bad[0], good[1], bad[1], bad[2], good[2]])
    alone = write(tmp_path / "alone.jsonl", good)
    loaders = [
        make_loader(path, folder / "good", slots=1, shuffle=False, one_epoch=True, skipped_dir=tmp_path / path.stem)
        for path in (mixed, alone)
    ]
    assert content_of([next(loaders[0])]) == content_of([next(loaders[1])])
    assert {key: n for key, n in loaders[0].counts.items() if "tokens" not in key} == {
        "broken_image": 2,
        "missing_file": 1,
    }
    listed = (tmp_path / "mixed" / "rank-00000.jsonl").read_text()
    assert [json.loads(line)["sample"].partition(": ")[0] for line in listed.splitlines()] == [
        f"{mixed}, line {number}" for number in (2, 4, 5)
    ]


def place_of(line: dict[str, str]) -> int:
    """The line of the data that a line of skipped/ names."""
    return int(line["sample"].partition(", line ")[2].partition(":")[0])


FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "TGA", "ICO", "JPEG2000")


def damaged_files(folder: Path) -> list[str]:
    """Files of every kind, each damaged in some way, and what is no file."""
    random, names = np.random.default_rng(0), []
    for kind in FORMATS:
        whole = picture(48, 70, 3, kind)
        for number in range(12):
            content = bytearray(whole)
            if number % 3 == 0:
                content = content[: random.integers(len(content))]
            elif number % 3 == 1:
                for place in random.integers(len(content), size=1 + number):
                    content[place] = random.integers(256)
            else:
                place = random.integers(min(len(content), 200))
                content[place : place + 4] = b"\xff\xff\xff\xff"
            names.append(f"{kind}{number}")
            (folder / names[-1]).write_bytes(content)
    (folder / "nothing").write_bytes(b"")
    (folder / "zeros").write_bytes(bytes(5000))
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    bomb = Image.new("1", (30_000, 30_000))
    bomb.save(folder / "bomb", "PNG")
    Image.new("L", (5000, 3)).save(folder / "strip", "PNG")
    return [*names, "nothing", "zeros", "folder", "loop", "dangling", "pipe", "bomb", "strip", "no such file"]


def test_a_folder_of_damaged_files_of_every_kind(tmp_path: Path) -> None:
    """Each record is trained on, or counted and listed; nothing else happens."""
    names = damaged_files(tmp_path)
    records = []
    for name in names:
        content = [{"type": "image", "image": name}, {"type": "text", "text": "?"}]
        records.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": name}]})
    path = write(tmp_path / "chat.jsonl", records)
    loader = make_loader(path, tmp_path, micro=4, one_epoch=True, skipped_dir=tmp_path / "skipped")
    trained = list[str]()
    while (batch := next(loader)).is_real.any():
        assert batch.patches is not None
        answers = TOKENIZERS["chatml"].decode(batch.labels[batch.labels != IGNORED].tolist())
        trained += answers.split("<|im_end|>")[:-1]
    lines = [json.loads(line) for line in (tmp_path / "skipped" / "rank-00000.jsonl").read_text().splitlines()]
    places = {int(line["sample"].partition(", line ")[2].partition(":")[0]) for line in lines}
    assert len(places) == len(lines)
    assert sorted([*trained, *(names[place - 1] for place in places)]) == sorted(names)
    assert {line["reason"] for line in lines} == {"broken_image", "missing_file", "oversized"}
    reasons = {
        names[int(line["sample"].partition(", line ")[2].partition(":")[0]) - 1]: line["reason"] for line in lines
    }
    assert {reasons[name] for name in ("folder", "loop", "dangling", "pipe", "no such file")} == {"missing_file"}
    assert {reasons[name] for name in ("bomb", "strip")} == {"oversized"}
    assert len(trained) > 5


def test_a_frame_of_a_video_that_breaks(tmp_path: Path) -> None:
    frames = []
    for number in range(4):
        content = picture(48, 64, number, "JPEG")
        frames.append(f"{number}.jpg")
        (tmp_path / frames[-1]).write_bytes(content[: len(content) // 2] if number == 2 else content)
    turns = [{"role": "user", "content": [{"type": "video", "video": frames, "fps": 2}]},
             {"role": "assistant", "content": "a"}]  # fmt: skip
    loader = make_loader(write(tmp_path / "chat.jsonl", [{"messages": turns}]), tmp_path, slots=1)
    batch = next(loader)
    assert batch.num_trained == 0
    assert batch.patches is not None
    assert {*batch.patches.pixels.flatten().tolist()} == {GREY}
    assert loader.counts["broken_image"] > 0


# ---------------------------------------------------------------------------------------- what is too long


def test_long_chats_are_cut_before_the_first_image_that_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(150, 150))  # 25 tokens, and 2
    parts: list[Any] = [{"type": "text", "text": "Look"}]
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "First."}]
    for _ in range(6):
        parts += [{"type": "image", "image": "a.png"}, {"type": "text", "text": " and"}]
    record = {"messages": [*turns, {"role": "user", "content": parts}, {"role": "assistant", "content": "Last."}]}
    whole = encode(record, tmp_path)
    with pytest.raises(BadSample, match="more than the 100 of a row") as caught:
        encode(record, tmp_path, max_tokens=100)
    assert caught.value.reason == "too_long"
    for max_tokens in range(60, len(whole.tokens)):
        cut = encode(record, tmp_path, max_tokens=max_tokens, too_long="truncate")
        assert len(cut.tokens) <= max_tokens
        assert cut.tokens.tolist() == whole.tokens[: len(cut.tokens)].tolist()
        assert cut.note is not None
        assert cut.note[0] == "truncated"
        assert cut.tokens.tolist().count(START) == cut.tokens.tolist().count(END) == len(cut.media)
        assert (cut.tokens == IMAGE).sum() == 25 * len(cut.media)
        if len(cut.tokens) < max_tokens:
            assert whole.tokens[len(cut.tokens)] == START
            assert max_tokens < len(cut.tokens) + 27
    # All that is trained on stands behind the cut.
    late = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Last."}]}
    with pytest.raises(BadSample, match="none to train on among the first") as caught:
        encode(late, tmp_path, max_tokens=60, too_long="truncate")
    assert caught.value.reason == "too_long"


def test_documents_are_cut_before_an_image_at_the_rows_end(tmp_path: Path) -> None:
    """The row is filled up; the next one begins with the image. Every token comes once, as does every image."""
    (tmp_path / "a.png").write_bytes(picture(150, 150))
    path = write(
        tmp_path / "text.jsonl", [{"text": "one two three four five <image> and <image>" * 9, "image": ["a.png"] * 18}]
    )
    whole = encode_text({"text": "one two three four five <image> and <image>" * 9, "image": ["a.png"] * 18}, tmp_path)
    loader = make_loader(path, tmp_path, slots=1, one_epoch=True, sequence_length=70)
    tokens, num_short = list[int](), 0
    while (batch := next(loader)).is_real.any():
        own = batch.tokens[batch.is_real].tolist()
        tokens += own
        assert own.count(START) == own.count(END)
        assert own.count(IMAGE) == 25 * own.count(START)
        assert batch.patches is not None
        assert len(batch.patches.pixels) == 100 * max(own.count(START), 0) or not own.count(START)
        num_short += len(own) < 70
        labels = batch.labels[batch.is_real].tolist()
        following = whole.tokens[len(tokens)] if len(tokens) < len(whole.tokens) else None
        assert labels[-1] == (following if following not in (START, None) else IGNORED)
    assert tokens == whole.tokens.tolist()
    assert num_short > 3


def test_an_image_longer_than_a_row_is_a_bad_sample(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(150, 150))
    for max_tokens in (26, 27):
        try:
            encode_text({"text": "a <image>", "image": "a.png"}, tmp_path, max_tokens=max_tokens)
            assert max_tokens == 27
        except BadSample as error:
            assert (error.reason, max_tokens) == ("too_long", 26)  # noqa: PT017
            assert "has an image or a video of 27 tokens, a row has 26" in str(error)  # noqa: PT017


# ------------------------------------------------------------------------------ nothing is decoded ahead


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_come_from_headers_and_waiting_samples_hold_no_pixels(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    decoded = list[Any]()
    load = ImageFile.ImageFile.load

    def counting(self: Any) -> Any:
        decoded.append(self)
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", counting)
    data = Data(
        format=kind, path=(str(folder / f"{kind}.jsonl"),), image_folder=str(folder / "good"), tokenizer=str(MODEL)
    )
    samples = open_samples(data, load_tokenizer(str(MODEL)), 300, 5, SETTINGS)
    assert not decoded
    slot = (packer := Packer(samples, data, 0, 1, False)).slot(packer.first_cursor(0))
    row = slot.next_row(300)
    assert len({*map(id, decoded)}) == len(row.frames) > 2
    waiting = [sample for _, sample in getattr(slot, "_pending", [])] or [slot._document]
    assert kind == "text" or len(waiting) > NUM_PENDING // 2
    for sample in waiting:
        if sample is not None and sample.media:
            assert len(pickle.dumps(sample)) < 8 * len(sample.tokens) + 6000 * len(sample.media) + 4000


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_length_needs_no_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    (tmp_path / "a").write_bytes(picture(48, 70, 3, kind))
    monkeypatch.setattr(Image.core, "new", lambda *_: pytest.fail("a picture was made"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("a picture was decoded"))
    turns = [{"role": "user", "content": [{"type": "image", "image": "a"}]}, {"role": "assistant", "content": "a"}]
    assert len(encode({"messages": turns}, tmp_path).media[0].frames) == 1
    assert noise(1, 1).shape == (1, 1, 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("images", ["good", "broken"])
def test_the_rows_of_an_epoch_are_counted_without_pictures(folder: Path, kind: str, images: str) -> None:
    """Where images lie decides where rows end: a text is cut before one that has no room."""
    options = {"micro": NUM_SLOTS, "sequence_length": 40 if kind == "text" else SEQUENCE_LENGTH}
    loader = make_loader(folder / f"{kind}.jsonl", folder / images, one_epoch=True, **options)
    num_rows = loader.num_steps_left()
    tokens = [int(next(loader).is_real.sum()) for _ in range(num_rows + 2)]
    assert [count > 0 for count in tokens] == [True] * num_rows + [False, False]
