"""The table of methods is METHOD.md section 4, row by row; and a comparison trains and evaluates each."""

import math
from pathlib import Path

import numpy as np
import pytest
from training_helpers import DEMO, MODEL, make_index, train_settings

from gftdata.config import validate_config
from gfttrain.compare import Listeners, compare
from gfttrain.config import EvalConfig, ObjectiveConfig
from gfttrain.plan import select
from gfttrain.presets import METHODS, folder_name
from gfttrain.results import read_results

SOURCES = ("expert", "teacher:a", "teacher:b", "self", "self", "self")
REWARDS = (1.0, 1.0, 0.0, 1.0, 0.0, None)

# method -> used responses, advantages (None: the group's), what the coefficient and the penalty are
TABLE: dict[str, tuple[list[int], float | None, str, bool]] = {
    "SFT": ([0], 1.0, "1", False),
    "SFT (mix)": ([0, 1, 2], 1.0, "1", False),
    "RFT": ([0, 1, 3], 1.0, "1", False),
    "DFT": ([0], 1.0, "pi", False),
    "DFT + anchor": ([0], 1.0, "pi", True),
    "PSFT": ([0], 1.0, "ratio refreshed", False),
    "GRPO (offline)": ([3, 4], None, "ratio reference", False),
    "GFT w/o GAL": ([0, 1, 2], 1.0, "rectified", False),
    "GFT w/o DCR": ([0, 1, 2, 3, 4], None, "1", False),
    "GFT (no mix)": ([0, 3, 4], None, "rectified", False),
    "GFT": ([0, 1, 2, 3, 4], None, "rectified", False),
}


def coefficient(objective: ObjectiveConfig) -> str:
    if objective.coefficient == "clipped_ratio":
        return f"ratio {objective.old_policy}"
    return "1" if objective.tau == 0 else "pi" if objective.tau > 1 else "rectified"


def test_every_method_of_the_paper_is_there() -> None:
    assert list(METHODS) == list(TABLE)
    assert METHODS["GFT"] == ObjectiveConfig()


@pytest.mark.parametrize("method", TABLE)
def test_method(method: str) -> None:
    used, advantage, weight, anchored = TABLE[method]
    objective = METHODS[method]
    index = make_index([[(s, r, 3) for s, r in zip(SOURCES, REWARDS, strict=True)]])
    selection = select(index, objective)
    assert np.flatnonzero(selection.used_R).tolist() == used
    rewards = np.array([REWARDS[k] for k in used], dtype=np.float64)
    expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6) if advantage is None else advantage
    np.testing.assert_allclose(selection.advantages_R[used], expected, rtol=1e-12)
    assert not np.delete(selection.advantages_R, used).any()
    assert coefficient(objective) == weight
    assert (objective.kl_coef > 0) == anchored


def test_folder_names_are_plain_and_distinct() -> None:
    names = [folder_name(method) for method in METHODS]
    assert len(set(names)) == len(names)
    assert all(name.replace("-", "").isalnum() for name in names)
    assert folder_name("GFT w/o DCR") == "gft-wo-dcr"


def test_compare(data: Path, tmp_path: Path) -> None:
    prompts = {"path": str(DEMO / "eval.jsonl"), "columns": {"ground_truth": "answer"}, "limit": 6}
    settings = {
        "model": "replaced",
        "benchmarks": [{"name": "eval", "prompts": prompts}],
        "reward": {"name": "numeric", "workers": 1},
        "num_samples": 2,
        "greedy": False,
    }
    eval_config = validate_config(EvalConfig, {**settings, "k": [1], "max_tokens": 32}, "test")
    config = train_settings(data, tmp_path / "runs", max_steps=2)
    begun: list[tuple[str, str]] = []
    chosen = {name: METHODS[name] for name in ("SFT", "GFT w/o DCR")}
    listeners = Listeners(on_begin=lambda method, what: begun.append((method, what)))
    outcomes = list(compare(config, chosen, eval_config, listeners))
    assert [outcome.method for outcome in outcomes] == ["base", *chosen]
    assert [outcome.model for outcome in outcomes] == [
        MODEL,
        tmp_path / "runs" / "sft" / "final",
        tmp_path / "runs" / "gft-wo-dcr" / "final",
    ]
    assert begun == [("base", "evaluation"), *((m, what) for m in chosen for what in ("train", "evaluation"))]
    assert [outcome.folder for outcome in outcomes] == [tmp_path / "runs" / n for n in ("base", "sft", "gft-wo-dcr")]
    for outcome in outcomes:
        result = outcome.results["eval"]
        assert result.model == str(outcome.model) and result.prompts == 6
        assert math.isfinite(result.pass_at[1].value)
        assert read_results(outcome.folder) == outcome.results
