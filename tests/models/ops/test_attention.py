"""Attention inside documents against a plain masked softmax."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.ops.attention import _runs, attention
from models.ops.documents import Documents
from models.ops.kernels import select_kernels
from tests.models.ops.compare import assert_close, relative_error, run

DIM = 8


def make_inputs(num_tokens: int, heads: tuple[int, int], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """q, k, v for (query heads, key heads)."""
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = [(num_tokens, num_heads, DIM) for num_heads in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], causal: bool = True) -> torch.Tensor:
    """One [T, T] softmax over the whole stream; all that is not the same document's past is masked, or not the same
    document's."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    document = torch.arange(len(lengths), device=q.device).repeat_interleave(torch.tensor(lengths, device=q.device))
    allowed = document[:, None] == document[None, :]
    allowed = allowed.tril() if causal else allowed
    scores = torch.einsum("qnk,snk->nqs", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1)
    return torch.einsum("nqs,snk->qnk", weights, v)


def run_sdpa(
    inputs: list[torch.Tensor], lengths: list[int], causal: bool = True
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    documents = Documents.from_lengths(lengths)
    return run(lambda q, k, v: attention(q, k, v, documents, backend="sdpa", causal=causal), inputs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 2), (6, 2), (8, 1)])
@settings(max_examples=15)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_equals_masked_softmax(heads: tuple[int, int], causal: bool, lengths: list[int]) -> None:
    # 1e-12: float64 sums of at most 100 terms.
    inputs = make_inputs(sum(lengths), heads)
    expected = run(lambda q, k, v: naive(q, k, v, lengths, causal), inputs)
    assert_close(run_sdpa(inputs, lengths, causal), expected, 1e-12)


def test_runs_of_one_length() -> None:
    def of(lengths: list[int], causal: bool) -> list[tuple[int, int, int]]:
        return [tuple(run) for run in _runs(Documents.from_lengths(lengths).cu_seqlens_cpu, causal)]

    assert of([5, 5, 5], True) == of([5, 5, 5], False) == [(0, 15, 5)]
    assert of([2000, 2000, 1000], True) == []
    assert of([2000, 2000, 1000], False) == [(0, 4000, 2000), (4000, 5000, 1000)]
    assert of([1000, 24], False) == of([2000, 1, 2000], False) == of([1, 1], True) == []


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


# FlashAttention 4 for the CPU: its parameters' names, order and defaults, the shapes that it takes and returns.
# What it computes is written out here, gradients as the kernels do it: from the output and the normalisers.


