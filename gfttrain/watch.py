"""Is a run getting worse? A rule over its evaluations during training. Pure.

How often it stops a run that would have ended well, and misses one that did not: samples/study/stopping.py measures it,
benchmarks/STUDY.md says it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gfttrain.curves import Series

PATIENCE = 2  # evaluations in a row
DROP = 3.0  # standard errors of the difference that pass@1 is below what it was before training


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation during training found."""

    step: int  # 0: before the first
    pass_at_1: float
    error: float  # standard error of pass@1, over prompts
    entropy: float | None  # nats a token, of fresh samples; None where they are not drawn of the model itself
    mean_tokens: float


def evaluations(series: Mapping[str, Series]) -> list[Evaluation]:
    """Those in a run's metrics, in order; without those that have no error, as of a single prompt."""

    def by_step(name: str) -> dict[int, float]:
        found = series.get(name)
        return {} if found is None else dict(zip(found.steps.tolist(), found.values.tolist(), strict=True))

    passed, errors, entropy, tokens = (
        by_step(f"eval/{name}") for name in ("pass@1", "pass@1_se", "entropy", "mean_tokens")
    )
    return [
        Evaluation(step, passed[step], errors[step], entropy.get(step), tokens[step])
        for step in passed
        if not any(np.isnan(of.get(step, math.nan)) for of in (passed, errors, tokens))
    ]


def is_worse(start: Evaluation, now: Evaluation) -> bool:
    """Whether pass@1 is below the start's by more than `DROP` standard errors.

    Both are of the same prompts, so the difference is less uncertain than this takes it to be.
    """
    return start.pass_at_1 - now.pass_at_1 > DROP * math.hypot(start.error, now.error)


def divergence(found: Sequence[Evaluation]) -> str:
    """Why a run should stop here: what its last evaluations say; empty where it may go on.

    Worse than before the first step in `PATIENCE` evaluations, the last ones.
    """
    if not found or found[0].step != 0 or len(found) <= PATIENCE:
        return ""
    start, last = found[0], found[-PATIENCE:]
    if not all(is_worse(start, later) for later in last):
        return ""
    parts = [f"pass@1 {_path([e.pass_at_1 for e in (start, *last)], '.3f')}"]
    if start.entropy is not None and all(e.entropy is not None for e in last):
        parts.append(f"entropy {_path([e.entropy or 0.0 for e in (start, *last)], '.3f')} nats a token")
    parts.append(f"tokens a sample {_path([e.mean_tokens for e in (start, *last)], '.1f')}")
    steps = _path([float(e.step) for e in (start, *last)], ".0f")
    return f"training makes this model worse: after steps {steps}: {'; '.join(parts)}"


def _path(values: Sequence[float], form: str) -> str:
    return " -> ".join(format(value, form) for value in values)
