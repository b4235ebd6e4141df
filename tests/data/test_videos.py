"""Videos: frames, times and sizes beside transformers; pixels beside PyAV's own; damaged files; lists of frames."""

import importlib
import io
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from data.images import PixelRules, fit_image, image_patches
from data.packing import BadSample
from data.videos import fit_video, plan_video, require_av, sample_frames, video_patches
from errors import UserError

try:
    import av
except ImportError:
    av = None  # an optional package
needs_av = pytest.mark.skipif(av is None, reason="decodes video files: needs the package av")

# Where torchvision is missing, the package's names are stand-ins; the module itself is not.
reference = importlib.import_module("transformers.models.qwen3_vl.video_processing_qwen3_vl")
RULES = PixelRules()
HEIGHT, WIDTH = 64, 96
SIDES = st.integers(1, 40) | st.integers(1, 5000)


def pictures(num_frames: int, height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
    """Frames that move."""
    frame, y, x = np.mgrid[:num_frames, :height, :width]
    return np.stack([(2 * x + 5 * frame) % 256, (3 * y + frame) % 256, (x + y + 9 * frame) % 256], -1).astype(np.uint8)


def film(
    num_frames: int,
    fps: int = 25,
    codec: str = "h264",
    kind: str = "mp4",
    rotation: int = 0,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    shown_from: int = 0,
) -> bytes:
    """A file of `pictures`. `shown_from`: the frames before it are in the file and not in the film."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind, options={"avoid_negative_ts": "disabled"} if shown_from else {}) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = size
        stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        stream.codec_context.gop_size = 12
        if rotation:
            stream.set_display_rotation(rotation)
        frames = [av.VideoFrame.from_ndarray(picture, format="rgb24") for picture in pictures(num_frames, *size)]
        for packet in [packet for frame in [*frames, None] for packet in stream.encode(frame)]:
            if shown_from:
                packet.pts -= int(shown_from / fps / packet.time_base)
                packet.dts -= int(shown_from / fps / packet.time_base)
            container.mux(packet)
    return file.getvalue()


def decoded(content: bytes) -> list[NDArray[np.uint8]]:
    with av.open(io.BytesIO(content)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def as_png(picture: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def reason_of(source: Any, rules: PixelRules = RULES) -> str:
    """Why a video is refused, when it is decoded at the latest; "" if it is not."""
    try:
        video_patches(source, plan_video(source, rules), rules)
        return ""
    except BadSample as error:
        bad = error
    assert len(str(bad).splitlines()) == 1
    assert not isinstance(source, str) or repr(source).strip("'") in str(bad)
    return bad.reason


# ------------------------------------------------------------------------------------------------- which frames


@given(st.integers(1, 60_000), st.floats(0.5, 240), st.floats(0.1, 30), st.integers(1, 9), st.integers(0, 900))
@settings(max_examples=400, deadline=None)
def test_frames_and_times_equal_transformers(total: int, fps: float, rate: float, low: int, more: int) -> None:
    rules = PixelRules(fps=rate, min_frames=low, max_frames=low + more)
    processor = SimpleNamespace(fps=rate, min_frames=low, max_frames=low + more)
    metadata = SimpleNamespace(total_num_frames=total, fps=fps)
    expected = reference.Qwen3VLVideoProcessor.sample_frames(processor, metadata).tolist()
    assert sample_frames(total, fps, rules) == expected


@given(st.integers(2, 900), SIDES, SIDES, st.integers(1, 10**6), st.integers(0, 10**8))
@settings(max_examples=400, deadline=None)
def test_sizes_equal_transformers(num_frames: int, height: int, width: int, low: int, more: int) -> None:
    rules = PixelRules(video_min_pixels=low, video_max_pixels=low + more)
    try:
        expected = reference.smart_resize(num_frames, height, width, 2, 32, low, low + more)
    except ValueError:
        with pytest.raises(BadSample, match="in a ratio of 200 at most"):
            fit_video(num_frames, height, width, rules)
    else:
        assert fit_video(num_frames, height, width, rules) == expected


def test_sizes_near_the_limits_equal_transformers() -> None:
    """Where it matters what is counted: the frames, or those rounded to whole pairs."""
    rng = np.random.default_rng(0)
    for _ in range(10_000):
        num_frames, height, width = (int(rng.integers(2, 12)), *rng.integers(20, 500, 2).tolist())
        if max(height, width) > 15 * min(height, width):
            continue
        low = max(1, int(num_frames * height * width * rng.uniform(0.4, 1.2)))
        high = int(low * rng.uniform(1, 1.5))
        rules = PixelRules(video_min_pixels=low, video_max_pixels=high)
        assert fit_video(num_frames, height, width, rules) == reference.smart_resize(
            num_frames, height, width, 2, 32, low, high
        )


def test_sizes_on_record() -> None:
    for num_frames, size in {6: (1088, 1920), 60: (480, 832), 768: (128, 224)}.items():
        assert fit_video(num_frames, 1080, 1920, RULES) == size
    assert fit_video(4, 10, 20, RULES) == (32, 64)


@needs_av
def test_three_seconds_at_25_frames(tmp_path: Path) -> None:
    path = tmp_path / "film"
    path.write_bytes(film(75))
    plan = plan_video(str(path), RULES)
    assert plan.indices == (0, 15, 30, 44, 59, 74)
    assert [f"{time:.1f}" for time in plan.timestamps] == ["0.3", "1.5", "2.7"]
    assert (plan.height, plan.width) == (HEIGHT, WIDTH)
    assert plan == plan_video(path.read_bytes(), RULES)
    assert plan_video(str(path), RULES._replace(fps=1)).indices == (0, 25, 49, 74)
    assert plan_video(str(path), RULES._replace(max_frames=4)).indices == (0, 25, 49, 74)


@needs_av
@pytest.mark.parametrize("num_frames", range(1, 10))
def test_few_frames(num_frames: int) -> None:
    content = film(num_frames)
    if num_frames == 1:
        with pytest.raises(BadSample, match="1 frame: expected 2 at least, or an image") as caught:
            plan_video(content, RULES)
        assert caught.value.reason == "broken_video"
        return
    plan = plan_video(content, RULES._replace(fps=25))
    expected = [*range(num_frames), *[num_frames - 1] * (num_frames % 2)]
    assert list(plan.indices) == expected
    assert list(plan.timestamps) == Qwen3VLProcessor._calculate_timestamps(None, [*range(num_frames)], 25.0)
    patches = video_patches(content, plan, RULES)
    frames = decoded(content)
    assert_patches_are(patches, [frames[index] for index in expected])
    assert len(plan_video(content, RULES).indices) == min(4, num_frames + num_frames % 2)


def assert_patches_are(patches: NDArray[np.uint8], frames: list[NDArray[np.uint8]]) -> None:
    """The patches of these frames, by transformers."""
    stack = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)[None]
    values, *_ = reference.Qwen3VLVideoProcessor.patchify(None, stack, 16, 2, 2)
    np.testing.assert_array_equal(patches, values[0].numpy())


# ------------------------------------------------------------------------------------------------- files


@needs_av
@pytest.mark.parametrize(
    ("codec", "kind"),
    [
        ("h264", "mp4"),
        ("h264", "mov"),
        ("h264", "matroska"),
        ("h264", "mpegts"),
        ("mpeg4", "mp4"),
        ("mpeg4", "avi"),
        ("mjpeg", "avi"),
        ("mpeg2video", "mpeg"),
        ("gif", "gif"),
        ("libvpx-vp9", "webm"),
    ],
)
def test_every_container(tmp_path: Path, codec: str, kind: str) -> None:
    """Those that tell the number of frames and those that do not."""
    content = film(31, codec=codec, kind=kind)
    frames = decoded(content)
    assert len(frames) == 31
    path = tmp_path / "film"
    path.write_bytes(content)
    plan = plan_video(str(path), RULES._replace(fps=5))
    assert plan.indices == (0, 6, 12, 18, 24, 30)
    patches = video_patches(str(path), plan, RULES)
    assert_patches_are(patches, [frames[index] for index in plan.indices])
    np.testing.assert_array_equal(patches, video_patches(content, plan, RULES))


@needs_av
@pytest.mark.parametrize("shown_from", [1, 5, 12, 13])
@pytest.mark.parametrize("codec", ["h264", "mpeg4"])
def test_frames_that_are_not_shown_do_not_count(codec: str, shown_from: int) -> None:
    """Of a film that was cut without encoding it again. Its index lists all of its frames, or (h264) some."""
    content = film(40, codec=codec, shown_from=shown_from)
    frames = decoded(content)
    assert len(frames) == 40 - shown_from
    plan = plan_video(content, RULES)
    assert plan.indices[-1] == len(frames) - 1
    assert_patches_are(video_patches(content, plan, RULES), [frames[index] for index in plan.indices])


@needs_av
@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_a_film_is_turned_as_it_is_shown(rotation: int) -> None:
    content = film(4, rotation=rotation)
    plan = plan_video(content, RULES)
    assert (plan.height, plan.width) == ((WIDTH, HEIGHT) if rotation % 180 else (HEIGHT, WIDTH))
    shown = [np.ascontiguousarray(np.rot90(frame, rotation // 90)) for frame in decoded(content)]
    assert_patches_are(video_patches(content, plan, RULES), shown)


@needs_av
def test_frames_are_resized_as_images() -> None:
    content = film(4, size=(70, 130))
    rules = RULES._replace(video_max_pixels=4 * 64 * 96, min_pixels=64, max_pixels=64 * 96)
    plan = plan_video(content, rules)
    assert (plan.height, plan.width) == fit_image(70, 130, rules) == (32, 96)
    frames = decoded(content)
    images = [image_patches(as_png(frame), plan.height, plan.width, rules) for frame in frames]
    patches = video_patches(content, plan, rules).reshape(2, -1, 3, 2, 256)
    for place, image in enumerate(images):
        np.testing.assert_array_equal(patches[place // 2, :, :, place % 2], image.reshape(-1, 3, 2, 256)[:, :, 0])


# ------------------------------------------------------------------------------------------------- lists of frames


@needs_av
def test_a_list_of_frames_equals_its_file(tmp_path: Path) -> None:
    content = film(75)
    plan = plan_video(content, RULES)
    frames = decoded(content)
    paths = [tmp_path / f"{index}.png" for index in plan.indices]
    for path, index in zip(paths, plan.indices):
        path.write_bytes(as_png(frames[index]))
    for source in (tuple(map(str, paths)), tuple(path.read_bytes() for path in paths)):
        listed = plan_video(source, RULES, fps=25.0, source_indices=plan.indices)
        assert listed == plan._replace(indices=tuple(range(6)))
        np.testing.assert_array_equal(video_patches(source, listed, RULES), video_patches(content, plan, RULES))


def test_frames_are_never_sampled_again() -> None:
    source = tuple(as_png(picture) for picture in pictures(61))
    plan = plan_video(source, RULES._replace(max_frames=4, fps=0.1))
    assert plan.indices == (*range(61), 60)
    assert len(plan.timestamps) == 31
    assert video_patches(source, plan, RULES).shape == (31 * 4 * 6, 1536)


@given(st.integers(2, 9), st.none() | st.floats(0.1, 100), st.data())
@settings(max_examples=50, deadline=None)
def test_the_times_of_frames_equal_transformers(num_frames: int, fps: float | None, data: st.DataObject) -> None:
    source = (as_png(pictures(1)[0]),) * num_frames
    places = sorted(data.draw(st.sets(st.integers(0, 999), min_size=num_frames, max_size=num_frames)))
    expected = Qwen3VLProcessor._calculate_timestamps(None, [*places], fps or 24)
    assert list(plan_video(source, RULES, fps, places).timestamps) == expected
    plain = plan_video(source, RULES, fps)
    assert list(plain.timestamps) == Qwen3VLProcessor._calculate_timestamps(None, [*range(num_frames)], fps or 24)


def test_five_frames_of_nothing_known() -> None:
    source = tuple(as_png(picture) for picture in pictures(5))
    plan = plan_video(source, RULES)
    assert plan.indices == (0, 1, 2, 3, 4, 4)
    assert [f"{time:.1f}" for time in plan.timestamps] == ["0.0", "0.1", "0.2"]
    assert_patches_are(video_patches(source, plan, RULES), [pictures(5)[index] for index in plan.indices])


def test_bad_lists_of_frames(tmp_path: Path) -> None:
    good, other = as_png(pictures(1)[0]), as_png(pictures(1, 32, 32)[0])
    assert reason_of(()) == "broken_video"
    assert reason_of((good,)) == "broken_video"
    assert reason_of((good, other)) == "broken_video"
    assert reason_of((good, good[:50])) == "broken_image"
    assert reason_of((good, good[:-100])) == "broken_image"
    assert reason_of((good, str(tmp_path / "none.png"))) == "missing_file"
    strip = as_png(pictures(1, 1, 201)[0])
    assert reason_of((strip, strip)) == "oversized"
    for fps, places in [
        (0.0, None),
        (-1.0, None),
        (math.nan, None),
        (math.inf, None),
        (2.0, [0]),
        (2.0, [1, 0]),
        (2.0, [3, 3]),
        (2.0, [-1, 0]),
    ]:
        with pytest.raises(BadSample) as caught:
            plan_video((good, good), RULES, fps, places)
        assert caught.value.reason == "broken_video"


# ------------------------------------------------------------------------------------------------- bad files


@needs_av
def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing.mp4", "pipe", ".", "a\0b"):
        assert reason_of(f"{tmp_path}/{name}") == "missing_file"
    assert reason_of("http://127.0.0.1:9/a.mp4") == "missing_file"


@needs_av
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.mp4", b""),
        ("a.txt", b"hello, world\n" * 99),
        ("a.mp4", b"\0" * 9999),
        ("a.mp4", b"\x00\x00\x00\x18ftypmp42"),
        ("a.ffconcat", b"ffconcat version 1.0\nfile good.mp4\n"),
        ("a.m3u8", b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\ngood.mp4\n#EXT-X-ENDLIST\n"),
        ("a.png", as_png(pictures(1)[0])),
    ],
)
def test_what_is_no_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes) -> None:
    """Lists that name other files among them: nothing but the file itself is opened."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.mp4").write_bytes(film(4))
    path = tmp_path / name
    path.write_bytes(content)
    assert reason_of(str(path)) == reason_of(content) == "broken_video"


