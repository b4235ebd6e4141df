"""Images and videos of a record, in the forms that people write them: which there are, their tokens, their pixels.

A medium is named by a content part ({"type": "image", "image": "a.jpg"}; also "video"), or by a tag, <image> or
<video>, in a text whose record has a field with images or videos. A part without a source takes the field's next.
docs/vision.md has the table.
"""

import base64
import binascii
import functools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

from config.options import Config, Data
from data.batch import MAX_PATCHES, Frame, Medium, Sample
from data.images import ImageSource, PixelRules, find_processor, fit_image, image_patches, image_size, pixel_rules
from data.layouts import read_layout
from data.packing import BadSample
from data.records import Record
from data.videos import VideoSource, plan_video, video_patches
from errors import UserError
from models.qwen35_moe.vision_config import TOKEN_IDS, VisionConfig

if TYPE_CHECKING:  # seconds to import
    from transformers import PreTrainedTokenizerFast

Range = tuple[int, int]
"""Where something begins and ends in a text."""

KINDS = ("image", "video")
PART_KEYS = {kind: (kind, f"{kind}_url", "path", "url", "base64", "bytes") for kind in KINDS}
"""Of a content part: where its source may stand."""
_TAG = re.compile("<(image|video)>")
_RATES = ("fps", "video_fps", "sample_fps")
_UNREAD = {
    *(*_RATES, "start", "end", "video_start", "video_end", "nframes", "num_frames", "min_frames", "max_frames"),
    *("crop", "bbox", "resized_height", "resized_width", "min_pixels", "max_pixels", "total_pixels", "rotation"),
}
"""What would change what a source shows, and is not read beside it."""


class Source(NamedTuple):
    """One of KINDS, and what the record has for it: a path, bytes, a table with one of these; of a video also a list
    of pictures."""

    kind: str
    value: Any
    fps: float | None = None
    """Of a video that is a list of pictures: how many of them make a second."""


def media_keys(data: Data) -> dict[str, tuple[str, ...]]:
    """The fields of a record that may hold images, and videos. The usual name in the plural means the singular too."""
    keys = {"image": data.images_key, "video": data.videos_key}
    return {kind: (key, kind) if key == f"{kind}s" else (key,) for kind, key in keys.items()}


def has_fields(record: dict[str, Any], data: Data) -> bool:
    """Whether there is anything in the fields for images and videos."""
    return any(not _is_nothing(record.get(key)) for keys in media_keys(data).values() for key in keys)


def has_media(record: Record, data: Data) -> bool:
    """Whether a record shows anything; of one in an unknown form, no. Of a document its text decides: many have a
    field "image" that is none of the model's business."""
    if not isinstance(record, dict):
        return False
    if data.format == "text":
        text = record.get(data.text_key)
        tagged = _tagged(record, data)
        return isinstance(text, str) and any(tag[1] in tagged for tag in _TAG.finditer(text))
    if has_fields(record, data):
        return True
    try:
        messages = read_layout(record, data).messages
    except BadSample:
        return False
    contents = [
        message.get(key)
        for message in (messages if isinstance(messages, list) else [])
        if isinstance(message, dict)
        for key in ("content", "value")
    ]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return any(kind_of_part({key: value for key, value in part.items() if value is not None}) for part in parts)


def _is_nothing(value: Any) -> bool:
    """Whether a field says nothing, as with the nulls by which a table fills it up."""
    if isinstance(value, list | dict):
        return all(map(_is_nothing, value.values() if isinstance(value, dict) else value))
    return not value


def _tagged(record: dict[str, Any], data: Data) -> set[str]:
    """The kinds that tags in texts name: those for which the record has the field, even an empty one, as where a
    picture was lost. Not an empty field of another name, which may be none of the model's business."""
    keys = media_keys(data).items()
    return {
        kind for kind, (own, *others) in keys if own in record or not all(_is_nothing(record.get(k)) for k in others)
    }


def kind_of_part(part: dict[str, Any]) -> str | None:
    """What a content part shows, if it shows anything."""
    if (name := part.get("type")) is not None:
        return next((kind for kind in KINDS if name in (kind, f"{kind}_url")), None)
    return next((kind for kind in KINDS if kind in part or f"{kind}_url" in part), None)


