"""Videos: which frames are read, at which size and second, from the container alone; their pixels as patches.

A file is decoded by PyAV, which is optional and imported where it is used. Frames can also be given as images.

Shapes: P patches, F frames, H and W height and width, C channels (3).
"""

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.images import (
    ImageSource,
    PixelRules,
    fit,
    image_size,
    name_of,
    open_source,
    parsing,
    patches_of,
    resized,
    rgb_image,
)
from data.packing import BadSample
from errors import UserError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

VideoSource = str | bytes | tuple[ImageSource, ...]
"""A path, the content of a video file, or the frames that somebody has chosen of a video."""

FPS_OF_FRAMES = 24.0  # what transformers takes for frames whose rate is not told
_TURNS = {1: Image.Transpose.ROTATE_90, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_270}


class VideoPlan(NamedTuple):
    """What is read of a video."""

    height: int  # after the resize
    width: int
    indices: tuple[int, ...]  # the frames that are read, the last one again where they would not fill its patches
    timestamps: tuple[float, ...]  # seconds; one for the frames that share their patches


def require_av() -> None:
    """Raises UserError where PyAV is missing or too old."""
    try:
        import av
        import av.index  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"video files are decoded by PyAV, which cannot be imported ({error}): expected the package av, 18 or "
            "later (pip install av, or this project's extra `video`), or videos as lists of frames"
        ) from error


def plan_video(
    source: VideoSource, rules: PixelRules, fps: float | None = None, source_indices: Sequence[int] | None = None
) -> VideoPlan:
    """Chooses the frames of a file; given frames are all read. Raises BadSample.

    `fps` and `source_indices` are for given frames: the rate of the video that they are from, and their places in it.
    """
    if isinstance(source, tuple):
        height, width = _size_of_frames(source)
        indices = list(range(len(source)))
        places = _places(len(source), fps, source_indices)
        rate = FPS_OF_FRAMES if fps is None else fps
    else:
        assert fps is None, "a file tells its rate itself"
        assert source_indices is None
        num_frames, rate, height, width = _read_header(source)
        indices = sample_frames(num_frames, rate, rules)
        places = indices
    time = rules.temporal_patch_size
    if len(indices) < time:
        name = name_of(source, "a video") if not isinstance(source, tuple) else "a video given as frames"
        # transformers refuses it too: what was trained could not be asked for. As an image it can.
        raise BadSample("broken_video", f"{name}: {len(indices)} frame: expected {time} at least, or an image")
    height, width = fit_video(len(indices), height, width, rules)
    missing = -len(indices) % time
    seconds = [place / rate for place in [*places, *[places[-1]] * missing]]
    timestamps = [(seconds[first] + seconds[first + time - 1]) / 2 for first in range(0, len(seconds), time)]
    return VideoPlan(height, width, (*indices, *[indices[-1]] * missing), tuple(timestamps))


def sample_frames(num_frames: int, fps: float, rules: PixelRules) -> list[int]:
    """Evenly over the whole video, the first and the last one included."""
    wanted = int(num_frames / fps * rules.fps)
    wanted = min(max(wanted, rules.min_frames), rules.max_frames, num_frames)
    places: list[int] = np.linspace(0, num_frames - 1, wanted).round().astype(int).tolist()
    return places


def fit_video(num_frames: int, height: int, width: int, rules: PixelRules) -> tuple[int, int]:
    """The size of each frame after the resize: as fit_image, with limits for all frames together. Raises BadSample."""
    if min(height, width) < rules.factor:
        scale = max(rules.factor / height, rules.factor / width)
        height, width = int(height * scale), int(width * scale)
    rounded = round(num_frames / rules.temporal_patch_size) * rules.temporal_patch_size
    return fit(height, width, rules.factor, (rules.video_min_pixels, rules.video_max_pixels), num_frames, rounded)


def _size_of_frames(frames: tuple[ImageSource, ...]) -> tuple[int, int]:
    if not frames:
        raise BadSample("broken_video", "a video without frames: expected some")
    sizes = [image_size(frame) for frame in frames]
    for number, size in enumerate(sizes):
        if size != sizes[0]:
            name = name_of(frames[number], "a frame")
            raise BadSample("broken_video", f"{name}: frame {number} is {size}, frame 0 {sizes[0]}: expected one size")
    return sizes[0]


def _places(num_frames: int, fps: float | None, places: Sequence[int] | None) -> list[int]:
    """Where frames stood in their video. Raises BadSample for what cannot be."""
    if fps is not None and not 0 < fps < math.inf:
        raise BadSample("broken_video", f"a video of {fps} frames a second: expected a number above 0")
    if places is None:
        return list(range(num_frames))
    if len(places) != num_frames or sorted({*places}) != [*places] or min(places) < 0:
        raise BadSample(
            "broken_video",
            f"a video of {num_frames} frames with the source indices {[*places][:9]}: expected {num_frames} that rise",
        )
    return list(places)


