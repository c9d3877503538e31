"""Run folders for the report: settings as gft train writes them, metrics by its own function, results, odd data."""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer, models

from gftdata.config import validate_config
from gftdata.manifest import read_manifest
from gftdata.schema import groups_to_table, table_to_groups
from gftdata.shards import sha256_file, shard_paths
from gftdata.types import Group, Message
from gfttrain.config import TrainConfig
from gfttrain.metrics import append_line
from gfttrain.prepare import write_run_file
from gfttrain.results import Estimate, Result, append_result
from gfttrain.runs import FINAL, METRICS

MODEL = Path(__file__).parents[2] / "samples" / "demo" / "model"
SOURCES = ("expert", "teacher:hint", "self")
HOSTILE = (
    "<script>alert('script')</script>",
    "</script><script>alert('left')</script>",
    "<img src=x onerror=alert('img')>",
    "<a href=\"javascript:alert('link')\">press</a>",
    "javascript:alert('plain')",
    "\u202eevil\u202c \u2066turned\u2069",
    "{{DATA}} {{SCRIPT}} ${alert('literal')} %{x} <b>bold</b>",
    "&lt;script&gt;alert('entity')&lt;/script&gt; &amp;",
    "<!-- <style>*{display:none}</style> ]]> -->",
    "\x00\x07\x1b[31m red \x7f",
    "__proto__",
    "constructor",
    "a\u0301" * 30,
    "W" * 1_000_000,
    "\ud55c\u6f22\U0001f600",
)


def metrics_of(step: int, seed: int = 0) -> dict[str, Any]:
    """One step's metrics, all keys that a GFT run has; a function of step and seed."""
    wave = math.sin(0.37 * step + seed) + 1.5
    metrics: dict[str, Any] = {"step": step, "epoch": 0, "loss": -0.01 * wave, "entropy": 0.2 * wave}
    metrics["rectified_fraction"] = 0.1 * wave
    for n, source in enumerate(SOURCES):
        metrics[f"log_ratio/{source}"] = 0.001 * wave * (n + 1)
        metrics[f"entropy/{source}"] = 0.1 * wave + 0.01 * n
        metrics[f"rectified_fraction/{source}"] = 0.05 * wave + 0.01 * n
        metrics[f"data/reward/{source}"] = metrics[f"data/pass_rate/{source}"] = 0.3 * wave
    metrics["stale_fraction"] = 0.02 * wave
    metrics["weights_before"] = [3000 + step, 200, 80, 50, 30, 10, 3, 5, 3, 1, 2, 1, 0, 0, 0, step % 3]
    metrics["weights_after"] = [3385 + step + step % 3, *[0] * 15]
    metrics |= {"computed_tokens": 3385 + step, "kl_ref_to_model": 0.003 * wave, "grad_norm": 0.15 * wave}
    metrics |= {"grad_clipped": 0, "lr": 1e-4, "tokens_per_second": 17000.0 * wave, "seconds": 0.2}
    return metrics | {
        "data_wait_fraction": 0.01,
        "data/groups": 32,
        "data/loss_tokens": 3855,
        "data/groups_with_signal": 30,
        "data/responses_unjudged": 0,
    }


def write_run(
    out: Path, data: Path | None, *, steps: int = 5, seed: int = 0, objective: Mapping[str, Any] | None = None
) -> Path:
    """A finished run, but for its model: final/ has only what a tokenizer is read from."""
    settings = {
        "model": str(MODEL),
        "data": str(data or "nowhere"),
        "out": str(out),
        "objective": dict(objective or {}),
    }
    write_run_file(validate_config(TrainConfig, settings, "test"), out)
    for step in range(1, steps + 1):
        append_line(out / METRICS, metrics_of(step, seed))
    (out / FINAL).mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(MODEL / name, out / FINAL)
    return out


def write_results(out: Path, value: float, benchmark: str = "sums", **changes: Any) -> Path:
    """A result with pass@1, 2 and 4."""
    at = {
        k: Estimate(value + 0.05 * n, value + 0.05 * n - 0.031, value + 0.05 * n + 0.029)
        for n, k in enumerate((1, 2, 4))
    }
    found = Result(
        benchmark=benchmark,
        model="model",
        revision="0" * 40,
        finished_at="2026-01-01T00:00:00Z",
        prompts=64,
        prompts_too_long=0,
        samples_per_prompt=4,
        unjudged_samples=0,
        truncated_samples=8,
        mean_tokens=13.25,
        mean_reward=at[1],
        pass_at=at,
        greedy=Estimate(value + 0.011, None, None),
        entropy=0.2134,
        kl=0.0456,
        settings={"num_samples": 4, "revision": str(out)},
    )
    append_result(out, replace(found, **changes))
    return out


def odd_data(data: Path, out: Path, texts: Sequence[str], lengths: Sequence[int]) -> Path:
    """A copy of a data set whose responses are made of other tokens: token i has the text texts[i].

    Response k of every group has lengths[k] tokens, all of the texts in turn. `out`/model has the tokenizer.
    """
    shutil.copytree(data, out)
    manifest = read_manifest(out)
    records = []
    for path, record in zip(shard_paths(out, manifest), manifest.shards, strict=True):
        groups = [_odd_group(group, texts, lengths) for group in table_to_groups(pq.read_table(path))]
        pq.write_table(groups_to_table(groups), path, row_group_size=4)
        tokens = sum(len(one.completion.response_ids) for made in groups for one in made.responses)
        found = {"sha256": sha256_file(path), "bytes": path.stat().st_size, "response_tokens": tokens}
        records.append(record.model_copy(update=found))
    written = manifest.model_copy(update={"shards": tuple(records)})
    (out / "manifest.json").write_text(json.dumps(written.model_dump(mode="json")))
    (out / "model").mkdir()
    (out / "model" / "config.json").write_text("{}")
    vocabulary = Tokenizer(models.WordLevel({text: n for n, text in enumerate(texts)}, unk_token=texts[0]))
    vocabulary.save(str(out / "model" / "tokenizer.json"))
    return out


def _odd_group(group: Group, texts: Sequence[str], lengths: Sequence[int]) -> Group:
    responses = []
    for k, response in enumerate(group.responses):
        ids = (np.arange(lengths[k % len(lengths)]) % len(texts)).astype(np.int32)
        logprobs = (-0.01 * (np.arange(len(ids)) % 700)).astype(np.float32)
        completion = replace(response.completion, response_ids=ids, text="".join(texts), behavior_logprobs=None)
        responses.append(replace(response, completion=completion, ref_logprobs=logprobs))
    prompt = replace(group.prompt, messages=(Message("user", "".join(texts)),), ground_truth=texts[0][:1000])
    return replace(group, prompt=prompt, responses=tuple(responses))
