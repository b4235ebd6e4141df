"""Samples, rows and micro-batches: their labels, and which tokens are real."""

import numpy as np
import torch

from data.batch import MicroBatch, Row, RowImages, Sample
from models.ops.labels import IGNORED
from tests.models.qwen35_moe.vision_shapes import random_pixels, tiny_vision


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


ROWS = [
    Row(ints(5, 6, 7, 0), ints(6, 7, IGNORED, IGNORED), ints(0, 1, 2, 0), [3, 1], 1, (0, 1), []),
    Row(ints(8, 9, 8, 9), ints(9, IGNORED, 9, IGNORED), ints(0, 1, 0, 1), [2, 2], 0, (2, 3), []),
]


def test_each_token_of_a_sample_is_labelled_with_the_next():
    sample = Sample.of(ints(5, 6, 7))
    assert sample.labels.tolist() == [6, 7, IGNORED]
    assert sample.labels.dtype == np.int32


def test_a_label_that_is_not_trained_on_is_ignored():
    sample = Sample.of(ints(5, 6, 7), np.array([True, False, True]))
    assert sample.labels.tolist() == [IGNORED, 7, IGNORED]


def test_a_micro_batch_lays_its_rows_end_to_end():
    batch = MicroBatch.of(ROWS, may_fill=True)
    assert batch.tokens.tolist() == [5, 6, 7, 0, 8, 9, 8, 9]
    assert batch.labels.tolist() == [6, 7, IGNORED, IGNORED, 9, IGNORED, 9, IGNORED]
    assert batch.positions.tolist() == [0, 1, 2, 0, 0, 1, 0, 1]
    assert {t.dtype for t in (batch.tokens, batch.labels, batch.positions)} == {torch.int64}
    assert batch.is_real.tolist() == [True, True, True, False, True, True, True, True]
    assert batch.num_trained == 4


def test_a_micro_batch_that_cannot_have_fillers_has_no_mask():
    assert MicroBatch.of(ROWS[1:], may_fill=False).is_real is None


def test_a_micro_batch_moves_whole():
    moved = MicroBatch.of(ROWS, may_fill=True).to(torch.device("meta"))
    assert {t.device.type for t in (moved.tokens, moved.labels, moved.positions, moved.is_real)} == {"meta"}
    assert MicroBatch.of(ROWS, may_fill=False).to(torch.device("meta")).is_real is None


VISION = tiny_vision()


def with_images(row: Row, *grids: tuple[int, int], places: list[int]) -> Row:
    pixels = random_pixels(VISION, list(grids)).numpy()
    positions = np.stack([row.positions] * 3)
    return row._replace(positions=positions, images=RowImages(pixels, list(grids), np.array(places)))


def test_frames_of_all_rows_stand_at_their_places():
    rows = [with_images(ROWS[0], (2, 2), (2, 2), places=[0, 2]), with_images(ROWS[1], (2, 4), places=[1, 2])]
    batch = MicroBatch.of(rows, may_fill=True, vision=VISION)
    assert batch.positions.shape == (3, 8)
    assert batch.patches.frames.lengths() == [4, 4, 8]
    assert batch.patches.places.tolist() == [0, 2, 5, 6]
    assert torch.equal(batch.patches.pixels, torch.from_numpy(np.concatenate([row.images.pixels for row in rows])))
    assert batch.patches.grid[:, :8].tolist() == [[0, 0, 1, 1] * 2, [0, 1] * 4, [2] * 8, [2] * 8]
    assert batch.patches.grid[:, 8:].tolist() == [[0, 0, 1, 1] * 2, [0, 1, 0, 1, 2, 3, 2, 3], [2] * 8, [4] * 8]
    moved = batch.to(torch.device("meta")).patches
    assert {t.device.type for t in (moved.pixels, moved.grid, moved.places, moved.frames.cu_seqlens)} == {"meta"}


def test_without_images_there_is_a_frame_that_goes_nowhere():
    rows = [row._replace(positions=np.stack([row.positions] * 3)) for row in ROWS]
    patches = MicroBatch.of(rows, may_fill=True, vision=VISION).patches
    assert (len(patches.pixels), patches.frames.lengths(), patches.places.tolist()) == (4, [4], [])
    assert MicroBatch.of(ROWS, may_fill=True).patches is None
