"""Images: sizes and pixels beside transformers' PIL processor, bit for bit; damaged and missing files."""

import io
import json
import os
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps
from transformers.image_utils import load_image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from data import images
from data.images import PixelRules, fit_image, image_patches, image_size, patches_of, pictures_of, pixel_rules, to_rgb
from data.packing import BadSample
from errors import UserError

RULES = PixelRules()
SMALL = PixelRules(min_pixels=64 * 64, max_pixels=160 * 160)
SIDES = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
HALF = [0.5, 0.5, 0.5]
MODES = (
    "1",
    "L",
    "LA",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBX",
    "RGBa",
    "La",
    "CMYK",
    "YCbCr",
    "HSV",
    "LAB",
    "I",
    "I;16",
    "F",
)


def processor(rules: PixelRules) -> Qwen2VLImageProcessorPil:
    size = {"shortest_edge": rules.min_pixels, "longest_edge": rules.max_pixels}
    return Qwen2VLImageProcessorPil(patch_size=16, image_mean=HALF, image_std=HALF, size=size)


def theirs(image: Image.Image, rules: PixelRules) -> tuple[NDArray[np.float32], list[int]]:
    """What transformers makes of an image."""
    out = processor(rules)(image, return_tensors="np")
    return out["pixel_values"], out["image_grid_thw"][0].tolist()


def assert_equals_transformers(source: str | bytes, expected: Image.Image, rules: PixelRules = SMALL) -> None:
    height, width = fit_image(*image_size(source), rules)
    patches = image_patches(source, height, width, rules)
    values, grid = theirs(expected, rules)
    assert grid == [1, height // 16, width // 16]
    assert patches.dtype == np.uint8
    assert patches.flags.c_contiguous
    np.testing.assert_array_equal(normalised(patches), values)


def normalised(patches: NDArray[np.uint8]) -> NDArray[np.float32]:
    """As the model does it."""
    return patches.astype(np.float32) / np.float32(127.5) - np.float32(1)


def noise(height: int, width: int, num_channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, num_channels), np.uint8)


def picture(height: int = 70, width: int = 90, mode: str = "RGB") -> Image.Image:
    """Noise of any mode, with transparency where the mode has any."""
    if mode == "I;16":
        return Image.fromarray(noise(height, width, 2)[:, :, 0].astype(np.uint16) * 257)
    if mode in ("I", "F"):
        return Image.fromarray((noise(height, width, 1)[:, :, 0] * 1.7 - 60).astype({"I": np.int32, "F": "f4"}[mode]))
    if mode in ("PA", "LAB"):
        bands = noise(height, width, len(Image.new(mode, (1, 1)).getbands()))
        image = Image.frombytes(mode, (width, height), bands.tobytes())
        if mode == "PA":
            image.putpalette(noise(256, 1).tobytes())
        return image
    image = Image.fromarray(noise(height, width, 4))
    if mode == "La":
        return image.convert("LA").convert(mode)
    return image.convert(mode) if mode in ("LA", "RGBA", "RGBa") else image.convert("RGB").convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# ------------------------------------------------------------------------------------------------- sizes


def test_sizes_equal_transformers() -> None:
    rng = np.random.default_rng(0)
    sides = np.exp(rng.uniform(0, np.log(9000), (20_000, 2))).astype(int)
    count = 0
    for height, width in sides.tolist():
        if max(height, width) <= 200 * min(height, width):
            count += 1
            expected = smart_resize(height, width, 32, RULES.min_pixels, RULES.max_pixels)
            assert fit_image(height, width, RULES) == expected
    assert count > 15_000


@given(st.integers(1, 40_000), st.integers(1, 40_000), st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 4))
@settings(max_examples=400, deadline=None)
def test_sizes_equal_transformers_for_any_limits(height: int, width: int, low: int, more: int, merge: int) -> None:
    rules = PixelRules(merge_size=merge, min_pixels=low, max_pixels=low + more)
    try:
        expected = smart_resize(height, width, 16 * merge, low, low + more)
    except ValueError:
        with pytest.raises(BadSample, match="in a ratio of 200 at most"):
            fit_image(height, width, rules)
    else:
        assert fit_image(height, width, rules) == expected


def test_sizes_on_record() -> None:
    for size, expected in {
        (1, 1): (256, 256),
        (720, 720): (704, 704),
        (1080, 1920): (1088, 1920),
        (2160, 3840): (2176, 3840),
        (1, 200): (32, 3648),
        (4000, 6000): (3328, 4992),
    }.items():
        assert fit_image(*size, RULES) == expected
    with pytest.raises(BadSample, match="201") as caught:
        fit_image(1, 201, RULES)
    assert caught.value.reason == "oversized"


