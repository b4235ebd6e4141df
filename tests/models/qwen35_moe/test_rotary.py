"""Rotary angles: which axis turns which pair, and equal axes are text."""

import pytest
import torch
from transformers import Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTextRotaryEmbedding

from models.qwen35_moe.rotary import apply_rotary, rotary_embedding
from tests.models.qwen35_moe.shapes import random_model, random_stream, run_model, tiny_config


@pytest.mark.parametrize(
    ("head_dim", "section"), [(256, (11, 11, 10)), (64, (3, 3, 2)), (64, (2, 1, 5)), (32, (11, 11, 10))]
)
def test_rotary_axes_are_interleaved_as_in_transformers(head_dim: int, section: tuple[int, int, int]) -> None:
    config = tiny_config(head_dim=head_dim, mrope_section=section)
    reference = Qwen3_5MoeTextRotaryEmbedding(Qwen3_5MoeTextConfig(**config.to_dict()))
    positions = torch.randint(0, 50_000, (3, 40), generator=torch.Generator().manual_seed(0))
    cos, sin = reference(torch.zeros(1), positions[:, None])
    ours = rotary_embedding(config, positions)
    pairs = config.rotary_dim // 2
    assert torch.equal(ours.cos, cos[0, :, :pairs])
    assert torch.equal(ours.sin, sin[0, :, :pairs])


def test_equal_axes_are_text_positions() -> None:
    model = random_model(tiny_config())
    tokens, positions, documents, _ = random_stream(model.config, [5, 9])
    text, _ = run_model(model, tokens, positions, documents)
    three, _ = run_model(model, tokens, positions.expand(3, -1), documents)
    assert torch.equal(text, three)


def test_scores_depend_on_distances_alone() -> None:
    """What rotary embeddings are for: q k^T is the same when both positions move by the same."""
    config = tiny_config(head_dim=32, mrope_section=(2, 1, 1))
    q, k = torch.randn(2, 6, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores = []
    for start in (0, 1000):
        rotary = rotary_embedding(config, torch.arange(start, start + 6))
        scores.append(torch.einsum("qnd,knd->nqk", apply_rotary(q, rotary), apply_rotary(k, rotary)))
    assert (scores[0] - scores[1]).abs().max() < 1e-3  # angles of float32 at 1000: 6e-5 each
    assert (scores[0] - torch.einsum("qnd,knd->nqk", q, k)).abs().max() > 0.5


def test_only_the_first_dims_are_turned() -> None:
    config = tiny_config(head_dim=32, mrope_section=(2, 1, 1))
    x = torch.randn(6, 3, 32, generator=torch.Generator().manual_seed(0))
    turned = apply_rotary(x, rotary_embedding(config, torch.arange(6)))
    assert torch.equal(turned[..., config.rotary_dim :], x[..., config.rotary_dim :])
    assert torch.equal(turned[0], x[0])  # position 0
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1))
