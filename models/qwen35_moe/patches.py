"""What the vision tower reads: the patches of all images and video frames of a micro-batch, in one stream."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from models.ops.documents import Documents, to_device

# Shapes: P patches, F frames (an image is one, a video one a pair of its pictures), M tokens of vision in the text,
# N pixel values of a patch.

Grid = tuple[int, int]
"""Height and width of a frame in patches, both multiples of the merge size."""


@dataclass(frozen=True, eq=False)
class Patches:
    """Frames laid end to end, nothing padded. The patches of a frame come in the order of the merger's squares: by
    square (row, column), in a square by (row, column). As Documents no tuple."""

    pixels: torch.Tensor
    """uint8 [P, N]; of a patch by (channel, time, row, column)."""
    frames: Documents
    """Attention sees a patch's own frame alone."""
    grid: torch.Tensor
    """int32 [4, P]: row, column, and of the patch's frame height and width, in patches."""
    places: torch.Tensor
    """int64 [M]: where in the stream of tokens the features go. The tower may make more, of the last frames: these are
    dropped."""

    @classmethod
    def of(
        cls, pixels: torch.Tensor, grids: Sequence[Grid], places: torch.Tensor, merge_size: int, max_patches: int
    ) -> "Patches":
        """On the host. `max_patches`: no frame has more; constant over a run, so that nothing recompiles."""
        grid = torch.cat([_grid(height, width, merge_size) for height, width in grids], dim=1)
        assert len(pixels) == grid.shape[1], (pixels.shape, grids)
        assert len(places) * merge_size**2 <= len(pixels), (len(places), grids)
        lengths = [height * width for height, width in grids]
        return cls(pixels, Documents.from_lengths(lengths, max_seqlen=max_patches), grid, places)

    @classmethod
    def grey(cls, num_values: int, merge_size: int, max_patches: int) -> "Patches":
        """A grey frame of one token that stands at no place, so its feature goes nowhere. `num_values`: of a patch."""
        pixels = torch.full((merge_size**2, num_values), 127, dtype=torch.uint8)
        return cls.of(pixels, [(merge_size, merge_size)], torch.empty(0, dtype=torch.int64), merge_size, max_patches)

    @property
    def num_shown(self) -> int:
        """How many of the features that the tower makes of these frames go anywhere."""
        return len(self.places)

    def to(self, device: torch.device) -> "Patches":
        """The same on `device`, without waiting for it."""
        pixels, grid, places = (to_device(tensor, device) for tensor in (self.pixels, self.grid, self.places))
        return replace(self, pixels=pixels, frames=self.frames.to(device), grid=grid, places=places)


@functools.lru_cache(maxsize=1024)
def _grid(height: int, width: int, merge: int) -> torch.Tensor:
    """int32 [4, height * width], as `Patches.grid`."""
    assert height % merge == width % merge == 0, (height, width, merge)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    squares = torch.stack([rows, columns]).view(2, height // merge, merge, width // merge, merge)
    in_order = squares.transpose(2, 3).reshape(2, -1)
    return torch.cat([in_order, torch.tensor([[height], [width]]).expand(2, height * width)]).int()
