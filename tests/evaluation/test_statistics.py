import random

import pytest

from evaluation.statistics import pass_at_k, wilson


@pytest.mark.parametrize(("successes", "n", "low", "high"), [
    # Newcombe 1998, table I, method 3; the last two follow from z^2 / (n + z^2)
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),
    (10, 10, 0.7225, 1.0), (0, 1, 0.0, 0.7935)])
def test_the_interval_is_wilsons(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_nothing_seen_says_nothing():
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("n", [1, 7, 500])
def test_the_interval_holds_the_share_and_is_symmetric_in_right_and_wrong(n):
    for successes in range(n + 1):
        low, high = wilson(successes, n)
        assert 0.0 <= low <= successes / n + 1e-12 and successes / n - 1e-12 <= high <= 1.0
        assert wilson(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


@pytest.mark.parametrize(("correct", "n", "k", "expected"), [
    ([0], 4, 4, 0.0), ([1], 4, 4, 1.0), ([1], 4, 1, 0.25), ([2], 4, 2, 1 - 1 / 6), ([4, 0], 4, 2, 0.5), ([], 4, 2, 0.0),
    ([3], 10, 5, 1 - 21 / 252)])
def test_pass_at_k_is_the_unbiased_estimate(correct, n, k, expected):
    assert pass_at_k(correct, n, k) == pytest.approx(expected)


def test_pass_at_k_is_the_chance_that_k_of_n_drawn_samples_hold_a_right_one():
    rng = random.Random(0)
    drawn = sum(any(index < 3 for index in rng.sample(range(12), 4)) for _ in range(20_000)) / 20_000
    assert pass_at_k([3], 12, 4) == pytest.approx(drawn, abs=0.01)
