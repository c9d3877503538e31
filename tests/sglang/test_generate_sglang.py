"""`gft generate` on the real engine: log-probs, crashes, kills."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import pytest
import yaml

from gftdata.config import GenerateConfig, SglangConfig, validate_config
from gftdata.engines import sglang
from gftdata.engines.sglang import SglangEngine
from gftdata.generate import generate
from gftdata.manifest import read_manifest
from gftdata.shards import verify
from gftdata.tokens import encode_prompt, load_tokenizer
from gftdata.types import Message, Sample, SampleRequest, Sampling, ScoreRequest, Seed

NUM_PROMPTS = 24


def settings(demo: Path, out: Path, engine: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "model": str(demo / "model"),
        "out": str(out),
        "prompts": {
            "path": str(demo / "train.jsonl"),
            "columns": {"ground_truth": "answer", "expert": "expert"},
            "limit": NUM_PROMPTS,
        },
        "reward": {"name": "numeric", "workers": 1},
        "responses": {
            "teachers": [{"name": "given", "column": "expert", "count": 1}],
            "self": {"count": 4, "sampling": {"temperature": 0.7, "top_p": 0.9}},
            "max_tokens": 48,
        },
        "engine": engine,
        "shards": {"groups_per_shard": 8},
    } | changes


@pytest.fixture(scope="module")
def engine(demo: Path, engine_settings: dict[str, Any]) -> Iterator[SglangEngine]:
    config = SglangConfig.model_validate(engine_settings)
    with sglang.open_engine(str(demo / "model"), config, load_tokenizer(str(demo / "model"))) as started:
        yield started


def requests(engine: SglangEngine, count: int) -> list[SampleRequest]:
    questions = ["12+34+56=", "99+11+22=", "45+45+45=", "57-23="]
    return [
        SampleRequest(question, k, (), encode_prompt(engine.tokenizer, [Message("user", question)]), Seed(k))
        for question in questions
        for k in range(count)
    ]


@pytest.mark.parametrize("temperature", [0.5, 0.7, 1.3])
def test_reference_log_probs_are_those_of_a_float32_forward_pass(
    engine: SglangEngine, demo: Path, naive_logprobs: Callable[..., np.ndarray], temperature: float
) -> None:
    drawn = list(engine.sample(requests(engine, 6), Sampling(temperature, 0.9, 48, ())))
    samples = [sample for sample in drawn if isinstance(sample, Sample)]
    assert len(samples) == len(drawn) == 24
    scores = engine.score([ScoreRequest(s.request.prompt_ids, s.response_ids) for s in samples])
    decode_differs = 0.0
    for sample, score in zip(samples, scores, strict=True):
        expected = naive_logprobs(demo / "model", sample.request.prompt_ids, sample.response_ids)
        np.testing.assert_allclose(score, expected, atol=1e-3)
        scaled = naive_logprobs(demo / "model", sample.request.prompt_ids, sample.response_ids, temperature)
        np.testing.assert_allclose(sample.behavior_logprobs, scaled, atol=1e-3)
        decode_differs = max(decode_differs, float(np.abs(sample.behavior_logprobs - expected).max()))
    assert decode_differs > 0.05, "decode log-probs would not pass for reference ones"


def test_every_id_of_the_vocabulary_is_scored(
    engine: SglangEngine, demo: Path, naive_logprobs: Callable[..., np.ndarray]
) -> None:
    """SGLang reports the last one as another."""
    size = len(engine.tokenizer.backend)
    (prompt_ids,) = {tuple(request.prompt_ids.tolist()) for request in requests(engine, 1)[:1]}
    prompt = np.array(prompt_ids, np.int32)
    responses = [np.arange(size, dtype=np.int32)[::step] for step in (1, -1)] + [np.array([size - 1], np.int32)]
    scores = engine.score([ScoreRequest(prompt, response) for response in responses])
    for response, score in zip(responses, scores, strict=True):
        np.testing.assert_allclose(score, naive_logprobs(demo / "model", prompt, response), atol=1e-3)


def test_samples_follow_the_model_and_stop(engine: SglangEngine) -> None:
    samples = [s for s in engine.sample(requests(engine, 8), Sampling(1.0, 1.0, 4, ())) if isinstance(s, Sample)]
    assert {s.finish_reason for s in samples} == {"stop", "length"}
    for sample in samples:
        ended = sample.response_ids[-1] == engine.tokenizer.end_id
        assert ended == (sample.finish_reason == "stop")
        assert len(sample.response_ids) <= 4
    assert len({sample.text for sample in samples}) > 4
    stopped = [s for s in engine.sample(requests(engine, 8), Sampling(1.0, 1.0, 48, ("=",))) if isinstance(s, Sample)]
    assert all(s.text.count("=") <= 1 for s in stopped)
    assert any(s.text.endswith("=") for s in stopped)


def test_a_killed_scheduler_loses_nothing(engine: SglangEngine) -> None:
    wanted = requests(engine, 60)
    restarts = engine.restarts
    stream = engine.sample(wanted, Sampling(1.0, 1.0, 48, ()))
    found = [next(stream)]
    kill(p for p in psutil.Process().children(recursive=True) if p.name().startswith("sglang::schedul"))
    found += stream
    assert engine.restarts == restarts + 1
    assert Counter((s.request.prompt_id, s.request.index) for s in found) == Counter(
        (r.prompt_id, r.index) for r in wanted
    )
    assert all(isinstance(s, Sample) for s in found)


def test_an_option_that_sglang_does_not_know_is_one_clear_error(demo: Path, engine_settings: dict[str, Any]) -> None:
    from gftdata.errors import UserError

    config = SglangConfig.model_validate(engine_settings | {"options": {"no_such_option": 1}})
    with pytest.raises(UserError, match="no_such_option"):
        sglang.open_engine(str(demo / "model"), config, load_tokenizer(str(demo / "model")))


def test_generate_stores_what_a_forward_pass_gives(
    demo: Path, tmp_path: Path, engine_settings: dict[str, Any], naive_logprobs: Callable[..., np.ndarray]
) -> None:
    out = tmp_path / "data"
    manifest = generate(validate_config(GenerateConfig, settings(demo, out, engine_settings), "test"))
    assert verify(out) == []
    assert manifest.engine == "sglang 0.5.23"
    rows = pl.read_parquet(out / "data" / "*.parquet").to_dicts()
    assert len(rows) == NUM_PROMPTS
    differs = 0.0
    for row in rows:
        assert row["sources"] == ["expert", "teacher:given", "self", "self", "self", "self"]
        for k, ids in enumerate(row["response_ids"]):
            expected = naive_logprobs(demo / "model", row["prompt_ids"], ids)
            np.testing.assert_allclose(row["ref_logprobs"][k], expected, atol=1e-3)
            if row["sources"][k] == "self":
                differs = max(differs, float(np.abs(np.array(row["behavior_logprobs"][k]) - expected).max()))
                assert row["seeds"][k] is None, "the engine does not honour seeds unless told to be deterministic"
    assert differs > 0.05


def test_killed_with_everything_it_started_and_continued(
    demo: Path, tmp_path: Path, engine_settings: dict[str, Any]
) -> None:
    rng = random.Random(int(os.environ.get("GFT_TEST_SEED", "0")))
    out, config = tmp_path / "data", tmp_path / "config.yaml"
    data = settings(demo, out, engine_settings, shards={"groups_per_shard": 64})
    data["prompts"]["limit"] = 512
    config.write_text(yaml.safe_dump(data))
    command = [sys.executable, "-m", "gftcli.main", "generate", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    journal = out / ".work" / "journal"
    deadline = time.monotonic() + 240
    while not any(journal.rglob("*.jsonl")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(rng.uniform(0.0, 2.0))
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kill(started)
    if not (out / "manifest.json").exists():
        assert list((out / "data").glob("*.parquet")) or list(journal.rglob("*.jsonl"))
    subprocess.run(command, check=True, capture_output=True, timeout=400)
    assert verify(out) == []
    assert read_manifest(out).summary.groups == 512
    sizes = pl.read_parquet(out / "data" / "*.parquet")["sources"].list.len()
    assert set(sizes) == {6}


def kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
