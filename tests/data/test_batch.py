"""Samples, rows and micro-batches: their labels, and which tokens are real."""

import numpy as np
import torch

from data.batch import MicroBatch, Row, Sample
from models.ops.labels import IGNORED


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


ROWS = [
    Row(ints(5, 6, 7, 0), ints(6, 7, IGNORED, IGNORED), [3, 1], 1, (0, 1), []),
    Row(ints(8, 9, 8, 9), ints(9, IGNORED, 9, IGNORED), [2, 2], 0, (2, 3), []),
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
