"""Images: their size from the header alone, their pixels as patches, and the rules of both from the processor's files.

Pixels stay uint8 here; the model makes x / 127.5 - 1 of them in float32. With that they equal transformers' PIL image
processor bit for bit; (x - 127.5) / 127.5 is off by a rounding in half of the values.

Shapes: P patches, F frames, H and W height and width, C channels (3), h and w patches along a merge block's side.
"""

import errno
import io
import json
import logging
import math
import os
import stat
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin

from data.packing import BadSample
from errors import UserError, reading

logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what is wrong with a file is told by the exception

ImageSource = str | bytes
"""A path, or the content of an image file."""

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")

MAX_ASPECT = 200
MAX_SOURCE_PIXELS = 2 * (1024**3 // 4 // 3)  # Pillow's own limit, whatever another library has set it to
_ORIENTATION = 0x0112
_NO_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
_NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP)
_ARITHMETIC: dict[str, tuple[Any, ...]] = {  # of the keys of a processor file, what is done here
    **dict.fromkeys(("image_mean", "image_std"), ([0.5] * 3, 0.5)),
    **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_sample_frames"), (True,)),
    **dict.fromkeys(("do_center_crop", "do_pad", "cap_pixels_per_frame"), (False,)),
    "num_frames": (None,),
    "resample": (Image.Resampling.BICUBIC.value,),
    "rescale_factor": (1 / 255,),
}
_NEEDED = ("patch_size", "image_mean", "image_std")
"""Of an image processor's file: for these transformers' class has CLIP's defaults, and exports are served so."""


class PixelRules(NamedTuple):
    """What the processor's files say: the sides of patches, and the limits of the resize."""

    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 65_536  # of an image after the resize
    max_pixels: int = 16_777_216
    video_min_pixels: int = 4_096  # of all frames of a video together
    video_max_pixels: int = 25_165_824
    fps: float = 2.0  # frames that are read of a second
    min_frames: int = 4
    max_frames: int = 768

    @property
    def factor(self) -> int:
        """The pixels along a side of a vision token."""
        return self.patch_size * self.merge_size


def find_processor(folders: Iterable[Path]) -> Path | None:
    """The first of `folders` that has any of a processor's files. These belong together: none is taken from another."""
    return next((folder for folder in folders if any((folder / name).exists() for name in PROCESSOR_FILES)), None)


def pixel_rules(
    folder: Path | None,
    *,
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
    min_pixels: int = 0,
    max_pixels: int = 0,
    video_max_pixels: int = 0,
    fps: float = 0.0,
    max_frames: int = 0,
) -> PixelRules:
    """The rules of the processor files in `folder`, or the published ones; limits that are not 0 override them.

    Raises UserError for files that ask for another arithmetic than this module's.
    """
    sides = {"patch_size": patch_size, "temporal_patch_size": temporal_patch_size, "merge_size": merge_size}
    image, image_file = _processor(folder, "image_processor", "preprocessor_config.json")
    video, video_file = _processor(folder, "video_processor", "video_preprocessor_config.json")
    for values, file in ((image, image_file), (video, video_file)):
        _refuse_other_arithmetic(values, file, sides)
    found: dict[str, Any] = {
        "min_pixels": min_pixels or _limit(image, image_file, "min_pixels", "shortest_edge"),
        "max_pixels": max_pixels or _limit(image, image_file, "max_pixels", "longest_edge"),
        "video_min_pixels": _limit(video, video_file, "min_pixels", "shortest_edge"),
        "video_max_pixels": video_max_pixels or _limit(video, video_file, "max_pixels", "longest_edge"),
        "fps": float(fps or _number(video, video_file, "fps", (int, float))),
        "min_frames": _number(video, video_file, "min_frames"),
        "max_frames": max_frames or _number(video, video_file, "max_frames"),
    }
    rules = PixelRules(**sides)._replace(**{key: value for key, value in found.items() if value})
    for low, high, file in (
        ("min_pixels", "max_pixels", image_file),
        ("video_min_pixels", "video_max_pixels", video_file),
        ("min_frames", "max_frames", video_file),
    ):
        lowest, highest = getattr(rules, low), getattr(rules, high)
        if lowest > highest:
            raise UserError(f"{high} = {highest} is below {low} = {lowest} (of {file}): expected at least as much")
    return rules


