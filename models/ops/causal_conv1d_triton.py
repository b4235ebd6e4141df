"""Triton kernels of the causal convolution: one pass over memory each way, the neighbours' values stay in registers."""

# mypy: disable-error-code="no-untyped-def"
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

# Shapes: T tokens, C channels, W taps, at most 4. A program walks along a run of tokens with some of the channels; what
# a token needs of those before it (x, as deep as the taps reach) and of those after (its gradient, not yet complete)
# are vectors that it carries along. It loads two tokens ahead of where it works, or else it would wait for each load.
# The result's channels lie apart in three tensors, the parts: a program's channels are all of one.
_CHANNELS, _NUM_WARPS = 128, 1
_STEPS, _UNROLL = 128, 4  # tokens that a program looks at


@triton.jit
def _tap(weight, channel, is_inside, shift: tl.constexpr, width: tl.constexpr):
    """What multiplies x[t - shift]; 0 beyond the width."""
    reaches = is_inside & (shift < width)
    return tl.load(weight + channel * width + (width - 1 - shift), mask=reaches, other=0.0).to(tl.float32)


@triton.jit
def _row(x, token, is_inside, num_tokens, stride):
    """x[token] [channels], 0 outside the stream; x points to the channels of the first token."""
    mask = is_inside & (token >= 0) & (token < num_tokens)
    return tl.load(x + token.to(tl.int64) * stride, mask=mask, other=0.0)


@triton.jit
def _put(out, value, token, is_own, is_inside, stride):
    tl.store(out + token.to(tl.int64) * stride, value.to(out.dtype.element_ty), mask=is_inside & is_own)


@triton.jit
def _part(
    first, second, third, width0: tl.constexpr, width1: tl.constexpr, width2: tl.constexpr, channels: tl.constexpr
):
    """Of this program: its part, how wide that is, how many channels lie before it, and which of its channels are the
    program's [channels]."""
    program = tl.program_id(0)
    blocks0: tl.constexpr = (width0 + channels - 1) // channels
    blocks1: tl.constexpr = (width1 + channels - 1) // channels
    in_second, in_third = program >= blocks0, program >= blocks0 + blocks1
    part = first
    if in_third:
        part = third
    elif in_second:
        part = second
    width = tl.where(in_third, width2, tl.where(in_second, width1, width0))
    before = tl.where(in_third, width0 + width1, tl.where(in_second, width0, 0))
    block = program - tl.where(in_third, blocks0 + blocks1, tl.where(in_second, blocks0, 0))
    return part, width, before, block * channels + tl.arange(0, channels)


@triton.jit
def _forward_kernel(
    x,
    weight,
    offsets,
    first,
    second,
    third,
    num_tokens,
    width0: tl.constexpr,
    width1: tl.constexpr,
    width2: tl.constexpr,
    width: tl.constexpr,
    channels: tl.constexpr,
    steps: tl.constexpr,
    unroll: tl.constexpr,
):
    num_channels: tl.constexpr = width0 + width1 + width2
    out, part_width, before, place = _part(first, second, third, width0, width1, width2, channels)
    channel, inside = before + place, place < part_width
    x, out = x + channel, out + place
    start = tl.program_id(1) * steps
    tap0, tap1 = _tap(weight, channel, inside, 0, width), _tap(weight, channel, inside, 1, width)
    tap2, tap3 = _tap(weight, channel, inside, 2, width), _tap(weight, channel, inside, 3, width)
    x1 = _row(x, start - 1, inside, num_tokens, num_channels).to(tl.float32)
    x2 = _row(x, start - 2, inside, num_tokens, num_channels).to(tl.float32)
    x3 = _row(x, start - 3, inside, num_tokens, num_channels).to(tl.float32)
    x_next = _row(x, start, inside, num_tokens, num_channels)
    x_after = _row(x, start + 1, inside, num_tokens, num_channels)
    for step in range(0, steps, unroll):
        for inner in tl.static_range(unroll):
            token = start + step + inner
            offset = tl.load(offsets + token, mask=token < num_tokens, other=0)
            x0, x_next = x_next.to(tl.float32), x_after
            x_after = _row(x, token + 2, inside, num_tokens, num_channels)
            total = tap0 * x0
            total += tap1 * tl.where(offset >= 1, x1, 0.0)
            total += tap2 * tl.where(offset >= 2, x2, 0.0)
            total += tap3 * tl.where(offset >= 3, x3, 0.0)
            _put(out, total * tl.sigmoid(total), token, token < num_tokens, inside, part_width)
            x3, x2, x1 = x2, x1, x0


