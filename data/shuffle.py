"""The order of the samples: a pseudo-random permutation that takes no memory and gives any places at once."""

import functools
import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_BLOCK = 1 << 16


def permute(indices: NDArray[np.int64], size: int, seed: int, epochs: int | NDArray[np.int64]) -> NDArray[np.int64]:
    """[n], where each of `indices` [n] goes in the permutation of range(size) that belongs to (seed, its epoch).

    A Feistel network permutes the next even power of two, whatever its round function is (Luby and Rackoff 1988).
    Walking along its cycle until the value is below `size` again makes that a permutation of range(size) (Black and
    Rogaway 2002). That takes at most four walks on average, more only where `size` is below 16.
    """
    half_bits = max(3, ((size - 1).bit_length() + 1) // 2)  # below 64 values a network mixes badly
    bits, half_mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    different, own = np.unique(epochs, return_inverse=True)
    of_epochs = np.array([_round_keys(seed, epoch) for epoch in different.tolist()], np.uint64).reshape(-1, _ROUNDS)
    keys = np.broadcast_to(of_epochs[own.reshape(-1)], (len(indices), _ROUNDS))
    values = indices.astype(np.uint64)
    assert (values < size).all()
    walking = np.arange(len(values))
    while len(walking):
        left, right = values[walking] >> bits, values[walking] & half_mask
        for key in keys[walking].T:
            left, right = right, left ^ (_mix(right ^ key) & half_mask)
        values[walking] = left << bits | right
        walking = walking[values[walking] >= size]
    return values.astype(np.int64)


def permutation(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """[size], where all indices go; a block at a time, as what is on the way takes much more memory."""
    places = np.arange(size)
    for begin in range(0, size, _BLOCK):
        block = slice(begin, begin + _BLOCK)
        places[block] = permute(places[block], size, seed, epoch)
    return places


@functools.lru_cache(maxsize=16)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return tuple(int.from_bytes(digest[start : start + 8], "little") for start in range(0, len(digest), 8))


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A hash of 64 bits: the output function of SplitMix64 (Steele, Lea and Flood 2014). The arithmetic of uint64 is
    modulo 2**64."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
