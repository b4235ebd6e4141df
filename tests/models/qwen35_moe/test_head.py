"""The head: logits and their loss are the plain ones, with an adapter and without, of its own weight or a tied one."""

import pytest
import torch

from models.qwen35_moe.head import Head, read_out
from models.qwen35_moe.lora import LoraHead

HIDDEN, VOCAB, RANK, SCALE = 16, 47, 4, 1.5


@pytest.mark.parametrize("num_tokens", [1, 9])
@pytest.mark.parametrize("has_adapter", [False, True])
def test_logits_and_loss_are_the_plain_ones(num_tokens: int, has_adapter: bool) -> None:
    torch.manual_seed(0)
    plain = Head(HIDDEN, VOCAB).double()
    head = LoraHead(plain, RANK, SCALE) if has_adapter else plain
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    hidden = torch.randn(num_tokens, HIDDEN, dtype=torch.float64)
    labels = torch.randint(VOCAB, (num_tokens,))
    labels[1:3] = -100
    weight = plain.weight
    if isinstance(head, LoraHead):
        weight = weight + SCALE * head.lora_B.weight @ head.lora_A.weight
    logits = hidden @ weight.T
    loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    # float64: what is left is another order of the sums.
    torch.testing.assert_close(head(hidden, None, "torch"), logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(head(hidden, labels, "torch"), loss, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(loss, list(head.parameters()))
    found = torch.autograd.grad(head(hidden, labels, "torch"), list(head.parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    if not has_adapter:  # of a weight that is another module's
        assert torch.equal(read_out(hidden, plain.weight, labels, "torch"), head(hidden, labels, "torch"))


def test_a_head_has_no_bias_and_the_name_of_hugging_faces() -> None:
    assert {name: tuple(each.shape) for name, each in Head(HIDDEN, VOCAB).named_parameters()} == {
        "weight": (VOCAB, HIDDEN)
    }
