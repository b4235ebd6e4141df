"""Softmax attention inside each document of a packed stream, to the past or to all of it."""

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from models.ops.documents import Documents, lengths_of
from models.ops.in_graph import in_graph

# Shapes: T tokens, N query heads, Nkv key and value heads (N / Nkv query heads share one), K head dim.

_aten = torch.ops.aten


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, *, backend: str, causal: bool = True
) -> torch.Tensor:
    """softmax(q k^T / sqrt(K)) v over the tokens of the same document (Vaswani et al. 2017), `causal`: up to one's own.

    q [T, N, K]; k, v [T, Nkv, K] -> [T, N, K]. backend "sdpa": one call a document, any device and dtype, the
    reference; "varlen": one kernel over the stream, the FlashAttention 2 that PyTorch contains; "cudnn": cuDNN's kernel
    where all documents have one length, faster there, and for long ones without `causal`, else as "varlen"; "fa4": as
    "cudnn", but else the package flash-attn-4. All but the first need CUDA with bfloat16 or float16.
    """
    if backend == "sdpa":
        return _sdpa(q, k, v, documents.cu_seqlens_cpu, causal)
    bounds = (documents.cu_seqlens, documents.cu_seqlens_cpu, documents.max_seqlen)
    out, _ = _forward(q, k, v, *bounds, backend, causal)
    return out


def _each_by_itself(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_cpu: torch.Tensor, causal: bool
) -> torch.Tensor:
    lengths, outs = lengths_of(cu_seqlens_cpu), []
    for document in zip(q.split(lengths), k.split(lengths), v.split(lengths)):
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in document)  # [1, N or Nkv, length, K]
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)
        outs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outs)


_sdpa = in_graph(
    _each_by_itself,
    "sdpa",
    "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_cpu, bool causal",
    num_inputs=3,
    shape=lambda q, *_: torch.empty_like(q, memory_format=torch.contiguous_format),
)


# Of 16 heads of 256, causal, in two documents of 4,096 tokens cuDNN took an H200 2.6 ms forward and backward, and
# FlashAttention 4 6.4; 74 and 73 in one of 32,768 (benchmarks/attention.py, when "fa4" was never cuDNN).
_WITH_CUDNN = ("cudnn", "fa4")


# One operation of torch for all kernels, so that a compiled block does not see which of them a batch takes.
#
# torch.nn.attention.activate_flash_attention_impl could put FlashAttention 4 in the place of PyTorch's own kernel.
# It is not used: it does so for the whole process, whatever a call asks for, and up to PyTorch 2.13 it does not
# understand what flash-attn-4 returns (PyTorch's issue 190212).


