"""A Triton kernel that updates all tensors in one launch: a launch for each keeps the host busier than the GPU."""

# mypy: disable-error-code="no-untyped-def"
import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from models.ops.documents import to_device
from training.optimizer import Hyperparameters, Tensors

# A program updates one chunk of one tensor. Where tensors lie it reads from a table, [number of tensors, 4]: parameter,
# mean, square, gradient.
_CHUNK, _BLOCK, _NUM_WARPS = 1 << 12, 1 << 10, 4
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _place(table, tensor, which: tl.constexpr, dtype: tl.constexpr, aligned: tl.constexpr):
    pointer = tl.load(table + tensor * 4 + which).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if aligned else pointer


@triton.jit
def _update_kernel(
    chunks,
    table,
    sizes,
    corrections,
    divisor,
    skips,
    num_tensors,
    lr,
    beta,
    one_minus_beta,
    beta_of_squares,
    one_minus_beta_of_squares,
    eps,
    weight_decay,
    parameter_type: tl.constexpr,
    mean_type: tl.constexpr,
    gradient_type: tl.constexpr,
    aligned: tl.constexpr,
    chunk_size: tl.constexpr,
    block: tl.constexpr,
):
    if skips is not None:  # noqa: SIM102 (together the compiler would load from nothing)
        if tl.load(skips) > 0:
            return
    tensor = tl.load(chunks + tl.program_id(0) * 2).to(tl.int64)
    start = tl.load(chunks + tl.program_id(0) * 2 + 1).to(tl.int64) * chunk_size
    size = tl.load(sizes + tensor)
    if aligned:
        size = tl.multiple_of(size, 16)
    parameter = _place(table, tensor, 0, parameter_type, aligned) + start
    mean = _place(table, tensor, 1, mean_type, aligned) + start
    square = _place(table, tensor, 2, mean_type, aligned) + start
    gradient = _place(table, tensor, 3, gradient_type, aligned) + start
    correction = tl.load(corrections + tensor)
    correction_of_squares = tl.load(corrections + num_tensors + tensor)
    scale = 1.0
    if divisor is not None:
        scale = tl.load(divisor)
    # Quotients and roots within 2 units of the last place: exactly rounded ones take longer than memory.
    for first in range(0, chunk_size, block):
        at = first + tl.arange(0, block)
        is_inside = start + at < size
        g = tl.load(gradient + at, mask=is_inside, other=0.0).to(tl.float32)
        if divisor is not None:
            g = g / scale
        m = beta * tl.load(mean + at, mask=is_inside, other=0.0).to(tl.float32) + one_minus_beta * g
        s = tl.load(square + at, mask=is_inside, other=0.0).to(tl.float32)
        s = beta_of_squares * s + one_minus_beta_of_squares * (g * g)
        p = tl.load(parameter + at, mask=is_inside, other=0.0).to(tl.float32)
        root = tl.sqrt(s / correction_of_squares) + eps
        p = p * (1 - lr * weight_decay) - lr * ((m / correction) / root)
        tl.store(parameter + at, p.to(parameter_type), mask=is_inside)
        tl.store(mean + at, m.to(mean_type), mask=is_inside)
        tl.store(square + at, s.to(mean_type), mask=is_inside)


def update(
    tensors: Sequence[Tensors],
    corrections: torch.Tensor,
    divisor: torch.Tensor | None,
    skips: torch.Tensor | None,
    hyperparameters: Hyperparameters,
) -> None:
    """What `adamw_updates` (training/optimizer.py) does, for the parameters of one device; a launch for all whose
    dtypes are the same."""
    lr, betas, eps, weight_decay = hyperparameters
    alike: dict[tuple[torch.dtype, torch.dtype, torch.dtype, bool], list[int]] = {}
    tensors = [each._replace(gradient=each.gradient.contiguous()) for each in tensors]
    places = [[x.data_ptr() for x in each] for each in tensors]
    for index, (each, of_each) in enumerate(zip(tensors, places)):
        # Only where addresses and sizes are multiples of 16 does a thread read 16 bytes at once.
        aligned = not any(x % 16 for x in (*of_each, each.parameter.numel()))
        assert all(x.is_contiguous() for x in each), "as all parameters are: they are updated by address"
        kinds = (each.parameter.dtype, each.mean.dtype, each.gradient.dtype, aligned)
        if each.parameter.numel():
            alike.setdefault(kinds, []).append(index)
    device = corrections.device
    for (*dtypes, aligned), indices in alike.items():
        chunks, sizes = _layout(tuple(tensors[index].parameter.numel() for index in indices), device)
        table = to_device(torch.tensor([places[index] for index in indices]), device)
        of_these = corrections[:, to_device(torch.tensor(indices), device)]
        _update_kernel[(len(chunks),)](
            chunks,
            table,
            sizes,
            of_these,
            divisor,
            skips,
            len(indices),
            lr,
            betas[0],
            1 - betas[0],
            betas[1],
            1 - betas[1],
            eps,
            weight_decay,
            *(_TYPES[dtype] for dtype in dtypes),
            aligned,
            _CHUNK,
            _BLOCK,
            num_warps=_NUM_WARPS,
        )


@functools.lru_cache(maxsize=64)
def _layout(sizes: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Of tensors with so many numbers each the chunks, int32 [number of chunks, 2]: tensor, place among its chunks; and
    the sizes, int64."""
    counts = torch.tensor([triton.cdiv(size, _CHUNK) for size in sizes])
    tensor = torch.arange(len(sizes)).repeat_interleave(counts)
    place = torch.arange(len(tensor)) - (counts.cumsum(0) - counts)[tensor]
    return torch.stack([tensor, place], dim=1).int().to(device), torch.tensor(sizes).to(device)
