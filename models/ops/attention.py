"""Causal softmax attention inside each document of a packed stream."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F

from models.ops.documents import Documents

# Shapes: T tokens, N query heads, Nkv key and value heads (N / Nkv query heads share one), K head dim.


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, *, backend: str) -> torch.Tensor:
    """softmax(q k^T / sqrt(K)) v over the tokens of the same document up to one's own (Vaswani et al. 2017).

    q [T, N, K]; k, v [T, Nkv, K] -> [T, N, K]. backend "sdpa": one call a document, any device and dtype, the
    reference; "varlen": one FlashAttention kernel over the stream, CUDA with bfloat16 or float16.
    """
    return _varlen(q, k, v, documents) if backend == "varlen" else _sdpa(q, k, v, documents)


@torch.compiler.disable  # a loop over documents: their number and lengths change with every batch
def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents) -> torch.Tensor:
    lengths = documents.lengths()
    outs = []
    for document in zip(q.split(lengths), k.split(lengths), v.split(lengths)):
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in document)  # [1, N or Nkv, length, K]
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        outs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outs)


def _varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn  # imports CUDA-only pieces

    # torch 2.13 wants to be told that heads are grouped; 2.11 sees it.
    options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    bounds, longest = documents.cu_seqlens, documents.max_seqlen
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0), **options)
    assert isinstance(out, torch.Tensor)
    return out
