"""The chunked gated delta rule against the step-by-step recurrence, and the isolation of documents."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import models.ops.gated_delta_rule as module
from models.ops.documents import Documents
from models.ops.gated_delta_rule import gated_delta_rule
from tests.models.ops.compare import assert_close, relative_error, run
from tests.models.ops.recurrence import recurrence

# Ranges of the log decay g: what a trained model has, memories that last for thousands of tokens, memories that are
# gone at the next token (whole chunks of them underflow), both in one document, and no decay at all.
DECAYS = {"usual": (-3.0, 0.0), "weak": (-1e-4, 0.0), "strong": (-50.0, -20.0), "mixed": (-50.0, 0.0), "none": (0, 0)}

# float64, relative to each tensor's largest: rounding is 1e-16 an operation, and a document of 200 tokens has its
# longest sums of some thousand terms; 1e-10 leaves room for cancellation, and is far below any mistake.
TOLERANCE = 1e-10


def make_inputs(
    num_tokens: int,
    decay: str = "usual",
    heads: tuple[int, int] = (2, 4),
    dims: tuple[int, int] = (8, 6),
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[torch.Tensor]:
    """q, k, v, g, beta."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    (num_key_heads, num_value_heads), (key_dim, value_dim) = heads, dims
    low, high = DECAYS[decay]
    uniform = torch.rand(num_tokens, num_value_heads, generator=generator, dtype=torch.float64)
    inputs = [
        normal(num_tokens, num_key_heads, key_dim),
        normal(num_tokens, num_key_heads, key_dim),
        normal(num_tokens, num_value_heads, value_dim),
        low + (high - low) * uniform,
        normal(num_tokens, num_value_heads).sigmoid(),
    ]
    return [x.to(dtype) for x in inputs]


def run_chunked(inputs: list[torch.Tensor], lengths: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    documents = Documents.from_lengths(lengths)
    return run(lambda *x: gated_delta_rule(*x, documents), inputs)


def run_recurrence(inputs: list[torch.Tensor], lengths: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return run(lambda *x: recurrence(*x, lengths), inputs)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 200])
def test_equals_recurrence_across_chunk_borders(length: int, decay: str) -> None:
    inputs = make_inputs(length, decay)
    assert_close(run_chunked(inputs, [length]), run_recurrence(inputs, [length]), TOLERANCE)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (1, 4), (2, 6)])
@pytest.mark.parametrize("dims", [(1, 1), (4, 16), (16, 4)])
def test_equals_recurrence_for_head_counts_and_dims(heads: tuple[int, int], dims: tuple[int, int]) -> None:
    inputs = make_inputs(70, heads=heads, dims=dims)
    assert_close(run_chunked(inputs, [66, 4]), run_recurrence(inputs, [66, 4]), TOLERANCE)


@settings(max_examples=15)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=4), st.sampled_from(list(DECAYS)), st.integers(0, 2**31))
def test_equals_recurrence_for_any_documents(lengths: list[int], decay: str, seed: int) -> None:
    inputs = make_inputs(sum(lengths), decay, heads=(1, 2), dims=(4, 3), seed=seed)
    assert_close(run_chunked(inputs, lengths), run_recurrence(inputs, lengths), TOLERANCE)


@pytest.mark.parametrize("decay", ["usual", "weak"])
def test_gradcheck(decay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 4)  # so that few tokens, as gradcheck needs, cross chunk borders
    lengths = [1, 9, 4, 3]
    documents = Documents.from_lengths(lengths)
    inputs = [x.requires_grad_() for x in make_inputs(sum(lengths), decay, heads=(1, 2), dims=(3, 2))]
    assert torch.autograd.gradcheck(lambda *x: gated_delta_rule(*x, documents), inputs)


def test_head_shapes_of_the_35b_in_float32() -> None:
    # 1e-5: float32 rounds at 6e-8; sums run over 128 channels, 64 tokens of a chunk and the triangular solve.
    lengths = [65, 1, 34]
    inputs = make_inputs(100, heads=(16, 32), dims=(128, 128), dtype=torch.float32)
    expected = run_recurrence([x.double() for x in inputs], lengths)
    assert_close(run_chunked(inputs, lengths), expected, 1e-5)


@pytest.mark.parametrize("decay", ["strong", "mixed", "weak"])
def test_float32_neither_overflows_nor_loses_digits(decay: str) -> None:
    # The gradient of g too, which under strong decay is a thousand millionth of the others: 1e-4 of its own largest.
    inputs = make_inputs(200, decay, dtype=torch.float32)
    expected = run_recurrence([x.double() for x in inputs], [200])
    assert_close(run_chunked(inputs, [200]), expected, 1e-4)


