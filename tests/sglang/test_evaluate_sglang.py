"""`gft eval` on the real engine: stopped, continued, scored by a second engine; greedy is transformers' greedy."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from gftdata.config import validate_config
from gfttrain.config import EvalConfig
from gfttrain.evaluate import Event, evaluate
from gfttrain.results import read_results

PROMPTS, SAMPLES = 8, 6


def settings(demo: Path, out: Path, engine: dict[str, Any], **changes: Any) -> EvalConfig:
    data = {
        "model": str(demo / "model"),
        "out": str(out),
        "benchmarks": [
            {
                "name": "sums",
                "prompts": {"path": str(demo / "eval.jsonl"), "columns": {"ground_truth": "answer"}, "limit": PROMPTS},
            }
        ],
        "reward": {"name": "numeric", "workers": 1},
        "num_samples": SAMPLES,
        "sampling": {"temperature": 1.0},
        "max_tokens": 48,
        "engine": engine,
    }
    return validate_config(EvalConfig, data | changes, "test")


def test_an_evaluation_is_stopped_continued_and_scored(
    demo: Path, tmp_path: Path, engine_settings: dict[str, Any]
) -> None:
    config = settings(demo, tmp_path / "sglang", engine_settings, reference=str(demo / "model"))
    drawn = 0

    def listen(event: Event) -> None:
        nonlocal drawn
        drawn += event.kind == "sample"
        if event.kind == "sample" and drawn == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(config, listen)
    result = evaluate(config, listen)["sums"]
    assert drawn == PROMPTS * (SAMPLES + 1), "what was there was not drawn again"
    assert read_results(tmp_path / "sglang") == {"sums": result}
    rows = pl.read_parquet(tmp_path / "sglang" / "evals" / "sums" / "samples.parquet")
    assert len(rows) == drawn and set(rows["status"]) == {"ok"}
    assert rows["seed"].is_null().all(), "the engine does not honour seeds unless told to be deterministic"
    own = rows.filter(~pl.col("greedy"))
    np.testing.assert_allclose(own["logprob_sum"], own["ref_logprob_sum"], atol=1e-2)
    assert result.kl is not None and abs(result.kl) < 1e-3
    assert result.entropy == pytest.approx(-own["ref_logprob_sum"].sum() / own["num_tokens"].sum(), abs=1e-3)
    assert len(set(own["text"])) > PROMPTS

    by_hf = evaluate(settings(demo, tmp_path / "hf", {"device": "cpu"}, num_samples=1))["sums"]
    greedy = [
        pl.read_parquet(tmp_path / name / "evals" / "sums" / "samples.parquet").filter(pl.col("greedy"))["text"]
        for name in ("sglang", "hf")
    ]
    assert greedy[0].to_list() == greedy[1].to_list() and result.greedy == by_hf.greedy