def _processor(folder: Path | None, section: str, name: str) -> tuple[dict[str, Any], str]:
    """The values of a processor and the file they stand in. As in transformers, a section of processor_config.json
    comes before the file of that name."""
    for path, key in [(folder / "processor_config.json", section), (folder / name, "")] if folder else []:
        if path.exists():
            with reading(path):
                values = json.loads(path.read_bytes())
            if key and isinstance(values, dict):
                values = values.get(key)
                if values is None:
                    continue
            if not isinstance(values, dict):
                raise UserError(f"{path}: {key or 'its content'} is a {type(values).__name__}: expected an object")
            for needed in _NEEDED if section == "image_processor" else ():
                if values.get(needed) is None:
                    raise UserError(f"{path}: {needed} is left out: expected it, as transformers would take CLIP's")
            return values, str(path)
    return {}, name


def _refuse_other_arithmetic(values: dict[str, Any], file: str, sides: dict[str, int]) -> None:
    for key, accepted in (_ARITHMETIC | {key: (side,) for key, side in sides.items()}).items():
        value = values.get(key)
        if value is not None and value not in accepted:
            raise UserError(f"{file}: {key} = {json.dumps(value)}: expected {json.dumps(accepted[0])}")


def _limit(values: dict[str, Any], file: str, older: str, edge: str) -> float:
    """A limit under its older name or in `size`; 0 for none."""
    size = values.get("size")
    if size is not None and (not isinstance(size, dict) or not {"shortest_edge", "longest_edge"} & {*size}):
        raise UserError(f"{file}: size = {json.dumps(size)}: expected shortest_edge and longest_edge")
    return _number(values, file, older) or _number(size or {}, f"{file}: size", edge)


def _number(values: dict[str, Any], file: str, key: str, kinds: tuple[type, ...] = (int,)) -> float:
    """0 for none."""
    value = values.get(key)
    if value is None:
        return 0
    if type(value) not in kinds or not 0 < value < 2**63:
        expected = "a whole number" if kinds == (int,) else "a number"
        raise UserError(f"{file}: {key} = {json.dumps(value)}: expected {expected} above 0")
    number: float = value
    return number


def fit_image(height: int, width: int, rules: PixelRules) -> tuple[int, int]:
    """The size after the resize: sides are whole merge blocks, pixels are between the limits. Raises BadSample."""
    return fit(height, width, rules.factor, (rules.min_pixels, rules.max_pixels))


def fit(
    height: int, width: int, factor: int, limits: tuple[int, int], num_frames: int = 1, rounded: int = 1
) -> tuple[int, int]:
    """As fit_image, with limits for all frames together; whether they are kept is asked of the `rounded` number."""
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise BadSample("oversized", f"{width} x {height} pixels: expected sides in a ratio of {MAX_ASPECT} at most")
    high, wide = (round(side / factor) * factor for side in (height, width))
    lowest, highest = limits
    if rounded * high * wide > highest:
        divisor = math.sqrt(num_frames * height * width / highest)
        high, wide = (max(factor, math.floor(side / divisor / factor) * factor) for side in (height, width))
    elif rounded * high * wide < lowest:
        multiplier = math.sqrt(lowest / (num_frames * height * width))
        high, wide = (math.ceil(side * multiplier / factor) * factor for side in (height, width))
    return high, wide


def name_of(source: ImageSource, what: str) -> str:
    """For messages."""
    return source if isinstance(source, str) else f"{what} of {len(source)} bytes in the record"


@contextmanager
def open_source(source: str | bytes, what: str) -> Iterator[IO[bytes]]:
    """The file. Raises BadSample where there is none. `what`: an image or a video, for messages."""
    if isinstance(source, bytes):
        yield io.BytesIO(source)
        return
    try:
        is_file = stat.S_ISREG(os.stat(source).st_mode)  # before it is opened: a pipe would wait for a writer
        file = open(source, "rb") if is_file else None  # noqa: SIM115
    except (OSError, ValueError) as error:  # ValueError: no name of a file, as with a zero byte in it
        if isinstance(error, OSError) and not isinstance(error, _NO_FILE) and error.errno not in _NO_NAME:
            raise UserError(f"{source} cannot be read: {error.strerror}") from error
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise BadSample("missing_file", f"{source!r:.300}: {why}: expected the path of {what}") from error
    if file is None:
        raise BadSample("missing_file", f"{source!r:.300} is no file: expected the path of {what}")
    with file:
        yield file


