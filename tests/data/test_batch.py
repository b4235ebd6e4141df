"""Samples, rows and micro-batches: their labels, and which tokens are real."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.batch import Frame, Medium, MicroBatch, Row, Sample, end_to_end
from models.ops.labels import IGNORED
from tests.models.qwen35_moe.vision_shapes import random_pixels, tiny_vision


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


DOCUMENTS = st.lists(st.lists(st.tuples(st.integers(0, 2**17), st.booleans()), min_size=1, max_size=9), min_size=1)


@given(DOCUMENTS, st.data())
def test_labels_of_documents_end_to_end_are_those_of_each(documents, data):
    """Of documents that are whole or cut on either side, of tokens in whatever type their shards have."""
    samples, tokens, labels = [], [], []
    for document in documents:
        begin = data.draw(st.integers(0, len(document) - 1))
        end = data.draw(st.integers(begin + 1, len(document)))
        ids, flags = map(list, zip(*document))
        dtype = data.draw(st.sampled_from([np.int32, np.uint32] + [np.uint16] * (max(ids) < 2**16)))
        samples.append(Sample(np.array(ids, dtype), np.array(flags)).piece(begin, end - begin))
        tokens += ids[begin:end]
        following = [token if flag else IGNORED for token, flag in document[1:]] + [IGNORED]
        labels += following[begin:end]
        assert samples[-1].labels.tolist() == following[begin:end]
    found = end_to_end(samples)
    assert [array.tolist() for array in found] == [tokens, labels]
    assert {array.dtype for array in found} == {np.dtype(np.int32)}


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
    with pytest.raises(AssertionError):  # a filler that nobody would know of
        MicroBatch.of(ROWS, may_fill=False)


def test_a_micro_batch_moves_whole():
    moved = MicroBatch.of(ROWS, may_fill=True).to(torch.device("meta"))
    assert {t.device.type for t in (moved.tokens, moved.labels, moved.positions, moved.is_real)} == {"meta"}
    assert MicroBatch.of(ROWS[1:], may_fill=False).to(torch.device("meta")).is_real is None


VISION = tiny_vision()


def shown(row: Row, *frames: Frame) -> Row:
    return row._replace(frames=frames, pixels=random_pixels(VISION, [(h, w) for _, h, w in frames]).numpy())


def test_frames_of_all_rows_stand_at_their_places():
    rows = [shown(ROWS[0], Frame(0, 2, 2), Frame(2, 2, 2)), shown(ROWS[1], Frame(0, 2, 4))]
    batch = MicroBatch.of(rows, may_fill=True, vision=VISION)
    assert batch.patches.frames.lengths() == [4, 4, 8]
    assert batch.patches.places.tolist() == [0, 2, 4, 5]
    assert torch.equal(batch.patches.pixels, torch.from_numpy(np.concatenate([row.pixels for row in rows])))
    assert batch.patches.grid[:, :8].tolist() == [[0, 0, 1, 1] * 2, [0, 1] * 4, [2] * 8, [2] * 8]
    assert batch.patches.grid[:, 8:].tolist() == [[0, 0, 1, 1] * 2, [0, 1, 0, 1, 2, 3, 2, 3], [2] * 8, [4] * 8]
    # Time, height, width, from 0 in each document.
    assert batch.positions.tolist() == [[0, 1, 2, 0, 0, 0, 0, 1], [0, 1, 2, 0, 0, 0, 0, 1], [0, 1, 2, 0, 0, 1, 0, 1]]
    moved = batch.to(torch.device("meta")).patches
    assert {t.device.type for t in (moved.pixels, moved.grid, moved.places, moved.frames.cu_seqlens)} == {"meta"}


def test_without_images_there_is_a_frame_that_goes_nowhere():
    batch = MicroBatch.of(ROWS, may_fill=True, vision=VISION)
    patches = batch.patches
    assert (len(patches.pixels), patches.frames.lengths(), patches.places.tolist()) == (4, [4], [])
    assert batch.positions.tolist() == [[0, 1, 2, 0, 0, 1, 0, 1]] * 3
    assert MicroBatch.of(ROWS, may_fill=True).patches is None


def test_a_piece_holds_images_whole():
    """Tokens 2 to 5 are one, 7 to 9 another, of which token 7 begins and 8 is the frame's own."""
    media = [Medium(2, 6, [Frame(3, 2, 4)], list, 6), Medium(7, 10, [Frame(8, 2, 2)], list, 6)]
    sample = Sample.of(np.arange(12, dtype=np.int32))._replace(media=media)
    pieces, begin = [], 0
    while begin < 12:
        pieces.append(sample.piece(begin, 5))
        begin += len(pieces[-1].tokens)
    assert [piece.tokens.tolist() for piece in pieces] == [[0, 1], [2, 3, 4, 5, 6], [7, 8, 9, 10, 11]]
    assert [[(m.begin, m.end, m.frames[0].place) for m in piece.media] for piece in pieces] == [
        [],
        [(0, 4, 1)],
        [(0, 3, 1)],
    ]
    assert pieces[0].labels.tolist() == [1, 2]  # the token after the cut, as in any document
    assert len(sample.piece(7, 2).tokens) == 0
