"""Attention inside documents against a plain masked softmax."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.ops.attention import attention
from models.ops.documents import Documents
from tests.models.ops.compare import assert_close, relative_error, run

DIM = 8


def make_inputs(num_tokens: int, heads: tuple[int, int], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """q, k, v for (query heads, key heads)."""
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = [(num_tokens, num_heads, DIM) for num_heads in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """One [T, T] softmax over the whole stream; all that is not the same document's past is masked."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    document = torch.arange(len(lengths), device=q.device).repeat_interleave(torch.tensor(lengths, device=q.device))
    allowed = (document[:, None] == document[None, :]).tril()
    scores = torch.einsum("qnk,snk->nqs", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1)
    return torch.einsum("nqs,snk->qnk", weights, v)


def run_sdpa(inputs: list[torch.Tensor], lengths: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    documents = Documents.from_lengths(lengths)
    return run(lambda q, k, v: attention(q, k, v, documents, backend="sdpa"), inputs)


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 2), (6, 2), (8, 1)])
@settings(deadline=None, max_examples=15)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_equals_masked_softmax(heads: tuple[int, int], lengths: list[int]) -> None:
    # 1e-12: float64 sums of at most 100 terms.
    inputs = make_inputs(sum(lengths), heads)
    assert_close(run_sdpa(inputs, lengths), run(lambda q, k, v: naive(q, k, v, lengths), inputs), 1e-12)


LENGTHS = [5, 1, 33, 2, 17]


@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_other_documents_change_nothing_bit_for_bit(changed: int) -> None:
    inputs = make_inputs(sum(LENGTHS), (4, 2), torch.float32)
    others = [x.clone() for x in inputs]
    for x in others:
        x.split(LENGTHS)[changed].mul_(-100)
    before, gradients_before = run_sdpa(inputs, LENGTHS)
    after, gradients_after = run_sdpa(others, LENGTHS)
    for x, y in zip([before, *gradients_before], [after, *gradients_after]):
        same = [torch.equal(a, b) for a, b in zip(x.split(LENGTHS), y.split(LENGTHS))]
        assert all(same[:changed] + same[changed + 1 :])
    assert not torch.equal(before.split(LENGTHS)[changed], after.split(LENGTHS)[changed])


@pytest.mark.parametrize("document", range(len(LENGTHS)))
def test_derivative_by_another_document_is_exactly_zero(document: int) -> None:
    inputs = [x.requires_grad_() for x in make_inputs(sum(LENGTHS), (4, 2))]
    out = attention(*inputs, Documents.from_lengths(LENGTHS), backend="sdpa")
    gradients = torch.autograd.grad(out.split(LENGTHS)[document].square().sum(), inputs)
    for gradient in gradients:
        assert not any(part.any() for d, part in enumerate(gradient.split(LENGTHS)) if d != document)
    assert gradients[2].split(LENGTHS)[document].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels run on CUDA alone")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "dim"), [((16, 2), 256), ((4, 4), 64)])
@pytest.mark.parametrize(
    ("backend", "lengths"),
    [("varlen", [1, 200, 63, 64, 184]), ("cudnn", [201, 311]), ("cudnn", [256, 256]), ("cudnn", [1] * 512)],
)
def test_kernels_equal_masked_softmax(
    backend: str, lengths: list[int], heads: tuple[int, int], dim: int, dtype: torch.dtype, compiled: bool
) -> None:
    # 1%: bfloat16 keeps 8 bits (0.4%), and the weights and the output are each rounded to it once.
    documents = Documents.from_lengths(lengths, torch.device("cuda"), max_seqlen=512)
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = [
        torch.randn(512, n, dim, generator=generator, device="cuda", dtype=dtype) for n in (heads[0], *2 * heads[1:])
    ]

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, documents, backend=backend)

    out, gradients = run(torch.compile(kernel, fullgraph=True) if compiled else kernel, inputs)
    expected, gradients_expected = run(lambda q, k, v: naive(q, k, v, lengths), [x.double() for x in inputs])
    assert_close((out, gradients), (expected, gradients_expected), 1e-2)

    # Isolation: other documents' content changes nothing, forward and backward.
    first = lengths[0]
    others = [x.clone() for x in inputs]
    for x in others:
        x[:first] *= -3
    changed, gradients_changed = run(kernel, others)
    unchanged, gradients_unchanged = run(kernel, inputs)
    assert torch.equal(changed[first:], unchanged[first:])
    assert not torch.equal(changed[:first], unchanged[:first])
    for x, y in zip(gradients_changed, gradients_unchanged):
        assert relative_error(x[first:], y[first:]) <= 1e-2  # the backward adds atomically: not bit for bit
