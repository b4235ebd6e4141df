"""The head's matrix product and the cross-entropy in one, a chunk of tokens at a time: never all logits at once."""

from typing import Any

import torch

from models.ops.precision import at_least_float32

# A chunk's float32 logits take at most this much memory: with 248,320 tokens in the vocabulary 1,081 rows a chunk,
# enough for the matrix products to run at full speed; all logits of a stream of 16,384 would take 16 GB.
_CHUNK_BYTES = 2**30

IGNORED = -100


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward, while a chunk's logits exist; the backward scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk_size: int
    ) -> torch.Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden) if wants_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        for start in range(0, hidden.shape[0], chunk_size):
            rows, targets = hidden[start : start + chunk_size], labels[start : start + chunk_size]
            logits = at_least_float32(rows @ weight.T)  # [chunk, V]
            log_normaliser = logits.logsumexp(dim=-1, keepdim=True)
            trained = (targets != IGNORED).unsqueeze(-1)
            index = targets.masked_fill(targets == IGNORED, 0).unsqueeze(-1)
            loss += ((log_normaliser - logits.gather(-1, index)) * trained).sum()
            if hidden_gradient is None and weight_gradient is None:
                continue
            # d loss / d logits = (softmax - one hot) for trained tokens, in place over the logits.
            gradient = logits.sub_(log_normaliser).exp_().mul_(trained)
            gradient.scatter_add_(-1, index, -trained.to(wide))
            gradient = gradient.to(hidden.dtype)
            if hidden_gradient is not None:
                hidden_gradient[start : start + chunk_size] = gradient @ weight
            if weight_gradient is not None:
                weight_gradient += gradient.T @ rows
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        if hidden_gradient is not None:
            # Not in bfloat16: a scale like 1 / 12345 would be rounded, and with it every gradient alike.
            hidden_gradient = (at_least_float32(hidden_gradient) * scale).to(hidden_gradient.dtype)
        if weight_gradient is not None:
            weight_gradient = (weight_gradient * scale).to(ctx.weight_dtype)
        return hidden_gradient, weight_gradient, None, None


# torch 2.11 compiles it, without a word, to gradients of zero: it saves `hidden_gradient` and `weight_gradient` as they
# were created, before they are written. The head stands outside the compiled blocks, so nothing is lost.
@torch.compiler.disable
def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk_size: int | None = None
) -> torch.Tensor:
    """Sum over tokens of -log softmax(hidden @ weight^T)[label], in nats; labels of -100 add nothing.

    hidden [T, H], weight [V, H], labels int64 [T] -> scalar, float32 (float64 for float64 inputs). `chunk_size` tokens
    at a time (default: what 1 GiB of float32 logits allows). Differentiable once.
    """
    if not torch.is_grad_enabled():  # an autograd.Function is told that inputs want gradients even then
        hidden, weight = hidden.detach(), weight.detach()
    if chunk_size is None:
        chunk_size = max(1, _CHUNK_BYTES // (4 * weight.shape[0]))
    return _LinearCrossEntropy.apply(hidden, weight, labels, chunk_size)
