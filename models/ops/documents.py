"""Where the documents of a packed stream begin and end, on the device and on the host."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from torch_private import mark_dynamic


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on `device`, without waiting for it."""
    # From pinned memory: a copy of more than 64 KiB from elsewhere waits until the GPU has done what it has to do.
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


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
        """Documents of these lengths (each at least 1), on the host or on `device`; `max_seqlen` defaults to the
        longest."""
        of_each = torch.tensor(lengths, dtype=torch.int64)
        longest = max(lengths)
        assert min(lengths) > 0, lengths
        assert max_seqlen is None or longest <= max_seqlen, (longest, max_seqlen)
        boundaries = torch.cat([torch.zeros(1, dtype=torch.int64), of_each.cumsum(0)])
        # A sum of steps, on one thread: to wake the host's others for a few documents takes milliseconds.
        steps = torch.ones(int(boundaries[-1]), dtype=torch.int32)
        steps[boundaries[:-1]] = torch.cat([torch.zeros(1, dtype=torch.int64), 1 - of_each[:-1]]).int()
        offsets = steps.cumsum(0)
        on_host = boundaries.int()
        mark_dynamic(on_host, 0)  # D changes with every batch: one graph for all
        documents = cls(on_host, on_host, offsets.int(), max_seqlen or longest)
        return documents if device is None else documents.to(device)

    def to(self, device: torch.device) -> "Documents":
        """The same with `device` as the compute device, without waiting for it."""
        on_device = to_device(self.cu_seqlens_cpu, device)
        mark_dynamic(on_device, 0)
        return Documents(on_device, self.cu_seqlens_cpu, to_device(self.token_offsets, device), self.max_seqlen)

    def lengths(self) -> list[int]:
        """Each document's number of tokens."""
        return lengths_of(self.cu_seqlens_cpu)


def lengths_of(cu_seqlens_cpu: torch.Tensor) -> list[int]:
    """Of documents that end there, as in `Documents`."""
    return cu_seqlens_cpu.diff().tolist()
