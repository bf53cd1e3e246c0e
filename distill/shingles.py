"""Hashed word n-grams of many texts at once, and MinHash signatures over them.

Texts become one flat array of hashed words and the place where each text begins, so that n-grams of all of them come
from a few whole-array operations. Signatures are rensa's R-MinHash (after arXiv 1704.04370).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from rensa import RMinHash

PERMUTATIONS = 128
BANDS = 16  # of 8 rows: a pair of Jaccard similarity 0.85 shares a band with probability 0.99, one of 0.5 with 0.06
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so multiplication by its powers loses nothing
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"  # each character counts as a word
# punctuation stays inside a word, where it carries meaning in code and formulas, and not around it
_WORD = rf"[{_UNSPACED}]|[^\s{_UNSPACED}.,;:!?]+(?:[.,;:!?]+[^\s{_UNSPACED}.,;:!?]+)*"


def level(texts: pl.Series) -> pl.Series:
    """Texts with case and Unicode width levelled."""
    if (texts.str.len_bytes() != texts.str.len_chars()).any():  # ASCII has one form, and most texts are ASCII
        texts = texts.str.normalize("NFKC")
    return texts.str.to_lowercase()


@dataclass(frozen=True)
class Words:
    """Hashed words of texts: uint64 [words of all], and int64 [texts + 1], where each text begins."""

    hashes: np.ndarray
    starts: np.ndarray

    @staticmethod
    def of(texts: pl.Series) -> Words:
        """Words of levelled texts. The hash is polars' own, equal wherever its version is."""
        words, starts = _split(texts)
        return Words(words.hash(seed=0).to_numpy(), starts)

    def ngrams(self, n: int) -> Words:
        """The hashed n-grams of each text in order; none of a text with fewer than n words."""
        inside, starts = _inside(self.starts, n)
        count = len(inside)
        grams = np.zeros(count, dtype=np.uint64)
        for offset in range(n):  # a polynomial in _BASE modulo 2^64; overflow is meant
            grams *= _BASE
            grams += self.hashes[offset:offset + count]
        return Words(grams[inside], starts)

    def texts_of(self, places: np.ndarray) -> np.ndarray:
        """The text that each place in `hashes` belongs to."""
        return np.searchsorted(self.starts, places, side="right") - 1


def lettered(texts: pl.Series, n: int) -> np.ndarray:
    """How many words of each n-gram of levelled texts, in the order of `Words.ngrams`, have a letter."""
    words, starts = _split(texts)
    inside, _ = _inside(starts, n)
    total = np.concatenate([[0], np.cumsum(words.str.contains(r"\p{L}").to_numpy())])
    return (total[n:] - total[:-n])[inside] if len(inside) else np.empty(0, dtype=np.int64)


def _split(texts: pl.Series) -> tuple[pl.Series, np.ndarray]:
    """The words of all texts, and where each text begins."""
    found = texts.str.extract_all(_WORD)
    starts = np.concatenate([[0], np.cumsum(found.list.len().to_numpy(), dtype=np.int64)])
    return found.explode(empty_as_null=False, keep_nulls=False), starts


def _inside(starts: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Which runs of n words do not reach into the next text, bool [words - n + 1], and where those of each begin."""
    sizes = np.diff(starts)
    inside = np.ones(starts[-1], dtype=bool)
    for back in range(1, n):
        inside[starts[1:][sizes >= back] - back] = False
    return (inside[:max(0, len(inside) - n + 1)], np.concatenate([[0], np.cumsum(np.maximum(sizes - n + 1, 0))]))


def signatures(grams: Words) -> np.ndarray:
    """uint32 [texts, PERMUTATIONS]; those of texts without any n-gram say nothing."""
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(grams.hashes, grams.starts.astype(np.uint64),
                                                           PERMUTATIONS, 0)
    return np.array(matrix.to_rows(), dtype=np.uint32).reshape(-1, PERMUTATIONS)


def bands(signature: np.ndarray, group: np.ndarray) -> np.ndarray:
    """uint64 [texts, BANDS]: near-equal texts of a group share at least one key with high probability.

    group: uint64 [texts]; texts of different groups share none.
    """
    keys = np.repeat(group[:, None], BANDS, axis=1) * _BASE + np.arange(BANDS, dtype=np.uint64)
    for column in np.moveaxis(signature.reshape(len(signature), BANDS, -1), 2, 0):
        keys = keys * _BASE + column
    return keys


def shorten(signature: np.ndarray) -> np.ndarray:
    """uint8 [texts, PERMUTATIONS], enough to estimate a similarity (b-bit minwise hashing, arXiv 0910.3349)."""
    return (signature * np.uint32(0x9E3779B1) >> np.uint32(24)).astype(np.uint8)


def similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Estimated Jaccard similarities [pairs] of shortened signatures; the deviation at 0.85 is 0.03."""
    equal = (first == second).mean(axis=1)
    return (equal - 1 / 256) / (1 - 1 / 256)
