"""Triton kernels that write tokens' rows and add them up, as operations that compiled blocks launch and do not fuse."""

# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl

_BLOCK = 2048


# Shapes: as in permute.py. Both go from the tokens' side: a token is read, or written, once, and not once a row.


@triton.jit
def _rows_kernel(x, places, rows, width, num_places: tl.constexpr, block: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    for first in range(0, width, block):
        at = first + tl.arange(0, block)
        row = tl.load(x + token * width + at, mask=at < width)
        for which in tl.static_range(num_places):
            place = tl.load(places + token * num_places + which).to(tl.int64)
            tl.store(rows + place * width + at, row, mask=(at < width) & (place >= 0))


@torch.library.triton_op("qwen35_moe::rows_of", mutates_args={})
def rows_of(x: torch.Tensor, places: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Each token's rows: x [N, H], places [N, m], -1 for none -> [R, H], of which what no place names is any."""
    rows = x.new_empty(num_rows, x.shape[1])
    if rows.numel() and places.numel():
        torch.library.wrap_triton(_rows_kernel)[(places.shape[0],)](
            x.contiguous(), places.contiguous(), rows, x.shape[1], num_places=places.shape[1], block=_BLOCK
        )
    return rows


@triton.jit
def _sum_kernel(rows, places, out, width, num_places: tl.constexpr, block: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    for first in range(0, width, block):
        at = first + tl.arange(0, block)
        total = tl.zeros([block], tl.float32)
        for which in tl.static_range(num_places):
            place = tl.load(places + token * num_places + which).to(tl.int64)
            row = tl.load(rows + place * width + at, mask=(at < width) & (place >= 0), other=0.0)
            total += row.to(total.dtype)
        tl.store(out + token * width + at, total.to(out.dtype.element_ty), mask=at < width)


@torch.library.triton_op("qwen35_moe::sum_of_rows", mutates_args={})
def sum_of_rows(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Each token's sum, in float32: rows [R, H], places [N, m], -1 for none -> [N, H]."""
    out = rows.new_empty(places.shape[0], rows.shape[1])
    if out.numel():
        torch.library.wrap_triton(_sum_kernel)[(places.shape[0],)](
            rows.contiguous(),
            places.contiguous(),
            out,
            rows.shape[1],
            num_places=places.shape[1],
            block=_BLOCK,
        )
    return out