@needs_av
def test_a_title_in_any_encoding() -> None:
    file = io.BytesIO()
    with av.open(io.BytesIO(film(4))) as source, av.open(file, "w", format="mp4") as container:
        container.metadata["title"] = "cafe cafe"
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    content = file.getvalue()
    assert b"cafe cafe" in content
    content = content.replace(b"cafe cafe", b"caf\xe9 caf\xe9")
    assert plan_video(content, RULES) == plan_video(film(4), RULES)


@needs_av
def test_sound_alone_is_no_video() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(BadSample, match="no video stream"):
        plan_video(file.getvalue(), RULES)


@needs_av
@pytest.mark.parametrize(("codec", "kind"), [("h264", "mp4"), ("h264", "matroska"), ("mpeg4", "avi"), ("gif", "gif")])
def test_a_truncated_film_is_refused_or_shorter(codec: str, kind: str) -> None:
    """Refused, or, where the container does not tell how long it is, the frames that are left, each of them whole."""
    content = film(30, codec=codec, kind=kind)
    whole = {frame.tobytes() for frame in decoded(content)}
    reasons = []
    for length in range(0, len(content) - 1, max(1, len(content) // 40)):
        cut = content[:length]
        reasons.append(reason := reason_of(cut))
        if not reason:
            plan = plan_video(cut, RULES)
            frames = [decoded(cut)[index] for index in plan.indices]
            assert all(frame.tobytes() in whole for frame in frames)
            assert_patches_are(video_patches(cut, plan, RULES), frames)
    assert {*reasons} <= {"", "broken_video"}
    assert reasons.count("broken_video") > (1 if kind == "matroska" else 30)


@needs_av
@pytest.mark.parametrize(("codec", "kind"), [("h264", "matroska"), ("vp9", "webm"), ("h264", "mpegts")])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.75])
def test_a_film_that_was_cut_off_is_no_shorter_film(codec: str, kind: str, share: float) -> None:
    """These have no index, so that what is left of them could be read as a whole."""
    content = film(120, codec=codec, kind=kind)
    assert len(plan_video(content, RULES).indices) > 2
    cut = int(len(content) * share)
    assert reason_of(content[: cut + (cut % 188 == 0)]) == "broken_video"


