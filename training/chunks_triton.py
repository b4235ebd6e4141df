"""How a Triton kernel works on many tensors in one launch: chunk by chunk, with tables of sizes and addresses."""

# mypy: disable-error-code="no-untyped-def"
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

CHUNK, BLOCK, NUM_WARPS = 1 << 12, 1 << 10, 4
"""Numbers of one tensor that a program works on; at a time; by so many warps."""
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def pointer(place, dtype: tl.constexpr, aligned: tl.constexpr):
    """The address that stands at a place of a table."""
    found = tl.load(place).to(tl.pointer_type(dtype))
    return tl.multiple_of(found, 16) if aligned else found


def are_aligned(size: int, *addresses: int) -> bool:
    """Of tensors with `size` numbers: only where addresses and sizes are multiples of 16 does a thread read 16 bytes at
    once."""
    for address in addresses:
        size |= address
    return size & 15 == 0


class Chunks(NamedTuple):
    """Of several tensors, end to end."""

    places: torch.Tensor
    """int32 [number of chunks, 2]: tensor, place among its chunks."""
    sizes: torch.Tensor
    """int64 [number of tensors]: its numbers."""
    ends: torch.Tensor
    """int64 [number of tensors]: how many chunks there are up to and with its last."""


@functools.lru_cache(maxsize=64)
def chunks_of(sizes: tuple[int, ...], device: torch.device) -> Chunks:
    """Of tensors with so many numbers each, on `device`; one without any has no chunk."""
    counts = torch.tensor([triton.cdiv(size, CHUNK) for size in sizes])
    tensor, ends = torch.arange(len(sizes)).repeat_interleave(counts), counts.cumsum(0)
    places = torch.stack([tensor, torch.arange(len(tensor)) - (ends - counts)[tensor]], dim=1)
    return Chunks(places.int().to(device), torch.tensor(sizes).to(device), ends.to(device))
