"""Where the documents of a packed stream begin and end, on the device and on the host."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Documents:
    """D documents laid end to end in a stream of T tokens.

    No tuple: FSDP moves every tensor that it finds in a model's arguments to the GPU, also in tuples, and waits for it.
    """

    cu_seqlens: torch.Tensor
    """int32 [D + 1] on the compute device: 0, then where each document ends; the last is T."""
    cu_seqlens_cpu: torch.Tensor
    """The same on the host, so that nothing has to wait for the device to read it."""
    token_offsets: torch.Tensor
    """int32 [T] on the compute device: how far each token stands from its document's first."""
    max_seqlen: int
    """No document is longer. Constant over a run, so that nothing recompiles when documents change."""

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int], device: torch.device | None = None, max_seqlen: int | None = None
    ) -> "Documents":
        """Documents of these lengths (each at least 1); `max_seqlen` defaults to the longest."""
        boundaries = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32)
        longest = max(lengths)
        assert min(lengths) > 0, lengths
        assert max_seqlen is None or longest <= max_seqlen, (longest, max_seqlen)
        on_device = boundaries.to(device, non_blocking=True)
        torch._dynamo.maybe_mark_dynamic(on_device, 0)  # D changes with every batch: one graph for all
        torch._dynamo.maybe_mark_dynamic(boundaries, 0)
        index = torch.arange(sum(lengths), dtype=torch.int32, device=device)
        starts = on_device[torch.searchsorted(on_device, index, right=True, out_int32=True) - 1]
        return cls(on_device, boundaries, index - starts, max_seqlen or longest)

    def lengths(self) -> list[int]:
        """Each document's number of tokens."""
        return self.cu_seqlens_cpu.diff().tolist()
