"""Intervals and pass@k."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, sqrt

Z95 = 1.959964


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion (Wilson 1927); (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = share + Z95**2 / (2 * n)
    half = Z95 * sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    scale = 1 + Z95**2 / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def pass_at_k(correct: Sequence[int], n: int, k: int) -> float:
    """Mean unbiased pass@k over problems with `correct` of `n` samples right (Chen et al. 2021, section 2.1)."""
    if not correct:
        return 0.0
    return sum(1.0 - comb(n - c, k) / comb(n, k) for c in correct) / len(correct)
