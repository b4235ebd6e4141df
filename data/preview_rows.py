"""What a packed row says, in pieces: its documents, which tokens are trained on, where images and video frames stand.

Shapes: S = sequence_length, P patches of a row, F pictures of a frame: one of an image, two of a video.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.batch import Row
from data.images import PixelRules, pictures_of
from models.ops.labels import IGNORED
from models.qwen35_moe.vision_config import VisionConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_GREEN, _GREY, _BAR, _PLAIN = "\033[32m", "\033[90m", "\033[1;31m", "\033[0m"
_SIGNS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
_CODES = (*range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000))
_VISIBLE = _SIGNS | {code: f"[U+{code:04X}]" for code in _CODES}


class Span(NamedTuple):
    """Tokens `begin` to `end` of a row, of one document."""

    begin: int
    end: int
    is_trained: bool
    frame: int | None  # which of the row's frames they are the placeholders of


class Shown(NamedTuple):
    """A frame of a row: an image, or the pictures of a video that share their patches."""

    mark: str  # stands for it in a text
    pictures: NDArray[np.uint8]  # [F, height, width, 3], as the model sees them
    is_grey: bool  # all of it: so are those that cannot be decoded


def documents_of(row: Row, vision: VisionConfig | None) -> Iterator[list[Span]]:
    """The spans of each document; not of the fillers."""
    # A label stands at the token before: the first of a document is never trained on.
    is_trained = np.concatenate(([False], row.labels[:-1] != IGNORED))
    frame_of: list[int | None] = [None] * len(row.tokens)
    for number, (place, height, width) in enumerate(row.frames):
        assert vision is not None
        num_tokens = height * width // vision.patches_per_token
        frame_of[place : place + num_tokens] = [number] * num_tokens
    start = 0
    for length in row.lengths:
        if start == len(row.tokens) - row.num_fillers:
            return
        is_trained[start] = False
        spans = []
        kinds = groupby(range(start, start + length), lambda place: (bool(is_trained[place]), frame_of[place]))
        for (trained, frame), places in kinds:
            begin, *others = places
            spans.append(Span(begin, begin + len(others) + 1, trained, frame))
        yield spans
        start += length


def shown_by(row: Row, vision: VisionConfig | None) -> list[Shown]:
    """What the frames of a row show."""
    frames, begin = [], 0
    for place, height, width in row.frames:
        assert vision is not None
        assert row.pixels is not None
        patches = row.pixels[begin : begin + height * width]
        sides = PixelRules(vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)
        pictures = pictures_of(patches, height, width, sides)
        is_video = row.tokens[place] == vision.video_token_id
        kind = f"{len(pictures)} video frames" if is_video else "image"
        is_grey = bool((patches == 127).all())
        size, num_tokens = size_of(*pictures.shape[1:3]), height * width // vision.patches_per_token
        mark = f"[{kind} {size}, {num_tokens} tokens{', all grey' if is_grey else ''}]"
        frames.append(Shown(mark, pictures if is_video else pictures[:1], is_grey))
        begin += height * width
    return frames


def size_of(height: int, width: int) -> str:
    """As people write it."""
    return f"{width}x{height}"


def visible(text: str) -> str:
    """With signs for control characters, which a terminal would obey and a page drop, and for those that make what
    follows run from right to left."""
    return text.translate(_VISIBLE)


def text_of(row: Row, span: Span, tokenizer: "PreTrainedTokenizerFast") -> str:
    """What the tokens of a span say."""
    text = tokenizer.decode(row.tokens[span.begin : span.end].tolist())
    assert isinstance(text, str)
    return visible(text)


def show_row(row: Row, tokenizer: "PreTrainedTokenizerFast", vision: VisionConfig | None, colours: bool) -> str:
    """A row as text. Without colours, what is trained on stands in «guillemets»."""
    on, off, bar, plain = (_GREEN, _GREY, _BAR, _PLAIN) if colours else ("«", "", "", "")
    parts, shown = [], shown_by(row, vision)
    for spans in documents_of(row, vision):
        parts.append(f"{bar}|{plain}")
        for span in spans:
            text = text_of(row, span, tokenizer) if span.frame is None else shown[span.frame].mark
            end = plain if colours else "»" if span.is_trained else ""
            parts.append(f"{on if span.is_trained else off}{text}{end}")
    if row.num_fillers:
        parts.append(f"{bar}|{plain}{off}({row.num_fillers} fillers){plain}")
    return "".join(parts)
