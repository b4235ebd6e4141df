"""The whole model with images and videos against transformers: logits, loss, every gradient; and positions."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe

from models.ops.documents import Documents
from models.ops.kernels import Kernels
from models.ops.labels import IGNORED
from models.qwen35_moe.config import FULL, LINEAR, ModelConfig
from models.qwen35_moe.hf_weights import hf_name
from models.qwen35_moe.model import Qwen35Moe
from models.qwen35_moe.positions import multimodal_positions
from models.qwen35_moe.vision_config import VisionConfig
from tests.models.qwen35_moe.shapes import tiny_config
from tests.models.qwen35_moe.test_parity import error
from tests.models.qwen35_moe.vision_shapes import exercise, random_patches, tiny_vision

Item = int | tuple[int, int, int]
"""Of a document: so many tokens of text, or a picture's (frames, height, width), in patches."""

# Packed: text alone, a picture first and last, two pictures with one token between, a video, one token.
DOCUMENTS: list[list[Item]] = [
    [5],
    [2, (1, 4, 6), 7, (1, 2, 2), 1],
    [1, (1, 8, 2), 1, (1, 2, 10), 3],
    [4, (3, 4, 4), 2],
    [1],
    [1, (1, 6, 6), 2, (2, 2, 4), 1, (1, 4, 4), 5],
]


class Reading(dict):
    """One document: its tokens, what transformers takes beside them, and its frames in patches."""

    tokens: list[int]
    frames: list[tuple[int, int, int]]  # (place, height, width), in patches
    image_grids: list[tuple[int, int, int]]
    video_grids: list[tuple[int, int, int]]
    types: list[int]


def read_document(items: list[Item], vision: VisionConfig, seed: int = 0) -> Reading:
    """Random text; a video's pairs of pictures each between start and end, with a token of text before, as a time."""
    document = Reading()
    document.tokens, document.frames, document.types = [], [], []
    document.image_grids, document.video_grids = [], []
    generator = np.random.default_rng(seed)

    def text(tokens: list[int]) -> None:
        document.tokens.extend(tokens)
        document.types.extend([0] * len(tokens))

    for item in items:
        if isinstance(item, int):
            text(generator.integers(0, 80, item).tolist())
            continue
        num_frames, height, width = item
        is_video = num_frames > 1
        (document.video_grids if is_video else document.image_grids).append(item)
        for _ in range(num_frames):
            text([*([81] if is_video else []), vision.vision_start_token_id])
            document.frames.append((len(document.tokens), height, width))
            num_tokens = height * width // vision.patches_per_token
            document.tokens.extend([vision.video_token_id if is_video else vision.image_token_id] * num_tokens)
            document.types.extend([2 if is_video else 1] * num_tokens)
            text([vision.vision_end_token_id])
    return document