def weights_of(q: torch.Tensor, k: torch.Tensor, cu_seqlens: torch.Tensor, normaliser: Any = None) -> torch.Tensor:
    """exp(scores - normaliser) [N, T, T]; without one, the normalisers [N, T] themselves."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    document = torch.arange(len(cu_seqlens) - 1).repeat_interleave(cu_seqlens.diff())
    allowed = (document[:, None] == document[None, :]).tril()
    scores = torch.einsum("qnk,snk->nqs", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~allowed, float("-inf"))
    return scores.logsumexp(dim=-1) if normaliser is None else (scores - normaliser[:, :, None]).exp()


def library_forward(q: Any, k: Any, v: Any, cu_seqlens: Any) -> tuple[torch.Tensor, torch.Tensor]:
    normaliser = weights_of(q, k, cu_seqlens)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return torch.einsum("nqs,snk->qnk", weights_of(q, k, cu_seqlens, normaliser), v), normaliser


def library_backward(dout: Any, q: Any, k: Any, v: Any, out: Any, normaliser: Any, cu_seqlens: Any) -> list[Any]:
    group, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    weights = weights_of(q, k, cu_seqlens, normaliser)
    of_weights = torch.einsum("qnk,snk->nqs", dout, v.repeat_interleave(group, dim=1))
    of_scores = weights * (of_weights - (dout * out).sum(-1).T[:, :, None]) * scale
    dq = torch.einsum("nqs,snk->qnk", of_scores, k.repeat_interleave(group, dim=1))
    heads = [torch.einsum("nqs,qnk->snk", *x) for x in ((of_scores, q), (weights, dout))]
    return [dq, *(x.unflatten(1, (-1, group)).sum(dim=2) for x in heads)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The library on the CPU; lists, for each backward pass, whether it was to be deterministic."""
    asked: list[bool] = []

    def fwd_4(
        q: Any, k: Any, v: Any, qv: None = None, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
        seqused_q: None = None, seqused_k: None = None, max_seqlen_q: int = 0, max_seqlen_k: int = 0,
        causal: bool = False, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        assert causal
        assert return_lse
        assert cu_seqlens_q.diff().max() <= max_seqlen_q == max_seqlen_k
        return *library_forward(q, k, v, cu_seqlens_k), None, None, None

    def bwd_4(
        q: Any, k: Any, v: Any, out: Any, dout: Any, lse: Any, softmax_scale: None = None, causal: bool = False,
        cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, max_seqlen_q: int = 0, max_seqlen_k: int = 0,
        deterministic: bool = False,
    ) -> Any:  # fmt: skip
        assert causal
        assert cu_seqlens_q.diff().max() <= max_seqlen_q == max_seqlen_k
        asked.append(deterministic)
        return tuple(library_backward(dout, q, k, v, out, lse, cu_seqlens_k))

    modules = {name: ModuleType(name) for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface")}
    vars(modules["flash_attn.cute.interface"]).update(_flash_attn_fwd=fwd_4, _flash_attn_bwd=bwd_4)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return asked


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)])
def test_flash_attention_4_is_called_rightly(heads: tuple[int, int], deterministic: bool, calls: list[bool]) -> None:
    inputs, documents = make_inputs(sum(LENGTHS), heads), Documents.from_lengths(LENGTHS, max_seqlen=64)
    torch.use_deterministic_algorithms(deterministic)
    try:
        actual = run(lambda q, k, v: attention(q, k, v, documents, backend="fa4"), inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls == [deterministic]
    assert_close(actual, run_sdpa(inputs, LENGTHS), 1e-12)  # float64 sums of at most 33 terms


@pytest.mark.parametrize("backend", ["cudnn", "fa4"])
def test_documents_of_one_length_are_cudnns_both_ways(
    backend: str, calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN for the CPU: its parameters' order, shapes [D, N, length, K], and gradients from what it is given."""
    asked = []

    def shared(x: torch.Tensor, group: int) -> torch.Tensor:
        return x.repeat_interleave(group, dim=1)

    def scores_of(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        scores = q @ shared(k, q.shape[1] // k.shape[1]).mT * q.shape[-1] ** -0.5
        return scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))

    def forward(q: Any, k: Any, v: Any, bias: None, lse: bool, dropout: float, causal: bool) -> Any:
        asked.append("forward")
        assert (bias, lse, dropout, causal) == (None, True, 0.0, True)
        scores = scores_of(q, k)
        out = scores.softmax(dim=-1) @ shared(v, q.shape[1] // v.shape[1])
        return out, scores.logsumexp(dim=-1, keepdim=True)

    def backward(dout: Any, q: Any, k: Any, v: Any, out: Any, normaliser: Any, *rest: Any) -> Any:
        asked.append("backward")
        assert rest[-4:] == (33, 33, 0.0, True)
        group, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
        weights = (scores_of(q, k) - normaliser).exp()
        of_scores = weights * (dout @ shared(v, group).mT - (dout * out).sum(-1, keepdim=True)) * scale
        of_keys, of_values = (x.unflatten(1, (-1, group)).sum(dim=2) for x in (of_scores.mT @ q, weights.mT @ dout))
        return of_scores @ shared(k, group), of_keys, of_values

    library = SimpleNamespace(
        _scaled_dot_product_cudnn_attention=forward, _scaled_dot_product_cudnn_attention_backward=backward
    )
    monkeypatch.setattr("models.ops.attention._aten", library)
    lengths = [33, 33, 33]
    inputs, documents = make_inputs(sum(lengths), (6, 2)), Documents.from_lengths(lengths, max_seqlen=64)
    actual = run(lambda q, k, v: attention(q, k, v, documents, backend=backend), inputs)
    assert (asked, calls) == (["forward", "backward"], [])
    assert_close(actual, run_sdpa(inputs, lengths), 1e-12)  # float64 sums of at most 33 terms


def skip_unless_it_runs(backend: str, dtype: torch.dtype, dim: int) -> None:
    try:
        select_kernels({"attention": backend}, "cuda", dtype, (128, 128), 4, dim)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels run on CUDA alone")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "dim", "causal"), [((16, 2), 256, True), ((4, 4), 64, True), ((16, 16), 72, False), ((4, 2), 128, False)]
)
@pytest.mark.parametrize(
    ("backend", "lengths"),
    [
        ("varlen", [1, 200, 63, 64, 184]),
        ("cudnn", [201, 311]),
        ("cudnn", [256, 256]),
        ("cudnn", [1500, 1500, 1100]),
        ("cudnn", [1] * 512),
        ("fa4", [256, 256]),
        ("fa4", [1, 200, 63, 64, 184]),
        ("fa4", [1] * 300 + [212]),  # from 257 documents on it finds a tile's document in another way
    ],
)
def test_kernels_equal_masked_softmax(
    backend: str, lengths: list[int], heads: tuple[int, int], dim: int, causal: bool, dtype: torch.dtype, compiled: bool
) -> None:
    skip_unless_it_runs(backend, dtype, dim)
    # 1%: bfloat16 keeps 8 bits (0.4%), and the weights and the output are each rounded to it once.
    torch.compiler.reset()
    documents = Documents.from_lengths(lengths, torch.device("cuda"), max_seqlen=max(512, *lengths))
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = [
        torch.randn(sum(lengths), n, dim, generator=generator, device="cuda", dtype=dtype)
        for n in (heads[0], *2 * heads[1:])
    ]

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, documents, backend=backend, causal=causal)

    out, gradients = run(torch.compile(kernel, fullgraph=True) if compiled else kernel, inputs)
    expected, gradients_expected = run(lambda q, k, v: naive(q, k, v, lengths, causal), [x.double() for x in inputs])
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels run on CUDA alone")
@pytest.mark.parametrize("backend", ["varlen", "fa4"])
def test_deterministic_gradients_are_the_same_bit_for_bit(backend: str) -> None:
    """The 35B model's heads, enough tokens that blocks of the GPU add to one gradient at the same time."""
    skip_unless_it_runs(backend, torch.bfloat16, 256)
    documents = Documents.from_lengths([2048, 1, 2047], torch.device("cuda"))
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = [torch.randn(4096, n, 256, generator=generator, device="cuda").bfloat16() for n in (16, 2, 2)]
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (run(lambda q, k, v: attention(q, k, v, documents, backend=backend), inputs) for _ in range(5))
    finally:
        torch.use_deterministic_algorithms(False)
    for out, gradients in others:
        assert all(torch.equal(x, y) for x, y in zip([out, *gradients], [first[0], *first[1]], strict=True))
