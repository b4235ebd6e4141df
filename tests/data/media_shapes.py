"""Records with pictures for tests: small pictures of noise, the shipped tokenizer that knows of them, and encoders."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from config.options import Data
from data.batch import Sample
from data.images import pixel_rules
from data.media import MediaReader, MediaSettings
from data.samples import EncodeChat, EncodeText
from data.tokenizer import load_tokenizer
from models.ops.labels import IGNORED
from models.qwen35_moe.vision_config import VisionConfig

MODEL = Path(__file__).resolve().parents[2] / "data" / "tiny_vision" / "model"
START, END, IMAGE, VIDEO = range(4096, 4100)
VISION = VisionConfig(
    image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END
)  # fmt: skip
RULES = pixel_rules(MODEL, patch_size=16, temporal_patch_size=2, merge_size=2)
SETTINGS = MediaSettings(VISION, RULES)
TEMPLATES = Path(__file__).parent / "templates"
TOKENIZERS = {style: load_tokenizer(str(MODEL)) for style in ("chatml", "qwen35_style", "texts alone")}
TOKENIZERS["qwen35_style"].chat_template = (TEMPLATES / "qwen35_style.jinja").read_text()
TOKENIZERS["texts alone"].chat_template = (TEMPLATES / "chatml.jinja").read_text()


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def picture(height: int = 40, width: int = 70, seed: int = 0, kind: str = "PNG") -> bytes:
    """A file's content."""
    file = io.BytesIO()
    Image.fromarray(noise(height, width, seed)).save(file, kind)
    return file.getvalue()


def reader(folder: Path | str = ".", style: str = "chatml") -> MediaReader:
    return MediaReader(SETTINGS, str(folder), TOKENIZERS[style])


def encode(
    record: Any, folder: Path | str = ".", style: str = "chatml", max_tokens: int = 10_000, **data: Any
) -> Sample:
    """A chat."""
    encoder = EncodeChat(Data(format="chat", **data), TOKENIZERS[style], max_tokens, reader(folder, style))
    return encoder(record)


def encode_text(
    record: Any, folder: Path | str = ".", ending: int | None = 4093, max_tokens: int = 10_000, **data: Any
) -> Sample:
    """A document."""
    tokenizer = TOKENIZERS["chatml"].backend_tokenizer
    return EncodeText(Data(**data), tokenizer, ending, max_tokens, reader(folder))(record)


def contents(sample: Sample) -> tuple[object, ...]:
    """All that a sample is, to compare it with others."""
    media = [
        (medium.begin, medium.end, tuple(medium.frames), medium.decode().tobytes(), medium.patch_values)
        for medium in sample.media
    ]
    return sample.tokens.tolist(), sample.labels.tolist(), sample.note, media


def check_sample(sample: Sample) -> None:
    """What is true of every sample: each label is the next token and none a medium's; placeholders and frames agree."""
    labels, tokens = sample.labels, sample.tokens
    assert len(labels) == len(tokens)
    has_label = labels[:-1] != IGNORED
    assert (labels[:-1] == tokens[1:])[has_label].all()
    assert not np.isin(labels, (START, END, IMAGE, VIDEO)).any()
    is_pad, last = np.zeros(len(tokens), bool), 0
    for medium in sample.media:
        assert last <= medium.begin < medium.end <= len(tokens)
        assert (labels[max(medium.begin - 1, 0) : medium.end - 1] == IGNORED).all()
        last = medium.begin
        for place, height, width in medium.frames:
            end = place + height * width // 4
            assert last < place < end < medium.end
            assert (tokens[place - 1], tokens[end]) == (START, END)
            assert len({*tokens[place:end]} & {IMAGE, VIDEO}) == len({*tokens[place:end]}) == 1
            is_pad[place:end] = True
            last = end
        last = medium.end
    assert (is_pad == np.isin(tokens, (IMAGE, VIDEO))).all()


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
