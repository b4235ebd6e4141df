"""A linear layer with float32 weights on bfloat16 inputs: exact products at the speed of bfloat16."""

from typing import Any

import torch
import torch.nn.functional as F

from models.ops.precision import at_least_float32

# Shapes: T tokens, H inputs, E outputs.


def float32_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, H], weight float32 or wider [E, H] -> x @ weight.T [T, E] in the weight's dtype; x's gradient in x's.

    A GPU multiplies float32 many times slower than bfloat16. Where x is bfloat16 the weight is cut into three bfloat16
    parts, 8 bits of its 24 each: a product of two bfloat16 is exact in float32, in which sums are made as ever.
    """
    if x.is_cuda and x.dtype == torch.bfloat16 and weight.dtype == torch.float32:
        return linear_in_parts(x, weight)
    return F.linear(at_least_float32(x), weight)


def three_parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float32 -> bfloat16 tensors, each smaller than the one before, whose sum is x."""
    first = x.bfloat16()
    rest = x - first
    second = rest.bfloat16()
    return first, second, (rest - second).bfloat16()


@torch.library.custom_op("qwen35_moe::float32_linear", mutates_args=())
def linear_in_parts(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x bfloat16 [T, H], weight float32 [E, H] -> float32 [T, E]."""
    return _product(x, torch.cat(three_parts(weight)).T).unflatten(1, (3, -1)).sum(dim=1)


@torch.library.custom_op("qwen35_moe::float32_linear_backward", mutates_args=())
def _backward(gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """gradient float32 [T, E] -> of x, bfloat16, and of weight, float32."""
    first, second, third = three_parts(gradient)
    of_weight = _product(torch.cat([first, second, third], dim=1).T, x).unflatten(0, (3, -1)).sum(dim=0)
    # Rounded to bfloat16 as it will be, two parts of each are more than enough: what is left out is 2^-16 of it.
    large, small, _ = three_parts(weight)
    of_x = torch.cat([first, first, second], dim=1) @ torch.cat([large, small, large])
    return of_x, of_weight


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """bfloat16 [A, B] @ [B, C] -> float32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


@linear_in_parts.register_fake
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight.new_empty(len(x), len(weight))


@_backward.register_fake
def _(gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _backward(gradient, *ctx.saved_tensors)


linear_in_parts.register_autograd(_differentiate, setup_context=_keep)
