"""Where the documents of a packed stream begin and end, on the device and on the host."""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Documents(NamedTuple):
    """D documents laid end to end in a stream of T tokens."""

    cu_seqlens: torch.Tensor
    """int32 [D + 1] on the compute device: 0, then where each document ends; the last is T."""
    cu_seqlens_cpu: torch.Tensor
    """The same on the host, so that nothing has to wait for the device to read it."""
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
        return cls(boundaries.to(device, non_blocking=True), boundaries, max_seqlen or longest)

    def lengths(self) -> list[int]:
        """Each document's number of tokens."""
        return self.cu_seqlens_cpu.diff().tolist()

    def token_offsets(self, num_tokens: int) -> torch.Tensor:
        """int64 [T] on the device: how far each of the stream's tokens stands from its document's first."""
        index = torch.arange(num_tokens, device=self.cu_seqlens.device)
        return index - self.cu_seqlens[torch.searchsorted(self.cu_seqlens, index, right=True) - 1]