class Media:
    """The images and videos of one record, collected in the order in which its texts name them."""

    def __init__(self, record: dict[str, Any], data: Data) -> None:
        self.sources: list[Source] = []
        self._num_taken = dict.fromkeys(KINDS, 0)  # from the fields
        self._waiting: dict[str, list[Any]] = {}
        for kind, keys in media_keys(data).items():
            given = [record[key] for key in keys if not _is_nothing(record.get(key))]
            if len(given) > 1:
                raise BadSample("unused_field", f"has both {' and '.join(map(repr, keys))}")
            # One alone stands without a list around it.
            values = given[0] if given and isinstance(given[0], list) else given
            self._waiting[kind] = list(values)
        self._tagged, self._shown = _tagged(record, data), {kind for kind in KINDS if self._waiting[kind]}
        rates = [key for key in _RATES if not _is_nothing(record.get(key))]
        if rates and any(isinstance(value, list) for value in self._waiting["video"]):
            raise BadSample("unused_field", f"has {rates[0]!r} beside videos of pictures: expected it in their parts")

    def in_text(self, text: str, is_answer: bool = False) -> list[str | Source]:
        """A text and what its tags name, in order; a tag of a kind that the record has no field of is text, and in an
        answer also one whose field is empty. Raises BadSample where the field has nothing left, or never had."""
        parts: list[str | Source] = []
        end = 0
        for tag in _TAG.finditer(text):
            if tag[1] in (self._shown if is_answer else self._tagged):
                parts += [text[end : tag.start()], self._next(tag[1])]
                end = tag.end()
        return [part for part in [*parts, text[end:]] if part != ""]

    def in_part(self, part: dict[str, Any], kind: str) -> Source:
        """What a content part shows. Raises BadSample."""
        given = [part[key] for key in PART_KEYS[kind] if part.get(key) is not None]
        if len(given) > 1:
            raise BadSample("unused_field", f"has a content part with more than one {kind}")
        fps = part.get("fps") if given and isinstance(given[0], list) else None
        known = {"type", "cache_control", "annotations", *PART_KEYS[kind]} | ({"fps"} if fps is not None else set())
        if not given and part.get("index") == self._num_taken[kind]:  # which of the field's it is: the next
            known.add("index")
        if unknown := [key for key, value in part.items() if key not in known and value not in (None, "", [], {})]:
            raise BadSample("unused_field", f"has a content part of type {kind!r} that has {unknown[0]!r:.60}")
        if fps is not None and (isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < 1e6):
            raise BadSample("wrong_type", f"has a video with fps {fps!r:.60}, expected a positive number")
        if not given:
            return self._next(kind)
        source = Source(kind, {"base64": given[0]} if part.get("base64") is not None else given[0], fps)
        self.sources.append(source)
        return source

    def _next(self, kind: str) -> Source:
        if not self._waiting[kind]:
            raise BadSample("media_count", f"names more {kind}s than the {self._num_taken[kind]} that it has")
        self._num_taken[kind] += 1
        source = Source(kind, self._waiting[kind].pop(0))
        self.sources.append(source)
        return source

    def finish(self) -> list[Source]:
        """All of them. Raises BadSample if the record has some that no text names."""
        for kind, waiting in self._waiting.items():
            if waiting:
                raise BadSample("media_count", f"has {len(waiting)} {kind}s more than its texts name by <{kind}>")
        return self.sources


class Shown(NamedTuple):
    """A medium as the model is to see it."""

    kind: str
    text: str
    """What stands for it, with one placeholder a frame."""
    grids: list[tuple[int, int]]
    """Of each frame, in patches."""
    decode: Callable[[], NDArray[np.uint8]]


class MediaSettings(NamedTuple):
    """What the model and the processor's files say of images and videos."""

    vision: VisionConfig
    rules: PixelRules


