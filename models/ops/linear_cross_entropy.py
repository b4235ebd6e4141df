"""The head's matrix product and the cross-entropy in one, a chunk of tokens at a time: never all logits at once."""

import functools
from typing import Any

import torch

from models.ops.labels import IGNORED
from models.ops.precision import at_least_float32

# A chunk's logits take at most this much memory: with 248,320 tokens in the vocabulary 4,324 rows a chunk in bfloat16,
# enough for the matrix products to run at full speed; all logits of a stream of 16,384 would take 8 GB.
_CHUNK_BYTES = 2**31


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [chunk, V], labels [chunk] -> the sum of the losses, float32 or wider, and log sum exp [chunk, 1]."""
    logits = at_least_float32(logits)
    log_normaliser = logits.logsumexp(dim=-1, keepdim=True)
    index = labels.masked_fill(labels == IGNORED, 0).unsqueeze(-1)
    losses = (log_normaliser - logits.gather(-1, index)).squeeze(-1)
    return losses.masked_fill(labels == IGNORED, 0.0).sum(), log_normaliser


def _loss_and_gradient(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_loss`, and its gradient by the logits, in their dtype: softmax - one hot for trained tokens, else 0."""
    loss, log_normaliser = _loss(logits, labels)
    softmax = (at_least_float32(logits) - log_normaliser).exp()
    is_label = torch.arange(logits.shape[-1], device=logits.device) == labels.unsqueeze(-1)
    gradient = (softmax - is_label.to(softmax.dtype)).masked_fill((labels == IGNORED).unsqueeze(-1), 0.0)
    return loss, gradient.to(logits.dtype)


def _scaled(gradient: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """gradient * scale, rounded once and in one pass: a scale like 1 / 12345 in bfloat16 would be off by itself, and
    with it every gradient alike."""
    return torch.mul(gradient, scale.view(1), out=torch.empty_like(gradient, dtype=dtype))


# Eagerly each line of the loss reads and writes all logits in float32; compiled, they are read twice and written once.
# A product that is rounded on its way out runs at half the speed. Not before the first call: importing the compiler
# takes seconds.
_compiled = functools.cache(torch.compile)


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward, while a chunk's logits exist; the backward scales them.

    `factors`: rows [T, A] and a matrix [V, A], and maybe such a pair again: the logits are the sum of rows @ matrix^T.
    """

    @staticmethod
    def forward(ctx: Any, labels: torch.Tensor, chunk_size: int, backend: str, *factors: torch.Tensor) -> torch.Tensor:
        hidden, wants = factors[0], ctx.needs_input_grad[3:]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        is_rows = [index % 2 == 0 for index in range(len(factors))]
        gradients = [
            torch.empty_like(factor, dtype=factor.dtype if of_rows else wide) if wanted else None
            for factor, of_rows, wanted in zip(factors, is_rows, wants)
        ]
        loss_and_gradient, loss_alone = _loss_and_gradient, _loss
        if backend == "compiled":
            loss_and_gradient, loss_alone = _compiled(_loss_and_gradient), _compiled(_loss)
        for start in range(0, max(hidden.shape[0], 1), chunk_size):
            chunk, targets = slice(start, start + chunk_size), labels[start : start + chunk_size]
            pairs = [(rows[chunk], matrix) for rows, matrix in zip(factors[::2], factors[1::2])]
            logits = pairs[0][0] @ pairs[0][1].T  # [chunk, V]
            for rows, matrix in pairs[1:]:
                logits += rows @ matrix.T
            if not any(wants):
                loss += loss_alone(logits, targets)[0]
                continue
            chunk_loss, gradient = loss_and_gradient(logits, targets)
            loss += chunk_loss
            for (rows, matrix), of_rows, of_matrix in zip(pairs, gradients[::2], gradients[1::2]):
                if of_rows is not None:
                    of_rows[chunk] = gradient @ matrix
                if of_matrix is not None:
                    _add_product(of_matrix, gradient.T, rows, beta=0 if start == 0 else 1)
        ctx.save_for_backward(*gradients)
        ctx.dtypes, ctx.backend = [factor.dtype for factor in factors], backend
        return loss

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients = zip(ctx.saved_tensors, ctx.dtypes)
        scaled = _compiled(_scaled) if ctx.backend == "compiled" else _scaled
        return None, None, None, *(g if g is None else scaled(g, scale, dtype) for g, dtype in gradients)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, beta: int) -> None:
    """total = beta * total + left @ right; `total` may be wider than the factors, as cuBLAS's own sums are."""
    if total.dtype != left.dtype and total.is_cuda:
        torch.addmm(total, left, right, beta=beta, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, left.to(total.dtype), right.to(total.dtype), beta=beta, out=total)


def _chunk_size(hidden: torch.Tensor, weight: torch.Tensor) -> int:
    return max(1, _CHUNK_BYTES // (hidden.element_size() * weight.shape[0]))


@torch.no_grad()
def linear_argmax(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The largest of each token's logits hidden @ weight^T: hidden [T, H], weight [V, H] -> int64 [T]."""
    return torch.cat([(rows @ weight.T).argmax(dim=-1) for rows in hidden.split(_chunk_size(hidden, weight))])


# torch 2.11 compiles it, without a word, to gradients of zero: it saves `hidden_gradient` and `weight_gradient` as they
# were created, before they are written. The head stands outside the compiled blocks, so nothing is lost.
@torch.compiler.disable
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    chunk_size: int | None = None,
    *,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
    backend: str = "torch",
) -> torch.Tensor:
    """Sum over tokens of -log softmax(hidden @ weight^T)[label], in nats; labels of -100 add nothing.

    low_rank: rows [T, r] and a matrix [V, r] of an adapter, whose product is added to the logits.

    hidden [T, H], weight [V, H], labels int64 [T] -> scalar, float32 (float64 for float64 inputs). At most `chunk_size`
    tokens at a time (default: what 2 GiB of logits allow). Differentiable once. backend "torch": the reference;
    "compiled": a chunk's softmax by torch.compile.
    """
    if not torch.is_grad_enabled():  # an autograd.Function is told that inputs want gradients even then
        hidden, weight = hidden.detach(), weight.detach()
        low_rank = low_rank and (low_rank[0].detach(), low_rank[1].detach())
    if chunk_size is None:
        chunk_size = _chunk_size(hidden, weight)
    num_tokens = hidden.shape[0]
    num_chunks = -(-num_tokens // chunk_size)
    even_size = -(-num_tokens // max(num_chunks, 1))  # chunks of one size compile once
    return _LinearCrossEntropy.apply(labels, max(even_size, 1), backend, hidden, weight, *(low_rank or ()))