# ------------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("size", [(70, 90), (64, 96), (33, 31), (1, 1), (3, 400), (300, 500), (512, 256), (160, 160)])
def test_pixels_equal_transformers_up_down_and_as_they_are(size: tuple[int, int]) -> None:
    image = picture(*size)
    assert_equals_transformers(encoded(image), image)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_equals_transformers(mode: str) -> None:
    image = picture(mode=mode)
    assert image.mode == mode
    try:
        values, grid = theirs(image, SMALL)
    except ValueError:  # some have no way to RGB
        with pytest.raises(ValueError, match="conversion"):
            to_rgb(image)
        return
    ours = np.asarray(to_rgb(image).resize((grid[2] * 16, grid[1] * 16), Image.Resampling.BICUBIC))
    patches = patches_of(np.stack([ours, ours]), SMALL)
    np.testing.assert_array_equal(normalised(patches), values)


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        *[(mode, "PNG", {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")],
        ("P", "PNG", {"transparency": 3}),
        ("P", "PNG", {"transparency": bytes(range(256))}),
        ("P", "PNG", {"transparency": 0, "bits": 4}),
        ("L", "PNG", {"transparency": 7}),
        ("RGB", "PNG", {"transparency": (1, 2, 3)}),
        *[(mode, "JPEG", {}) for mode in ("1", "L", "RGB", "CMYK", "YCbCr")],
        ("RGB", "JPEG", {"progressive": True, "quality": 30}),
        *[(mode, "WEBP", {"lossless": lossless}) for mode in ("RGB", "RGBA") for lossless in (True, False)],
        *[(mode, "GIF", {}) for mode in ("1", "L", "P", "RGB", "RGBA")],
        ("P", "GIF", {"transparency": 5}),
        *[
            (mode, "TIFF", {})
            for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "F")
        ],
        *[("RGB", "TIFF", {"compression": compression}) for compression in ("tiff_lzw", "jpeg", "tiff_deflate")],
        *[(mode, "BMP", {}) for mode in ("1", "L", "P", "RGB", "RGBA")],
        *[(mode, "TGA", {}) for mode in ("L", "LA", "P", "RGB", "RGBA")],
        *[(mode, "PPM", {}) for mode in ("1", "L", "RGB", "I")],
        ("RGBA", "ICO", {}),
        ("RGB", "JPEG2000", {}),
        ("RGBA", "AVIF", {}),
    ],
)
def test_every_format_equals_transformers(tmp_path: Path, mode: str, kind: str, options: dict[str, Any]) -> None:
    image = picture(mode=mode)
    if "transparency" in options and mode == "RGB":
        image.paste(options["transparency"], (10, 10, 40, 40))
    content = encoded(image, kind, **options)
    path = tmp_path / "a picture"
    path.write_bytes(content)
    with Image.open(path) as expected:
        assert image_size(str(path)) == (expected.height, expected.width)
        assert_equals_transformers(str(path), expected)
    if "transparency" not in options and "A" not in mode:
        assert_equals_transformers(content, load_image(str(path)))


def test_transparent_pixels_are_white() -> None:
    image = Image.new("RGBA", (64, 64), (10, 20, 30, 0))
    assert (image_patches(encoded(image), 64, 64, SMALL) == 255).all()


def test_an_animation_is_its_first_frame() -> None:
    frames = [Image.fromarray(noise(64, 64, seed=seed)) for seed in range(3)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        with Image.open(io.BytesIO(content)) as image:
            assert image.n_frames == 3
        first = encoded(frames[0], kind, lossless=True)
        np.testing.assert_array_equal(image_patches(content, 64, 64, SMALL), image_patches(first, 64, 64, SMALL))


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation_equals_transformers(tmp_path: Path, orientation: int, kind: str) -> None:
    path = tmp_path / "a picture"
    path.write_bytes(encoded(picture(70, 130), kind, exif=turned(orientation)))
    assert image_size(str(path)) == ((130, 70) if orientation in (5, 6, 7, 8) else (70, 130))
    assert_equals_transformers(str(path), load_image(str(path)))


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4) + kind + body + zlib.crc32(kind + body).to_bytes(4)


