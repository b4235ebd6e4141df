"""What data is on its way to the model: samples, the rows that they are packed into, and micro-batches of rows.

torch is imported where tensors are made: samples are also read by the check before a run, which it would slow down.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.ops.labels import IGNORED

if TYPE_CHECKING:
    import torch

    from models.ops.documents import Documents

# Shapes: n tokens of a sample, S = sequence_length, T = local_batch_size * S.


class Sample(NamedTuple):
    """One document or conversation, n > 0 tokens."""

    tokens: NDArray[np.int32]  # [n]
    labels: NDArray[np.int32]  # [n], what is to be predicted at each token: the next one, or IGNORED
    note: tuple[str, str] | None = None  # (reason, message): counted, although the sample is used

    @classmethod
    def of(cls, tokens: NDArray[np.int32], is_trained: NDArray[np.bool_] | bool = True) -> "Sample":
        """The sample of these tokens, of which those are trained on where `is_trained` [n] is true.

        Each token's label is the next one, so the last has none. (One that is cut later keeps the token after the cut.)
        """
        labels = np.full(len(tokens), IGNORED, np.int32)
        labels[:-1] = np.where(is_trained, tokens, IGNORED)[1:]
        return cls(tokens, labels)


Cursor = tuple[int, ...]
"""Where a slot stands: numbers of samples in the endless stream of epochs. The first element is the sample that the
slot reads next (of text: goes on with); the one after it is `stride` further. packing.py tells the other elements."""


class Row(NamedTuple):
    """`sequence_length` tokens of one slot."""

    tokens: NDArray[np.int32]  # [S]
    labels: NDArray[np.int32]  # [S]
    lengths: list[int]  # of the documents, those of the filler at the end included; their sum is S
    num_fillers: int  # how many of the tokens, the last ones, only fill the row
    cursor: Cursor  # after this row
    notes: list[tuple[str, str]]  # reason and message of each sample that was skipped or truncated on the way


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """`local_batch_size` rows laid end to end: what the model takes."""

    tokens: "torch.Tensor"  # int64 [T]
    labels: "torch.Tensor"  # int64 [T], shifted: what is to be predicted at each token, or IGNORED
    positions: "torch.Tensor"  # int64 [T], from 0 in each document
    documents: "Documents"  # fillers included
    is_real: "torch.Tensor | None" = None  # bool [T], False for fillers; None where there are none ever

    @classmethod
    def of(cls, rows: Sequence[Row], may_fill: bool) -> "MicroBatch":
        """On the host. `may_fill`: whether rows can have fillers at all."""
        import torch

        from models.ops.documents import Documents

        length = len(rows[0].tokens)
        place = torch.arange(length)
        documents = Documents.from_lengths([length for row in rows for length in row.lengths], max_seqlen=length)
        return cls(
            tokens=torch.from_numpy(np.concatenate([row.tokens for row in rows])).long(),
            labels=torch.from_numpy(np.concatenate([row.labels for row in rows])).long(),
            positions=documents.token_offsets.long(),
            documents=documents,
            is_real=torch.cat([place < length - row.num_fillers for row in rows]) if may_fill else None,
        )

    @property
    def num_trained(self) -> int:
        """How many tokens have a label; of a micro-batch on the host."""
        return int((self.labels != IGNORED).sum())

    def to(self, device: "torch.device") -> "MicroBatch":
        """The same on `device`, without waiting for it."""
        from models.ops.documents import to_device

        return replace(
            self,
            tokens=to_device(self.tokens, device),
            labels=to_device(self.labels, device),
            positions=to_device(self.positions, device),
            documents=self.documents.to(device),
            is_real=None if self.is_real is None else to_device(self.is_real, device),
        )
