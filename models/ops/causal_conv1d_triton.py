"""Triton kernels of the causal convolution: each element is read from memory once, taps come from the cache."""

# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl

# Shapes: T tokens, C channels, W taps. A program works on a tile of tokens and channels.
_TILE_TOKENS, _TILE_CHANNELS = 64, 128


@triton.jit
def _shifted_rows(x, token, channel, offset, num_tokens, num_channels, shift):
    """x[token - shift] [tokens, channels] as float32, 0 where that lies before the token's document."""
    inside = (token < num_tokens) & (offset >= shift)
    place = (token - shift).to(tl.int64)[:, None] * num_channels + channel[None, :]
    return tl.load(x + place, mask=inside[:, None] & (channel < num_channels)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _tap(weight, channel, num_channels, shift, width: tl.constexpr):
    return tl.load(weight + channel * width + (width - 1 - shift), mask=channel < num_channels, other=0.0).to(
        tl.float32
    )


@triton.jit
def _forward_kernel(
    x, weight, offsets, out, num_tokens, num_channels, width: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr
):
    channel = tl.program_id(0) * columns + tl.arange(0, columns)
    token = tl.program_id(1) * rows + tl.arange(0, rows)
    offset = tl.load(offsets + token, mask=token < num_tokens, other=0)
    total = tl.zeros([rows, columns], tl.float32)
    for shift in tl.static_range(width):
        tap = _tap(weight, channel, num_channels, shift, width)
        total += tap[None, :] * _shifted_rows(x, token, channel, offset, num_tokens, num_channels, shift)
    place = token.to(tl.int64)[:, None] * num_channels + channel[None, :]
    mask = (token < num_tokens)[:, None] & (channel < num_channels)[None, :]
    tl.store(out + place, (total * tl.sigmoid(total)).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _before_silu_kernel(
    gradient,
    x,
    weight,
    offsets,
    inner,
    weight_gradients,
    num_tokens,
    num_channels,
    width: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """inner: the gradient before SiLU [T, C]; weight_gradients: this tile's part of the taps' gradients, [W, C]."""
    channel = tl.program_id(0) * columns + tl.arange(0, columns)
    token = tl.program_id(1) * rows + tl.arange(0, rows)
    offset = tl.load(offsets + token, mask=token < num_tokens, other=0)
    total = tl.zeros([rows, columns], tl.float32)
    for shift in tl.static_range(width):
        tap = _tap(weight, channel, num_channels, shift, width)
        total += tap[None, :] * _shifted_rows(x, token, channel, offset, num_tokens, num_channels, shift)
    sigmoid = tl.sigmoid(total)
    change = _shifted_rows(gradient, token, channel, offset, num_tokens, num_channels, 0)
    change *= sigmoid * (1 + total * (1 - sigmoid))
    place = token.to(tl.int64)[:, None] * num_channels + channel[None, :]
    mask = (token < num_tokens)[:, None] & (channel < num_channels)[None, :]
    tl.store(inner + place, change.to(inner.dtype.element_ty), mask=mask)
    for shift in tl.static_range(width):
        product = change * _shifted_rows(x, token, channel, offset, num_tokens, num_channels, shift)
        part = (tl.program_id(1) * width + width - 1 - shift).to(tl.int64) * num_channels + channel
        tl.store(weight_gradients + part, tl.sum(product, axis=0), mask=channel < num_channels)


@triton.jit
def _x_gradient_kernel(
    inner,
    weight,
    offsets,
    out,
    num_tokens,
    num_channels,
    width: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """out[t] = the sum over `later` of tap * inner[t + later], of those that read t: they lie in its document."""
    channel = tl.program_id(0) * columns + tl.arange(0, columns)
    token = tl.program_id(1) * rows + tl.arange(0, rows)
    total = tl.zeros([rows, columns], tl.float32)
    for later in tl.static_range(width):
        reader = token + later
        offset = tl.load(offsets + reader, mask=reader < num_tokens, other=-1)
        reads = (offset >= later)[:, None] & (channel < num_channels)[None, :]
        place = reader.to(tl.int64)[:, None] * num_channels + channel[None, :]
        tap = _tap(weight, channel, num_channels, later, width)
        total += tap[None, :] * tl.load(inner + place, mask=reads, other=0.0).to(tl.float32)
    place = token.to(tl.int64)[:, None] * num_channels + channel[None, :]
    mask = (token < num_tokens)[:, None] & (channel < num_channels)[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)


def _grid(x: torch.Tensor) -> tuple[int, int]:
    return triton.cdiv(x.shape[1], _TILE_CHANNELS), triton.cdiv(x.shape[0], _TILE_TOKENS)


def forward(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """x [T, C], weight [C, 1, W], offsets int32 [T] (how far a token stands from its document's first) -> [T, C]."""
    out = torch.empty_like(x)
    tile = (weight.shape[-1], _TILE_TOKENS, _TILE_CHANNELS)
    _forward_kernel[_grid(x)](x, weight.contiguous(), offsets, out, *x.shape, *tile)
    return out


def backward(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x and weight. The parts of the latter are added up in a fixed order: no atomics."""
    width, weight = weight.shape[-1], weight.contiguous()
    inner, x_gradient = torch.empty_like(x), torch.empty_like(x)
    parts = torch.empty(_grid(x)[1], width, x.shape[1], dtype=torch.float32, device=x.device)
    tile = (width, _TILE_TOKENS, _TILE_CHANNELS)
    _before_silu_kernel[_grid(x)](gradient, x, weight, offsets, inner, parts, *x.shape, *tile)
    _x_gradient_kernel[_grid(x)](inner, weight, offsets, x_gradient, *x.shape, *tile)
    return x_gradient, parts.sum(dim=0).T.to(weight.dtype).contiguous().view(weight.shape)
