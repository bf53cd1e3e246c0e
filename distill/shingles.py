"""Hashed word n-grams and MinHash signatures over them, vectorised: words become 64-bit numbers once, and all
n-grams of a text, or all permutations of a signature, come from whole-array operations.

MinHash: Broder, 1997. Python's own `hash` of text differs between processes, so words are hashed with BLAKE2.
"""

from __future__ import annotations

import hashlib

import numpy as np

from distill.prompts import normalise

PERMUTATIONS = 64
BANDS = 8  # of 8 rows: a pair of Jaccard similarity 0.9 shares a band with probability 0.99, one of 0.5 with 0.03
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so multiplication by its powers loses nothing


class Shingler:
    """Turns texts into sorted arrays of distinct hashed word n-grams. Remembers the hash of each word it met."""

    def __init__(self) -> None:
        self._words: dict[str, int] = {}
        rng = np.random.default_rng(0)
        self._scale = rng.integers(1, 2**63, PERMUTATIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._shift = rng.integers(0, 2**63, PERMUTATIONS, dtype=np.uint64)

    def ngrams(self, text: str, n: int) -> np.ndarray:
        """uint64 [at most words - n + 1]; empty for a text of fewer than n words."""
        words = [word.strip(".,;:!?") for word in normalise(text).split()]
        count = len(words) - n + 1
        if count <= 0:
            return np.empty(0, dtype=np.uint64)
        hashes = np.fromiter((self._hash(word) for word in words), dtype=np.uint64, count=len(words))
        grams = np.zeros(count, dtype=np.uint64)
        for offset in range(n):  # a polynomial in _BASE modulo 2^64; overflow is meant
            grams = grams * _BASE + hashes[offset:offset + count]
        return np.unique(grams)

    def _hash(self, word: str) -> int:
        value = self._words.get(word)
        if value is None:
            value = int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(),
                                   "little")
            self._words[word] = value
        return value

    def bands(self, grams: np.ndarray) -> list[int]:
        """The BANDS keys of a non-empty set of n-grams: near-equal sets share at least one with high probability."""
        mixed = grams[:, None] * self._scale + self._shift  # [n-grams, permutations], modulo 2^64
        mixed ^= mixed >> np.uint64(32)  # multiplication alone leaves the order of low bits untouched
        signature = (mixed * _BASE).min(axis=0).reshape(BANDS, -1)
        keys = np.arange(BANDS, dtype=np.uint64)
        for column in signature.T:
            keys = keys * _BASE + column
        return keys.tolist()


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Size of the intersection over size of the union of two sorted arrays without repeats."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)
