"""The rule that ends a run which gets worse, and that the trainer obeys it: saved, explained, off when told so."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_helpers import DEMO, train_settings

from gfttrain import watch
from gfttrain.curves import Series, read_history
from gfttrain.runs import FINAL, METRICS
from gfttrain.train import Diverged, train
from gfttrain.watch import Evaluation, divergence, evaluations


def seen(*passes: float, error: float = 0.02) -> list[Evaluation]:
    return [Evaluation(8 * n, value, error, 0.2 + n / 10, 12.0 + n) for n, value in enumerate(passes)]


def test_better_and_equal_go_on() -> None:
    assert divergence([]) == divergence(seen(0.5)) == ""
    assert divergence(seen(0.5, 0.5, 0.5, 0.5)) == divergence(seen(0.5, 0.6, 0.7, 0.8)) == ""


def test_worse_once_goes_on_and_in_a_row_does_not() -> None:
    drop = 1.1 * watch.DROP * 0.02 * 2**0.5
    low = 0.5 - drop
    for count in range(1, watch.PATIENCE):
        assert divergence(seen(0.5, *[low] * count)) == ""
    why = divergence(seen(0.5, 0.5, *[low] * watch.PATIENCE))
    assert why.startswith("training makes this model worse: after steps 0 -> ")
    assert f"pass@1 0.500 -> {low:.3f}" in why and "entropy 0.200 -> " in why and "tokens a sample 12.0 -> " in why
    assert divergence(seen(0.5, *[low] * watch.PATIENCE, 0.5)) == "", "it has come back"
    assert divergence(seen(0.5, low, 0.5, low, 0.5)) == ""


def test_the_threshold_is_in_standard_errors_of_the_difference() -> None:
    for error in (0.001, 0.01, 0.05):
        edge = watch.DROP * error * 2**0.5
        above, below = 0.5 - 0.99 * edge, 0.5 - 1.01 * edge
        assert divergence(seen(0.5, *[above] * watch.PATIENCE, error=error)) == ""
        assert divergence(seen(0.5, *[below] * watch.PATIENCE, error=error)) != ""


def test_noise_alone_seldom_ends_a_run() -> None:
    """With 512 samples of a model that stays as it is; 8 evaluations a run."""
    rng, stopped = random.Random(0), 0
    for _ in range(2000):
        passes = [sum(rng.random() < 0.5 for _ in range(64)) / 64 for _ in range(9)]
        history = seen(*passes, error=(0.25 / 64) ** 0.5)
        stopped += any(divergence(history[:count]) for count in range(1, 10))
    assert stopped < 20


def test_without_a_start_nothing_is_said() -> None:
    """A run of a version that did not evaluate before the first step."""
    assert divergence(seen(0.9, 0.1, 0.1, 0.1)[1:]) == ""


def test_evaluations_are_read_from_the_metrics() -> None:
    def of(*values: float) -> Series:
        return Series(np.arange(len(values), dtype=np.int64) * 8, np.array(values))

    series = {"eval/pass@1": of(0.5, 0.4), "eval/pass@1_se": of(0.01, 0.02), "eval/mean_tokens": of(9.0, 8.0)}
    assert evaluations(series) == [Evaluation(0, 0.5, 0.01, None, 9.0), Evaluation(8, 0.4, 0.02, None, 8.0)]
    series["eval/entropy"] = of(0.3, 0.2)
    assert [one.entropy for one in evaluations(series)] == [0.3, 0.2]
    series["eval/pass@1_se"] = of(0.01, np.nan)
    assert [one.step for one in evaluations(series)] == [0]
    assert evaluations({}) == []


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


def test_a_run_that_gets_worse_is_saved_and_told(data: Path, tmp_path: Path) -> None:
    block = {
        "every_steps": 1,
        "num_samples": 4,
        "max_tokens": 32,
        "sampling": {"temperature": 1.0},
        "prompts": {"path": str(DEMO / "eval.jsonl"), "limit": 24, "columns": {"ground_truth": "answer"}},
        "reward": {"name": "numeric", "workers": 1},
        "engine": {"device": "cpu"},
    }
    out = tmp_path / "run"
    ruinous = {"optim": {"lr": 0.05}, "max_steps": 5, "checkpoint": {"every_steps": 100}}
    with pytest.raises(
        Diverged, match=r"stopped after step \d of 5, and saved: training makes .*stop_when_worse=false"
    ):
        train(train_settings(data, out, evaluation=block, **ruinous))
    told = lines(out)
    assert [line["step"] for line in told] == list(range(len(told))) and len(told) == watch.PATIENCE + 1
    assert told[0].keys() == {"step", "epoch"} | {k for k in told[1] if k.startswith("eval/")}
    assert told[0]["eval/pass@1"] > 0.3 > told[-1]["eval/pass@1"] and told[0]["eval/entropy"] > 0
    assert not (out / FINAL).exists() and (out / f"checkpoints/step-{watch.PATIENCE:08d}").is_dir()
    # the same command says it again, and trains no step more
    with pytest.raises(Diverged, match="stop_when_worse=false"):
        train(train_settings(data, out, evaluation=block, **ruinous))
    assert lines(out) == told
    # off: the same run goes on to its end, and has what one has that nothing watched
    train(train_settings(data, out, evaluation={**block, "stop_when_worse": False}, **ruinous))
    unwatched = tmp_path / "unwatched"
    train(train_settings(data, unwatched, **ruinous))
    finals = [(folder / FINAL / "model.safetensors").read_bytes() for folder in (out, unwatched)]
    assert finals[0] == finals[1]
    assert [line["step"] for line in lines(out)] == list(range(6))
    assert read_history(out / METRICS).last_step == 5


def test_begun_anew_step_0_is_told_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the first checkpoint, the run begins anew, and its metrics too."""
    block = {
        "every_steps": 1,
        "num_samples": 1,
        "max_tokens": 8,
        "prompts": {"path": str(DEMO / "eval.jsonl"), "limit": 2, "columns": {"ground_truth": "answer"}},
        "reward": {"name": "numeric", "workers": 1},
        "engine": {"device": "cpu"},
    }
    config = train_settings(data, tmp_path / "run", evaluation=block, max_steps=2, checkpoint={"every_steps": 100})

    def stop(event: Any) -> None:
        if event.kind == "step":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, stop)
    assert [line["step"] for line in lines(tmp_path / "run")] == [0, 1]
    train(config)
    assert [line["step"] for line in lines(tmp_path / "run")] == [0, 1, 2]
