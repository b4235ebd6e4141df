"""Activation checkpointing of blocks: what the backward pass recomputes, and what it must not."""

import functools
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import models.ops.attention
import models.ops.gated_delta_rule
import models.ops.grouped_experts  # noqa: F401
import parallelisms.expert_parallel  # noqa: F401  (the four register the operations named below)
from torch_private import functional_collectives

_aten = torch.ops.aten

# Routing is decided once. A recomputed router could break a tie the other way (its input may differ in the last bit),
# and then rows, shapes and gradients would belong to another set of experts. How many copies travel between ranks
# belongs to it: as known to the host, and to the device (see `_policy`).
_ROUTING = {_aten.topk.default, _aten.sort.stable, torch.ops.qwen35_moe.splits.default}
_GROUPED_LOOP = torch.ops.qwen35_moe.grouped_linear.default
_ALL_TO_ALL = functional_collectives.all_to_all_single.default

# Dear to compute or to send, cheap to keep: matrix products, attention, and what came from other ranks.
_DEAR = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten._grouped_mm.default,
    _GROUPED_LOOP,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.qwen35_moe.attention.default,
    torch.ops.qwen35_moe.sdpa.default,
    torch.ops.qwen35_moe.chunked_delta_rule.default,
    torch.ops.qwen35_moe.gated_delta_rule.default,
    _ALL_TO_ALL,
}

_SAVED = {"selective": _ROUTING | _DEAR, "full": _ROUTING}


def _policy(
    saved: set[Any], unused: Collection[torch.Size], context: Any, operation: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    if operation is _aten.mm.default and args[1].shape in unused:
        return CheckpointPolicy.PREFER_RECOMPUTE
    is_wide = operation is _aten._grouped_mm.default and args[1].shape[-1] > args[0].shape[-1]
    if is_wide or (operation is _GROUPED_LOOP and args[1].shape[1] > args[0].shape[-1]):
        # The experts' down_proj: k rows of H a token, the largest tensor there is, and no gradient needs it.
        return CheckpointPolicy.PREFER_RECOMPUTE
    if operation is _aten.mm.default and args[1].shape[-1] >= 8 * args[0].shape[-1]:
        # An adapter's B: as wide as the product that it is added to, and cheap to compute again.
        return CheckpointPolicy.PREFER_RECOMPUTE
    is_count = operation is _ALL_TO_ALL and not args[0].is_floating_point()
    return CheckpointPolicy.MUST_SAVE if operation in saved or is_count else CheckpointPolicy.PREFER_RECOMPUTE


def apply_activation_checkpointing(
    parts: Iterable[tuple[object, str]], mode: str, unused_products: Collection[torch.Size] = ()
) -> None:
    """Replaces these methods (object, name) by ones that keep less. Names of parameters do not change.

    mode "none": keep every activation; "selective": keep matrix products, attention and what came from other ranks,
    recompute the rest; "full": keep each part's input and its routing. `unused_products`: by the shapes of their
    weights [in, out], products that no gradient needs, as only what is made of them is read; never kept.
    """
    if mode == "none":
        return
    contexts = functools.partial(
        create_selective_checkpoint_contexts, functools.partial(_policy, _SAVED[mode], unused_products)
    )
    for owner, name in parts:
        setattr(owner, name, _checkpointed(getattr(owner, name), contexts))


def _checkpointed(forward: Callable, contexts: Callable) -> Callable:
    # A function, as a functools.partial in the place of a forward is silently left uncompiled.
    def run(*args: Any) -> Any:
        # The model draws no random numbers, so there is no RNG state to keep for the recomputation.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    return run
