"""Triton kernels for the experts' SwiGLU and its backward pass, as operations that compiled blocks launch."""

# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl

# Shapes: R routed rows, I expert hidden, E experts. In float32, whatever the tensors are.

_ROWS = 4  # of a program
_MOST = 1024  # numbers of a row at a time


@triton.jit
def _swiglu_kernel(gate_up, weights, offsets, out, num_rows, inner, last, rows: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    is_row = (row < num_rows) & (row < tl.load(offsets + last))
    weight = tl.load(weights + row, mask=is_row, other=0.0).to(tl.float32)
    for first in range(0, inner, block):
        at = first + tl.arange(0, block)
        mask = is_row[:, None] & (at < inner)[None, :]
        here = gate_up + row[:, None] * (2 * inner) + at[None, :]
        gate = tl.load(here, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(here + inner, mask=mask, other=0.0).to(tl.float32)
        result = gate * tl.sigmoid(gate) * up * weight[:, None]
        tl.store(out + row[:, None] * inner + at[None, :], result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward_kernel(
    gradient,
    gate_up,
    weights,
    offsets,
    d_gate_up,
    d_weights,
    num_rows,
    inner,
    last,
    rows: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    is_row = (row < num_rows) & (row < tl.load(offsets + last))
    weight = tl.load(weights + row, mask=is_row, other=0.0).to(tl.float32)
    d_weight = tl.zeros([rows], tl.float32)
    for first in range(0, inner, block):
        at = first + tl.arange(0, block)
        mask = is_row[:, None] & (at < inner)[None, :]
        here = row[:, None] * (2 * inner) + at[None, :]
        gate = tl.load(gate_up + here, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up + here + inner, mask=mask, other=0.0).to(tl.float32)
        d_out = tl.load(gradient + row[:, None] * inner + at[None, :], mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        d_weight += tl.sum(d_out * silu * up, axis=1)
        d_out *= weight[:, None]
        d_gate = d_out * up * (sigmoid + silu * (1 - sigmoid))
        tl.store(d_gate_up + here, d_gate.to(d_gate_up.dtype.element_ty), mask=mask)
        tl.store(d_gate_up + here + inner, (d_out * silu).to(d_gate_up.dtype.element_ty), mask=mask)
    tl.store(d_weights + row, d_weight, mask=is_row)


def _launch(kernel, *tensors: torch.Tensor, inner: int, num_experts: int) -> None:
    num_rows = tensors[0].shape[0]
    if num_rows:
        block = min(triton.next_power_of_2(inner), _MOST)
        grid = (triton.cdiv(num_rows, _ROWS),)
        torch.library.wrap_triton(kernel)[grid](*tensors, num_rows, inner, num_experts - 1, rows=_ROWS, block=block)


@torch.library.triton_op("qwen35_moe::weighted_swiglu", mutates_args={})
def weighted_swiglu(gate_up: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up * weight: gate_up [R, 2I] (gate, then up), weights [R], offsets int32 [E], where each expert's
    rows end -> [R, I] in gate_up's dtype; what comes after the last is not written."""
    inner = gate_up.shape[1] // 2
    out = gate_up.new_empty(gate_up.shape[0], inner)
    tensors = gate_up.contiguous(), weights.contiguous(), offsets, out
    _launch(_swiglu_kernel, *tensors, inner=inner, num_experts=offsets.shape[0])
    return out


@torch.library.triton_op("qwen35_moe::weighted_swiglu_backward", mutates_args={})
def weighted_swiglu_backward(
    gradient: torch.Tensor, gate_up: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate_up [R, 2I] and, float32, of weights [R], where the result's is [R, I]."""
    d_gate_up = gate_up.new_empty(gate_up.shape)
    d_weights = weights.new_empty(weights.shape)
    tensors = gradient.contiguous(), gate_up.contiguous(), weights.contiguous(), offsets, d_gate_up, d_weights
    _launch(_swiglu_backward_kernel, *tensors, inner=gradient.shape[1], num_experts=offsets.shape[0])
    return d_gate_up, d_weights