def positions_of(document: Reading, merge: int) -> np.ndarray:
    frames = [(place, height // merge, width // merge) for place, height, width in document.frames]
    return multimodal_positions(len(document.tokens), frames)


def reference_model(config: ModelConfig, native: Qwen35Moe) -> torch.nn.Module:
    """transformers' image-text model with our weights."""
    hf_config = transformers.Qwen3_5MoeConfig(**config.to_dict())
    hf_config._attn_implementation = "sdpa"
    hf_config.text_config._attn_implementation, hf_config.text_config._experts_implementation = "sdpa", "eager"
    model = transformers.Qwen3_5MoeForConditionalGeneration(hf_config)
    state = {hf_name(name, "image_text_to_text"): tensor for name, tensor in native.state_dict().items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    model.tie_weights()
    return model


def run_reference(model: torch.nn.Module, document: Reading, pixels: torch.Tensor) -> torch.Tensor:
    """transformers on one document by itself; `pixels` of its frames in order, images and videos mixed."""
    arguments = {"input_ids": torch.tensor([document.tokens]), "mm_token_type_ids": torch.tensor([document.types])}
    values = pixels.float() / 127.5 - 1
    parts = values.split([height * width for _, height, width in document.frames])
    starts = [document.types[place] for place, _, _ in document.frames]
    for kind, grids, name in ((1, document.image_grids, "image"), (2, document.video_grids, "video")):
        if grids:
            arguments["pixel_values" if kind == 1 else "pixel_values_videos"] = torch.cat(
                [part for part, start in zip(parts, starts) if start == kind]
            )
            arguments[f"{name}_grid_thw"] = torch.tensor(grids)
    return model(**arguments).logits[0]


CONFIGS = {
    "tiny": tiny_config(vision=tiny_vision()),
    "tied, top 1": tiny_config(tie_word_embeddings=True, num_experts_per_tok=1, vision=tiny_vision(num_heads=4)),
    "full attention first": tiny_config(
        num_hidden_layers=3,
        layer_types=(FULL, LINEAR, FULL),
        head_dim=32,
        partial_rotary_factor=0.75,
        mrope_section=(5, 4, 3),
        vision=tiny_vision(depth=1, patch_size=6, temporal_patch_size=1),
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step_by_step = modeling_qwen3_5_moe.torch_recurrent_gated_delta_rule  # as in test_parity.py, and so are the bounds
    monkeypatch.setattr(modeling_qwen3_5_moe, "torch_chunk_gated_delta_rule", step_by_step)
    config = CONFIGS[name]
    vision = config.vision
    assert vision is not None
    model = exercise(Qwen35Moe(config, Kernels()))
    hf = reference_model(config, model)
    documents = [read_document(items, vision, seed) for seed, items in enumerate(DOCUMENTS)]
    starts = list(itertools.accumulate((len(d.tokens) for d in documents), initial=0))
    places, grids = [], []
    for start, document in zip(starts, documents):
        for place, height, width in document.frames:
            places += range(start + place, start + place + height * width // vision.patches_per_token)
            grids.append((height, width))
    patches = random_patches(vision, [*grids, (2, 2)], places)  # the last frame is nobody's, as on ranks without
    tokens = torch.tensor([token for document in documents for token in document.tokens])
    labels = torch.full_like(tokens, IGNORED)
    for start, document in zip(starts, documents):
        following = torch.tensor([*document.tokens[1:], 0])
        trained = (following < 80) & (torch.arange(len(following)) < len(following) - 1)
        labels[start : start + len(following)][trained] = following[trained]
    batch = SimpleNamespace(
        tokens=tokens,
        positions=torch.from_numpy(np.concatenate([positions_of(d, 2) for d in documents], axis=1)).long(),
        documents=Documents.from_lengths([len(document.tokens) for document in documents]),
        labels=None,
        patches=patches,
    )
    logits, *_ = model(batch)
    batch.labels = labels
    loss, *_ = model(batch)
    loss.backward()

    of_documents = [sum(h * w for _, h, w in document.frames) for document in documents]
    pixels = patches.pixels.split([*of_documents, 4])
    expected = torch.cat([run_reference(hf, document, part) for document, part in zip(documents, pixels)])
    assert error(logits, expected) < 1e-5
    torch.nn.functional.cross_entropy(expected, labels, reduction="sum", ignore_index=IGNORED).backward()
    gradients = {name: parameter.grad for name, parameter in hf.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        expected_gradient = gradients[hf_name(name, "image_text_to_text")]
        if config.num_experts_per_tok == 1 and name.endswith("mlp.gate.weight"):
            assert max(g.abs().max() for g in (parameter.grad, expected_gradient)) < 1e-6, name
            continue
        bound = 1e-3 if name.endswith(("A_log", "dt_bias")) else 1e-4
        assert error(parameter.grad, expected_gradient) < bound, name
    # The embeddings of placeholders are never read.
    for token in (vision.image_token_id, vision.video_token_id):
        if not config.tie_word_embeddings:
            assert not model.embed_tokens.weight.grad[token].any()
