"""Which metrics a report draws in which chart, with as many points as there is room for.

Series and how they are thinned out are curves.py's.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gfttrain.curves import History, Sampled, Series, downsample, sum_weights
from gfttrain.html_page import to_json

POINTS = (3000, 2000, 1400, 1000, 700, 500, 350, 250, 170, 120, 80, 40)  # of a charted curve; the first that fit
OTHER_POINTS = 4  # times fewer for the metrics that no chart is about
BYTES_A_POINT = 18  # about, with the means: where the search for what fits begins
WEIGHT_BUCKETS = 24  # histograms of weights of one run


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart of training curves; of several metrics one is picked at a time. `name/*` is every metric below it."""

    title: str
    note: str
    metrics: tuple[str, ...]


CHARTS = (
    Chart(
        "Loss",
        "Over all response tokens of a step. Losses of different objectives are on different scales.",
        ("loss",),
    ),
    Chart("Gradient norm", "Before clipping.", ("grad_norm",)),
    Chart("Entropy", "Of the model at the stored responses' tokens, nats a token.", ("entropy", "entropy/*")),
    Chart(
        "KL and log-ratio by source",
        "Nats a token. On stored responses the mean of log π - log π_ref is a log-ratio; on self samples drawn at "
        "temperature 1 its negative estimates KL(π_ref ‖ π).",
        ("kl_ref_to_model", "log_ratio/*"),
    ),
    Chart(
        "Rectified fraction",
        "Share of tokens with π < τ, whose coefficient is π. Of objectives with a clipped ratio: the clipped share.",
        ("rectified_fraction", "rectified_fraction/*", "clipped_fraction"),
    ),
    Chart(
        "Staleness",
        "Share of tokens of self samples whose π / π_ref has left 0.8 to 1.25.",
        ("stale_fraction",),
    ),
    Chart(
        "Reward mix",
        "Of the groups of a step, by source. It is in the data: runs over the same groups show the same.",
        ("data/reward/*", "data/pass_rate/*", "data/groups_with_signal"),
    ),
    Chart("Tokens per second", "Response tokens that went through the model.", ("tokens_per_second",)),
    Chart("Evaluation during training", "As configured in the run.", ("eval/pass@1", "eval/*")),
)
OTHERS = Chart("Other metrics", "Everything else that the runs recorded.", ())
FIRST_SOURCES = ("self", "expert")


def _present(histories: Sequence[History]) -> list[dict[str, Any]]:
    """The charts that have something to show, with the metrics to pick from, and `other`: what no chart is about."""
    names = dict.fromkeys(name for history in histories for name in history.series)
    charts, taken = [], set()
    for chart in CHARTS:
        metrics = list(dict.fromkeys(name for pattern in chart.metrics for name in _matching(names, pattern)))
        taken |= set(metrics)
        charts.append({"title": chart.title, "note": chart.note, "metrics": metrics, "other": False})
    others = sorted(name for name in names if name not in taken)
    charts.append({"title": OTHERS.title, "note": OTHERS.note, "metrics": others, "other": True})
    return [chart for chart in charts if chart["metrics"]]


def _matching(names: Iterable[str], pattern: str) -> list[str]:
    if not pattern.endswith("*"):
        return [name for name in names if name == pattern]
    found = sorted(name for name in names if name.startswith(pattern[:-1]))
    first = [f"{pattern[:-1]}{source}" for source in FIRST_SOURCES]
    return [name for name in first if name in found] + [name for name in found if name not in first]


def fit_curves(histories: Sequence[History], room: int) -> dict[str, Any]:
    """Curves with as many points as `room` bytes hold; `points`: how many a long one has, 0 where none was cut."""
    charts = _present(histories)
    others = {name for chart in charts if chart["other"] for name in chart["metrics"]}
    tables = [{name: _table(series) for name, series in history.series.items()} for history in histories]
    sizes = [(len(s.steps), name in others) for history in histories for name, s in history.series.items()]
    for points in POINTS:
        limits = {True: max(8, points // OTHER_POINTS), False: points}
        if points != POINTS[-1] and sum(min(n, limits[other]) for n, other in sizes) * BYTES_A_POINT > 1.2 * room:
            continue
        curves = [
            {
                name: _curve(downsample(series, limits[name in others])) | {"table": table[name]}
                for name, series in history.series.items()
            }
            for history, table in zip(histories, tables, strict=True)
        ]
        cut = any(n > limits[other] for n, other in sizes)
        made = {"charts": charts, "series": curves, "points": points if cut else 0}
        if len(to_json(made)) <= room:
            break
    return made


def _table(series: Series) -> dict[str, Any]:
    """What the table under a chart says of a curve: of all its steps, with all digits."""
    real = np.flatnonzero(np.isfinite(series.values))
    table: dict[str, Any] = {"count": len(series.steps), "gaps": len(series.steps) - len(real)}
    if len(real):
        values = series.values[real]
        for name, place in (("first", 0), ("last", -1), ("lowest", values.argmin()), ("highest", values.argmax())):
            table[name] = [int(series.steps[real[place]]), float(values[place])]
    return table


def _curve(sampled: Sampled) -> dict[str, Any]:
    """Steps are differences, values have six digits."""
    curve: dict[str, Any] = {"x": _differences(sampled.steps), "y": _rounded(sampled.values)}
    if len(sampled.means):
        curve |= {"mx": _differences(sampled.mean_steps), "my": _rounded(sampled.means)}
    return curve


def _differences(steps: npt.NDArray[np.int64]) -> list[int]:
    differences: list[int] = np.diff(steps, prepend=0).tolist()
    return differences


def _rounded(values: npt.NDArray[np.float64]) -> list[float | None]:
    return [None if value != value else float(f"{value:.6g}") for value in values.tolist()]


def weights_data(history: History) -> dict[str, Any] | None:
    """A run's histograms of weights, summed over stretches of steps; None where it has none."""
    if history.weights is None:
        return None
    summed = sum_weights(history.weights, WEIGHT_BUCKETS)
    return {"steps": summed.steps.tolist(), "before": summed.before.tolist(), "after": summed.after.tolist()}
