"""Triton kernels for the norms of many tensors: two launches a dtype, and two for tensors whose addresses are odd.

PyTorch launches one for every 20 M numbers or so.
"""

# mypy: disable-error-code="no-untyped-def"
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from models.ops.documents import to_device
from training.chunks_triton import BLOCK, CHUNK, NUM_WARPS, TYPES, are_aligned, chunks_of, pointer


@triton.jit
def _squares_kernel(
    sums, places, table, sizes, dtype: tl.constexpr, aligned: tl.constexpr, chunk: tl.constexpr, block: tl.constexpr
):
    """Of each chunk the sum of its numbers' squares, float32."""
    tensor = tl.load(places + tl.program_id(0) * 2).to(tl.int64)
    start = tl.load(places + tl.program_id(0) * 2 + 1).to(tl.int64) * chunk
    size = tl.load(sizes + tensor)
    if aligned:
        size = tl.multiple_of(size, 16)
    numbers = pointer(table + tensor, dtype, aligned) + start
    squares = tl.zeros([block], dtype=tl.float32)
    for first in range(0, chunk, block):
        at = first + tl.arange(0, block)
        x = tl.load(numbers + at, mask=start + at < size, other=0.0).to(tl.float32)
        squares += x * x
    tl.store(sums + tl.program_id(0), tl.sum(squares, axis=0))


@triton.jit
def _norms_kernel(norms, numbers, sums, ends, block: tl.constexpr):
    """Of each tensor the root of its chunks' sums, float64, to the place that `numbers` tells."""
    tensor = tl.program_id(0)
    first = tl.load(ends + tensor - 1, mask=tensor > 0, other=0)
    end = tl.load(ends + tensor)
    total = tl.zeros([block], dtype=tl.float64)
    for start in range(first, end, block):
        at = start + tl.arange(0, block)
        total += tl.load(sums + at, mask=at < end, other=0.0).to(tl.float64)
    tl.store(norms + tl.load(numbers + tensor), tl.sqrt(tl.sum(total, axis=0)))


def norms(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of each tensor, float64 [number of tensors]; all on one GPU, of float32, bfloat16 or float16.

    Squares are added up in float32 within a chunk of 4096 numbers, and chunks in float64, in the same order each time.
    """
    tensors = [each.contiguous() for each in tensors]
    found = torch.empty(len(tensors), dtype=torch.float64, device=tensors[0].device)
    alike: dict[tuple[torch.dtype, bool], list[int]] = {}
    for number, each in enumerate(tensors):
        alike.setdefault((each.dtype, are_aligned(each.numel(), each.data_ptr())), []).append(number)
    for (dtype, aligned), numbers in alike.items():
        places, sizes, ends = chunks_of(tuple(tensors[number].numel() for number in numbers), found.device)
        table = to_device(torch.tensor([[tensors[number].data_ptr() for number in numbers], numbers]), found.device)
        sums = torch.empty(len(places), dtype=torch.float32, device=found.device)
        if len(places):
            kind = TYPES[dtype], aligned, CHUNK, BLOCK
            _squares_kernel[(len(places),)](sums, places, table[0], sizes, *kind, num_warps=NUM_WARPS)
        _norms_kernel[(len(numbers),)](found, table[1], sums, ends, BLOCK, num_warps=NUM_WARPS)
    return found
