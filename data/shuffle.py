"""The order of the samples: a pseudo-random permutation that takes no memory and gives any place at once."""

import functools
import hashlib

import numpy as np
from numpy.typing import NDArray

_MASK_64 = 2**64 - 1
_ROUNDS = 6


def permute(index: int, size: int, seed: int, epoch: int) -> int:
    """Where `index` goes in the permutation of range(size) that belongs to (seed, epoch).

    A Feistel network permutes the next even power of two, whatever its round function is (Luby and Rackoff 1988).
    Walking along its cycle until the value is below `size` again makes that a permutation of range(size) (Black and
    Rogaway 2002). That takes at most four walks on average, more only where `size` is below 16.
    """
    assert 0 <= index < size
    half_bits = max(3, ((size - 1).bit_length() + 1) // 2)  # below 64 values a network mixes badly
    half_mask = (1 << half_bits) - 1
    keys = _round_keys(seed, epoch)
    while True:
        left, right = index >> half_bits, index & half_mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & half_mask)
        index = left << half_bits | right
        if index < size:
            return index


def permutation(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """[size], of all indices at once what `permute` says of each."""
    half_bits = max(3, ((size - 1).bit_length() + 1) // 2)
    bits, half_mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    keys = np.array(_round_keys(seed, epoch), np.uint64)
    values = np.arange(size, dtype=np.uint64)
    walking = np.arange(size)
    while len(walking):
        left, right = values[walking] >> bits, values[walking] & half_mask
        for key in keys:
            left, right = right, left ^ (_mix_all(right ^ key) & half_mask)
        values[walking] = left << bits | right
        walking = walking[values[walking] >= size]
    return values.astype(np.int64)


@functools.lru_cache(maxsize=16)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return tuple(int.from_bytes(digest[start : start + 8], "little") for start in range(0, len(digest), 8))


def _mix(value: int) -> int:
    """A hash of 64 bits: the output function of SplitMix64 (Steele, Lea and Flood 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK_64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK_64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK_64
    return value ^ value >> 31


def _mix_all(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`_mix` of each; the arithmetic of uint64 is modulo 2**64."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
