"""The gated delta rule: in plain PyTorch, chunk by chunk (the CPU path and the oracle), and by libraries' kernels."""

import dataclasses
from typing import Any, NamedTuple

import torch

from models.ops.documents import Documents, lengths_of
from models.ops.in_graph import in_graph
from models.ops.precision import at_least_float32

# Shapes: T tokens, Nk key heads of dim K, Nv value heads of dim Kv, G = Nv / Nk value heads a key head;
# M chunks of C tokens (all documents'), A documents that still have a chunk at some step of the scan.
CHUNK = 64


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    documents: Documents,
    *,
    backend: str = "torch",
) -> torch.Tensor:
    """Linear attention whose state S [K, Kv] forgets, and corrects what it has stored (Yang et al. 2024, 2412.06464):

        S = exp(g_t) S;   S = S + k_t (beta_t (v_t - k_t^T S))^T;   o_t = q_t^T S       S = 0 where a document begins

    q, k [T, Nk, K] (L2-normalised here, q then scaled by K^-0.5); v [T, Nv, Kv]; g [T, Nv], the log of the decay, at
    most 0; beta [T, Nv] -> [T, Nv, Kv] in v's dtype. Each key head serves Nv / Nk value heads.

    backend "torch": computed in float32 or wider, anywhere; "fla": flash-linear-attention's Triton kernels;
    "flash_qla": TileLang kernels for Hopper and Blackwell, K = Kv = 128. Both need a CUDA GPU and bfloat16, read
    normalised q and k in bfloat16, and sum in float32.
    """
    if backend == "torch":
        return _chunked(q, k, v, g, beta, documents.cu_seqlens_cpu)
    q, k = (_l2_normalise(at_least_float32(x)).to(x.dtype) for x in (q, k))
    out, _, _ = _forward(q, k, v, g, beta, documents.cu_seqlens, documents.cu_seqlens_cpu, backend)
    return out


def _in_chunks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, cu_seqlens_cpu: torch.Tensor
) -> torch.Tensor:
    """The reference.

    In a chunk with inclusive prefix sums b of g the recurrence is matrix products and one triangular system:

        D_ij = exp(g_{j+1} + ... + g_i) for i >= j, else 0         (I + strictly_lower(diag(beta) K K^T * D)) [U W] =
        new values  V = U - W S                                                     [diag(beta) V, diag(beta exp(b)) K]
        O = diag(exp(b)) Q S + (Q K^T * D) V                       S' = exp(b_C) S + (diag(D_C) K)^T V

    D's exponents are summed, not taken as differences b_i - b_j: under strong decay b is large, and the difference and
    even more its gradient, a difference of large sums, would lose their digits.
    """
    _, num_key_heads, key_dim = k.shape
    group = v.shape[1] // num_key_heads
    chunks, position, active = _chunk_layout(lengths_of(cu_seqlens_cpu), v.device)

    def cut(x: torch.Tensor) -> torch.Tensor:
        """[T, N, ...] -> [M, Nk, 1 or G, C, ...]; beyond a document's end there are zeros, which change nothing."""
        rows = torch.cat([x, x.new_zeros(1, *x.shape[1:])])[chunks]  # [M, C, N, ...]
        return rows.unflatten(2, (num_key_heads, -1)).movedim(1, 3)

    q, k, v_wide, g, beta = (at_least_float32(x) for x in (q, k, v, g, beta))
    q, k = _l2_normalise(q) * key_dim**-0.5, _l2_normalise(k)
    q, k, values, g, beta = (cut(x) for x in (q, k, v_wide, g, beta))
    beta = beta.unsqueeze(-1)

    prefix_decay = g.cumsum(-1).exp().unsqueeze(-1)  # exp(b) [M, Nk, G, C, 1]
    decay = _pairwise_decay(g)  # [M, Nk, G, C, C]
    system = beta * (k @ k.mT) * decay  # solve_triangular reads what is strictly below the diagonal
    right_side = torch.cat([beta * values, beta * prefix_decay * k], dim=-1)
    solved = torch.linalg.solve_triangular(system, right_side, upper=False, unitriangular=True)
    new_values, reads = solved.split([values.shape[-1], key_dim], dim=-1)  # U, W
    scores = (q @ k.mT) * decay
    queries = q * prefix_decay
    keys = k * decay[..., -1, :].unsqueeze(-1)
    chunk_decay = prefix_decay[..., -1:, :]

    # The scan: one step a chunk index, all documents that have such a chunk at once; their number only falls.
    state = values.new_zeros(active[0], num_key_heads, group, key_dim, values.shape[-1])
    outs = []
    steps = zip(*(x.split(active) for x in (new_values, reads, scores, queries, keys, chunk_decay)))
    for u, w, score, query, key, last_decay in steps:
        state = state[: u.shape[0]]
        corrected = u - w @ state
        outs.append(query @ state + score @ corrected)
        state = last_decay * state + key.mT @ corrected
    out = torch.cat(outs).movedim(3, 1).flatten(0, 1)  # [M * C, Nk, G, Kv]
    return out[position].flatten(1, 2).to(v.dtype)


