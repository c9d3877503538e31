"""Stopped and started again, a run ends with the same weights, bit by bit. Killed at any moment: `tests/faults`."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import MODEL, train_settings

from gftdata.errors import UserError
from gfttrain import metrics
from gfttrain.config import TrainConfig
from gfttrain.presets import METHODS
from gfttrain.train import Event, train


class Interrupted(Exception):
    pass


def final_weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "final" / "model.safetensors")


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


TIMES = ("seconds", "tokens_per_second", "data_wait_fraction")


def without_times(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines(out)]


def assert_same_run(out: Path, expected: Path) -> None:
    """Weights equal bit by bit, every step once in the metrics, and with the same numbers."""
    found, wanted = final_weights(out), final_weights(expected)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert without_times(out) == without_times(expected)
    assert [line["step"] for line in lines(out)] == list(range(1, len(lines(expected)) + 1))


def train_until(config: TrainConfig, step: int, kind: str = "step") -> None:
    """Train and fall over when `step` is reported."""

    def listener(event: Event) -> None:
        if event.kind == kind and event.step == step:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(config, listener)


COSINE = {"lr": 1e-3, "schedule": "cosine", "warmup_ratio": 0.2}
RUNS: dict[str, dict[str, Any]] = {
    "GFT, cosine": {"optim": COSINE},
    "PSFT": {"objective": {**METHODS["PSFT"].model_dump(), "refresh_every": 5}},
    "padded": {"batch": {"layout": "padded", "micro_batch_tokens": 400}},
}


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runs of 12 steps that were never stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    for name, settings in RUNS.items():
        train(train_settings(data, folder / name, epochs=2, **settings))
    return {name: folder / name for name in RUNS}


# a checkpoint every 2 steps, the old policy refreshed every 5: 8 goes on within a window, at 5 one begins
@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("GFT, cosine", [1, 4, 11]),
        ("PSFT", [5, 8]),
        ("padded", [3]),
    ],
)
def test_interrupted_runs_end_with_the_same_bits(
    name: str, stops: list[int], uninterrupted: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    config = train_settings(data, tmp_path / "run", epochs=2, **RUNS[name])
    print("stopped at", stops)
    for stop in stops:
        train_until(config, stop)
    events: list[Event] = []
    train(config, events.append)
    assert events[0].kind == "start" and events[0].step == (stops[-1] - 1) // 2 * 2  # nothing before is done again
    assert_same_run(tmp_path / "run", uninterrupted[name])


def test_the_learning_rate_goes_on_where_it_was(uninterrupted: dict[str, Path], data: Path, tmp_path: Path) -> None:
    rates = [line["lr"] for line in lines(uninterrupted["GFT, cosine"])]
    assert rates[0] == 0 and max(rates) == 1e-3 and rates[-1] < 0.1e-3
    config = train_settings(data, tmp_path / "run", epochs=2, **RUNS["GFT, cosine"])
    train_until(config, 9)
    seen: list[Event] = []
    train(config, seen.append)
    assert [event.metrics["lr"] for event in seen if event.kind == "step"] == rates[8:]


def test_settings_that_only_change_how_may_change(uninterrupted: dict[str, Path], data: Path, tmp_path: Path) -> None:
    settings = {"epochs": 2, "optim": COSINE}
    train_until(train_settings(data, tmp_path / "run", **settings), 5)
    other = {"batch": {"layout": "packed", "micro_batch_tokens": 300}, "gradient_checkpointing": True}
    train(train_settings(data, tmp_path / "run", **settings, **other, checkpoint={"every_steps": 3, "keep": 1}))
    found, expected = without_times(tmp_path / "run"), without_times(uninterrupted["GFT, cosine"])
    assert [line["step"] for line in found] == list(range(1, 13))
    for line, wanted in zip(found, expected, strict=True):
        assert line["loss"] == pytest.approx(wanted["loss"], rel=1e-2, abs=1e-4)


def test_a_model_that_has_dropout_trains_without(data: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.2}))
    train(train_settings(data, tmp_path / "run", model=str(model), max_steps=1))
    assert abs(lines(tmp_path / "run")[0]["log_ratio/self"]) < 1e-5


def test_changed_data_is_refused_on_resume(data: Path, unjudged_data: Path, tmp_path: Path) -> None:
    moving = tmp_path / "data"
    shutil.copytree(data, moving)
    config = train_settings(moving, tmp_path / "run", unjudged_groups="skip")
    train_until(config, 3)
    shutil.rmtree(moving)
    shutil.copytree(unjudged_data, moving)
    with pytest.raises(UserError, match="was saved on other data"):
        train(config)
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3]


def test_metrics_are_cut_back_to_a_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics.cut_back(path, 3)
    assert not path.exists()
    for step in range(1, 6):
        metrics.append_line(path, {"step": step, "loss": float("nan") if step == 2 else 0.5})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')  # torn
    metrics.cut_back(path, 3)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": None},
        {"step": 3, "loss": 0.5},
    ]
    metrics.cut_back(path, 0)
    assert path.read_text() == ""


@pytest.mark.parametrize("line", [b'{"loss": 1}', b"[]", b'{"step": "1"}', b"\xff", b'{"st', b"", b'{"step": null}'])
def test_a_damaged_line_of_metrics_is_named_and_a_torn_last_one_dropped(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n{"ste')
    with pytest.raises(UserError, match=r"metrics.jsonl: line 2 is damaged: .*remove that line"):
        metrics.cut_back(path, 1)
    path.write_bytes(b'{"step": 1}\n{"ste')
    metrics.cut_back(path, 1)
    assert path.read_bytes() == b'{"step": 1}\n'
