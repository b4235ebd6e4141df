"""The routed experts' SwiGLU feed-forward over rows that are sorted by expert."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from models.ops.has_triton import HAS_TRITON
from models.ops.in_graph import in_graph
from models.ops.precision import at_least_float32

if HAS_TRITON:
    from models.ops import swiglu_triton

# Shapes: R routed rows, H hidden, E experts, I expert hidden, r rank of an adapter.


class Projection(NamedTuple):
    """Each expert's matrix, and maybe an adapter of low rank that is added to it: weight + scale * B A. The adapter may
    be stored in another dtype than what it is multiplied with."""

    weight: torch.Tensor
    """[E, out, in]"""
    lora_A: torch.Tensor | None = None
    """[E, r, in]"""
    lora_B: torch.Tensor | None = None
    """[E, out, r]"""
    scale: float = 1.0

    def __call__(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """x [R, in], sorted by expert -> [R, out]."""
        out = _grouped_linear(x, self.weight, offsets)
        if self.lora_A is None or self.lora_B is None:
            return out
        lora_A, lora_B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return out + _grouped_linear(_grouped_linear(x, lora_A, offsets) * self.scale, lora_B, offsets)


def weighted_swiglu(gate_up: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up * weight in float32 or wider: gate_up [R, 2I] (gate, then up), weights [R] -> [R, I]. offsets as
    in `grouped_experts`: what comes after the last is any, in the result and in gradients."""
    if HAS_TRITON and gate_up.is_cuda and gate_up.dtype != torch.float64:
        return _WeightedSwiGLU.apply(gate_up, weights, offsets)
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(at_least_float32(gate)) * at_least_float32(up) * weights.unsqueeze(-1)).to(gate_up.dtype)


class _WeightedSwiGLU(torch.autograd.Function):
    """By kernels of its own: of the backward pass the compiler makes one kernel or three, which take three times as
    long, depending on what surrounds it; and it knows nothing of rows that nobody reads."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up, weights, offsets)
        return swiglu_triton.weighted_swiglu(gate_up, weights, offsets)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return *swiglu_triton.weighted_swiglu_backward(gradient, *ctx.saved_tensors), None


def grouped_experts(
    x: torch.Tensor,
    gate_up_proj: Projection,
    down_proj: Projection,
    weights: torch.Tensor,
    offsets: torch.Tensor,
) -> torch.Tensor:
    """weight * down(silu(gate(x)) * up(x)), each row by its own expert and with its own weight.

    x [R, H]; gate_up_proj [E, 2I, H] (rows: gate, then up); down_proj [E, H, I]; weights float32 or wider [R]; offsets
    int32 [E], where each expert's rows end (an expert may have none; what comes after the last is anything, and so are
    its gradients) -> [R, H] in x's dtype. Matrices are read as they are stored, never copied.

    The weight multiplies the inner activation, which is the same as multiplying the result: its gradient then needs
    [R, I] numbers that the backward pass has at hand, not the result [R, H], which nothing has to keep.
    """
    inner = weighted_swiglu(gate_up_proj(x, offsets), weights, offsets)
    return _ContiguousGradient.apply(down_proj(inner, offsets))


class _ContiguousGradient(torch.autograd.Function):
    """The identity. grouped_mm's backward refuses a gradient without strides of its own, as .sum() hands back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.contiguous()


def _grouped_linear(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """x [R, A], weight [E, B, A] -> [R, B]."""
    if x.shape[0] == 0:  # without a look at the offsets; and the weights' gradients are zeros, not none
        return x @ weight[0].T
    if _grouped_mm_works(x, weight):
        return F.grouped_mm(x, weight.transpose(-2, -1), offs=offsets)
    return _loop(x, weight, offsets)


def _each_by_itself(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    *parts, rest = x.tensor_split(offsets.tolist())
    results = [part @ matrix.T for part, matrix in zip(parts, weight)]
    return torch.cat([*results, rest.new_zeros(len(rest), weight.shape[1])])


_loop = in_graph(
    _each_by_itself,
    "grouped_linear",
    "Tensor x, Tensor weight, Tensor offsets",
    num_inputs=2,
    shape=lambda x, weight, offsets: x.new_empty(x.shape[0], weight.shape[1]),
)


def is_aligned(width: int, dtype: torch.dtype) -> bool:
    """Whether rows of this width are a multiple of 16 bytes."""
    return width * dtype.itemsize % 16 == 0


def _grouped_mm_works(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """grouped_mm takes no float64, and only rows whose strides are multiples of 16 bytes.

    Its shape function, which the compiler runs, knows bfloat16 alone (torch 2.11 to 2.13).
    """
    aligned = all(is_aligned(size, x.dtype) for size in weight.shape[-2:])
    float32_works = x.dtype == torch.float32 and not torch.compiler.is_compiling()
    return aligned and (x.dtype == torch.bfloat16 or float32_works)
