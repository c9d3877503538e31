"""metrics.jsonl -> what a page draws: every metric as a series, long ones down-sampled without hiding a spike.

What a step reports is metrics.py's and train.py's; which series go into which chart, and the page, are report.py's.

Shapes: N steps at which a metric was reported, B buckets of consecutive ones, W bins of weights.
"""

from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic_core import from_json

from gftdata.errors import UserError
from gftdata.store import read_file

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

WEIGHTS = ("weights_before", "weights_after")
NOT_CURVES = ("step", "epoch")
MAX_COUNT = 2**53


@dataclass(frozen=True, slots=True)
class Series:
    """One metric of one run."""

    steps: Ints  # [N] increasing
    values: Floats  # [N] NaN: reported as null, a gap


@dataclass(frozen=True, slots=True)
class Weights:
    """Histograms of token weights over log2 bins [2^i, 2^(i+1)), the last open."""

    steps: Ints  # [N]
    before: Ints  # [N, W] tokens by 1/pi
    after: Ints  # [N, W] tokens by C/pi


@dataclass(frozen=True, slots=True)
class History:
    """A run's metrics.jsonl."""

    last_step: int  # 0: nothing reported yet
    series: dict[str, Series]
    weights: Weights | None


@dataclass(frozen=True, slots=True)
class Sampled:
    """A series as it is drawn."""

    steps: Ints
    values: Floats  # NaN: a gap
    mean_steps: Ints  # [B] middle of each bucket; empty where every value is there
    means: Floats  # [B] exact mean of the bucket's values; NaN where it has none


def read_history(path: Path) -> History:
    """Read metrics.jsonl; a torn last line is passed over, a file that is not there holds nothing.

    Raises UserError for any other line that is no step of gft train.
    """
    columns: dict[str, tuple[array[int], array[float]]] = {}
    weights: tuple[array[int], list[list[int]], list[list[int]]] = (array("q"), [], [])
    last = -1  # step 0 is the evaluation before training
    for number, line, is_last in _lines(path):
        try:
            report = _report(line, last)
        except ValueError as error:
            if is_last and not line.endswith(b"\n"):
                break
            raise UserError(f"{path}, line {number}: is no step of gft train: {error}; remove the line") from None
        last = report["step"]
        _add(columns, last, report)
        if all(name in report for name in WEIGHTS):
            rows = [report[name] for name in WEIGHTS]
            if not all(isinstance(row, list) and all(_is_count(n) for n in row) for row in rows):
                raise UserError(f"{path}, line {number}: weights_before and weights_after are not counts of tokens")
            weights[0].append(last)
            weights[1].append(rows[0])
            weights[2].append(rows[1])
    series = {
        key: Series(np.array(steps, np.int64), _finite_or_nan(np.array(values, np.float64)))
        for key, (steps, values) in columns.items()
        if key not in NOT_CURVES and steps
    }
    return History(max(0, last), series, _weights(path, *weights))


def _add(columns: "dict[str, tuple[array[int], array[float]]]", step: int, report: dict[str, Any]) -> None:
    """A step's numbers to their columns; a number that no float holds, and null, as NaN."""
    for key, value in report.items():
        if key in columns:
            steps, values = columns[key]
        else:
            steps, values = columns[key] = (array("q"), array("d"))
        if type(value) is float:
            values.append(value)
        elif isinstance(value, int):
            values.append(value if abs(value) <= MAX_COUNT else np.nan)
        elif value is None:
            values.append(np.nan)
        else:
            continue
        steps.append(step)


def _lines(path: Path) -> Any:
    try:
        content = read_file(path)
    except FileNotFoundError:
        return
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        yield number, line, number == len(lines)


def _report(line: bytes, last: int) -> dict[str, Any]:
    found = from_json(line)
    if not isinstance(found, dict) or not _is_count(found.get("step")):
        raise ValueError("expected an object with a step")
    if found["step"] <= last:
        raise ValueError(f"step {found['step']} comes after step {last}")
    return found


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value <= MAX_COUNT


def _finite_or_nan(values_N: Floats) -> Floats:
    return np.where(np.isfinite(values_N), values_N, np.nan)


def _weights(path: Path, steps: "array[int]", before: list[list[int]], after: list[list[int]]) -> Weights | None:
    if not steps:
        return None
    if len({len(row) for row in (*before, *after)}) != 1:
        raise UserError(f"{path}: its histograms of weights have different numbers of bins")
    return Weights(np.array(steps, np.int64), np.array(before, np.int64), np.array(after, np.int64))


def downsample(series: Series, points: int) -> Sampled:
    """At most `points` points (at least 8): all of them, or those that no spike and no gap can hide between.

    Of each of B buckets of consecutive points its lowest, its highest and its first gap are kept, at their own steps,
    and the first and the last point of all.
    """
    steps, values = series.steps, series.values
    size = len(values)
    if points < 8:
        raise ValueError(f"expected at least 8 points, found {points}")
    if size <= points:
        return Sampled(steps, values, np.empty(0, np.int64), np.empty(0))
    is_gap_N = np.isnan(values)
    num_buckets = (points - 2) // (3 if is_gap_N.any() else 2)
    edges = np.linspace(0, size, num_buckets + 1).astype(np.int64)
    starts_B, sizes_B = edges[:-1], np.diff(edges)
    bucket_N = np.repeat(np.arange(num_buckets), sizes_B)
    order_N = np.lexsort((values, bucket_N))  # within a bucket from the lowest to the highest, then gaps
    gaps_B = np.bincount(bucket_N, weights=is_gap_N, minlength=num_buckets).astype(np.int64)
    real_B = sizes_B > gaps_B
    lowest_B, highest_B = order_N[starts_B], order_N[np.maximum(starts_B + sizes_B - gaps_B - 1, starts_B)]
    gap_places = np.flatnonzero(is_gap_N)
    first_gaps = gap_places[np.unique(bucket_N[gap_places], return_index=True)[1]]
    kept = np.unique(np.concatenate([[0, size - 1], lowest_B[real_B], highest_B[real_B], first_gaps]).astype(np.int64))
    sums_B = np.bincount(bucket_N, weights=np.where(is_gap_N, 0.0, values), minlength=num_buckets)
    means_B = np.divide(sums_B, sizes_B - gaps_B, out=np.full(num_buckets, np.nan), where=real_B)
    return Sampled(steps[kept], values[kept], steps[starts_B + sizes_B // 2], means_B)


def sum_weights(weights: Weights, buckets: int) -> Weights:
    """At most so many histograms: each the sum over consecutive steps, at the last of them."""
    size = len(weights.steps)
    edges = np.unique(np.linspace(0, size, min(size, buckets) + 1).astype(np.int64))
    before, after = (np.add.reduceat(rows, edges[:-1], axis=0) for rows in (weights.before, weights.after))
    return Weights(weights.steps[edges[1:] - 1], before, after)