class MediaReader:
    """How images and videos become tokens and pixels. Small to pickle."""

    def __init__(self, settings: MediaSettings, folder: str, tokenizer: "PreTrainedTokenizerFast") -> None:
        """`folder`: where relative paths begin. Raises UserError for a tokenizer without the model's vision tokens."""
        self.files: set[str] | None = None
        """If a set, it comes to hold the paths that samples name, also of files that are not there."""
        vision, self._rules = settings
        self._vision, self._folder = vision, folder
        texts: dict[str, str] = {}
        for name in TOKEN_IDS:
            number = getattr(vision, name)
            added = tokenizer.added_tokens_decoder.get(number)
            if added is None or not added.special:
                raise UserError(
                    f"data.tokenizer = {tokenizer.name_or_path!r}: the model's {name} = {number} is "
                    f"{tokenizer.backend_tokenizer.id_to_token(number)!r}: expected one of its special tokens"
                )
            texts[name] = added.content
        pads = {"image": texts["image_token_id"], "video": texts["video_token_id"]}
        self._start, self._end = texts["vision_start_token_id"], texts["vision_end_token_id"]
        self._pads = pads
        start, end, *both = (re.escape(text) for text in (self._start, self._end, *pads.values()))
        self._placeholder = re.compile(f"(?:{start})?({'|'.join(both)})(?:{end})?")

    def show(self, source: Source) -> Shown:
        """Reads headers alone. Raises BadSample for what is missing, or no image or video."""
        if source.kind == "image":
            picture = self._file(source.value, "image")
            height, width = fit_image(*image_size(picture), self._rules)
            decode = functools.partial(image_patches, picture, height, width, self._rules)
            return self._shown("image", height, width, [""], decode)
        is_list = isinstance(source.value, list)
        video: VideoSource = (
            tuple(self._file(value, "image") for value in source.value)
            if is_list
            else self._file(source.value, "video")
        )
        plan = plan_video(video, self._rules, source.fps)
        # The time, as text, before each frame. The template's own start and end are not kept around all of them: the
        # models were trained without, and vLLM serves them so. (transformers up to 4.57 took them away; from 5 on it
        # keeps them.)
        times = [f"<{timestamp:.1f} seconds>" for timestamp in plan.timestamps]
        decode = functools.partial(video_patches, video, plan, self._rules)
        return self._shown("video", plan.height, plan.width, times, decode)

    def _shown(
        self, kind: str, height: int, width: int, times: Sequence[str], decode: Callable[[], NDArray[np.uint8]]
    ) -> Shown:
        grid = height // self._rules.patch_size, width // self._rules.patch_size
        if grid[0] * grid[1] > MAX_PATCHES:
            raise BadSample("oversized", f"has a frame of {grid} patches, expected {MAX_PATCHES} at most")
        text = "".join(f"{time}{self._start}{self._pads[kind]}{self._end}" for time in times)
        return Shown(kind, text, [grid] * len(times), decode)

    def _file(self, value: Any, kind: str) -> ImageSource:
        """A path, or a file's content."""
        while isinstance(value, dict):  # {"bytes": ..., "path": ...} of `datasets`, {"url": ...} of chat services
            given = [(key, inner) for key, inner in value.items() if inner is not None]
            preferred = next((pair for pair in given if pair[0] in ("bytes", "base64")), None)
            key, value = preferred or next((pair for pair in given if pair[0] in ("path", "url")), ("", None))
            unknown = [name for name, inner in given if name in _UNREAD and not _is_nothing(inner)]
            if key and unknown:
                raise BadSample("unused_field", f"has {kind} with {unknown[0]!r:.60}, which is not read")
            if key == "base64" and isinstance(value, str):
                return _decoded(value.partition(",")[2] if value.startswith("data:") else value, kind)
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str) or not value:
            raise BadSample("wrong_type", f"has {value!r:.60} as {kind}: expected a path, or a file's content")
        if value.startswith("data:"):
            return _decoded(value.partition(",")[2], kind)
        if re.match("[a-zA-Z][a-zA-Z0-9+.-]+://", value):
            url = urlsplit(value)
            if url.scheme != "file" or url.netloc not in ("", "localhost"):
                raise BadSample("missing_file", f"has {value!r:.80} as {kind}: expected a file, nothing is fetched")
            # As a path that somebody put file:// before, or as the standard has it, with %20 for a space.
            plain = value[value.index("://") + 3 + len(url.netloc) :]
            value = plain if os.path.lexists(plain) else unquote(url.path)
        path = os.path.join(self._folder, value)
        if self.files is not None:
            self.files.add(path)
        return path

    def without_placeholders(self, rendered: str) -> str:
        """What a rendering says beside images and videos."""
        return self._placeholder.sub("", rendered)

    def replace(self, rendered: str, shown: Sequence[Shown]) -> tuple[str, list[Range], list[tuple[int, int]]]:
        """The rendering with each medium's text in the place of the template's placeholder for it.

        Also where each of these texts begins and ends in the result, and how far what stands from a place on has moved:
        (place in the rendering, distance). Raises BadSample if the placeholders are others.
        """
        found = list(self._placeholder.finditer(rendered))
        kinds = [next(kind for kind in KINDS if self._pads[kind] == match[1]) for match in found]
        if kinds != [each.kind for each in shown]:
            raise BadSample("unrendered", f"has {len(shown)} images and videos; the chat template shows others")
        parts: list[str | Source] = []
        ends = [0]
        for match in found:
            parts += [rendered[ends[-1] : match.start()], Source(match[1], None)]
            ends.append(match.end())
        text, ranges = self.join([*parts, rendered[ends[-1] :]], shown)
        moves = [(end, moved - end) for end, moved in zip(ends, [0, *(end for _, end in ranges)])]
        return text, ranges, moves

    def join(self, parts: Sequence[str | Source], shown: Sequence[Shown]) -> tuple[str, list[Range]]:
        """The text that these parts make, `shown` in the place of the sources, and where in it each of them stands."""
        texts, ranges, length, following = [], [], 0, iter(shown)
        for part in parts:
            texts.append(part if isinstance(part, str) else next(following).text)
            if not isinstance(part, str):
                ranges.append((length, length + len(texts[-1])))
            length += len(texts[-1])
        return "".join(texts), ranges

    def check_placeholders(self, tokens: NDArray[np.int32], expected: int) -> NDArray[np.bool_]:
        """Which of the tokens are placeholders. Raises BadSample unless there are as many as expected."""
        is_pad = np.isin(tokens, (self._vision.image_token_id, self._vision.video_token_id))
        if is_pad.sum() != expected:
            raise BadSample("special_token", "has a placeholder for an image or a video in a text")
        return is_pad

    def sample(
        self,
        tokens: NDArray[np.int32],
        offsets: NDArray[np.int64],
        is_trained: NDArray[np.bool_],
        ranges: Sequence[Range],
        shown: Sequence[Shown],
    ) -> Sample:
        """The sample in which as many placeholders stand for a frame as it has tokens, none of them trained on.

        tokens [n] with one placeholder a frame, offsets [2, n] of each in the text, `ranges` of the media there. Raises
        BadSample if a text holds placeholders of its own.
        """
        grids = [grid for each in shown for grid in each.grids]
        is_pad = self.check_placeholders(tokens, len(grids))
        repeats = np.ones(len(tokens), np.int64)
        repeats[is_pad] = [height * width // self._vision.patches_per_token for height, width in grids]
        starts = np.concatenate([[0], np.cumsum(repeats)])  # of each token, and of what would follow the last
        tokens, is_trained = np.repeat(tokens, repeats), np.repeat(is_trained, repeats)
        places = iter(zip(starts[:-1][is_pad].tolist(), grids))
        media = []
        for (begin, end), each in zip(ranges, shown):
            first, last = np.searchsorted(offsets[1], begin, "right"), np.searchsorted(offsets[0], end, "left")
            frames = [Frame(place, *grid) for place, grid in (next(places) for _ in each.grids)]
            media.append(Medium(int(starts[first]), int(starts[last]), frames, each.decode, self._vision.patch_values))
            is_trained[media[-1].begin : media[-1].end] = False
        return Sample(tokens, is_trained, media=media)


def _decoded(text: str, kind: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)  # some write it in lines
    except (binascii.Error, ValueError) as error:
        raise BadSample(f"broken_{kind}", f"has {kind} data that are not base64: {error}") from None


def moved(place: int, moves: list[tuple[int, int]]) -> int:
    """A place in the rendering, in the text that media are put into."""
    return place + next(distance for start, distance in reversed(moves) if start <= place)


def show_all(sources: Sequence[Source], reader: MediaReader | None) -> tuple[MediaReader, list[Shown]]:
    """The reader, and what it shows. Raises BadSample, also if there is none."""
    if reader is None:
        raise BadSample(
            "no_vision",
            f"has {len(sources)} images and videos, but the model is built without its vision tower: expected "
            "model.vision = 'on' and a config.json with a vision_config",
        )
    return reader, [reader.show(source) for source in sources]


def processor_of(config: Config) -> Path | None:
    """Where the processor's files are: beside the model, else beside the tokenizer."""
    return find_processor(Path(folder) for folder in (config.model.path, config.data.tokenizer) if folder)


def media_settings(config: Config, vision: VisionConfig | None) -> MediaSettings | None:
    """What [data] and the processor's files beside the model say; None without a tower. Raises UserError."""
    if vision is None:
        return None
    data = config.data
    rules = pixel_rules(
        processor_of(config),
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        min_pixels=data.min_pixels,
        max_pixels=data.max_pixels,
        video_max_pixels=data.max_video_pixels,
        fps=data.video_fps,
        max_frames=data.max_video_frames,
    )
    return MediaSettings(vision, rules)
