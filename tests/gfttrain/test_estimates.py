"""pass@k against its closed form and a simulation; intervals against what they are to cover."""

import itertools
import math

import numpy as np
import pytest

from gfttrain.estimates import estimate, mean_rewards, pass_at_k, passes
from gfttrain.results import Estimate

NAN = math.nan

# pass@k


@pytest.mark.parametrize("n", [1, 2, 5, 16, 64])
def test_pass_at_k_is_the_closed_form(n: int) -> None:
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        expected = 1 - math.comb(n - c, k) / math.comb(n, k)
        assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12), (c, k)


def test_pass_at_k_counts_the_subsets() -> None:
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            right = [True] * c + [False] * (n - c)
            subsets = list(itertools.combinations(right, k))
            assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(subset) for subset in subsets]))


def test_pass_at_k_of_many_prompts_at_once() -> None:
    found = pass_at_k([4, 4, 4, 2], [0, 1, 4, 2], 2)
    np.testing.assert_allclose(found, [0.0, 0.5, 1.0, 1.0])
    np.testing.assert_allclose(pass_at_k(8, np.arange(9), 1), np.arange(9) / 8)


def test_pass_at_k_of_too_few_samples_is_unknown() -> None:
    assert np.isnan(pass_at_k([3, 0], [3, 0], 4)).all()
    assert math.isnan(pass_at_k(0, 0, 1))


def test_pass_at_k_does_not_overflow() -> None:
    assert 0.99 < pass_at_k(100_000, 100, 10_000) <= 1
    assert pass_at_k(1000, 0, 500) == 0
    assert pass_at_k(1000, 501, 500) == 1


def test_passes_and_means_are_of_what_was_judged() -> None:
    rewards_PN = np.array([[1.0, 0.0, NAN, 1.0], [0.5, 1.0, 0.0, 0.0], [NAN] * 4])
    np.testing.assert_allclose(passes(rewards_PN, 1), [2 / 3, 1 / 4, NAN])
    np.testing.assert_allclose(passes(rewards_PN, 4), [NAN, 1.0, NAN])
    np.testing.assert_allclose(mean_rewards(rewards_PN), [2 / 3, 3 / 8, NAN])


# intervals


def test_an_interval_is_that_of_resampled_means() -> None:
    values_P = np.random.default_rng(1).beta(2, 3, 40)
    found = estimate(values_P)
    assert found is not None and found.low is not None and found.high is not None
    assert found.value == pytest.approx(values_P.mean())
    picks = np.random.default_rng(2).integers(0, 40, (20_000, 40))
    low, high = np.quantile(values_P[picks].mean(1), [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.004)
    assert estimate(values_P) == found, "the same numbers give the same interval"
    assert estimate(np.append(values_P, NAN)) == found, "a prompt without a value does not count"


def test_intervals_of_little() -> None:
    assert estimate(np.array([NAN, NAN])) is None
    assert estimate(np.array([0.25, NAN])) == Estimate(0.25, None, None)
    assert estimate(np.full(7, 0.5)) == Estimate(0.5, 0.5, 0.5)


@pytest.mark.parametrize("k", [1, 4])
def test_intervals_cover_the_truth_as_often_as_they_say(k: int) -> None:
    """Synthetic counts: prompts of known difficulty, 8 samples each; the truth is the mean of pass@k over prompts."""
    rng, repeats, prompts, n = np.random.default_rng(k), 150, 60, 8
    truth = 1 - np.prod([(3 + i) / (5 + i) for i in range(k)])  # E[1 - (1 - q)^k] for q ~ beta(2, 3)
    covered = 0
    for _ in range(repeats):
        correct = rng.binomial(n, rng.beta(2, 3, prompts))
        found = estimate(pass_at_k(n, correct, k))
        assert found is not None and found.low is not None and found.high is not None
        covered += found.low <= truth <= found.high
    assert 0.88 <= covered / repeats <= 0.99
