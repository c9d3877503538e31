"""Numbers from verdicts: pass@k, and how far a mean over prompts may be from the truth. Pure, no torch.

Shapes: P prompts, N samples of each. What could not be judged is NaN.
"""

import numpy as np
import numpy.typing as npt

from gfttrain.results import Estimate

Values = npt.NDArray[np.float64]

RESAMPLES = 9999
CONFIDENCE = 0.95
BATCH_ELEMENTS = 2**22  # of prompts drawn again at a time: 32 MiB


def pass_at_k(num_samples: npt.ArrayLike, num_correct: npt.ArrayLike, k: int) -> Values:
    """1 - C(n-c, k) / C(n, k) of each prompt: the chance that k of its n samples, c of them right, hold a right one.

    The unbiased estimator of Chen et al., arXiv:2107.03374, eq. 1, as a product so that nothing overflows. NaN where a
    prompt has fewer than k samples.
    """
    n, c = np.broadcast_arrays(np.asarray(num_samples, np.float64), np.asarray(num_correct, np.float64))
    failing = np.ones(n.shape)
    for i in range(k):
        failing *= np.clip((n - c - i) / np.maximum(n - i, 1.0), 0.0, None)
    return np.where(n >= k, 1.0 - failing, np.nan)


def passes(rewards_PN: Values, k: int) -> Values:
    """`pass_at_k` of each prompt [P] from its rewards; a sample is right at reward 1."""
    return pass_at_k(np.isfinite(rewards_PN).sum(1), (rewards_PN == 1.0).sum(1), k)


def mean_rewards(rewards_PN: Values) -> Values:
    """The mean over a prompt's judged samples [P]; NaN where it has none."""
    judged_P = np.isfinite(rewards_PN).sum(1)
    return np.where(judged_P > 0, np.nansum(rewards_PN, axis=1) / np.maximum(judged_P, 1), np.nan)


def standard_error(found: Estimate) -> float | None:
    """Of an estimate, from its 95 % interval; None where it has none."""
    return None if found.low is None or found.high is None else (found.high - found.low) / (2 * 1.96)


def estimate(values_P: Values) -> Estimate | None:
    """The mean over the prompts that have a value, with its bootstrap interval; None where none has one.

    The percentile bootstrap (Efron 1979) over prompts: 95 %, 9,999 resamples, always the same ones for a number of
    prompts. Where all values are equal the interval has no width.
    """
    from scipy.stats import bootstrap

    found = values_P[np.isfinite(values_P)]
    if not len(found):
        return None
    mean = float(found.mean())
    if len(found) == 1:
        return Estimate(mean, None, None)
    if (found == found[0]).all():
        return Estimate(mean, mean, mean)
    interval = bootstrap(
        (found,),
        np.mean,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, BATCH_ELEMENTS // len(found)),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high))
