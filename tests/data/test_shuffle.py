"""The permutation: one of range(size) for every size, and well mixed."""

import hashlib
import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data.shuffle import permutation, permute

SEEDS = st.integers(0, 2**63 - 1)
EPOCHS = st.integers(0, 10**6)


@given(st.integers(1, 700), SEEDS, EPOCHS)
@example(1, 0, 0)
@example(2, 0, 0)
@example(63, 1, 0)
@example(64, 1, 0)
@example(65, 1, 0)
@example(256, 2**63 - 1, 0)
@example(257, 2**63 - 1, 0)
def test_a_permutation_for_every_size(size, seed, epoch):
    assert sorted(permutation(size, seed, epoch).tolist()) == list(range(size))


@given(st.integers(2, 2**40), SEEDS, EPOCHS, st.data())
def test_no_two_places_meet_where_the_size_is_large(size, seed, epoch, data):
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=20, unique=True))
    places = permute(np.array(indices), size, seed, epoch).tolist()
    assert len(set(places)) == len(places)
    assert all(0 <= place < size for place in places)


def by_hand(index, size, seed, epoch):
    """One place, in integers without a bound."""
    half_bits = max(3, -(-(size - 1).bit_length() // 2))
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=48).digest()
    while True:
        left, right = divmod(index, 1 << half_bits)
        for key in np.frombuffer(digest, "<u8").tolist():
            value = ((right ^ key) + 0x9E3779B97F4A7C15) % 2**64
            value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
            left, right = right, left ^ (value ^ value >> 31) % (1 << half_bits)
        index = left << half_bits | right
        if index < size:
            return index


@given(st.integers(1, 2**50), st.integers(0, 2**70), st.data())
def test_many_places_at_once_are_those_of_each(size, seed, data):
    """In epochs of their own, or all in one."""
    indices = data.draw(st.lists(st.integers(0, size - 1), max_size=20))
    epochs = data.draw(st.lists(EPOCHS, min_size=len(indices), max_size=len(indices)) | st.just([7] * len(indices)))
    expected = [by_hand(index, size, seed, epoch) for index, epoch in zip(indices, epochs)]
    of_each = permute(np.array(indices, np.int64), size, seed, np.array(epochs, np.int64))
    assert of_each.tolist() == expected
    if len(set(epochs)) == 1:
        assert permute(np.array(indices, np.int64), size, seed, epochs[0]).tolist() == expected


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 1000, 65_536, 70_000])
def test_all_places_are_those_of_each(size):
    for seed, epoch in ((0, 0), (5, 3), (2**63, 1)):
        places = permutation(size, seed, epoch).tolist()
        assert sorted(places) == list(range(size))
        for index in range(0, size, max(1, size // 50)):
            assert places[index] == by_hand(index, size, seed, epoch)


def test_the_same_for_ever():
    """Checkpoints rely on it: a changed permutation would read some samples twice and others never."""
    assert permutation(10, 0, 0).tolist() == [1, 3, 6, 0, 8, 4, 5, 2, 9, 7]
    assert permute(np.array([123_456_789]), 10**12, 42, 7).tolist() == [428_846_001_119]


@pytest.mark.parametrize("varied", ["seed", "epoch"])
def test_all_orders_of_a_few_are_equally_likely(varied):
    """Pearson's statistic over the 120 orders of 5 has mean 119 and variance 2 * 119: six deviations happen by chance
    once in about ten million, and the numbers here are fixed."""
    num_draws = 12_000 if varied == "epoch" else 3_600  # of seeds one after the other
    if varied == "seed":
        drawn = [permutation(5, seed, 0).tolist() for seed in range(num_draws)]
    else:  # all at once, which is the same: see above
        indices, epochs = np.tile(np.arange(5), num_draws), np.repeat(np.arange(num_draws), 5)
        drawn = permute(indices, 5, 0, epochs).reshape(num_draws, 5).tolist()
    orders = Counter(map(tuple, drawn))
    expected = num_draws / 120
    statistic = sum((count - expected) ** 2 / expected for count in orders.values()) + (120 - len(orders)) * expected
    assert abs(statistic - 119) < 6 * math.sqrt(2 * 119)


@pytest.mark.parametrize("size", [1000, 1024, 1025, 4096])
def test_places_tell_nothing_of_their_neighbours(size):
    """Of two random orders, the correlation has mean 0 and variance 1 / (size - 1); the number of places where they
    agree, and of steps by one, are Poisson(1), which exceeds 10 with a probability of 1e-8."""
    first, second = (permutation(size, 3, epoch).tolist() for epoch in (0, 1))
    mean = (size - 1) / 2
    variance = (size**2 - 1) / 12
    for other in (range(size), second):
        correlation = sum((a - mean) * (b - mean) for a, b in zip(first, other)) / size / variance
        assert abs(correlation) < 6 / math.sqrt(size - 1)
        assert sum(a == b for a, b in zip(first, other)) <= 10
    assert sum(b - a == 1 for a, b in pairwise(first)) <= 10
