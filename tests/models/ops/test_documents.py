"""Documents: boundaries and offsets."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.utils import _to_kwargs

from models.ops.documents import Documents


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_boundaries_and_offsets(lengths: list[int]) -> None:
    documents = Documents.from_lengths(lengths)
    assert documents.cu_seqlens.dtype == documents.cu_seqlens_cpu.dtype == torch.int32
    assert documents.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert documents.cu_seqlens_cpu.tolist() == documents.cu_seqlens.tolist()
    assert documents.lengths() == lengths
    assert documents.max_seqlen == max(lengths)
    expected = [offset for length in lengths for offset in range(length)]
    assert documents.token_offsets.tolist() == expected


def test_max_seqlen_is_an_upper_bound() -> None:
    assert Documents.from_lengths([3, 5], max_seqlen=64).max_seqlen == 64
    with pytest.raises(AssertionError):
        Documents.from_lengths([3, 5], max_seqlen=4)
    with pytest.raises(AssertionError):
        Documents.from_lengths([3, 0])


def test_what_the_host_reads_stays_there() -> None:
    """FSDP moves its arguments to the device before the root's forward: `meta` stands for a GPU."""
    documents = Documents.from_lengths([3, 1])
    ((moved, tokens),), _ = _to_kwargs((documents, torch.zeros(4)), {}, torch.device("meta"), False)
    assert tokens.is_meta
    assert moved.cu_seqlens_cpu.tolist() == [0, 3, 4]
