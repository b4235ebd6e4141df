"""Triton kernels of the causal convolution: one pass over memory each way, the neighbours' values stay in registers."""

# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl

# Shapes: T tokens, C channels, W taps, at most 4. A program walks along a run of tokens with some of the channels; what
# a token needs of those before it (x, as deep as the taps reach) and of those after (its gradient, not yet complete)
# are vectors that it carries along. It loads two tokens ahead of where it works, or else it would wait for each load.
_CHANNELS, _NUM_WARPS = 128, 1
_STEPS, _UNROLL = 256, 4  # tokens that a program looks at


@triton.jit
def _tap(weight, channel, num_channels, shift: tl.constexpr, width: tl.constexpr):
    """What multiplies x[t - shift]; 0 beyond the width."""
    reaches = (channel < num_channels) & (shift < width)
    return tl.load(weight + channel * width + (width - 1 - shift), mask=reaches, other=0.0).to(tl.float32)


@triton.jit
def _row(x, token, channel, num_tokens, num_channels):
    """x[token] [channels], 0 outside the stream."""
    mask = (channel < num_channels) & (token >= 0) & (token < num_tokens)
    return tl.load(x + token.to(tl.int64) * num_channels + channel, mask=mask, other=0.0)


@triton.jit
def _put(out, value, token, is_own, channel, num_channels):
    mask = (channel < num_channels) & is_own
    tl.store(out + token.to(tl.int64) * num_channels + channel, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _forward_kernel(
    x,
    weight,
    offsets,
    out,
    num_tokens,
    num_channels,
    width: tl.constexpr,
    channels: tl.constexpr,
    steps: tl.constexpr,
    unroll: tl.constexpr,
):
    channel = tl.program_id(0) * channels + tl.arange(0, channels)
    start = tl.program_id(1) * steps
    tap0, tap1 = _tap(weight, channel, num_channels, 0, width), _tap(weight, channel, num_channels, 1, width)
    tap2, tap3 = _tap(weight, channel, num_channels, 2, width), _tap(weight, channel, num_channels, 3, width)
    x1 = _row(x, start - 1, channel, num_tokens, num_channels).to(tl.float32)
    x2 = _row(x, start - 2, channel, num_tokens, num_channels).to(tl.float32)
    x3 = _row(x, start - 3, channel, num_tokens, num_channels).to(tl.float32)
    x_next = _row(x, start, channel, num_tokens, num_channels)
    x_after = _row(x, start + 1, channel, num_tokens, num_channels)
    for step in range(0, steps, unroll):
        for inner in tl.static_range(unroll):
            token = start + step + inner
            offset = tl.load(offsets + token, mask=token < num_tokens, other=0)
            x0, x_next = x_next.to(tl.float32), x_after
            x_after = _row(x, token + 2, channel, num_tokens, num_channels)
            total = tap0 * x0
            total += tap1 * tl.where(offset >= 1, x1, 0.0)
            total += tap2 * tl.where(offset >= 2, x2, 0.0)
            total += tap3 * tl.where(offset >= 3, x3, 0.0)
            _put(out, total * tl.sigmoid(total), token, token < num_tokens, channel, num_channels)
            x3, x2, x1 = x2, x1, x0


@triton.jit
def _backward_kernel(
    gradient,
    x,
    weight,
    offsets,
    x_gradient,
    tap_gradients,
    num_tokens,
    num_channels,
    width: tl.constexpr,
    channels: tl.constexpr,
    steps: tl.constexpr,
    unroll: tl.constexpr,
):
    """tap_gradients: each run's part of the taps' gradients, [runs, W, C].

    A run's last 3 tokens are the next one's own: they are looked at for what they add to the gradients before them.
    """
    channel = tl.program_id(0) * channels + tl.arange(0, channels)
    start = tl.program_id(1) * (steps - 3)
    end = tl.minimum(start + steps - 3, num_tokens)
    tap0, tap1 = _tap(weight, channel, num_channels, 0, width), _tap(weight, channel, num_channels, 1, width)
    tap2, tap3 = _tap(weight, channel, num_channels, 2, width), _tap(weight, channel, num_channels, 3, width)
    x1 = _row(x, start - 1, channel, num_tokens, num_channels).to(tl.float32)
    x2 = _row(x, start - 2, channel, num_tokens, num_channels).to(tl.float32)
    x3 = _row(x, start - 3, channel, num_tokens, num_channels).to(tl.float32)
    zero = tl.zeros([channels], tl.float32)
    dx1, dx2, dx3 = zero, zero, zero  # of the three tokens before, as far as later ones have added to it
    dtap0, dtap1, dtap2, dtap3 = zero, zero, zero, zero
    x_next = _row(x, start, channel, num_tokens, num_channels)
    x_after = _row(x, start + 1, channel, num_tokens, num_channels)
    dout_next = _row(gradient, start, channel, num_tokens, num_channels)
    dout_after = _row(gradient, start + 1, channel, num_tokens, num_channels)
    for step in range(0, steps, unroll):
        for inner in tl.static_range(unroll):
            token = start + step + inner
            offset = tl.load(offsets + token, mask=token < num_tokens, other=0)
            x0, x_next = x_next.to(tl.float32), x_after
            dout, dout_next = dout_next.to(tl.float32), dout_after
            x_after = _row(x, token + 2, channel, num_tokens, num_channels)
            dout_after = _row(gradient, token + 2, channel, num_tokens, num_channels)
            x1, x2, x3 = tl.where(offset >= 1, x1, 0.0), tl.where(offset >= 2, x2, 0.0), tl.where(offset >= 3, x3, 0.0)
            total = tap0 * x0 + tap1 * x1 + tap2 * x2 + tap3 * x3
            sigmoid = tl.sigmoid(total)
            change = dout * sigmoid * (1 + total * (1 - sigmoid))  # the gradient before SiLU
            dx1 += tl.where(offset >= 1, tap1 * change, 0.0)
            dx2 += tl.where(offset >= 2, tap2 * change, 0.0)
            dx3 += tl.where(offset >= 3, tap3 * change, 0.0)
            done = token - 3
            _put(x_gradient, dx3, done, (done >= start) & (done < end), channel, num_channels)
            dx3, dx2, dx1 = dx2, dx1, tap0 * change
            own = tl.where(token < end, change, 0.0)
            dtap0 += own * x0
            dtap1 += own * x1
            dtap2 += own * x2
            dtap3 += own * x3
            x3, x2, x1 = x2, x1, x0
    part = tap_gradients + tl.program_id(1).to(tl.int64) * width * num_channels + channel
    inside = channel < num_channels
    tl.store(part + (width - 1) * num_channels, dtap0, mask=inside)
    tl.store(part + (width - 2) * num_channels, dtap1, mask=inside & (width > 1))
    tl.store(part + (width - 3) * num_channels, dtap2, mask=inside & (width > 2))
    tl.store(part + (width - 4) * num_channels, dtap3, mask=inside & (width > 3))


def forward(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """x [T, C], weight [C, 1, W], offsets int32 [T] (how far a token stands from its document's first) -> [T, C]."""
    out = torch.empty_like(x)
    grid = (triton.cdiv(x.shape[1], _CHANNELS), triton.cdiv(x.shape[0], _STEPS))
    sizes = (*x.shape, weight.shape[-1], _CHANNELS, _STEPS, _UNROLL)
    _forward_kernel[grid](x, weight.contiguous(), offsets, out, *sizes, num_warps=_NUM_WARPS)
    return out


def backward(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x and weight. The runs' parts of the latter are added up in a fixed order: no atomics."""
    grid = (triton.cdiv(x.shape[1], _CHANNELS), triton.cdiv(x.shape[0], _STEPS - 3))
    x_gradient = torch.empty_like(x)
    parts = torch.empty(grid[1], weight.shape[-1], x.shape[1], dtype=torch.float32, device=x.device)
    sizes = (*x.shape, weight.shape[-1], _CHANNELS, _STEPS, _UNROLL)
    _backward_kernel[grid](gradient, x, weight.contiguous(), offsets, x_gradient, parts, *sizes, num_warps=_NUM_WARPS)
    return x_gradient, parts.sum(dim=0).T.to(weight.dtype).contiguous().view(weight.shape)
