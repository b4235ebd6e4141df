"""How FSDP reduces gradients here: not at all over one rank; within a host as they are, added up in float32.

FSDP asks a `ReduceScatter` in turn for its input and for the output that belongs to it, and then calls it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from models.ops.has_triton import HAS_TRITON
from torch_private import ReduceScatter

if HAS_TRITON:
    from parallelisms import reduction_triton


class NothingToReduce(ReduceScatter):
    """For a mesh of one rank: one process, or experts that are whole on their rank, as at ep = fsdp.

    FSDP would copy the gradients that it reduces into those that it keeps; here both are one tensor, made on the stream
    of the computation, and used on FSDP's own. One that becomes a parameter's gradient goes when the computation's
    stream has waited for that one, at the end of the backward pass. Any other goes at once: then the allocator must
    know of that use. (Not otherwise: what it knows so is given out again only when FSDP's stream has got there, and
    until then, as the host launches the next step, there would be two sets of gradients.)
    """

    def __init__(self, dtypes: set[torch.dtype]) -> None:
        """dtypes: the parameters'."""
        self._dtypes = dtypes
        self._input: torch.Tensor | None = None
        self.adds_up = True
        """Whether parameters may have gradients already, to which these are added."""

    def is_kept(self, dtype: torch.dtype) -> bool:
        """Whether what is made in this dtype becomes a gradient as it is."""
        return not self.adds_up and self._dtypes == {dtype}

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The input, and then the same for the output."""
        if self._input is None:
            self._input = torch.empty(size, dtype=dtype, device=device)
            return self._input
        output, self._input = self._input, None
        if output.is_cuda and not self.is_kept(dtype):
            output.record_stream(torch.cuda.current_stream())
        return output

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, *_: Any, **__: Any) -> None:
        raise AssertionError("FSDP has nothing to scatter over a mesh of one")


class ExchangeAndAddUp(ReduceScatter):
    """For gradients that are computed in bfloat16 and reduced in float32: they travel as they are, half the bytes, and
    each rank adds up what it gets of its own part, in float32. So sums are made in float32, as in a ring of float32.

    Within a host alone, where on most machines any two ranks are as near. Between hosts a ring passes the border once,
    and this would for each rank.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        """dtype: the gradients'."""
        self._dtype = dtype
        self._is_input = False

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The input in the gradients' dtype, the output in that of the reduction."""
        self._is_input = not self._is_input
        return torch.empty(size, dtype=self._dtype if self._is_input else dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        assert op == dist.ReduceOp.SUM
        assert not async_op
        assert input_tensor.dtype == self._dtype, "FSDP allocates an input, and then its output"
        parts = torch.empty_like(input_tensor)
        dist.all_to_all_single(parts, input_tensor, group=group)
        parts = parts.view(group.size(), -1)
        if HAS_TRITON and parts.is_cuda:
            reduction_triton.add_up(parts, output_tensor)
        else:
            torch.sum(parts, 0, dtype=output_tensor.dtype, out=output_tensor)
