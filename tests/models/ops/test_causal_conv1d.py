"""The causal convolution against F.conv1d on each document alone."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from models.ops.causal_conv1d import causal_conv1d
from models.ops.documents import Documents
from tests.models.ops.compare import assert_close, run

CHANNELS = 6
WIDTHS = (1, 2, 3)


def make_inputs(num_tokens: int, width: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, CHANNELS, generator=generator, dtype=torch.float64)
    weight = torch.randn(CHANNELS, 1, width, generator=generator, dtype=torch.float64)
    return [x.to(dtype), weight.to(dtype)]


def convolve_alone(x: torch.Tensor, weight: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Every document on its own: padded with zeros at its start, then torch's depthwise convolution."""
    outs = []
    for document in x.split(lengths):
        padded = F.pad(document.T, (weight.shape[-1] - 1, 0)).unsqueeze(0)
        outs.append(F.silu(F.conv1d(padded, weight, groups=CHANNELS)).squeeze(0).T)
    return torch.cat(outs)


def convolve(x: torch.Tensor, weight: torch.Tensor, documents: Documents) -> torch.Tensor:
    """All parts side by side."""
    parts = causal_conv1d(x, weight, WIDTHS, documents)
    assert [part.shape[1] for part in parts] == list(WIDTHS)
    return torch.cat(parts, dim=-1)


def run_packed(inputs: list[torch.Tensor], lengths: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    documents = Documents.from_lengths(lengths)
    return run(lambda x, weight: convolve(x, weight, documents), inputs)


@pytest.mark.parametrize("width", [2, 3, 4, 5])
@settings(max_examples=25)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_equals_each_document_alone(width: int, lengths: list[int]) -> None:
    # 1e-13: float64, sums of at most 5 taps (54 tokens in the weight's gradient).
    inputs = make_inputs(sum(lengths), width)
    expected = run(lambda x, weight: convolve_alone(x, weight, lengths), inputs)
    assert_close(run_packed(inputs, lengths), expected, 1e-13)


def test_float32() -> None:
    # 1e-6: ten roundings of 6e-8.
    lengths = [1, 30, 2, 67]
    inputs = make_inputs(100, 4, torch.float32)
    expected = run(lambda x, weight: convolve_alone(x, weight, lengths), [x.double() for x in inputs])
    assert_close(run_packed(inputs, lengths), expected, 1e-6)


def test_bfloat16_taps_are_summed_in_float32() -> None:
    """As exact as torch's convolution, which rounds once before SiLU and once after."""
    lengths = [500, 1, 499]
    x, weight = make_inputs(1000, 4, torch.bfloat16)
    exact = convolve_alone(x.double(), weight.double(), lengths)
    ours = convolve(x, weight, Documents.from_lengths(lengths))
    assert ours.dtype == torch.bfloat16
    error, torchs = ((y - exact).square().mean().sqrt() for y in (ours, convolve_alone(x, weight, lengths)))
    assert error <= 1.05 * torchs  # rounding after every tap makes it 1.5 times


LENGTHS = [5, 1, 3, 2, 7]


@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_other_documents_change_nothing_bit_for_bit(changed: int) -> None:
    x, weight = make_inputs(sum(LENGTHS), 4, torch.float32)
    other = x.clone()
    other.split(LENGTHS)[changed].mul_(-1000)
    before, (gradient_before, _) = run_packed([x, weight], LENGTHS)
    after, (gradient_after, _) = run_packed([other, weight], LENGTHS)
    for d in range(len(LENGTHS)):
        same = torch.equal(before.split(LENGTHS)[d], after.split(LENGTHS)[d])
        assert same == (d != changed)
        if d != changed:
            assert torch.equal(gradient_before.split(LENGTHS)[d], gradient_after.split(LENGTHS)[d])


@pytest.mark.parametrize("document", range(len(LENGTHS)))
def test_derivative_by_another_document_is_exactly_zero(document: int) -> None:
    x, weight = make_inputs(sum(LENGTHS), 4)
    x.requires_grad_()
    out = convolve(x, weight, Documents.from_lengths(LENGTHS))
    (gradient,) = torch.autograd.grad(out.split(LENGTHS)[document].square().sum(), x)
    assert [bool(part.any()) for part in gradient.split(LENGTHS)] == [d == document for d in range(len(LENGTHS))]


def test_one_graph_whatever_the_documents() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(convolve, fullgraph=True, backend=counter)
    x, weight = make_inputs(24, 4, torch.float32)
    for lengths in ([12, 12], [8, 8, 8], [24 - 9, 2, 3, 4], [20, 1, 1, 1, 1], [4] * 6):
        documents = Documents.from_lengths(lengths, max_seqlen=24)
        assert torch.equal(compiled(x, weight, documents), convolve(x, weight, documents))
    assert counter.frame_count <= 2  # the second graph takes any number of documents
