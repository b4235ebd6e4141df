"""What data is on its way to the model: samples, the rows that they are packed into, and micro-batches of rows.

torch is imported where tensors are made: samples are also read by the check before a run, which it would slow down.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.ops.labels import IGNORED
from models.qwen35_moe.positions import multimodal_positions
from models.qwen35_moe.vision_config import VisionConfig

if TYPE_CHECKING:
    import torch

    from models.ops.documents import Documents
    from models.qwen35_moe.patches import Patches

# Shapes: n tokens of a sample, S = sequence_length, T = local_batch_size * S, P patches of images and videos.

MAX_PATCHES = 2**16
"""Of one frame: the 16,777,216 pixels that published processors allow."""


class Frame(NamedTuple):
    """An image, or a pair of a video's pictures: where its tokens begin, and its size in patches."""

    place: int
    height: int
    width: int


class Medium(NamedTuple):
    """An image or a video in a sample: the tokens from `begin` to `end` are all of it."""

    begin: int
    end: int
    frames: Sequence[Frame]
    decode: Callable[[], NDArray[np.uint8]]
    """-> [P, values of a patch] of the frames. Raises BadSample."""
    patch_values: int

    def grey(self) -> NDArray[np.uint8]:
        """What stands for it where it cannot be decoded."""
        num_patches = sum(height * width for _, height, width in self.frames)
        return np.full((num_patches, self.patch_values), 127, np.uint8)


class Sample(NamedTuple):
    """One document or conversation, n > 0 tokens."""

    tokens: NDArray[np.integer]  # [n]
    is_trained: NDArray[np.bool_]  # [n], which of them are to be predicted; the first is not, whatever this says
    note: tuple[str, str] | None = None  # (reason, message): counted, although the sample is used
    media: Sequence[Medium] = ()  # in order
    last_label: int = IGNORED  # of the last token: where more followed and was cut off, the next one

    @classmethod
    def of(cls, tokens: NDArray[np.integer], is_trained: NDArray[np.bool_] | bool = True) -> "Sample":
        """The sample of these tokens; `is_trained` may be said of all of them."""
        return cls(tokens, np.full(len(tokens), is_trained))

    @property
    def labels(self) -> NDArray[np.int32]:
        """[n], what is to be predicted at each token: the next one, or IGNORED."""
        return end_to_end([self])[1]

    def piece(self, begin: int, room: int) -> "Sample":
        """The tokens from `begin` on, at most `room` of them, none of them inside an image or a video that goes on
        behind. Its last label is the token after the cut."""
        end = min(len(self.tokens), begin + room)
        if end - begin == len(self.tokens):
            return self
        end = next((medium.begin for medium in self.media if medium.begin < end < medium.end), end)
        media = [
            medium._replace(
                begin=medium.begin - begin,
                end=medium.end - begin,
                frames=[frame._replace(place=frame.place - begin) for frame in medium.frames],
            )
            for medium in self.media
            if begin <= medium.begin < end
        ]
        is_cut = end < len(self.tokens)
        last_label = self.last_label if not is_cut else int(self.tokens[end]) if self.is_trained[end] else IGNORED
        return Sample(self.tokens[begin:end], self.is_trained[begin:end], self.note, media, last_label)


