"""Packing: every token once, every label once, nothing across a document's border, whatever the lengths."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from data.batch import Sample
from data.packing import NO_SAMPLE, NUM_PENDING, BadSample, ChatSlot, Share, TextSlot, best_fill
from models.ops.labels import IGNORED


def make_documents(lengths):
    """Documents whose tokens are all different: 0, 1, 2, ... over all of them, so a token says where it belongs."""
    starts = np.cumsum([0, *lengths])
    return [np.arange(start, start + length, dtype=np.int32) for start, length in zip(starts, lengths)]


def make_slot(documents, cursor, num_slots, max_empty=100):
    return TextSlot(Share(reader_of(documents), num_slots, max_bad=max_empty), cursor)


def reader_of(documents):
    def read(number):
        document = documents[number % len(documents)]
        if not len(document):
            raise BadSample("empty", f"number {number} is empty")
        return Sample.of(document)

    return read


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
    expected = (slot % num_slots, 0)
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
        number, offset = expected
        while offset == len(documents[number % len(documents)]):
            number, offset = number + num_slots, 0
        assert row.tokens[0] == documents[number % len(documents)][offset]
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
    slot, cursor = make_slot(documents, (0, 0), num_slots), (0, 0)
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
    slot = TextSlot(Share(lambda number: reads.append(number) or Sample.of(documents[0]), 1), (0, 0))
    for _ in range(25):
        slot.next_row(4)
    assert reads == [0]


def test_empty_documents_alone_end_in_an_error():
    documents = make_documents([0, 0, 3])
    assert make_slot(documents, (1, 0), 1, max_empty=2).next_row(4).tokens.tolist() == [0, 1, 2, 0]
    with pytest.raises(ValueError, match="3 samples in a row cannot be used, the last: number 6 is empty") as raised:
        make_slot(documents, (0, 0), 3, max_empty=2).next_row(4)
    assert "\n" not in str(raised.value)


def test_a_cursor_of_other_data_is_refused():
    with pytest.raises(ValueError, match="sample 6 has 3 tokens, but the checkpoint stands at its token 3"):
        make_slot(make_documents([3]), (6, 3), 2).next_row(4)


def test_a_share_that_ends_is_filled_up():
    documents = make_documents([3, 4, 0, 2])
    slot = TextSlot(Share(reader_of(documents), 1, end=4), (0, 0), filler=77)
    rows = [slot.next_row(5) for _ in range(3)]
    assert [row.tokens.tolist() for row in rows] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 77], [77] * 5]
    assert [row.num_fillers for row in rows] == [0, 1, 5]
    assert [row.lengths for row in rows] == [[3, 2], [2, 2, 1], [5]]
    assert [row.labels.tolist() for row in rows][1:] == [[6, -100, 8, -100, -100], [-100] * 5]
    assert [reason for row in rows for reason, _ in row.notes] == ["empty"]


# Chats: samples whose every token names its sample's number, so that a row tells what is in it.


def numbered(lengths):
    """Reads sample v of length lengths[v % n], all its tokens v; a length of 0 is a bad sample."""

    def read(number):
        length = lengths[number % len(lengths)]
        if not length:
            raise BadSample("empty", f"number {number} is empty")
        return Sample.of(np.full(length, number, np.int32))

    return read


def contents(row):
    """The numbers of a row's samples. Checks what is true of each row."""
    ends = np.cumsum(row.lengths)
    assert ends[-1] == len(row.tokens)
    numbers = []
    for end, length in zip(ends.tolist(), row.lengths):
        tokens, labels = row.tokens[end - length : end].tolist(), row.labels[end - length : end].tolist()
        assert len(set(tokens)) == 1
        if end == len(row.tokens) and row.num_fillers:
            assert (length, labels) == (row.num_fillers, [IGNORED] * length)
        else:
            assert labels == [*tokens[1:], IGNORED]
            numbers.append(tokens[0])
    return numbers


ROW = 12
CHAT_LENGTHS = st.lists(st.integers(0, ROW), min_size=1, max_size=100).filter(any)