@contextmanager
def parsing(name: str, reason: str) -> Iterator[None]:
    """Inside, content of a file is parsed and nothing else is done: what it makes a parser raise is a BadSample."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Image.UnidentifiedImageError as error:
        raise BadSample(reason, f"{name} is no image, or of an unknown format") from error
    except Image.DecompressionBombError as error:
        raise BadSample("oversized", f"{name}: {error}") from error
    except Exception as error:  # a damaged file can raise nearly anything, MemoryError for its huge numbers included
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: a seek to a wrong place
            raise UserError(f"{name} cannot be read: {error.strerror}") from error
        raise BadSample(reason, f"{name} cannot be decoded: {type(error).__name__}: {error}") from error


@contextmanager
def _opened(source: ImageSource) -> Iterator[Image.Image]:
    """The image, not decoded yet. Inside nothing is done but what may fail for a damaged file."""
    name = name_of(source, "an image")
    with open_source(source, "an image") as file, parsing(name, "broken_image"), Image.open(file) as image:
        width, height = image.size
        if width * height > MAX_SOURCE_PIXELS:
            raise BadSample("oversized", f"{name}: {width} x {height} pixels: expected {MAX_SOURCE_PIXELS} at most")
        yield image


def image_size(source: ImageSource) -> tuple[int, int]:
    """Height and width as the image is shown, from its header alone. Raises BadSample."""
    with _opened(source) as image:
        early = isinstance(image, PngImagePlugin.PngImageFile) and not _orientation_may_follow(image)
        # Pillow decodes a whole PNG to see whether an orientation stands behind its pixels.
        exif = Image.Image.getexif(image) if early else image.getexif()
        turned = exif.get(_ORIENTATION) in (5, 6, 7, 8) and image.format != "TIFF"  # a TIFF's size is turned already
        width, height = image.size
    return (width, height) if turned else (height, width)


def _orientation_may_follow(image: PngImagePlugin.PngImageFile) -> bool:
    """Whether a chunk that can hold an orientation stands behind the pixels."""
    file = image.fp
    assert file is not None
    start, behind, found = file.tell(), False, False
    file.seek(8)
    while not found and len(head := file.read(8)) == 8:
        length, kind = int.from_bytes(head[:4]), head[4:]
        behind = behind or kind == b"IDAT"
        text = file.read(min(length, 32)) if behind and kind in (b"tEXt", b"zTXt", b"iTXt") else b""
        found = behind and (kind == b"eXIf" or text.startswith((b"Raw profile type exif", b"XML:com.adobe.xmp")))
        file.seek(length + 4 - len(text), io.SEEK_CUR)
    file.seek(start)
    return found


def rgb_image(source: ImageSource) -> Image.Image:
    """The decoded image as it is shown, of an animation the first frame; what is transparent is white."""
    with _opened(source) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """What is transparent is laid over white, as transformers' processor does with an image."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def image_patches(source: ImageSource, height: int, width: int, rules: PixelRules) -> NDArray[np.uint8]:
    """uint8 [P, 1536] of the image, resized to the size of fit_image and doubled in time. Raises BadSample."""
    frame = resized(rgb_image(source), height, width)
    return patches_of(np.broadcast_to(frame, (rules.temporal_patch_size, *frame.shape)), rules)


def resized(image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:  # [H, W, C]
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def patches_of(frames: NDArray[np.uint8], rules: PixelRules) -> NDArray[np.uint8]:
    """Of frames [F, H, W, C] the patches [P, C * 2 * 16 * 16]: in time, then merge block by merge block.

    Inside a patch: channel, time, y, x.
    """
    num_frames, height, width, num_channels = frames.shape
    time, side, merge = rules.temporal_patch_size, rules.patch_size, rules.merge_size
    split = frames.reshape(
        num_frames // time, time, height // rules.factor, merge, side, width // rules.factor, merge, side, num_channels
    )
    ordered = split.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # pair, block row and column, h, w, channel, time, y, x
    return ordered.reshape(-1, num_channels * time * side * side)


def pictures_of(patches: NDArray[np.uint8], height: int, width: int, rules: PixelRules) -> NDArray[np.uint8]:
    """The way back of `patches_of`, for frames of `height` x `width` patches: [F, H, W, C]."""
    time, side, merge = rules.temporal_patch_size, rules.patch_size, rules.merge_size
    split = patches.reshape(-1, height // merge, width // merge, merge, merge, 3, time, side, side)
    ordered = split.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5)  # pair, time, block row, h, y, block column, w, x, channel
    return ordered.reshape(-1, height * side, width * side, 3)
