"""A Triton kernel that updates all tensors in one launch: a launch for each keeps the host busier than the GPU."""

# mypy: disable-error-code="no-untyped-def"
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from models.ops.documents import to_device
from training.chunks_triton import BLOCK, CHUNK, NUM_WARPS, TYPES, are_aligned, chunks_of, pointer
from training.optimizer import Hyperparameters, Tensors

# A program updates one chunk of one tensor. Where tensors lie it reads from a table, [number of tensors, 4]: parameter,
# mean, square, gradient.


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
    parameter = pointer(table + tensor * 4, parameter_type, aligned) + start
    mean = pointer(table + tensor * 4 + 1, mean_type, aligned) + start
    square = pointer(table + tensor * 4 + 2, mean_type, aligned) + start
    gradient = pointer(table + tensor * 4 + 3, gradient_type, aligned) + start
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
    gradients = [each.gradient.contiguous() for each in tensors]
    places = [
        [parameter.data_ptr(), mean.data_ptr(), square.data_ptr(), gradient.data_ptr()]
        for (parameter, mean, square, _), gradient in zip(tensors, gradients)
    ]
    for index, ((parameter, mean, square, gradient), of_each) in enumerate(zip(tensors, places)):
        are_contiguous = parameter.is_contiguous() and mean.is_contiguous() and square.is_contiguous()
        assert are_contiguous, "as all parameters are: they are updated by address"
        if size := parameter.numel():
            kinds = (parameter.dtype, mean.dtype, gradient.dtype, are_aligned(size, *of_each))
            alike.setdefault(kinds, []).append(index)
    device = corrections.device
    for (*dtypes, aligned), indices in alike.items():
        chunks, sizes, _ = chunks_of(tuple(tensors[index].parameter.numel() for index in indices), device)
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
            *(TYPES[dtype] for dtype in dtypes),
            aligned,
            CHUNK,
            BLOCK,
            num_warps=NUM_WARPS,
        )