@contextmanager
def _opened(source: str | bytes) -> Iterator[tuple["InputContainer", "VideoStream"]]:
    """The container and its first video stream. Inside nothing is done but what may fail for a damaged file."""
    require_av()
    import av

    name = name_of(source, "a video")
    with open_source(source, "a video") as file, parsing(name, "broken_video"):
        try:
            # Its bytes alone decide, not its name: FFmpeg would draw the letters of a .txt. And a file can name others,
            # and addresses: nothing else is opened.
            content = SimpleNamespace(read=file.read, seek=file.seek, tell=file.tell)
            # Titles may be in any encoding.
            options = {"protocol_whitelist": "none"}
            with av.open(content, "r", container_options=options, metadata_errors="replace") as container:
                if not container.streams.video:
                    raise BadSample("broken_video", f"{name} has no video stream")
                kind = container.format.name
                if (kind == "gif" and not _ends_as_gif(file)) or (kind == "mpegts" and not _has_whole_packets(file)):
                    raise BadSample("broken_video", f"{name} is cut off")
                stream = container.streams.video[0]
                stream.thread_count = 1  # one thread a worker, and the same frames each time
                yield container, stream
        except av.FFmpegError as error:  # of the library: what the system refuses to the file object is no such error
            raise BadSample("broken_video", f"{name} cannot be decoded: {error.strerror}") from error


def _ends_as_gif(file: IO[bytes]) -> bool:
    """Without its end FFmpeg gives the last frame of a GIF half, and no sign of it."""
    here = file.tell()
    file.seek(max(file.seek(0, io.SEEK_END) - 64, 0))
    end = file.read().rstrip(b"\0")
    file.seek(here)
    return end.endswith(b";")


def _has_whole_packets(file: IO[bytes]) -> bool:
    """A transport stream tells no length. It is packets of 188 bytes, each of which begins with 0x47, and of 192 or 204
    with what some devices put around them. True where that is not seen."""
    here = file.tell()
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    start = file.read(5 * 204)
    file.seek(here)
    for length in (188, 192, 204):
        for first in range(length):
            if all(start[place : place + 1] == b"G" for place in range(first, first + 4 * length, length)):
                return (size - first) % length in (0, 188 % length)
    return True


def _seconds_told(container: "InputContainer", stream: "VideoStream") -> float:
    """How long the film is by its header; 0 if that does not tell it of the pictures alone."""
    if tag := re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = map(float, tag.groups())
        return 3600 * hours + 60 * minutes + seconds
    return (container.duration or 0) / 1e6 if len(container.streams) == 1 else 0.0


def _read_header(source: str | bytes) -> tuple[int, float, int, int]:
    """Number of frames, frames a second, height and width as shown. One frame is decoded: it tells how it is turned."""
    name = name_of(source, "a video")
    with _opened(source) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate or stream.base_rate
        listed = list(stream.index_entries)
        # Files that were cut without encoding them again list frames that are not shown.
        num_frames = sum(not entry.is_discard for entry in listed) if len(listed) == stream.frames else 0
        frame = next(container.decode(stream), None)
        if frame is None or frame.is_corrupt:
            raise BadSample("broken_video", f"{name}: its first frame cannot be decoded")
        turned = round(frame.rotation / 90) % 2 == 1
        height, width = (frame.width, frame.height) if turned else (frame.height, frame.width)
    if not num_frames:
        with _opened(source) as (container, stream):
            told, end = _seconds_told(container, stream), 0.0
            for packet in container.demux(stream):
                num_frames += packet.size > 0 and not packet.is_discard
                if packet.pts is not None:
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        # Some files tell no duration of their last frame.
        if end < 0.95 * told - 0.5:
            raise BadSample("broken_video", f"{name} is cut off: it ends after {end:.1f} of {told:.1f} s")
    if not rate or rate < 0:
        raise BadSample("broken_video", f"{name} does not tell how many frames a second it has")
    return num_frames, float(rate), height, width


def video_patches(source: VideoSource, plan: VideoPlan, rules: PixelRules) -> NDArray[np.uint8]:
    """uint8 [P, 1536] of the planned frames, each resized as an image is. Raises BadSample."""
    frames = np.empty((len(plan.indices), plan.height, plan.width, 3), np.uint8)
    if isinstance(source, tuple):
        images: Iterator[Image.Image] = (rgb_image(source[index]) for index in dict.fromkeys(plan.indices))
    else:
        images = _decode(source, plan.indices)
    number = 0
    for image in images:
        frames[number] = resized(image, plan.height, plan.width)
        number += 1
    frames[number:] = frames[number - 1]
    return patches_of(frames, rules)


def _decode(source: str | bytes, indices: Sequence[int]) -> Iterator[Image.Image]:
    """The frames of rising indices, each once. Raises BadSample for a file that breaks or ends before the last."""
    wanted, last, num_frames = {*indices}, indices[-1], 0
    with _opened(source) as (container, stream):
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise BadSample("broken_video", f"{name_of(source, 'a video')}: frame {num_frames} is damaged")
            if num_frames in wanted:
                image = Image.fromarray(frame.to_ndarray(format="rgb24"))
                turns = round(frame.rotation / 90) % 4  # against the clock
                yield image.transpose(_TURNS[turns]) if turns else image
            num_frames += 1
            if num_frames > last:
                return
    raise BadSample("broken_video", f"{name_of(source, 'a video')} ends after {num_frames} frames: expected {last + 1}")