def end_to_end(samples: Sequence[Sample]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The tokens and the labels of all samples, of which there is one at least."""
    tokens = np.concatenate([sample.tokens for sample in samples], dtype=np.int32, casting="unsafe")
    labels = np.where(np.concatenate([sample.is_trained for sample in samples]), tokens, np.int32(IGNORED))
    labels[:-1] = labels[1:]
    ends = np.cumsum([len(sample.tokens) for sample in samples])
    labels[ends - 1] = [sample.last_label for sample in samples]
    return tokens, labels


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
    frames: Sequence[Frame] = ()  # of its images and videos, in the order of their tokens
    pixels: NDArray[np.uint8] | None = None  # [P, values of a patch] of the frames, if there are any


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """`local_batch_size` rows laid end to end: what the model takes."""

    tokens: "torch.Tensor"  # int64 [T]
    labels: "torch.Tensor"  # int64 [T], shifted: what is to be predicted at each token, or IGNORED
    positions: "torch.Tensor"  # int64 [T], from 0 in each document; [3, T] for a model with a vision tower
    documents: "Documents"  # fillers included
    is_real: "torch.Tensor | None" = None  # bool [T], False for fillers; None where there are none ever
    patches: "Patches | None" = None  # of a model with a vision tower, never empty: see `_patches`
    mtp_labels: "torch.Tensor | None" = None  # int64 [T], of a model with multi-token prediction

    @classmethod
    def of(cls, rows: Sequence[Row], may_fill: bool, vision: VisionConfig | None = None) -> "MicroBatch":
        """On the host. `may_fill`: whether rows can have fillers at all. `vision`: the model's tower."""
        import torch

        from models.ops.documents import Documents

        length = len(rows[0].tokens)
        assert may_fill or not any(row.num_fillers for row in rows)
        place = torch.arange(length)
        documents = Documents.from_lengths([length for row in rows for length in row.lengths], max_seqlen=length)
        return cls(
            tokens=torch.from_numpy(np.concatenate([row.tokens for row in rows])).long(),
            labels=torch.from_numpy(np.concatenate([row.labels for row in rows])).long(),
            positions=_positions(rows, vision) if vision else documents.token_offsets.long(),
            documents=documents,
            is_real=torch.cat([place < length - row.num_fillers for row in rows]) if may_fill else None,
            patches=_patches(rows, vision) if vision else None,
        )

    @property
    def num_trained(self) -> int:
        """How many tokens have a label; of a micro-batch on the host."""
        return int((self.labels != IGNORED).sum())

    @property
    def num_drafted(self) -> int:
        """How many tokens have a label of multi-token prediction; of a micro-batch on the host."""
        return 0 if self.mtp_labels is None else int((self.mtp_labels != IGNORED).sum())

    def with_mtp_labels(self) -> "MicroBatch":
        """The same for a model with multi-token prediction; of whole documents, on the host."""
        from models.qwen35_moe.mtp import mtp_labels

        return replace(self, mtp_labels=mtp_labels(self.labels, self.documents))

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
            mtp_labels=None if self.mtp_labels is None else to_device(self.mtp_labels, device),
        )


def _positions(rows: Sequence[Row], vision: VisionConfig) -> "torch.Tensor":
    """int64 [3, T]."""
    import torch

    positions, merge = [], vision.spatial_merge_size
    for row in rows:
        begin, frames = 0, list(row.frames)
        for length in row.lengths:
            own = [frame for frame in frames if begin <= frame.place < begin + length]
            places = ((place - begin, height // merge, width // merge) for place, height, width in own)
            positions.append(multimodal_positions(length, places))
            begin += length
    return torch.from_numpy(np.concatenate(positions, axis=1)).long()


def _patches(rows: Sequence[Row], vision: VisionConfig) -> "Patches":
    """All that the rows show, end to end.

    Where that is nothing, there is a grey frame: every rank has to run the tower, and its backward, once for each
    micro-batch, or the others would wait for its part of the weights and gradients for ever.
    """
    import torch

    from models.qwen35_moe.patches import Patches

    length, merge = len(rows[0].tokens), vision.spatial_merge_size
    frames = [frame._replace(place=frame.place + n * length) for n, row in enumerate(rows) for frame in row.frames]
    max_patches = min(MAX_PATCHES, length * vision.patches_per_token)
    if not frames:
        return Patches.grey(vision.patch_values, merge, max_patches)
    tokens = [np.arange(place, place + height * width // merge**2) for place, height, width in frames]
    return Patches.of(
        torch.from_numpy(np.concatenate([row.pixels for row in rows if row.pixels is not None])),
        [(height, width) for _, height, width in frames],
        torch.from_numpy(np.concatenate(tokens)),
        merge,
        max_patches,
    )
