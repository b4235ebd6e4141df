"""What data is on its way to the model: samples, the rows that they are packed into, and micro-batches of rows.

torch is imported where tensors are made: samples are also read by the check before a run, which it would slow down.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.ops.labels import IGNORED
from models.qwen35_moe.vision_config import VisionConfig

if TYPE_CHECKING:
    import torch

    from models.ops.documents import Documents
    from models.qwen35_moe.patches import Grid, Patches

# Shapes: n tokens of a sample, S = sequence_length, T = local_batch_size * S, P patches of images and videos.

MAX_PATCHES = 2**16
"""Of one frame: the 16,777,216 pixels that published processors allow."""


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


class RowImages(NamedTuple):
    """What a row shows, decoded: the frames of its images and videos in the order of their tokens."""

    pixels: NDArray[np.uint8]  # [P, values of a patch]
    grids: "list[Grid]"  # of each frame
    places: NDArray[np.int64]  # of the tokens that stand for them, in the row


class Row(NamedTuple):
    """`sequence_length` tokens of one slot."""

    tokens: NDArray[np.int32]  # [S]
    labels: NDArray[np.int32]  # [S]
    positions: NDArray[np.int32]  # [S], from 0 in each document; [3, S] where there may be images
    lengths: list[int]  # of the documents, those of the filler at the end included; their sum is S
    num_fillers: int  # how many of the tokens, the last ones, only fill the row
    cursor: Cursor  # after this row
    notes: list[tuple[str, str]]  # reason and message of each sample that was skipped or truncated on the way
    images: RowImages | None = None


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """`local_batch_size` rows laid end to end: what the model takes."""

    tokens: "torch.Tensor"  # int64 [T]
    labels: "torch.Tensor"  # int64 [T], shifted: what is to be predicted at each token, or IGNORED
    positions: "torch.Tensor"  # int64 [T], from 0 in each document; [3, T] for a model with a vision tower
    documents: "Documents"  # fillers included
    is_real: "torch.Tensor | None" = None  # bool [T], False for fillers; None where there are none ever
    patches: "Patches | None" = None  # of a model with a vision tower, never empty: see `_patches`

    @classmethod
    def of(cls, rows: Sequence[Row], may_fill: bool, vision: VisionConfig | None = None) -> "MicroBatch":
        """On the host. `may_fill`: whether rows can have fillers at all. `vision`: the model's tower."""
        import torch

        from models.ops.documents import Documents

        length = len(rows[0].tokens)
        place = torch.arange(length)
        return cls(
            tokens=torch.from_numpy(np.concatenate([row.tokens for row in rows])).long(),
            labels=torch.from_numpy(np.concatenate([row.labels for row in rows])).long(),
            positions=torch.from_numpy(np.concatenate([row.positions for row in rows], axis=-1)).long(),
            documents=Documents.from_lengths([length for row in rows for length in row.lengths], max_seqlen=length),
            is_real=torch.cat([place < length - row.num_fillers for row in rows]) if may_fill else None,
            patches=_patches(rows, vision) if vision else None,
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
            patches=None if self.patches is None else self.patches.to(device),
        )


def _patches(rows: Sequence[Row], vision: VisionConfig) -> "Patches":
    """All that the rows show, end to end.

    Behind it, where it is nothing, a grey frame of one token: every rank has to run the tower, and its backward, once
    for each micro-batch, or the others would wait for its part of the weights and gradients for ever. It stands at no
    place, so its feature goes nowhere.
    """
    import torch

    from models.qwen35_moe.patches import Patches

    length, merge = len(rows[0].tokens), vision.spatial_merge_size
    shown = [(number * length, row.images) for number, row in enumerate(rows) if row.images is not None]
    grids = [grid for _, images in shown for grid in images.grids]
    pixels = [images.pixels for _, images in shown]
    if not grids:
        grids, pixels = [(merge, merge)], [np.full((merge**2, vision.patch_values), 127, np.uint8)]
    places = np.concatenate([np.empty(0, np.int64), *(start + images.places for start, images in shown)])
    return Patches.of(
        torch.from_numpy(np.concatenate(pixels)),
        grids,
        torch.from_numpy(places),
        merge,
        max_patches=min(MAX_PATCHES, length * vision.patches_per_token),
    )