@triton.jit
def _backward_kernel(
    first,
    second,
    third,
    x,
    weight,
    offsets,
    x_gradient,
    tap_gradients,
    num_tokens,
    width0: tl.constexpr,
    width1: tl.constexpr,
    width2: tl.constexpr,
    width: tl.constexpr,
    channels: tl.constexpr,
    steps: tl.constexpr,
    unroll: tl.constexpr,
):
    """first, second, third: the gradients of the parts. tap_gradients: each run's part of the taps', [runs, W, C].

    A run's last 3 tokens are the next one's own: they are looked at for what they add to the gradients before them.
    """
    num_channels: tl.constexpr = width0 + width1 + width2
    gradient, part_width, before, place = _part(first, second, third, width0, width1, width2, channels)
    channel, inside = before + place, place < part_width
    x, x_gradient, gradient = x + channel, x_gradient + channel, gradient + place
    start = tl.program_id(1) * (steps - 3)
    end = tl.minimum(start + steps - 3, num_tokens)
    tap0, tap1 = _tap(weight, channel, inside, 0, width), _tap(weight, channel, inside, 1, width)
    tap2, tap3 = _tap(weight, channel, inside, 2, width), _tap(weight, channel, inside, 3, width)
    x1 = _row(x, start - 1, inside, num_tokens, num_channels).to(tl.float32)
    x2 = _row(x, start - 2, inside, num_tokens, num_channels).to(tl.float32)
    x3 = _row(x, start - 3, inside, num_tokens, num_channels).to(tl.float32)
    zero = tl.zeros([channels], tl.float32)
    dx1, dx2, dx3 = zero, zero, zero  # of the three tokens before, as far as later ones have added to it
    dtap0, dtap1, dtap2, dtap3 = zero, zero, zero, zero
    x_next = _row(x, start, inside, num_tokens, num_channels)
    x_after = _row(x, start + 1, inside, num_tokens, num_channels)
    dout_next = _row(gradient, start, inside, num_tokens, part_width)
    dout_after = _row(gradient, start + 1, inside, num_tokens, part_width)
    for step in range(0, steps, unroll):
        for inner in tl.static_range(unroll):
            token = start + step + inner
            offset = tl.load(offsets + token, mask=token < num_tokens, other=0)
            x0, x_next = x_next.to(tl.float32), x_after
            dout, dout_next = dout_next.to(tl.float32), dout_after
            x_after = _row(x, token + 2, inside, num_tokens, num_channels)
            dout_after = _row(gradient, token + 2, inside, num_tokens, part_width)
            x1, x2, x3 = tl.where(offset >= 1, x1, 0.0), tl.where(offset >= 2, x2, 0.0), tl.where(offset >= 3, x3, 0.0)
            total = tap0 * x0 + tap1 * x1 + tap2 * x2 + tap3 * x3
            sigmoid = tl.sigmoid(total)
            change = dout * sigmoid * (1 + total * (1 - sigmoid))  # the gradient before SiLU
            dx1 += tl.where(offset >= 1, tap1 * change, 0.0)
            dx2 += tl.where(offset >= 2, tap2 * change, 0.0)
            dx3 += tl.where(offset >= 3, tap3 * change, 0.0)
            done = token - 3
            _put(x_gradient, dx3, done, (done >= start) & (done < end), inside, num_channels)
            dx3, dx2, dx1 = dx2, dx1, tap0 * change
            own = tl.where(token < end, change, 0.0)
            dtap0 += own * x0
            dtap1 += own * x1
            dtap2 += own * x2
            dtap3 += own * x3
            x3, x2, x1 = x2, x1, x0
    part = tap_gradients + tl.program_id(1).to(tl.int64) * width * num_channels + channel
    tl.store(part + (width - 1) * num_channels, dtap0, mask=inside)
    tl.store(part + (width - 2) * num_channels, dtap1, mask=inside & (width > 1))
    tl.store(part + (width - 3) * num_channels, dtap2, mask=inside & (width > 2))
    tl.store(part + (width - 4) * num_channels, dtap3, mask=inside & (width > 3))


def _num_blocks(widths: Sequence[int]) -> int:
    return sum(_ceil_div(width, _CHANNELS) for width in widths)


@torch.library.triton_op("qwen35_moe::causal_conv1d", mutates_args={})
def forward(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, widths: list[int]) -> list[torch.Tensor]:
    """x [T, C], weight [C, 1, W], offsets int32 [T] (how far a token stands from its document's first), three widths
    that add up to C -> three parts [T, width]. As an operation that compiled blocks launch themselves."""
    parts = [x.new_empty(x.shape[0], width) for width in widths]
    grid = (_num_blocks(widths), _ceil_div(x.shape[0], _STEPS))
    sizes = (x.shape[0], *widths, weight.shape[-1], _CHANNELS, _STEPS, _UNROLL)
    torch.library.wrap_triton(_forward_kernel)[grid](
        x.contiguous(), weight.contiguous(), offsets, *parts, *sizes, num_warps=_NUM_WARPS
    )
    return parts


@torch.library.triton_op("qwen35_moe::causal_conv1d_backward", mutates_args={})
def backward(
    gradients: list[torch.Tensor], x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x and weight from those of the parts. The runs' shares of the latter are added up in a fixed
    order: no atomics."""
    widths = [gradient.shape[1] for gradient in gradients]
    grid = (_num_blocks(widths), _ceil_div(x.shape[0], _STEPS - 3))
    x_gradient = torch.empty_like(x, memory_format=torch.contiguous_format)
    shares = torch.empty(grid[1], weight.shape[-1], x.shape[1], dtype=torch.float32, device=x.device)
    sizes = (x.shape[0], *widths, weight.shape[-1], _CHANNELS, _STEPS, _UNROLL)
    gradients = [gradient.contiguous() for gradient in gradients]
    torch.library.wrap_triton(_backward_kernel)[grid](
        *gradients, x.contiguous(), weight.contiguous(), offsets, x_gradient, shares, *sizes, num_warps=_NUM_WARPS
    )
    return x_gradient, shares.sum(dim=0).T.to(weight.dtype).contiguous().view(weight.shape)


def _ceil_div(number: int, by: int) -> int:
    return (number + by - 1) // by


def _autograd(ctx: Any, gradients: list[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    return *backward(gradients, *ctx.saved_tensors), None, None


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3])


forward.register_autograd(_autograd, setup_context=_save_for_backward)
