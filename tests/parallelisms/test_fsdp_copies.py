"""The layout of a unit's gradients before their reduction is FSDP's own, whatever their shapes, strides and number."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.fsdp._fully_shard import _fsdp_collectives

from parallelisms import fsdp_copies
from parallelisms.fsdp_copies import lay_out_gradients_without_tables

FSDPS_OWN = _fsdp_collectives.foreach_reduce_scatter_copy_in  # tests replace it, but all are collected before


@settings(max_examples=60)
@given(
    shapes=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=4),
    num_ranks=st.sampled_from([1, 2, 3, 4, 9]),
    even=st.booleans(),
    transposed=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_as_fsdp_does(
    shapes: list[list[int]], num_ranks: int, even: bool, transposed: bool, dtype: torch.dtype
) -> None:
    gradients = []
    for shape in shapes:
        size = [shape[0] * num_ranks, *shape[1:]] if even else shape
        gradient = torch.randn(size).to(dtype)
        gradients.append(gradient.mT.contiguous().mT if transposed and gradient.dim() > 1 else gradient)
    padded = sum(-(-g.shape[0] // num_ranks) * num_ranks * (g.numel() // g.shape[0]) for g in gradients)
    ours, theirs = torch.full([padded], torch.nan), torch.zeros(padded)
    lay_out_gradients_without_tables()
    assert _fsdp_collectives.foreach_reduce_scatter_copy_in is fsdp_copies._lay_out
    _fsdp_collectives.foreach_reduce_scatter_copy_in(list(gradients), ours, num_ranks)
    FSDPS_OWN(list(gradients), theirs, num_ranks)
    assert torch.equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)  # within a host, and between hosts
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_as_fsdp_does_on_a_gpu(num_ranks: int, dtype: torch.dtype) -> None:
    gradients = [torch.randn(size, device="cuda").bfloat16() for size in ((32, 1024, 64), (2048, 96), (1, 96), (64,))]
    total = sum(-(-g.shape[0] // num_ranks) * num_ranks * g[0].numel() for g in gradients)
    ours, theirs = (torch.full([total], torch.nan, device="cuda", dtype=dtype) for _ in range(2))
    fsdp_copies._lay_out(list(gradients), ours, num_ranks)
    FSDPS_OWN(list(gradients), theirs, num_ranks)
    assert torch.equal(ours, theirs)