@torch.library.custom_op("qwen35_moe::attention", mutates_args=())
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_seqlens_cpu: torch.Tensor,
    max_seqlen: int,
    backend: str,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out [T, N, K], and the softmax's logarithmic normalisers, float32 [N * T] in the kernel's own order."""
    if backend in _WITH_CUDNN and (runs := _runs(cu_seqlens_cpu, causal)):
        outs, normalisers = [], []
        for run in runs:
            heads_first = [_by_document(run.of(x), run.length) for x in (q, k, v)]
            out, normaliser, *_ = _aten._scaled_dot_product_cudnn_attention(*heads_first, None, True, 0.0, causal)
            outs.append(_as_stream(out))
            normalisers.append(normaliser.reshape(-1))
        return _joined(outs), _joined(normalisers)
    bounds = _bounds(cu_seqlens, max_seqlen)
    if backend == "fa4":
        from flash_attn.cute.interface import _flash_attn_fwd

        out, normaliser, *_ = _flash_attn_fwd(q, k, v, **bounds, causal=causal, return_lse=True)
    else:
        out, normaliser, *_ = _aten._flash_attention_forward(q, k, v, *bounds.values(), 0.0, causal, False)
    return out, normaliser.reshape(-1)


@_forward.register_fake
def _(q: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    normaliser = q.new_empty(q.shape[0] * q.shape[1], dtype=torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), normaliser


@torch.library.custom_op("qwen35_moe::attention_backward", mutates_args=())
def _backward(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    normaliser: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_seqlens_cpu: torch.Tensor,
    max_seqlen: int,
    backend: str,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v."""
    unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the random state of a dropout that there is not
    if backend in _WITH_CUDNN and (runs := _runs(cu_seqlens_cpu, causal)):
        of_runs, seed = [], unused.view(torch.int64)[0]
        for run in runs:
            tensors = [_by_document(run.of(x), run.length) for x in (gradient, q, k, v, out)]
            of_run = normaliser[run.start * q.shape[1] : run.stop * q.shape[1]].view(*tensors[1].shape[:3], 1)
            gradients = _aten._scaled_dot_product_cudnn_attention_backward(
                *tensors, of_run, seed, seed, None, None, None, run.length, run.length, 0.0, causal
            )
            of_runs.append([_as_stream(x) for x in gradients])
        dq, dk, dv = (_joined(list(parts)) for parts in zip(*of_runs))
        return dq, dk, dv
    bounds, deterministic = _bounds(cu_seqlens, max_seqlen), torch.are_deterministic_algorithms_enabled()
    gradient, normaliser = gradient.contiguous(), normaliser.view(q.shape[1], q.shape[0])
    if backend == "fa4":
        from flash_attn.cute.interface import _flash_attn_bwd

        tensors = [q, k, v, out, gradient, normaliser]
        dq, dk, dv = _flash_attn_bwd(*tensors, **bounds, causal=causal, deterministic=deterministic)
    else:
        tensors = [gradient, q, k, v, out, normaliser]
        dq, dk, dv = _aten._flash_attention_backward(*tensors, *bounds.values(), 0.0, causal, unused, unused)
    return dq, dk, dv


@_backward.register_fake
def _(gradient: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, cu_seqlens, cu_seqlens_cpu, ctx.max_seqlen, ctx.backend, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, cu_seqlens_cpu)


def _autograd(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    gradients = _backward(gradient, *ctx.saved_tensors, ctx.max_seqlen, ctx.backend, ctx.causal)
    return *gradients, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_save_for_backward)


def _bounds(cu_seqlens: torch.Tensor, max_seqlen: int) -> dict[str, Any]:
    """Where documents end, of queries and of keys, by FlashAttention's names and in its order."""
    return {
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": max_seqlen,
        "max_seqlen_k": max_seqlen,
    }


class _Run(NamedTuple):
    """Neighbouring documents of one length: the tokens from `start` to `stop`."""

    start: int
    stop: int
    length: int

    def of(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.start : self.stop]


# On an H100, three frames of 8,160 patches and 16 heads of 72 took FlashAttention 2 3.9 ms forward and 12.0 backward,
# and cuDNN 3.0 and 8.0 (benchmarks/attention.py --vision). Short documents would be more launches than work.
_TOKENS_OF_A_RUN = 1024


def _runs(cu_seqlens_cpu: torch.Tensor, causal: bool) -> list[_Run]:
    """What cuDNN computes, in as many calls; none if that would be slower than one kernel over the stream."""
    bounds = cu_seqlens_cpu.tolist()
    most = 1 if causal else max(1, bounds[-1] // _TOKENS_OF_A_RUN)
    runs: list[_Run] = []
    for start, stop in itertools.pairwise(bounds):
        if stop - start == 1 or len(runs) > most:  # cuDNN takes two tokens and more
            return []
        if runs and runs[-1].length == stop - start:
            runs[-1] = runs[-1]._replace(stop=stop)
        else:
            runs.append(_Run(start, stop, stop - start))
    return runs if len(runs) <= most else []


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _by_document(x: torch.Tensor, length: int) -> torch.Tensor:
    """[T, N, K] -> [D, N, length, K], without a copy."""
    return x.unflatten(0, (-1, length)).transpose(1, 2)


def _as_stream(x: torch.Tensor) -> torch.Tensor:
    """[D, N, length, K] -> [T, N, K]."""
    return x.transpose(1, 2).reshape(-1, *x.shape[1::2])
