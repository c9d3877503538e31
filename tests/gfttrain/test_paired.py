"""Two models prompt by prompt: against enumeration and closed forms, under no difference, and under a known one."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gftdata.errors import UserError
from gftdata.types import Message, Prompt, Verdict
from gfttrain.estimates import Values
from gfttrain.paired import Difference, compare, compare_all, difference_of_choices, difference_of_means
from gfttrain.results import Estimate, Result, append_result
from gfttrain.samples import Judged, benchmark_folder, write_samples

NAN = math.nan


def found(difference: Difference | None) -> Difference:
    assert difference is not None
    return difference


# the statistics


def test_the_permutation_test_is_the_enumeration_of_all_signs() -> None:
    rng = np.random.default_rng(0)
    a_P, b_P = rng.integers(0, 9, 11) / 8, rng.integers(0, 9, 11) / 8
    d_P = a_P - b_P
    sums = np.array([np.dot(signs, d_P) for signs in itertools.product((-1, 1), repeat=11)])
    expected = (np.abs(sums) >= abs(d_P.sum()) - 1e-9).mean()
    assert 0.01 < expected < 0.99
    difference = found(difference_of_means(a_P, b_P))
    assert difference.p == pytest.approx(expected)
    assert (difference.a, difference.b) == (a_P.mean(), b_P.mean())
    assert difference.difference.value == pytest.approx(d_P.mean())


def test_the_interval_is_that_of_resampled_differences() -> None:
    rng = np.random.default_rng(3)
    b_P = rng.beta(1, 1, 50)
    a_P = np.clip(b_P + rng.normal(0.02, 0.05, 50), 0, 1)  # prompts differ far more than models
    interval = found(difference_of_means(a_P, b_P)).difference
    picks = rng.integers(0, 50, (20_000, 50))
    low, high = np.quantile((a_P - b_P)[picks].mean(1), [0.025, 0.975])
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.002)


def test_mcnemar_is_the_binomial_of_the_prompts_that_only_one_gets_right() -> None:
    for only_a, only_b in ((0, 5), (3, 9), (6, 6), (1, 0)):
        a_P = np.array([1.0] * only_a + [0.0] * only_b + [1.0] * 7 + [0.0] * 4)
        b_P = np.array([0.0] * only_a + [1.0] * only_b + [1.0] * 7 + [0.0] * 4)
        n, few = only_a + only_b, min(only_a, only_b)
        expected = min(1.0, 2 * sum(math.comb(n, i) for i in range(few + 1)) / 2**n)
        difference = found(difference_of_choices(a_P, b_P))
        assert difference.p == pytest.approx(expected)
        assert difference.difference.value == pytest.approx((only_a - only_b) / len(a_P))


def test_without_a_difference_there_is_nothing_to_find() -> None:
    same_P = np.array([0.0, 0.5, 1.0, 1.0])
    for test in (difference_of_means, difference_of_choices):
        difference = found(test(same_P, same_P))
        assert difference.p == 1.0 and difference.difference == Estimate(0.0, 0.0, 0.0)
    assert found(difference_of_means(np.array([1.0, 0.5]), np.array([0.5, 0.5]))).p == 1.0, "one prompt moved"


def pass_rates(rng: np.random.Generator, difficulty_P: Values) -> Values:
    return rng.binomial(8, difficulty_P) / 8


def test_equal_models_give_every_p_equally_often() -> None:
    rng, ps, covered = np.random.default_rng(5), [], 0
    for _ in range(120):
        difficulty_P = rng.beta(1, 1, 24)
        difference = found(difference_of_means(pass_rates(rng, difficulty_P), pass_rates(rng, difficulty_P)))
        ps.append(difference.p)
        interval = difference.difference
        assert interval.low is not None and interval.high is not None
        covered += interval.low <= 0 <= interval.high
    assert 0.4 < np.mean(ps) < 0.6
    assert np.mean(np.array(ps) <= 0.1) < 0.2
    assert 0.15 < np.mean(np.array(ps) <= 0.3) < 0.45
    assert 0.85 <= covered / 120 <= 0.99


def test_a_known_shift_is_found() -> None:
    rng = np.random.default_rng(6)
    difficulty_P = rng.beta(1, 1, 200)
    better_P = np.clip(difficulty_P + 0.08, 0, 1)
    difference = found(difference_of_means(pass_rates(rng, better_P), pass_rates(rng, difficulty_P)))
    interval = difference.difference
    assert interval.low is not None and interval.high is not None
    assert difference.p < 0.001 and interval.low < (better_P - difficulty_P).mean() < interval.high
    assert difference.difference.value > 0, "a - b, where a is the better one"
    back = found(difference_of_means(pass_rates(rng, difficulty_P), pass_rates(rng, better_P)))
    assert back.difference.value < 0


def test_prompts_that_one_was_not_judged_on_are_left_out() -> None:
    difference = found(difference_of_means(np.array([1.0, NAN, 0.5]), np.array([0.0, 1.0, NAN])))
    assert (difference.prompts, difference.a, difference.b) == (1, 1.0, 0.0)
    assert difference_of_means(np.array([NAN]), np.array([1.0])) is None
    assert difference_of_choices(np.array([NAN]), np.array([NAN])) is None


# two folders

RESULT = Result(
    benchmark="sums",
    model="m",
    revision="r",
    finished_at="2026-01-01T00:00:00+00:00",
    prompts=1,
    prompts_too_long=0,
    samples_per_prompt=2,
    unjudged_samples=0,
    truncated_samples=0,
    mean_tokens=1.0,
    mean_reward=Estimate(0.0, None, None),
    pass_at={1: Estimate(0.0, None, None)},
    greedy=None,
    entropy=None,
    kl=None,
    settings={"num_samples": 2, "max_tokens": 8, "seed": 0, "prompts_sha256": "x"},
)


def leave(
    folder: Path, rewards: dict[str, list[float | None]], greedy: dict[str, float] | None = None, **settings: Any
) -> Path:
    """Results as `gft eval` leaves them: prompt -> rewards of its samples."""
    prompts = [Prompt(p, None, (Message("user", p),), "1", "", (), "{}", p) for p in rewards]
    samples = []
    for row, prompt in enumerate(rewards):
        asked = [(False, k, reward) for k, reward in enumerate(rewards[prompt])]
        asked += [(True, 0, greedy[prompt])] if greedy else []
        for is_greedy, k, reward in asked:
            verdict = Verdict(reward, "ok" if reward is not None else "timeout")
            samples.append(Judged(row, k, is_greedy, "t", 1, "stop", verdict, None, -1.0, None))
    write_samples(benchmark_folder(folder, "sums"), prompts, samples)
    append_result(folder, replace(RESULT, settings=RESULT.settings | settings))
    return folder


def test_prompts_are_paired_by_their_id_and_the_others_counted(tmp_path: Path) -> None:
    a = leave(tmp_path / "a", {"x": [1.0, 1.0], "y": [1.0, None], "z": [None, None], "only": [0.0, 0.0]})
    b = leave(tmp_path / "b", {"z": [1.0, 1.0], "y": [0.0, 1.0], "x": [0.0, 0.5]})
    paired = compare(a, b, "sums")
    assert (paired.benchmark, paired.common, paired.only_a, paired.only_b) == ("sums", 3, 1, 0)
    difference = found(paired.pass_at_1)
    assert (difference.a, difference.b, difference.prompts) == (1.0, 0.25, 2)  # z is not judged for a; 0.5 is not right
    assert paired.greedy is None and paired.measured_otherwise == ""


def test_greedy_answers_are_paired_too(tmp_path: Path) -> None:
    a = leave(tmp_path / "a", {"x": [1.0], "y": [1.0]}, {"x": 1.0, "y": 1.0}, seed=3)
    b = leave(tmp_path / "b", {"x": [1.0], "y": [1.0]}, {"y": 0.0, "x": 1.0}, max_tokens=16)
    paired = compare(a, b, "sums")
    greedy = found(paired.greedy)
    assert (greedy.a, greedy.b, greedy.p, greedy.prompts) == (1.0, 0.5, 1.0, 2)
    assert paired.measured_otherwise == "`max_tokens` was 16 and is now 8"


def test_what_cannot_be_paired_is_said(tmp_path: Path) -> None:
    a = leave(tmp_path / "a", {"x": [1.0]})
    b = leave(tmp_path / "b", {"other": [1.0]})
    with pytest.raises(UserError, match="have no prompt in common"):
        compare(a, b, "sums")
    with pytest.raises(UserError, match="has none of the benchmarks gsm8k; it has: sums"):
        compare_all(a, b, ["gsm8k"])
    with pytest.raises(UserError, match="has no results of gft eval"):
        compare_all(a, tmp_path / "nowhere", ["sums"])
    (benchmark_folder(b, "sums") / "samples.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"samples\.parquet: cannot be read"):
        compare(a, b, "sums")
    (benchmark_folder(b, "sums") / "samples.parquet").unlink()
    with pytest.raises(UserError, match=r"samples\.parquet: no such file; a finished `gft eval`"):
        compare_all(a, b, ["sums"])
