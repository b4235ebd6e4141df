"""Packing: a document in a stream is computed as if it were alone, and nothing passes from one to another."""

import pytest
import torch

from models.ops.documents import Documents
from models.qwen35_moe.block import Block
from models.qwen35_moe.moe import Router
from models.qwen35_moe.rotary import rotary_embedding
from tests.models.qwen35_moe.shapes import random_model, random_stream, run_model, tiny_config

# One token, one chunk (64), one more, odd lengths.
LENGTHS = [1, 64, 65, 3, 1, 31]
CONFIG = tiny_config()


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


@pytest.mark.parametrize("lengths", [LENGTHS, [1] * 9, [200], [63, 128, 2]])
def test_packed_equals_alone(lengths: list[int]) -> None:
    # 1e-6: groups of rows of another size may differ in the last bit of grouped_mm.
    model = random_model(CONFIG)
    tokens, positions, documents, labels = random_stream(CONFIG, lengths)
    logits, _ = run_model(model, tokens, positions, documents)
    if any(length > 1 for length in lengths):
        run_model(model, tokens, positions, documents, labels)[0].backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = []
    for tokens_d, positions_d, labels_d in zip(*(x.split(lengths) for x in (tokens, positions, labels))):
        document = Documents.from_lengths([len(tokens_d)])
        alone.append(run_model(model, tokens_d, positions_d, document)[0])
        if len(tokens_d) > 1:
            run_model(model, tokens_d, positions_d, document, labels_d)[0].backward()
    assert error(logits, torch.cat(alone)) < 1e-6
    for name, gradient in packed.items():
        assert error(gradient, dict(model.named_parameters())[name].grad) < 1e-5, name


def changed_document(tokens: torch.Tensor, lengths: list[int], which: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream with all tokens of one document replaced, and a mask of the tokens that were not."""
    start = sum(lengths[:which])
    changed = tokens.clone()
    changed[start : start + lengths[which]] = (changed[start : start + lengths[which]] + 1) % CONFIG.vocab_size
    others = torch.ones_like(tokens, dtype=torch.bool)
    others[start : start + lengths[which]] = False
    return changed, others


@pytest.mark.parametrize("which", range(len(LENGTHS)))
def test_changing_a_document_changes_no_other(which: int) -> None:
    model = random_model(CONFIG)
    tokens, positions, documents, _ = random_stream(CONFIG, LENGTHS)
    changed, others = changed_document(tokens, LENGTHS, which)
    with torch.no_grad():
        before, _ = run_model(model, tokens, positions, documents)
        after, _ = run_model(model, changed, positions, documents)
    assert error(after[others], before[others]) < 1e-6
    assert not torch.equal(after[~others], before[~others])


@pytest.mark.parametrize("layer", [0, 3], ids=["linear", "full"])
def test_whole_blocks_are_isolated_bit_for_bit_with_routing_pinned(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Other rows in an expert's group may change the last bit of a row's product; with the routing pinned the groups are
    # the same, and then so is every bit.
    block: Block = random_model(CONFIG).blocks[layer]
    tokens, positions, documents, _ = random_stream(CONFIG, LENGTHS)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(len(tokens), CONFIG.hidden_size, generator=generator)
    weights = torch.rand(len(tokens), CONFIG.num_experts_per_tok, generator=generator)
    experts = torch.rand(len(tokens), CONFIG.num_experts, generator=generator).topk(CONFIG.num_experts_per_tok)[1]
    unread = torch.empty(0)
    monkeypatch.setattr(Router, "forward", lambda self, x: (weights, experts, unread, unread))
    rotary = rotary_embedding(CONFIG, positions)
    with torch.no_grad():
        before, _ = block(hidden, rotary, documents)
        for which in range(len(LENGTHS)):
            _, others = changed_document(tokens, LENGTHS, which)
            changed = torch.where(others[:, None], hidden, hidden + 1)
            after, _ = block(changed, rotary, documents)
            assert torch.equal(after[others], before[others])
            assert not torch.equal(after[~others], before[~others])


def test_derivative_by_another_document_is_exactly_zero() -> None:
    model = random_model(CONFIG)
    tokens, positions, documents, _ = random_stream(CONFIG, LENGTHS)
    embedded = model.embed_tokens(tokens).detach().requires_grad_()
    model.embed_tokens.forward = lambda _: embedded
    logits, _ = run_model(model, tokens, positions, documents)
    for document, rows in zip(range(len(LENGTHS)), logits.split(LENGTHS)):
        (gradient,) = torch.autograd.grad(rows.square().sum(), embedded, retain_graph=True)
        for other, part in enumerate(gradient.split(LENGTHS)):
            assert (part.abs().max() > 0) == (other == document), (document, other)
