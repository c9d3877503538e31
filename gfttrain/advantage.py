"""Group Advantage Learning (arXiv:2604.14258): rewards of a group -> advantages. Pure, numpy, float64.

Shapes: R responses, G groups.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

EPS = 1e-6  # the authors' code

Floats = npt.NDArray[np.float64]


def group_advantages(rewards: Sequence[float | None] | npt.ArrayLike, used: Sequence[bool] | None = None) -> Floats:
    """Advantages of one group: A_k = (R_k - mean(R)) / (std(R) + eps), with the unbiased std (divisor K-1).

    `rewards` [K]: None or NaN where a response could not be judged; `used` [K]: False where the objective leaves its
    source out. Both are left out of the statistics and get A = 0. A group of one gets A = R. A group whose rewards are
    all equal gets A = 0, and so does a larger one with fewer than two judged responses left.
    """
    values = np.array([np.nan if r is None else r for r in np.asarray(rewards, dtype=object)], dtype=np.float64)
    return segment_advantages(values, np.array([0, len(values)]), None if used is None else np.asarray(used, bool))


def segment_advantages(
    rewards_R: npt.ArrayLike, offsets: npt.NDArray[np.int64], used_R: npt.NDArray[np.bool_] | None = None
) -> Floats:
    """`group_advantages` of many groups at once: group g is rewards_R[offsets[g]:offsets[g+1]]. Returns [R]."""
    rewards = np.asarray(rewards_R, dtype=np.float64)
    sizes_G = np.diff(offsets)
    num_groups = len(sizes_G)
    group_R = np.repeat(np.arange(num_groups), sizes_G)
    counted_R = np.isfinite(rewards) if used_R is None else np.isfinite(rewards) & used_R
    group_C, values_C = group_R[counted_R], rewards[counted_R]  # C: counted responses

    counts_G = np.bincount(group_C, minlength=num_groups)
    means_G = np.bincount(group_C, weights=values_C, minlength=num_groups) / np.maximum(counts_G, 1)
    centred_C = values_C - means_G[group_C]
    squares_G = np.bincount(group_C, weights=centred_C**2, minlength=num_groups)
    stds_G = np.sqrt(squares_G / np.maximum(counts_G - 1, 1))
    # min == max decides: the standard deviation of equal rewards need not be exactly zero in floating point
    lowest_G, highest_G = np.full(num_groups, np.inf), np.full(num_groups, -np.inf)
    np.minimum.at(lowest_G, group_C, values_C)
    np.maximum.at(highest_G, group_C, values_C)
    zero_G = (counts_G < 2) | (lowest_G == highest_G)

    advantages_C = np.where(zero_G[group_C], 0.0, centred_C / (stds_G[group_C] + EPS))
    advantages_C = np.where(sizes_G[group_C] == 1, values_C, advantages_C)
    advantages_R = np.zeros(len(rewards))
    advantages_R[counted_R] = advantages_C
    return advantages_R