def test_zero_rows_have_finite_gradients() -> None:
    inputs = make_inputs(66)
    inputs[0][5], inputs[1][6], inputs[4][7] = 0, 0, 0  # q, k and beta
    assert_close(run_chunked(inputs, [66]), run_recurrence(inputs, [66]), TOLERANCE)


def test_bfloat16_is_computed_in_float32() -> None:
    inputs = [x.bfloat16() for x in make_inputs(100)]
    inputs[3] = inputs[3].float()  # g is float32 always
    documents = Documents.from_lengths([70, 30])
    out = gated_delta_rule(*inputs, documents)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, gated_delta_rule(*(x.float() for x in inputs), documents).bfloat16())


def test_gradients_have_the_dtype_of_their_inputs() -> None:
    inputs = [x.bfloat16() for x in make_inputs(10)]
    inputs[3] = inputs[3].float()
    _, gradients = run_chunked(inputs, [10])
    assert [x.dtype for x in gradients] == [x.dtype for x in inputs]


LENGTHS = [1, 64, 70, 3, 130]


def test_packed_equals_alone() -> None:
    # 1e-14 in float64: the same sums, of which a matrix product may order a few differently in a larger batch.
    inputs = make_inputs(sum(LENGTHS))
    out, gradients = run_chunked(inputs, LENGTHS)
    cotangents = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pieces = [x.split(LENGTHS) for x in (out, cotangents)]
    for d, length in enumerate(LENGTHS):
        alone = [x.split(LENGTHS)[d].clone().requires_grad_() for x in inputs]
        out_alone = gated_delta_rule(*alone, Documents.from_lengths([length]))
        gradients_alone = torch.autograd.grad(out_alone, alone, pieces[1][d])
        assert relative_error(pieces[0][d], out_alone) <= 1e-14
        for gradient, gradient_alone in zip(gradients, gradients_alone):
            # Relative to the whole stream's largest: g's gradient in a document of one token is rounding alone.
            assert (gradient.split(LENGTHS)[d] - gradient_alone).abs().max() <= 1e-14 * gradient.abs().max()


@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_other_documents_change_nothing_bit_for_bit(changed: int) -> None:
    inputs = make_inputs(sum(LENGTHS), dtype=torch.float32)
    others = make_inputs(sum(LENGTHS), "mixed", dtype=torch.float32, seed=1)
    start = sum(LENGTHS[:changed])
    inside = torch.zeros(sum(LENGTHS), dtype=torch.bool)
    inside[start : start + LENGTHS[changed]] = True
    mixed = [torch.where(inside.view(-1, *[1] * (x.dim() - 1)), 1000 * y, x) for x, y in zip(inputs, others)]
    before, gradients_before = run_chunked(inputs, LENGTHS)
    after, gradients_after = run_chunked(mixed, LENGTHS)
    assert not torch.equal(before[inside], after[inside])
    for x, y in zip([before, *gradients_before], [after, *gradients_after]):
        assert torch.equal(x[~inside], y[~inside])


@pytest.mark.parametrize("document", range(len(LENGTHS)))
def test_derivative_by_another_document_is_exactly_zero(document: int) -> None:
    inputs = [x.requires_grad_() for x in make_inputs(sum(LENGTHS))]
    out = gated_delta_rule(*inputs, Documents.from_lengths(LENGTHS))
    gradients = torch.autograd.grad(out.split(LENGTHS)[document].square().sum(), inputs)
    for gradient in gradients:
        for d, part in enumerate(gradient.split(LENGTHS)):
            assert d == document or not part.any()
    assert gradients[2].split(LENGTHS)[document].any()


def test_many_short_documents_cost_few_steps() -> None:
    """The scan runs over chunk indices, all documents at once: its steps are the longest document's chunks."""
    lengths = [1] * 300 + [65, 2, 128]
    token, position, active = module._chunk_layout(lengths, torch.device("cpu"))
    assert active == [303, 2]
    assert token.shape == (305, module.CHUNK)
    assert torch.equal(token.flatten()[position], torch.arange(sum(lengths)))


def test_compiled_callers_work() -> None:
    documents = Documents.from_lengths([3, 66])
    inputs = make_inputs(69)
    compiled = torch.compile(lambda *x: 2 * gated_delta_rule(*x, documents), backend="eager")
    assert torch.equal(compiled(*inputs), 2 * gated_delta_rule(*inputs, documents))
