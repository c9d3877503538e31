"""Group advantages, against hand-computed cases, a naive loop and the authors' formula in torch."""

import math
import statistics

import numpy as np
import pytest
import torch

from gfttrain.advantage import EPS, group_advantages, segment_advantages


def naive(rewards: list[float | None], used: list[bool] | None = None) -> list[float]:
    """METHOD.md section 2, word by word, with Python's own statistics."""
    used = used or [True] * len(rewards)
    counted = [r for r, u in zip(rewards, used, strict=True) if u and r is not None]
    result = []
    for reward, use in zip(rewards, used, strict=True):
        if reward is None or not use:
            result.append(0.0)
        elif len(rewards) == 1:
            result.append(reward)
        elif len(counted) < 2 or max(counted) == min(counted):
            result.append(0.0)
        else:
            result.append((reward - statistics.fmean(counted)) / (statistics.stdev(counted) + 1e-6))
    return result


def test_eps_is_the_authors() -> None:
    assert EPS == 1e-6


def test_one_right_of_four() -> None:
    # mean 1/4, unbiased variance (9/16 + 3/16) / 3 = 1/4
    expected = [0.75 / (0.5 + 1e-6), *[-0.25 / (0.5 + 1e-6)] * 3]
    np.testing.assert_allclose(group_advantages([1.0, 0.0, 0.0, 0.0]), expected, rtol=1e-12)


def test_one_wrong_of_eight() -> None:
    # mean 7/8, unbiased variance (7/64 + 49/64) / 7 = 1/8
    found = group_advantages([1.0] * 7 + [0.0])
    np.testing.assert_allclose(found[7], -0.875 / (math.sqrt(0.125) + 1e-6), rtol=1e-12)
    assert round(float(found[7]), 2) == -2.47
    np.testing.assert_allclose(found[:7], 0.125 / (math.sqrt(0.125) + 1e-6), rtol=1e-12)


@pytest.mark.parametrize("reward", [1.0, 0.0, -3.5, 0.25])
def test_a_group_of_one_has_its_reward_as_advantage(reward: float) -> None:
    assert group_advantages([reward]).tolist() == [reward]


def test_a_group_of_one_without_judgement_has_none() -> None:
    assert group_advantages([None]).tolist() == [0.0]


@pytest.mark.parametrize("size", [2, 7, 10])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, np.float32(0.1), 1e-8, 1e6])
def test_equal_rewards_have_no_advantage(reward: float, size: int) -> None:
    assert group_advantages([float(reward)] * size).tolist() == [0.0] * size


def test_equal_float32_rewards_would_fool_the_standard_deviation() -> None:
    # the case METHOD.md names: computed as the authors do, in float32, the deviation is not zero
    rewards = torch.full((7,), 0.1)
    assert rewards.std() != 0
    assert group_advantages(rewards.numpy()).tolist() == [0.0] * 7


@pytest.mark.parametrize("null", [None, math.nan])
def test_a_null_reward_is_left_out_of_the_statistics(null: float | None) -> None:
    with_null = group_advantages([1.0, null, 0.0, 0.0, 0.0])
    assert with_null[1] == 0.0
    np.testing.assert_array_equal(np.delete(with_null, 1), group_advantages([1.0, 0.0, 0.0, 0.0]))


@pytest.mark.parametrize("rewards", [[1.0, None], [None, None], [None, 1.0, None, None]])
def test_a_larger_group_with_fewer_than_two_judged_is_not_a_group_of_one(rewards: list[float | None]) -> None:
    assert group_advantages(rewards).tolist() == [0.0] * len(rewards)


def test_unused_responses_are_left_out_first() -> None:
    found = group_advantages([1.0, 1.0, 0.0, 0.0, 5.0], used=[True, True, True, True, False])
    assert found[4] == 0.0
    np.testing.assert_array_equal(found[:4], group_advantages([1.0, 1.0, 0.0, 0.0]))
    assert group_advantages([1.0, 0.0], used=[True, False]).tolist() == [0.0, 0.0]
    assert group_advantages([1.0], used=[False]).tolist() == [0.0]


def test_an_empty_group_is_empty() -> None:
    assert group_advantages([]).shape == (0,)


def test_advantages_of_a_group_sum_to_zero_and_ignore_a_shift() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        rewards = rng.normal(size=8)
        found = group_advantages(rewards)
        assert abs(found.sum()) < 1e-12
        np.testing.assert_allclose(group_advantages(rewards + 3.0), found, atol=1e-9)
        order = rng.permutation(8)
        np.testing.assert_allclose(group_advantages(rewards[order]), found[order], atol=1e-12)


def test_equals_the_authors_formula_in_torch() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        rewards = torch.from_numpy(rng.integers(0, 2, rng.integers(2, 12)).astype(np.float64))
        if rewards.min() == rewards.max():
            continue
        expected = (rewards - rewards.mean()) / (torch.std(rewards) + 1e-6)
        np.testing.assert_allclose(group_advantages(rewards.numpy()), expected.numpy(), rtol=1e-12)
        as_float32 = rewards.float()
        single = (as_float32 - as_float32.mean()) / (torch.std(as_float32) + 1e-6)
        np.testing.assert_allclose(group_advantages(as_float32.numpy()), single.numpy(), rtol=2e-6, atol=1e-6)


def test_segments_equal_a_naive_loop() -> None:
    rng = np.random.default_rng(2)
    kinds = [lambda: float(rng.integers(2)), lambda: float(np.float32(0.1)), lambda: float(rng.normal()), lambda: None]
    groups = [
        [kinds[rng.choice(4, p=[0.6, 0.1, 0.1, 0.2])]() for _ in range(rng.choice([0, 1, 2, 3, 8]))] for _ in range(400)
    ]
    assert any(not group for group in groups) and groups[0] is not None
    groups = [[], *groups, []]  # empty ones at both ends too
    offsets = np.concatenate([[0], np.cumsum([len(group) for group in groups])]).astype(np.int64)
    flat = np.array([np.nan if r is None else r for group in groups for r in group])
    used = rng.random(len(flat)) < 0.8
    expected = [naive(g, used[a:b].tolist()) for g, a, b in zip(groups, offsets[:-1], offsets[1:], strict=True)]
    np.testing.assert_allclose(
        segment_advantages(flat, offsets, used), [a for group in expected for a in group], rtol=1e-11, atol=1e-13
    )
    everything = [a for group in groups for a in naive(group)]
    np.testing.assert_allclose(segment_advantages(flat, offsets), everything, rtol=1e-11, atol=1e-13)
    one_by_one = [a for group in groups for a in group_advantages(group)]
    np.testing.assert_allclose(segment_advantages(flat, offsets), one_by_one, rtol=1e-12, atol=1e-14)