_chunked = in_graph(
    _in_chunks,
    "chunked_delta_rule",
    "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor cu_seqlens_cpu",
    num_inputs=5,
    shape=lambda q, k, v, *_: torch.empty_like(v, memory_format=torch.contiguous_format),
)


def _l2_normalise(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _pairwise_decay(g: torch.Tensor) -> torch.Tensor:
    """exp(g_{j+1} + ... + g_i) at [i, j] for i >= j, else 0; g [..., C] -> [..., C, C]."""
    size = g.shape[-1]
    below = torch.ones(size, size, dtype=torch.bool, device=g.device).tril(-1)
    sums = (g.unsqueeze(-1) * below).cumsum(-2)
    return sums.exp().tril()


def _chunk_layout(lengths: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Cuts every document into chunks, its last one short.

    Returns the token of each place of each chunk, int64 [M, C] (T where a chunk is short); the place of each token,
    int64 [T], in the chunks laid end to end; and the number of documents that have a j-th chunk, for each j. Chunks are
    ordered by their index in the document, then by document, longest first: those of one j are neighbours, and the
    documents of one step are a prefix of those of the step before.
    """
    size = torch.tensor(lengths)
    start = size.cumsum(0) - size
    num_chunks = (size + CHUNK - 1) // CHUNK
    by_length = num_chunks.argsort(descending=True, stable=True)
    size, start, num_chunks = size[by_length], start[by_length], num_chunks[by_length]
    index = torch.arange(int(num_chunks[0])).unsqueeze(-1)  # [steps, 1]
    exists = index < num_chunks  # [steps, D]
    step, document = exists.nonzero(as_tuple=True)  # by step, then by document
    place = step.unsqueeze(-1) * CHUNK + torch.arange(CHUNK)  # [M, C], inside the document
    inside = place < size[document].unsqueeze(-1)
    num_tokens = sum(lengths)
    token = torch.where(inside, place + start[document].unsqueeze(-1), num_tokens)
    position = torch.empty(num_tokens, dtype=torch.int64)
    position[token[inside]] = inside.flatten().nonzero().squeeze(-1)
    return token.to(device), position.to(device), exists.sum(dim=1).tolist()


# The libraries' kernels as operations of torch: the compiler sees their shapes alone, and a block stays one graph.


@torch.library.custom_op("qwen35_moe::gated_delta_rule", mutates_args=())
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_seqlens_cpu: torch.Tensor,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Out [T, Nv, Kv]; and for the backward pass the prefix sums of g in each chunk, float32 [T, Nv], and the inverse
    of each chunk's triangular system [T, Nv, C]."""
    inputs = [x.contiguous().unsqueeze(0) for x in (q, k, v, g, beta)]
    scale = k.shape[-1] ** -0.5
    if backend == "flash_qla":
        from flash_qla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_fwd

        context = _flash_qla_context(v, cu_seqlens, cu_seqlens_cpu)
        sums, inverse, out, *_ = chunk_gated_delta_rule_fwd(
            *inputs, scale=scale, output_final_state=False, is_train=True, cp_context=context
        )
    else:
        from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_fwd

        of_parts = []
        for part in _fla_parts(cu_seqlens, cu_seqlens_cpu, v.shape[1]):
            sums, out, inverse, *_ = chunk_gated_delta_rule_fwd(
                *(x[:, part.tokens] for x in inputs),
                scale=scale,
                initial_state=None,
                output_final_state=False,
                cu_seqlens=part.cu_seqlens,
                chunk_indices=part.chunk_indices,
            )
            of_parts.append((sums, out, inverse))
        sums, out, inverse = map(_joined, zip(*of_parts))
    return out.squeeze(0).to(v.dtype), sums.squeeze(0), inverse.squeeze(0)


@_forward.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    return out, torch.empty_like(g, dtype=torch.float32), k.new_empty(*v.shape[:2], CHUNK)


@torch.library.custom_op("qwen35_moe::gated_delta_rule_backward", mutates_args=())
def _backward(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sums: torch.Tensor,
    beta: torch.Tensor,
    inverse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_seqlens_cpu: torch.Tensor,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k, v, beta (each in its dtype) and g (float32)."""
    names = ("q", "k", "v", "g", "beta", "A", "do")
    tensors = (q, k, v, sums, beta, inverse, gradient)
    inputs: dict[str, Any] = {name: x.contiguous().unsqueeze(0) for name, x in zip(names, tensors)}
    scale = k.shape[-1] ** -0.5
    if backend == "flash_qla":
        from flash_qla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_bwd

        context = _flash_qla_context(v, cu_seqlens, cu_seqlens_cpu)
        dq, dk, dv, dbeta, dg, *_ = chunk_gated_delta_rule_bwd(**inputs, scale=scale, cp_context=context)
    else:
        from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_bwd

        of_parts = []
        for part in _fla_parts(cu_seqlens, cu_seqlens_cpu, v.shape[1]):
            of_part = chunk_gated_delta_rule_bwd(
                **{name: x[:, part.tokens] for name, x in inputs.items()},
                scale=scale,
                initial_state=None,
                dht=None,
                cu_seqlens=part.cu_seqlens,
                chunk_indices=part.chunk_indices,
            )
            of_parts.append(of_part[:5])
        dq, dk, dv, dbeta, dg = map(_joined, zip(*of_parts))
    gradients = (x.squeeze(0).to(like.dtype) for x, like in zip((dq, dk, dv, dbeta, dg), (q, k, v, beta, sums)))
    dq, dk, dv, dbeta, dg = gradients
    return dq, dk, dv, dbeta, dg


@_backward.register_fake
def _(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sums: torch.Tensor,
    beta: torch.Tensor,
    *_: Any,
) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, beta, sums))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, v, g, beta, cu_seqlens, cu_seqlens_cpu, ctx.backend = inputs
    _, sums, inverse = output
    ctx.g_dtype = g.dtype
    ctx.save_for_backward(q, k, v, sums, beta, inverse, cu_seqlens, cu_seqlens_cpu)


def _autograd(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    dq, dk, dv, dbeta, dg = _backward(gradient, *ctx.saved_tensors, ctx.backend)
    return dq, dk, dv, dg.to(ctx.g_dtype), dbeta, None, None, None


_forward.register_autograd(_autograd, setup_context=_save_for_backward)


def _flash_qla_context(v: torch.Tensor, cu_seqlens: torch.Tensor, cu_seqlens_cpu: torch.Tensor) -> Any:
    """How the kernels cut the stream, made once a batch and from the host's numbers, so that no layer waits for the
    device to tell them."""
    if hasattr(cu_seqlens, "_flash_qla_context"):
        return cu_seqlens._flash_qla_context
    from flash_qla.ops.gated_delta_rule.chunk import CHUNK_SIZE, build_cp_context
    from flash_qla.utils.index import prepare_varlen_metadata

    # One block of threads works through a document's head. Where that leaves most of the GPU idle, long documents are
    # cut and their states corrected.
    few = (len(cu_seqlens) - 1) * v.shape[1] < _NUM_BLOCKS_WORTH_CUTTING
    on_host = build_cp_context(
        cu_seqlens_cpu, enable_intra=few, num_v_heads=v.shape[1], chunk_size=CHUNK_SIZE, is_train=True
    )
    tensors = {name: x for name, x in vars(on_host).items() if isinstance(x, torch.Tensor)}
    moved = {name: x.to(v.device, non_blocking=True) for name, x in tensors.items()} | {"cu_seqlens": cu_seqlens}
    for name in ("cu_seqlens", "intra_cp_cu_seqlens"):
        if name in moved:
            prepare_varlen_metadata(moved[name], tensors[name])
    context = dataclasses.replace(on_host, **moved)
    cu_seqlens._flash_qla_context = context  # type: ignore[attr-defined]
    return context


_NUM_BLOCKS_WORTH_CUTTING = 96  # of the 132 multiprocessors of an H100


class _FlaPart(NamedTuple):
    """Documents that one call of fla's kernels takes."""

    tokens: slice
    cu_seqlens: torch.Tensor
    chunk_indices: torch.Tensor
    """The document and the place of each chunk."""


_MAX_GRID = 2**16 - 1  # a CUDA grid's second and third dimension, in which fla has a block for each document and head


def _fla_parts(cu_seqlens: torch.Tensor, cu_seqlens_cpu: torch.Tensor, num_heads: int) -> list[_FlaPart]:
    """All documents, in calls of as many as the kernels can be launched for (fla's issue 1077); made once a batch, as
    above."""
    if hasattr(cu_seqlens, "_fla_parts"):
        return cu_seqlens._fla_parts
    from fla.ops.utils.index import prepare_chunk_indices

    parts, num_documents, most = [], len(cu_seqlens) - 1, _MAX_GRID // num_heads
    for first in range(0, num_documents, most):
        ends = slice(first, min(first + most, num_documents) + 1)
        start, stop = cu_seqlens_cpu[ends][[0, -1]].tolist()
        indices = prepare_chunk_indices(cu_seqlens_cpu[ends] - start, CHUNK)
        indices = indices.to(cu_seqlens.device, non_blocking=True)
        parts.append(_FlaPart(slice(start, stop), cu_seqlens[ends] - start, indices))
    cu_seqlens._fla_parts = parts  # type: ignore[attr-defined]
    return parts


def _joined(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
