"""The check of data and tokenizer before a run: the readers' own code, on the first records. Needs no torch."""

import os
from dataclasses import replace

from config.options import Config
from data.files import check_cache, is_dataset
from data.media import MediaReader, media_settings
from data.records import Source, Whole
from data.samples import Encode, EncodeChat, EncodeText, check_source
from data.sources import declared_sources
from data.tokenizer import check_tokenizer, load_tokenizer
from errors import UserError
from models.qwen35_moe.vision_config import VisionConfig


def check_data(config: Config, vocab_size: int, vision: VisionConfig | None = None) -> None:
    """Raises UserError for data and a tokenizer that could not be used. Takes no longer for a large corpus."""
    data = config.data
    weights = list(data.weights)
    if weights and len(weights) != len(data.path):
        raise UserError(f"data.weights = {weights}: expected {len(data.path)}, one for each of data.path")
    if weights and min(weights) < 1e-3 * sum(weights):
        raise UserError(f"data.weights = {weights}: expected none below a thousandth of their sum")
    validation = config.validation
    if validation.enable and validation.path and validation.share:
        raise UserError(
            f"validation.share = {validation.share} and validation.path = {list(validation.path)}: expected one of "
            "them, and more data by name in validation.sets"
        )
    if validation.enable and not validation.path and not validation.share and not validation.sets:
        raise UserError("validation.path = []: expected at least one file or glob, or a validation.share")
    if config.training.epochs and weights:
        raise UserError(
            f"training.epochs = {config.training.epochs} and data.weights: each entry has epochs of its own: expected "
            "training.steps"
        )
    paths = {"data.path": data.path} | validation.entries
    sources: list[tuple[str, Source]] = []
    for key, entries in paths.items():
        if not entries:
            raise UserError(f"{key} = []: expected at least one file or glob")
        sources += declared_sources(replace(data, path=entries), key)
    check_tokenizer(data.tokenizer, vocab_size, data.format == "text" and data.end_of_document)
    tokenizer, settings = load_tokenizer(data.tokenizer), media_settings(config, vision)
    reader = settings and MediaReader(settings, data.image_folder, tokenizer)
    if reader and not os.path.isdir(data.image_folder):
        raise UserError(f"data.image_folder = {data.image_folder!r}: expected a folder")
    max_tokens = config.training.sequence_length
    encode: Encode
    if data.format == "chat":
        encode = EncodeChat(data, tokenizer, max_tokens, reader)
    else:
        encode = EncodeText(data, tokenizer.backend_tokenizer, None, max_tokens, reader)
    if not all(isinstance(source, Whole) for _, source in sources):
        check_cache()
    found = False
    for entry, source in sources:
        is_on_hub = is_dataset(entry) and not os.path.isdir(entry)  # opened by the ranks: it may have to be fetched
        found |= is_on_hub or check_source(source, encode)
    if not found:
        raise UserError(f"data.path: no document in {', '.join(map(repr, data.path))}")
