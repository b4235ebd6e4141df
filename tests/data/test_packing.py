"""Packing: every token once, every label once, nothing across a document's border, whatever the lengths."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from data.packing import IGNORED, Cursor, Slot


def make_documents(lengths):
    """Documents whose tokens are all different: 0, 1, 2, ... over all of them, so a token says where it belongs."""
    starts = np.cumsum([0, *lengths])
    return [np.arange(start, start + length, dtype=np.int32) for start, length in zip(starts, lengths)]


def make_slot(documents, cursor, num_slots, max_empty=100):
    return Slot(lambda sample: documents[sample % len(documents)], Cursor(*cursor), num_slots, max_empty)


LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any)


def every_slot_meets_a_token(lengths, num_slots):
    """Without shuffling, slot s sees the documents s, s + num_slots, ... modulo their number only."""
    num = len(lengths)
    return all(any(lengths[(slot + step * num_slots) % num] for step in range(num)) for slot in range(num_slots))


@given(LENGTHS, st.integers(1, 5), st.integers(1, 17), st.integers(0, 4))
def test_rows_are_full_and_labels_stay_inside_documents(lengths, num_slots, sequence_length, slot):
    assume(every_slot_meets_a_token(lengths, num_slots))
    documents = make_documents(lengths)
    first = {int(document[0]) for document in documents if len(document)}
    last = {int(document[-1]) for document in documents if len(document)}
    reader = make_slot(documents, (slot % num_slots, 0), num_slots)
    expected = Cursor(slot % num_slots, 0)
    for _ in range(6):
        row = reader.next_row(sequence_length)
        assert len(row.tokens) == len(row.labels) == sum(row.lengths) == sequence_length
        assert min(row.lengths) >= 1
        # The next token of the same document, known past the row's end too; none after a document's last.
        assert row.labels.tolist() == [IGNORED if token in last else token + 1 for token in row.tokens.tolist()]
        # A document begins where the row begins or a document does, and nowhere else.
        starts = np.cumsum([0, *row.lengths[:-1]]).tolist()
        assert starts == [place for place in range(sequence_length) if not place or int(row.tokens[place]) in first]
        # The row begins at the cursor of the one before.
        while expected.offset == len(documents[expected.sample % len(documents)]):
            expected = Cursor(expected.sample + num_slots, 0)
        assert row.tokens[0] == documents[expected.sample % len(documents)][expected.offset]
        expected = row.cursor


@given(LENGTHS, st.integers(1, 5), st.integers(1, 17))
def test_an_epoch_trains_each_token_once(lengths, num_slots, sequence_length):
    """No token lost, none twice; each is a label once, but for the first of a document, which never is."""
    assume(every_slot_meets_a_token(lengths, num_slots))
    documents = make_documents(lengths)
    tokens, labels = [], []
    for number in range(num_slots):
        slot, stream = make_slot(documents, (number, 0), num_slots), []
        num_wanted = sum(lengths[number::num_slots])  # its share of the first epoch comes first in its rows
        while len(stream) < num_wanted:
            row = slot.next_row(sequence_length)
            stream += zip(row.tokens.tolist(), row.labels.tolist())
        tokens += [token for token, _ in stream[:num_wanted]]
        labels += [label for _, label in stream[:num_wanted] if label != IGNORED]
    first = {int(document[0]) for document in documents if len(document)}
    assert sorted(tokens) == list(range(sum(lengths)))
    assert sorted(labels) == sorted(set(range(sum(lengths))) - first)


@given(LENGTHS, st.integers(1, 5), st.integers(1, 17), st.integers(0, 8))
def test_a_slot_continues_from_the_cursor_of_any_row(lengths, num_slots, sequence_length, num_before):
    assume(every_slot_meets_a_token(lengths, num_slots))
    documents = make_documents(lengths)
    slot, cursor = make_slot(documents, (0, 0), num_slots), Cursor(0, 0)
    for _ in range(num_before):
        cursor = slot.next_row(sequence_length).cursor
    resumed = make_slot(documents, cursor, num_slots)
    for _ in range(4):
        row, other = slot.next_row(sequence_length), resumed.next_row(sequence_length)
        assert row.tokens.tolist() == other.tokens.tolist()
        assert row.labels.tolist() == other.labels.tolist()
        assert (row.lengths, row.cursor) == (other.lengths, other.cursor)


def test_documents_by_hand():
    """Two documents, the first cut twice: once in its middle, once before its last token, which trains nothing then."""
    documents = make_documents([7, 1])
    slot = make_slot(documents, (0, 0), 1)
    expected = [
        ([0, 1, 2], [1, 2, 3], [3], (0, 3)),
        ([3, 4, 5], [4, 5, 6], [3], (0, 6)),
        ([6, 7, 0], [-100, -100, 1], [1, 1, 1], (2, 1)),
    ]
    for tokens, labels, lengths, cursor in expected:
        row = slot.next_row(3)
        assert (row.tokens.tolist(), row.labels.tolist(), row.lengths, row.cursor) == (tokens, labels, lengths, cursor)


def test_a_document_is_read_once_although_rows_cut_it():
    documents, reads = make_documents([100]), []
    slot = Slot(lambda sample: reads.append(sample) or documents[0], Cursor(0, 0), 1, 100)
    for _ in range(25):
        slot.next_row(4)
    assert reads == [0]


def test_empty_documents_alone_end_in_an_error():
    documents = make_documents([0, 0, 3])
    assert make_slot(documents, (1, 0), 1, max_empty=2).next_row(4).tokens.tolist() == [0, 1, 2, 0]
    with pytest.raises(ValueError, match="3 documents in a row without any token") as raised:
        make_slot(documents, (0, 0), 3, max_empty=2).next_row(4)
    assert "\n" not in str(raised.value)


def test_a_cursor_of_other_data_is_refused():
    with pytest.raises(ValueError, match="sample 6 has 3 tokens, but the checkpoint stands at its token 3"):
        make_slot(make_documents([3]), (6, 3), 2).next_row(4)