@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("form", ["eXIf", "xmp", "raw profile"])
def test_an_orientation_behind_the_pixels_of_a_png(tmp_path: Path, behind: bool, form: str) -> None:
    exif = turned(6).tobytes()
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    profile = b"\nexif\n%8d\n%s\n" % (len(exif), exif.hex().encode())
    chunk = {
        "eXIf": png_chunk(b"eXIf", exif.removeprefix(b"Exif\0\0")),
        "xmp": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
        "raw profile": png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile)),
    }[form]
    plain = encoded(picture(70, 130))
    place = plain.rindex(b"IEND") - 4 if behind else plain.index(b"IDAT") - 4
    path = tmp_path / "a.png"
    path.write_bytes(plain[:place] + chunk + plain[place:])
    assert image_size(str(path)) == (130, 70)
    assert_equals_transformers(str(path), load_image(str(path)))


def test_a_header_is_read_without_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [encoded(picture(70, 90), kind) for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP")]
    plain = contents[0]
    comment = png_chunk(b"tEXt", b"date:create\0now")
    contents.append(plain[: plain.rindex(b"IEND") - 4] + comment + plain[plain.rindex(b"IEND") - 4 :])

    def decode(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", decode)
    for kind in ("PngImagePlugin.PngImageFile", "ImageFile.ImageFile", "GifImagePlugin.GifImageFile"):
        monkeypatch.setattr(f"PIL.{kind}.load", decode)
    for content in contents:
        assert image_size(content) == (70, 90)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_the_order_of_patches(pairs: int, rows: int, columns: int, merge: int, time: int) -> None:
    rules = PixelRules(merge_size=merge, temporal_patch_size=time, patch_size=2)
    frames = noise(pairs * time * rows * merge * 2, columns * merge * 2).reshape(pairs * time, rows * merge * 2, -1, 3)
    restored = pictures_of(patches_of(frames, rules), rows * merge, columns * merge, rules)
    np.testing.assert_array_equal(restored, frames)
    patches = iter(patches_of(frames, rules))
    for pair in range(pairs):
        for row in range(rows):
            for column in range(columns):
                for y in range(row * merge, (row + 1) * merge):
                    for x in range(column * merge, (column + 1) * merge):
                        part = frames[pair * time : (pair + 1) * time, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
                        np.testing.assert_array_equal(next(patches), part.transpose(3, 0, 1, 2).ravel())
    assert next(patches, None) is None


# ------------------------------------------------------------------------------------------------- bad files


def reason_of(source: str | bytes) -> str:
    """Why an image is refused, when it is decoded at the latest; "" if it is not."""
    try:
        size = fit_image(*image_size(source), SMALL)
        image_patches(source, *size, SMALL)
        return ""
    except BadSample as error:
        bad = error
    assert len(str(bad).splitlines()) == 1
    assert isinstance(source, bytes) or repr(source).strip("'")[:100] in str(bad)  # a giant name is cut
    return bad.reason


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_bytes(b"")
    for name in ("missing.png", "pipe", "loop", ".", "file/a.png", "x" * 300, "a\0b", "\ud800"):
        assert reason_of(f"{tmp_path}/{name}") == "missing_file", name
    assert reason_of("") == "missing_file"
    assert reason_of(f"{tmp_path}/file") == "broken_image"


def test_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture()))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(images, "open", refuse, raising=False)
    assert reason_of(str(path)) == "missing_file"


def test_an_error_of_the_system_is_no_bad_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture()))

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(images.os, "stat", fail)
    with pytest.raises(UserError, match=r"a\.png cannot be read: Input/output error") as caught:
        image_size(str(path))
    assert not isinstance(caught.value, BadSample)
    monkeypatch.undo()
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(UserError, match=r"a\.png cannot be read: Input/output error") as caught:
        image_size(str(path))
    assert not isinstance(caught.value, BadSample)


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"hello, world\n" * 9, b"\x89PNG\r\n\x1a\n", b"GIF89a", b"<svg/>", b"{}"]
)
def test_what_is_no_image(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    assert reason_of(content) == reason_of(str(path)) == "broken_image"


@pytest.mark.parametrize("offset", [2**62, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_place_that_no_file_has(tmp_path: Path, offset: int) -> None:
    """The system refuses to go there; it is the file's fault."""
    path = tmp_path / "a.tif"
    path.write_bytes(b"II\x2b\0\x08\0\0\0" + offset.to_bytes(8, "little") + bytes(64))
    assert reason_of(str(path)) == reason_of(path.read_bytes()) == "broken_image"


def test_pillow_writes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    content = bytearray(encoded(picture(), "TIFF"))
    entry = content.index((277).to_bytes(2, "little") + (3).to_bytes(2, "little"))  # how many samples a pixel has
    content[entry + 8 : entry + 10] = (9999).to_bytes(2, "little")
    assert reason_of(bytes(content)) == "broken_image"
    assert not caplog.records


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_truncated_file_is_never_half_decoded(tmp_path: Path, kind: str) -> None:
    """Cut anywhere, a file is refused, or gives the pixels of the whole: then only what follows them is missing."""
    content = encoded(picture(), kind)
    whole = image_patches(content, 64, 96, SMALL)
    path = tmp_path / "a"
    refused, late = 0, 0
    for length in sorted({*range(0, 64), *range(64, len(content), 211), *range(len(content) - 24, len(content))}):
        cut = content[:length]
        path.write_bytes(cut)
        reason = reason_of(cut)
        assert reason_of(str(path)) == reason
        assert reason in ("", "broken_image")
        if not reason:
            np.testing.assert_array_equal(image_patches(cut, 64, 96, SMALL), whole)
        else:
            refused += 1
            try:
                image_size(cut)
                late += 1
            except BadSample:
                pass
    assert refused > 60
    assert late > 10 or kind in ("WEBP", "TIFF")  # those have no header that is read by itself, or have it at the end


@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "ICO", "TGA", "PPM"]), st.data())
@settings(max_examples=250, deadline=None)
def test_damage_is_a_bad_sample_or_an_image(kind: str, data: st.DataObject) -> None:
    """The same however often it is asked, and nothing else than a BadSample is raised."""
    content = bytearray(encoded(picture(40, 50), kind, exif=turned(6)))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, min(len(content), 400) - 1) | st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    source = bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reason = reason_of(source)
        assert reason in ("", "broken_image", "oversized")
        assert reason_of(source) == reason
    if not reason:
        size = fit_image(*image_size(source), SMALL)
        np.testing.assert_array_equal(image_patches(source, *size, SMALL), image_patches(source, *size, SMALL))


