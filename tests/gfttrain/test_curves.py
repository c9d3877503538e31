"""Reading metrics.jsonl, and down-sampling that hides nothing."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gftdata.errors import UserError
from gfttrain.charts import CHARTS, fit_curves
from gfttrain.curves import History, Series, Weights, downsample, read_history, sum_weights
from gfttrain.metrics import STALE_RATIOS, append_line


def series_of(values: np.ndarray, gaps: np.ndarray | None = None) -> Series:
    values = values.astype(np.float64)
    if gaps is not None:
        values = np.where(gaps, np.nan, values)
    return Series(np.arange(1, len(values) + 1) * 3, values)


@given(
    hnp.arrays(np.float64, st.integers(1, 400), elements=st.floats(-1e6, 1e6)),
    st.integers(8, 60),
    st.randoms(use_true_random=False),
    st.sampled_from([0.0, 0.1, 0.9, 1.0]),
)
def test_downsampling_keeps_every_extreme_and_every_gap(values, points, random, rate):
    gaps = np.array([random.random() < rate for _ in values], dtype=bool)
    whole = series_of(values, gaps)
    sampled = downsample(whole, points)

    assert len(sampled.steps) == len(sampled.values) <= points
    assert (np.diff(sampled.steps) > 0).all()
    # every point that is there is one of the whole, at its own step
    np.testing.assert_array_equal(whole.values[np.searchsorted(whole.steps, sampled.steps)], sampled.values)
    assert sampled.steps[0] == whole.steps[0] and sampled.steps[-1] == whole.steps[-1]
    if len(whole.values) <= points:
        assert not len(sampled.means)
        return
    edges = np.linspace(0, len(values), len(sampled.means) + 1).astype(int)
    for number, (low, high) in enumerate(pairwise(edges)):
        inside = whole.values[low:high]
        shown = sampled.values[(sampled.steps >= whole.steps[low]) & (sampled.steps <= whole.steps[high - 1])]
        assert np.isnan(inside).any() == np.isnan(shown).any()
        if np.isfinite(inside).any():
            assert np.nanmin(shown) == np.nanmin(inside) and np.nanmax(shown) == np.nanmax(inside)
            assert sampled.means[number] == pytest.approx(np.nanmean(inside), rel=1e-9, abs=1e-9)
        else:
            assert np.isnan(sampled.means[number])


@given(st.integers(0, 9999), st.sampled_from([-1.0, 1.0]), st.integers(8, 500))
def test_one_spike_among_ten_thousand_steps_survives(place, sign, points):
    values = np.sin(np.arange(10_000))
    values[place] = 1e9 * sign
    sampled = downsample(series_of(values), points)
    assert 1e9 * sign in sampled.values
    assert sampled.steps[list(sampled.values).index(1e9 * sign)] == 3 * (place + 1)


def test_the_budget_is_used():
    values = np.random.default_rng(0).normal(size=10_000)
    assert len(downsample(series_of(values), 500).steps) > 450


def test_the_sum_of_histograms_is_kept_in_parts():
    rng = np.random.default_rng(0)
    weights = Weights(np.arange(1, 101), rng.integers(0, 9, (100, 16)), rng.integers(0, 9, (100, 16)))
    summed = sum_weights(weights, 24)
    assert summed.before.shape == (24, 16) and summed.steps[-1] == 100
    np.testing.assert_array_equal(summed.before.sum(0), weights.before.sum(0))
    first = summed.steps[0]
    np.testing.assert_array_equal(summed.after[0], weights.after[:first].sum(0))
    assert sum_weights(
        Weights(*(part[:3] for part in (weights.steps, weights.before, weights.after))), 24
    ).steps.tolist() == [1, 2, 3]


def test_metrics_are_read_as_they_were_written(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_line(
            path,
            {
                "step": step,
                "loss": 0.1 * step,
                "grad_norm": float("nan"),
                "weights_before": [step, 0],
                "weights_after": [0, step],
            },
        )
    append_line(path, {"step": 4, "loss": 1e300, "eval/pass@1": 0.5})
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # torn
    history = read_history(path)
    assert history.last_step == 4
    assert history.series["loss"].values.tolist() == [0.1, 0.2, 0.1 * 3, 1e300]
    assert np.isnan(history.series["grad_norm"].values).all() and len(history.series["grad_norm"].steps) == 3
    assert history.series["eval/pass@1"].steps.tolist() == [4]
    assert history.weights is not None and history.weights.before.tolist() == [[1, 0], [2, 0], [3, 0]]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("not JSON", "line 2: is no step of gft train"),
        ("[]", "expected an object with a step"),
        ('{"step": "2"}', "expected an object with a step"),
        ('{"step": 1}', "step 1 comes after step 1"),
        ('{"step": 2, "weights_before": ["a"], "weights_after": [1]}', "are not counts of tokens"),
        ('{"step": 2, "weights_before": [1, 2], "weights_after": [1]}', "different numbers of bins"),
    ],
)
def test_a_line_that_is_no_step_is_named(tmp_path: Path, line: str, said: str):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "loss": 1.0}) + f"\n{line}\n" + json.dumps({"step": 3}) + "\n")
    with pytest.raises(UserError, match=said):
        read_history(path)


def test_numbers_out_of_all_bounds_are_gaps(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "loss": 1e999, "lr": NaN, "big": {10**400}, "name": "text", "list": [1]}}\n')
    series = read_history(path).series
    assert set(series) == {"loss", "lr", "big"}
    assert all(np.isnan(one.values).all() for one in series.values())


def test_a_file_that_is_not_there_holds_nothing(tmp_path: Path):
    history = read_history(tmp_path / "metrics.jsonl")
    assert history.last_step == 0 and not history.series and history.weights is None


def test_the_page_names_the_range_that_counts_as_fresh():
    low, high = STALE_RATIOS
    assert any(f"{low:g} to {high:g}" in chart.note for chart in CHARTS)


def test_of_evaluations_pass_at_1_is_shown_first():
    names = ("eval/entropy", "eval/mean_tokens", "eval/pass@1", "eval/pass@1_se", "loss")
    history = History(1, {name: series_of(np.ones(1)) for name in names}, None)
    charts = {chart["title"]: chart["metrics"] for chart in fit_curves([history], 10**6)["charts"]}
    shown = charts["Evaluation during training"]
    assert shown == ["eval/pass@1", "eval/entropy", "eval/mean_tokens", "eval/pass@1_se"]
