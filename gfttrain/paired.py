"""Two models on the same prompts: the difference, how far it may be from the truth, and whether it may be chance.

Reads what `gft eval` left in two folders (samples.py); no torch here, and nothing is sampled. Pairing by prompt takes
out what prompts differ in, so that a smaller difference shows than two separate intervals would.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gftdata.config import recipe_differences
from gftdata.errors import UserError
from gfttrain.estimates import BATCH_ELEMENTS, RESAMPLES, Values, estimate, passes
from gfttrain.results import Estimate, read_results
from gfttrain.samples import benchmark_folder, read_table

# How samples were drawn and judged; two models should be alike in it.
MEASURED_BY = ("reward", "num_samples", "sampling", "max_tokens", "engine")


@dataclass(frozen=True, slots=True)
class Difference:
    """Of a mean over the common prompts that are judged for both: a, b, and a - b."""

    a: float
    b: float
    difference: Estimate  # a - b, with a paired 95 % bootstrap interval over prompts
    p: float  # two-sided, of no difference
    prompts: int


@dataclass(frozen=True, slots=True)
class Paired:
    """Two models on one benchmark."""

    benchmark: str
    common: int  # prompts that both were asked
    only_a: int  # prompts that one of them was asked: not looked at
    only_b: int
    pass_at_1: Difference | None  # p by a sign-flip permutation test; None where no common prompt is judged for both
    greedy: Difference | None  # p by McNemar's exact test; None where one of them has no greedy answers
    measured_otherwise: str  # how the two were sampled and judged differently; empty where they were not


def check_results(folder: Path) -> None:
    """Raise UserError unless the folder has results."""
    if not read_results(folder):
        raise UserError(f"{folder}: has no results of gft eval; name the folder that `out` was, or a run")


def compare_all(a: Path, b: Path, benchmarks: Sequence[str]) -> list[Paired]:
    """Those of the benchmarks that both folders have. Raises UserError as `compare` does, and where there is none."""
    check_results(b)
    there = read_results(b)
    common = [name for name in benchmarks if name in there]
    if not common:
        raise UserError(f"{b}: has none of the benchmarks {', '.join(benchmarks)}; it has: {', '.join(there)}")
    return [compare(a, b, name) for name in common]


def compare(a: Path, b: Path, benchmark: str) -> Paired:
    """The finished samples of a benchmark in folder `a` against those in `b`, prompt by prompt.

    Raises UserError where one of them has none, or they have no prompt in common.
    """
    of_a, of_b = _rewards(a, benchmark), _rewards(b, benchmark)
    common = [prompt for prompt in of_a if prompt in of_b]
    if not common:
        raise UserError(f"{benchmark}: {a} and {b} have no prompt in common, so there is nothing to pair")
    settings = [_settings(folder, benchmark) for folder in (a, b)]
    return Paired(
        benchmark=benchmark,
        common=len(common),
        only_a=len(of_a) - len(common),
        only_b=len(of_b) - len(common),
        pass_at_1=difference_of_means(*(np.array([of[p][0] for p in common]) for of in (of_a, of_b))),
        greedy=difference_of_choices(*(np.array([of[p][1] for p in common]) for of in (of_a, of_b))),
        measured_otherwise=recipe_differences(settings[1], settings[0]),
    )


def difference_of_means(a_P: Values, b_P: Values) -> Difference | None:
    """Of per-prompt means. p: under no difference the sign of each prompt's a - b is a coin's (permutation test).

    Exact where few prompts differ (13 and fewer), else of 9,999 random flips. Prompts without a difference have no sign
    to flip and are left out of the test.
    """
    from scipy.stats import permutation_test

    a_P, b_P = _both(a_P, b_P)
    if not len(a_P):
        return None
    difference = estimate(a_P - b_P)
    assert difference is not None
    moved = (a_P - b_P)[a_P != b_P]
    p = 1.0  # of a single one that moved: it does so by either sign
    if len(moved) > 1:
        p = permutation_test(
            (moved,),
            lambda x, axis: x.sum(axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=max(1, BATCH_ELEMENTS // len(moved)),
            rng=np.random.default_rng(0),
        ).pvalue
    return Difference(float(a_P.mean()), float(b_P.mean()), difference, float(p), len(a_P))


def difference_of_choices(a_P: Values, b_P: Values) -> Difference | None:
    """Of answers that are right (1) or not (0). p: McNemar's exact test on the prompts where only one is right."""
    from scipy.stats import binomtest

    a_P, b_P = _both(a_P, b_P)
    if not len(a_P):
        return None
    difference = estimate(a_P - b_P)
    assert difference is not None
    only_a, only_b = int((a_P > b_P).sum()), int((a_P < b_P).sum())
    p = float(binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0
    return Difference(float(a_P.mean()), float(b_P.mean()), difference, p, len(a_P))


def _both(a_P: Values, b_P: Values) -> tuple[Values, Values]:
    """The prompts that have a value in both."""
    there = np.isfinite(a_P) & np.isfinite(b_P)
    return a_P[there], b_P[there]


def _rewards(folder: Path, benchmark: str) -> dict[str, tuple[float, float]]:
    """prompt id -> (pass@1, whether the greedy answer is right), NaN where that is not known."""
    table = read_table(benchmark_folder(folder, benchmark), ["prompt_id", "greedy", "index", "reward"])
    lines = table.to_pylist()
    place = {prompt: row for row, prompt in enumerate(dict.fromkeys(line["prompt_id"] for line in lines))}
    most = 1 + max(line["index"] for line in lines)
    drawn_PN, greedy_P1 = np.full((len(place), most), np.nan), np.full((len(place), 1), np.nan)
    for line in lines:
        if line["reward"] is not None:
            found = greedy_P1 if line["greedy"] else drawn_PN
            found[place[line["prompt_id"]], line["index"]] = line["reward"]
    return dict(zip(place, zip(passes(drawn_PN, 1).tolist(), passes(greedy_P1, 1).tolist(), strict=True), strict=True))


def _settings(folder: Path, benchmark: str) -> dict[str, object]:
    result = read_results(folder).get(benchmark)
    return {} if result is None else {key: result.settings.get(key) for key in MEASURED_BY}