def huge_png(width: int, height: int) -> bytes:
    """A header of any size and pixels of none."""
    header = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 0, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(b""))
        + png_chunk(b"IEND", b"")
    )


def test_huge_images(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_size(huge_png(10_000, 17_000)) == (17_000, 10_000)  # above what Pillow warns of
        for limit in (Image.MAX_IMAGE_PIXELS, None):
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
            assert reason_of(huge_png(13_378, 13_378)) == "oversized"
            assert reason_of(huge_png(2**31 - 1, 2**31 - 1)) == "oversized"
    assert reason_of(huge_png(0, 10)) == "broken_image"
    assert reason_of(huge_png(10, 0)) == "broken_image"
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------- rules


NEEDED = {"patch_size": 16, "image_mean": HALF, "image_std": HALF}


def write(folder: Path, **files: object) -> Path:
    """Files of a processor, with what each of an image's needs."""
    for name, content in files.items():
        if name == "preprocessor_config" and isinstance(content, dict):
            content = NEEDED | content
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_without_files_the_published_values_hold(tmp_path: Path) -> None:
    assert pixel_rules(None, **SIDES) == pixel_rules(tmp_path, **SIDES) == PixelRules()


def test_rules_of_transformers_files(tmp_path: Path) -> None:
    processor(SMALL).save_pretrained(tmp_path)
    write(tmp_path, video_preprocessor_config={"size": {"shortest_edge": 5000, "longest_edge": 90_000}, "fps": 1.5})
    expected = SMALL._replace(video_min_pixels=5000, video_max_pixels=90_000, fps=1.5)
    assert pixel_rules(tmp_path, **SIDES) == expected
    mine = {"min_pixels": 7000, "max_pixels": 8000, "video_max_pixels": 9000, "fps": 3.0, "max_frames": 10}
    assert pixel_rules(tmp_path, **SIDES, **mine) == expected._replace(**mine)
    nested = NEEDED | {"min_pixels": 3136, "max_pixels": 99_999}
    write(tmp_path, processor_config={"image_processor": nested, "video_processor": {"min_frames": 2, "max_frames": 6}})
    assert pixel_rules(tmp_path, **SIDES) == PixelRules(min_pixels=3136, max_pixels=99_999, min_frames=2, max_frames=6)
    write(tmp_path, processor_config={"processor_class": "Qwen3VLProcessor"})
    assert pixel_rules(tmp_path, **SIDES) == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_mean", [0.5, 0.5, 0.4]),
        ("image_mean", [0.48145466, 0.4578275, 0.40821073]),
        ("image_std", [0.5]),
        ("image_std", 1),
        *[(f"do_{what}", False) for what in ("resize", "rescale", "normalize")],
        ("do_center_crop", True),
        ("do_pad", True),
        ("rescale_factor", 1 / 127.5),
        ("rescale_factor", "1/255"),
        ("resample", 2),
        ("resample", "bicubic"),
        ("patch_size", 14),
        ("temporal_patch_size", 1),
        ("merge_size", 4),
        ("merge_size", "2"),
        ("size", 224),
        ("size", {"height": 224, "width": 224}),
        ("size", {"shortest_edge": 0, "longest_edge": 99}),
        ("size", {"shortest_edge": 4096.5, "longest_edge": 9999}),
        ("size", {"shortest_edge": True, "longest_edge": 9999}),
        ("max_pixels", -1),
        ("max_pixels", [5]),
        ("max_pixels", 100),
        ("min_pixels", 10**9),
    ],
)
@pytest.mark.parametrize("name", ["preprocessor_config", "video_preprocessor_config", "processor_config"])
def test_another_arithmetic_is_refused(tmp_path: Path, name: str, key: str, value: object) -> None:
    values: dict[str, Any] = NEEDED | {"size": {"shortest_edge": 4096, "longest_edge": 10**8}, key: value}
    write(tmp_path, **{name: {"image_processor": values} if name == "processor_config" else values})
    with pytest.raises(UserError) as caught:
        pixel_rules(tmp_path, **SIDES)
    assert key in str(caught.value)
    assert f"{name}.json" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fps", 0),
        ("fps", "2"),
        ("fps", float("inf")),
        ("min_frames", 2.5),
        ("max_frames", 3),
        ("num_frames", 8),
        ("do_sample_frames", False),
        ("cap_pixels_per_frame", True),
    ],
)
def test_another_sampling_is_refused(tmp_path: Path, key: str, value: object) -> None:
    write(tmp_path, video_preprocessor_config={key: value})
    with pytest.raises(UserError, match=rf"video_preprocessor_config\.json.*{key}|{key}.*video_preprocessor_config"):
        pixel_rules(tmp_path, **SIDES)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", "[" * 100_000, '{"size": 1e999}', "\0"])
def test_a_damaged_processor_file(tmp_path: Path, content: str) -> None:
    write(tmp_path, preprocessor_config=content)
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        pixel_rules(tmp_path, **SIDES)


@pytest.mark.parametrize("name", ["preprocessor_config", "processor_config"])
@pytest.mark.parametrize("key", NEEDED)
def test_what_transformers_would_read_otherwise_is_not_left_out(tmp_path: Path, name: str, key: str) -> None:
    """An export carries the file, whose class has CLIP's values where it says nothing: not those of training."""
    left = {other: value for other, value in NEEDED.items() if other != key}
    for values in (left, {**left, key: None}):
        content = json.dumps({"image_processor": values} if name == "processor_config" else values)
        write(tmp_path, **{name: content})
        default = getattr(Qwen2VLImageProcessorPil(**left), key)
        assert default != NEEDED[key]
        with pytest.raises(UserError, match=rf"{name}\.json: {key} is left out"):
            pixel_rules(tmp_path, **SIDES)


def test_what_is_not_set_is_not_asked_for(tmp_path: Path) -> None:
    """Keys that say nothing, and those that say what is done anyway."""
    values = {"image_mean": HALF, "image_std": 0.5, "rescale_factor": 1 / 255, "resample": 3, "size": None, "fps": None}
    write(tmp_path, preprocessor_config=values, video_preprocessor_config=values | {"fps": 2})
    assert pixel_rules(tmp_path, **SIDES) == PixelRules()


def test_needs_no_torch() -> None:
    code = "import sys, data.images, data.videos; sys.exit('torch' in sys.modules or 'av' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_exif_of_pillow_is_undone_once() -> None:
    """A TIFF is turned by Pillow itself when it is decoded: not a second time by us."""
    image = picture(70, 130)
    content = encoded(image, "TIFF", exif=turned(8))
    with Image.open(io.BytesIO(content)) as opened:
        expected = ImageOps.exif_transpose(opened)
    assert (expected.height, expected.width) == image_size(content) == (130, 70)
    np.testing.assert_array_equal(np.asarray(expected), np.asarray(images.rgb_image(content)))