@needs_av
@pytest.mark.parametrize("kind", ["matroska", "webm"])
def test_a_film_with_a_longer_sound_is_whole(kind: str) -> None:
    file, codecs = io.BytesIO(), {"matroska": ("h264", "aac"), "webm": ("vp9", "libopus")}[kind]
    with av.open(file, "w", format=kind) as container:
        stream, sound = container.add_stream(codecs[0], rate=25), container.add_stream(codecs[1], rate=48000)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        frames = [av.VideoFrame.from_ndarray(picture, format="rgb24") for picture in pictures(12)]
        for packet in [packet for frame in [*frames, None] for packet in stream.encode(frame)]:
            container.mux(packet)
        for number in range(200):
            samples = av.AudioFrame.from_ndarray(np.zeros((2, 960), np.float32), format="fltp", layout="stereo")
            samples.sample_rate, samples.pts = 48000, number * 960
            container.mux(sound.encode(samples))
        container.mux(sound.encode(None))
    assert plan_video(file.getvalue(), RULES).timestamps[-1] < 0.5


@needs_av
def test_a_header_that_promises_more_than_there_is() -> None:
    """The case of a file that only breaks while it is decoded: its index stands before its frames."""
    content = bytearray(film(30))
    start, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    content[(start + end) // 2 : end] = bytes(end - (start + end) // 2)
    plan = plan_video(bytes(content), RULES)
    assert plan.indices == (0, 10, 19, 29)
    with pytest.raises(BadSample) as caught:
        video_patches(bytes(content), plan, RULES)
    assert caught.value.reason == "broken_video"


@needs_av
def test_a_damaged_first_frame_is_told_by_the_plan() -> None:
    content = bytearray(film(6, codec="mpeg4", kind="avi"))
    start = content.index(b"movi") + 12
    content[start + 400 : start + 460] = bytes(60)
    with pytest.raises(BadSample, match="first frame cannot be decoded"):
        plan_video(bytes(content), RULES)


@needs_av
def test_a_gif_may_be_padded() -> None:
    content = film(4, codec="gif", kind="gif")
    assert plan_video(content + bytes(9), RULES) == plan_video(content, RULES)


@needs_av
def test_a_file_that_has_become_shorter() -> None:
    plan = plan_video(film(30), RULES)
    with pytest.raises(BadSample, match="ends after 20 frames: expected 30"):
        video_patches(film(20), plan, RULES)


@needs_av
@given(st.sampled_from([("h264", "mp4"), ("mpeg4", "avi"), ("mjpeg", "avi"), ("h264", "matroska")]), st.data())
@settings(max_examples=120, deadline=None)
def test_damage_is_a_bad_sample_or_a_video(form: tuple[str, str], data: st.DataObject) -> None:
    """The same however often it is asked, and nothing else than a BadSample is raised."""
    codec, kind = form
    content = bytearray(FILMS.setdefault(form, film(6, codec=codec, kind=kind)))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    reason = reason_of(bytes(content))
    assert reason in ("", "broken_video", "oversized")
    assert reason_of(bytes(content)) == reason


FILMS: dict[tuple[str, str], bytes] = {}


@needs_av
def test_an_error_of_the_system_is_no_bad_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(film(4))

    class Failing(io.BytesIO):
        def read(self, *_: object) -> bytes:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("data.images.open", lambda *_: Failing(), raising=False)
    with pytest.raises(UserError, match=r"a\.mp4 cannot be read: Input/output error") as caught:
        plan_video(str(path), RULES)
    assert not isinstance(caught.value, BadSample)


def test_without_av_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a file is looked for, and not as a bad sample, which would be passed over. Frames need no av."""
    monkeypatch.setitem(sys.modules, "av", None)
    for run in (require_av, lambda: plan_video("missing.mp4", RULES), lambda: plan_video(b"", RULES)):
        with pytest.raises(UserError, match=r"pip install av\b") as caught:
            run()
        assert not isinstance(caught.value, BadSample)
        assert len(str(caught.value).splitlines()) == 1
    source = tuple(as_png(picture) for picture in pictures(2))
    assert video_patches(source, plan_video(source, RULES), RULES).shape == (24, 1536)
