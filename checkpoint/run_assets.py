"""What accompanies the weights in a run's checkpoints: config.json, tokenizer, templates, processor, sample texts."""

import json
from pathlib import Path

from checkpoint.hf_assets import PROCESSOR_TEMPLATE, SAMPLE, TEMPLATE, Files, read_checkpoint_assets
from config.options import Config
from config.reading import model_config
from data.chat import end_of_turn_ids
from data.media import processor_of
from data.samples import sample_texts
from errors import UserError, reading
from models.qwen35_moe.config import ModelConfig, read_config


def assets_of_run(run: Config, shape: ModelConfig) -> Files:
    """Each checkpoint's `hf/`, read when the run begins: its sources may change or vanish while it goes on."""
    data, model = run.data, run.model
    tokenizer = Path(data.tokenizer)
    sources = [tokenizer]
    config = shape.to_dict()
    # No position beyond has been seen in training.
    config.get("text_config", config)["max_position_embeddings"] = run.training.sequence_length
    if model.path:  # it may say more than the shape
        sources.append(Path(model.path))
        config = read_config(sources[-1] / "config.json")
        if model_config(run) != shape:
            raise UserError(f"{sources[-1] / 'config.json'} has changed since the run began: expected it as it was")
    ends = end_of_turn_ids(data.tokenizer, data) if data.format == "chat" else None
    files = read_checkpoint_assets(config, *sources, tokenizer=tokenizer, processor=processor_of(run), end_of_turn=ends)
    if data.format == "chat" and data.chat_template:  # comes before what the tokenizer has
        with reading(data.chat_template):
            files[TEMPLATE] = Path(data.chat_template).read_bytes()
    if data.format == "chat" and TEMPLATE in files:  # and not another than the run trains with
        files.pop(PROCESSOR_TEMPLATE, None)
    return files | {SAMPLE: json.dumps(sample_texts(data)).encode()}