@given(CHAT_LENGTHS, st.integers(1, 4))
def test_chats_are_whole_and_an_epoch_has_each_once(lengths, num_slots):
    """No sample lost, none twice, whatever the lengths; and none waits for longer than is promised."""
    found = []
    for place in range(num_slots):
        share = Share(numbered(lengths), num_slots, end=len(lengths))
        slot = ChatSlot(share, (place, *[NO_SAMPLE] * NUM_PENDING), filler=-7)
        waiting: dict[int, int] = {}
        while True:
            row = slot.next_row(ROW)
            numbers = contents(row)
            if not numbers:
                break
            for number in numbers:
                assert sum(row.tokens == number) == lengths[number]
                waiting.pop(number, None)
            waiting = {number: waiting.get(number, 0) + 1 for number in row.cursor[1:] if number != NO_SAMPLE}
            assert max(waiting.values(), default=0) <= NUM_PENDING
            found += numbers
        assert row.num_fillers == ROW
    assert sorted(found) == [number for number, length in enumerate(lengths) if length]


@given(CHAT_LENGTHS.filter(all), st.integers(1, 4), st.integers(0, 8))
def test_chats_continue_from_the_cursor_of_any_row(lengths, num_slots, num_before):
    def start(cursor):
        return ChatSlot(Share(numbered(lengths), num_slots), cursor, filler=-7)

    slot, cursor = start((0, *[NO_SAMPLE] * NUM_PENDING)), (0, *[NO_SAMPLE] * NUM_PENDING)
    for _ in range(num_before):
        cursor = slot.next_row(ROW).cursor
    assert len(cursor) == 1 + NUM_PENDING
    assert cursor[0] % num_slots == 0
    resumed = start(cursor)
    for _ in range(4):
        row, other = slot.next_row(ROW), resumed.next_row(ROW)
        assert row.tokens.tolist() == other.tokens.tolist()
        assert row.labels.tolist() == other.labels.tolist()
        assert (row.lengths, row.cursor, row.notes) == (other.lengths, other.cursor, other.notes)


def test_a_note_on_a_waiting_chat_is_not_told_again_after_a_resume():
    def read(number):
        return Sample.of(np.full(9, number, np.int32))._replace(note=("truncated", f"number {number}"))

    slot = ChatSlot(Share(read, 1), (0, *[NO_SAMPLE] * NUM_PENDING), filler=0)
    row = slot.next_row(10)
    assert len(row.notes) == NUM_PENDING
    resumed = ChatSlot(Share(read, 1), row.cursor, filler=0).next_row(10)
    assert resumed.notes == slot.next_row(10).notes == [("truncated", f"number {NUM_PENDING}")]


def test_a_chat_cursor_of_other_data_is_refused():
    cursor = (9, 3, *[NO_SAMPLE] * (NUM_PENDING - 1))
    with pytest.raises(ValueError, match="sample 3, for which the checkpoint waits, cannot be used"):
        ChatSlot(Share(numbered([1, 1, 1, 0]), 1), cursor, filler=0).next_row(ROW)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(0, 30))
def test_best_fill_is_the_best_there_is(lengths, room):
    places = best_fill(lengths, room)
    assert places == sorted(set(places))
    assert (0 in places) == (lengths[0] <= room)
    fixed = lengths[0] if lengths[0] <= room else 0
    others = lengths[1:]
    sums = {
        fixed + sum(length for bit, length in enumerate(others) if chosen >> bit & 1)
        for chosen in range(1 << len(others))
    }
    assert sum(lengths[place] for place in places) == max(total for total in sums if total <= room)


@pytest.mark.parametrize(
    ("sequence_length", "median", "spread", "at_least"),
    # Log-normal lengths, as those of published instruction sets are: a short median and a long tail.
    [(2048, 300, 1.0, 0.99), (4096, 500, 0.8, 0.99), (4096, 900, 0.7, 0.98), (32768, 500, 0.8, 0.99)],
)
def test_chat_rows_are_full(sequence_length, median, spread, at_least):
    random = np.random.default_rng(0)
    lengths = random.lognormal(np.log(median), spread, 50_000).astype(int) + 8
    lengths = lengths[lengths <= sequence_length].tolist()
    slot = ChatSlot(Share(numbered(lengths), 1), (0, *[NO_SAMPLE] * NUM_PENDING), filler=0)
    rows = [slot.next_row(sequence_length) for _ in range(200)]
    fill = 1 - sum(row.num_fillers for row in rows) / (200 * sequence_length)
    print(f"fill rate {fill:.4f}")
    assert fill > at_least
