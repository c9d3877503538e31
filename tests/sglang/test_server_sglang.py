"""The real SGLang server on a CPU, as engine `server` and as an OpenAI-compatible endpoint."""

import os
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from gftdata.config import GenerateConfig, OpenaiConfig, ServerConfig, validate_config
from gftdata.engines.endpoint import open_endpoint
from gftdata.engines.server import ServerEngine, open_engine
from gftdata.errors import UserError
from gftdata.events import Event
from gftdata.generate import generate
from gftdata.shards import verify
from gftdata.tokens import encode_prompt, load_tokenizer
from gftdata.types import Message, Refusal, Sample, SampleRequest, Sampling, ScoreRequest, Seed, Unscored
from gfttrain.config import EvalConfig
from gfttrain.evaluate import evaluate

# the demo has no chat template: the endpoint is to see what the engine is given
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="session")
def server(
    demo: Path, engine_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """URL and process of a server of the demo's model, which is still coming up."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "template.jinja").write_text(TEMPLATE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = engine_settings["options"] | {
        "model_path": demo / "model",
        "chat_template": folder / "template.jinja",
        "log_level": "error",
        "port": port,
    }
    command = [engine_settings["python"], "-m", "sglang.launch_server"]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    yield f"http://127.0.0.1:{port}", process
    end(process)


def end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="session")
def url(server: tuple[str, Any]) -> str:
    return server[0]


@pytest.fixture(scope="session")
def engine(url: str, demo: Path) -> Iterator[ServerEngine]:
    with open_engine(str(demo / "model"), config(url), load_tokenizer(str(demo / "model"))) as opened:
        yield opened


def config(url: str, **settings: Any) -> ServerConfig:
    return ServerConfig.model_validate(
        {"name": "server", "urls": [url], "max_in_flight": 32, "timeout_s": 120, "give_up_after_s": 240} | settings
    )


def requests(engine: ServerEngine, count: int) -> list[SampleRequest]:
    return [
        SampleRequest(question, k, (message,), encode_prompt(engine.tokenizer, [message]), Seed(k))
        for question in ("12+34+56=", "99+11+22=", "45+45+45=", "57-23=")
        for message in [Message("user", question)]
        for k in range(count)
    ]


def test_it_says_what_it_is(engine: ServerEngine, url: str, demo: Path) -> None:
    assert engine.version == "sglang 0.5.23 server"
    with pytest.raises(UserError, match=r"engine\.serves"):
        open_engine("another/model-of-the-hub", config(url), engine.tokenizer)
    open_engine("another/model-of-the-hub", config(url, serves=str(demo / "model")), engine.tokenizer).close()


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_reference_log_probs_are_those_of_a_float32_forward_pass(
    engine: ServerEngine, demo: Path, naive_logprobs: Callable[..., np.ndarray], temperature: float
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


def test_samples_follow_the_model_and_stop(engine: ServerEngine) -> None:
    samples = [s for s in engine.sample(requests(engine, 8), Sampling(1.0, 1.0, 4, ())) if isinstance(s, Sample)]
    assert {s.finish_reason for s in samples} == {"stop", "length"}
    for sample in samples:
        ended = sample.response_ids[-1] == engine.tokenizer.end_id
        assert ended == (sample.finish_reason == "stop")
        assert len(sample.response_ids) == sample.num_tokens <= 4
        assert sample.seed is None, "the server does not honour seeds unless told to be deterministic"
    assert len({sample.text for sample in samples}) > 4
    stopped = [s for s in engine.sample(requests(engine, 8), Sampling(1.0, 1.0, 48, ("=",))) if isinstance(s, Sample)]
    assert all(s.text.count("=") <= 1 for s in stopped)
    assert any(s.text.endswith("=") for s in stopped)


def test_what_is_too_long_is_refused_alone(engine: ServerEngine) -> None:
    short = requests(engine, 2)
    long = SampleRequest("long", 0, (), np.full(500, 5, np.int32), Seed(0))
    answers = {a.request.prompt_id: a for a in engine.sample([*short[:3], long, *short[3:]], Sampling(1.0, 1.0, 8, ()))}
    refusal = answers.pop("long")
    assert isinstance(refusal, Refusal) and "answered 400" in refusal.reason
    assert all(isinstance(answer, Sample) for answer in answers.values())
    scores = engine.score([ScoreRequest(r.prompt_ids, np.array([4, 1], np.int32)) for r in (short[0], long)])
    assert isinstance(scores[0], np.ndarray) and isinstance(scores[1], Unscored)


def test_the_same_server_as_an_endpoint_that_gives_text(
    engine: ServerEngine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GFT_TEST_KEY", "none")
    settings = OpenaiConfig(
        name="openai", base_url=f"{url}/v1", api_key_env="GFT_TEST_KEY", timeout_s=120, give_up_after_s=120
    )
    wanted = requests(engine, 4)
    with open_endpoint("default", settings) as endpoint:
        found = list(endpoint.sample(wanted, Sampling(0.01, 1.0, 48, ())))
    assert Counter(f.request.prompt_id for f in found) == Counter(r.prompt_id for r in wanted)
    same = {
        s.request.prompt_id: s.text for s in engine.sample(wanted, Sampling(0.01, 1.0, 48, ())) if isinstance(s, Sample)
    }
    for sample in found:
        assert isinstance(sample, Sample) and sample.finish_reason in ("stop", "length")
        assert sample.text == same[sample.request.prompt_id]
        assert sample.num_tokens > 0 and len(sample.response_ids) == 0


def test_generate_draws_teacher_and_self_and_continues(
    url: str, demo: Path, tmp_path: Path, naive_logprobs: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole pipeline on the server, its own endpoint as the teacher; stopped half way in the self phase."""
    monkeypatch.setenv("GFT_TEST_KEY", "none")
    limits = {"timeout_s": 120, "give_up_after_s": 240}
    far = {"name": "openai", "base_url": f"{url}/v1", "api_key_env": "GFT_TEST_KEY", **limits}
    settings = {
        "model": str(demo / "model"),
        "out": str(tmp_path / "data"),
        "prompts": {
            "path": str(demo / "train.jsonl"),
            "columns": {"ground_truth": "answer", "expert": "expert"},
            "limit": 12,
        },
        "reward": {"name": "numeric", "workers": 1},
        "responses": {
            "max_tokens": 48,
            "teachers": [
                {"name": "far", "model": "default", "engine": far, "count": 1, "sampling": {"temperature": 0.5}}
            ],
            "self": {"count": 3, "sampling": {"temperature": 0.7, "top_p": 0.9}},
        },
        "engine": {"name": "server", "urls": [url], **limits},
        "shards": {"groups_per_shard": 4},
    }
    run = validate_config(GenerateConfig, settings, "test")
    drawn: Counter[str] = Counter()

    def listen(event: Event) -> None:
        drawn[event.source] += event.kind == "sample"
        if event.kind == "sample" and drawn["self"] == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(run, listen)
    manifest = generate(run, listen)
    assert (drawn["teacher:far"], drawn["self"]) == (12, 36), "what was there was not drawn again"
    assert verify(tmp_path / "data") == [] and manifest.engine == "sglang 0.5.23 server"
    differs = 0.0
    for row in pl.read_parquet(tmp_path / "data" / "data" / "*.parquet").to_dicts():
        assert row["sources"] == ["expert", "teacher:far", "self", "self", "self"]
        for k, ids in enumerate(row["response_ids"]):
            expected = naive_logprobs(demo / "model", row["prompt_ids"], ids)
            np.testing.assert_allclose(row["ref_logprobs"][k], expected, atol=1e-3)
            if row["behavior_logprobs"][k] is not None:
                differs = max(differs, float(np.abs(np.array(row["behavior_logprobs"][k]) - expected).max()))
    assert differs > 0.05


def test_an_evaluation_by_the_server_and_a_reference_beside_it(url: str, demo: Path, tmp_path: Path) -> None:
    settings = {
        "model": str(demo / "model"),
        "out": str(tmp_path),
        "benchmarks": [
            {
                "name": "sums",
                "prompts": {"path": str(demo / "eval.jsonl"), "columns": {"ground_truth": "answer"}, "limit": 6},
            }
        ],
        "reward": {"name": "numeric", "workers": 1},
        "num_samples": 4,
        "sampling": {"temperature": 1.0},
        "max_tokens": 48,
        "reference": str(demo / "model"),
        "engine": {"name": "server", "urls": [url], "timeout_s": 120, "give_up_after_s": 240},
        "reference_engine": {"name": "hf", "device": "cpu"},
    }
    result = evaluate(validate_config(EvalConfig, settings, "test"))["sums"]
    rows = pl.read_parquet(tmp_path / "evals" / "sums" / "samples.parquet")
    assert len(rows) == 6 * 5 and rows["seed"].is_null().all() and set(rows["status"]) == {"ok"}
    drawn = rows.filter(~pl.col("greedy"))
    np.testing.assert_allclose(drawn["logprob_sum"], drawn["ref_logprob_sum"], atol=1e-2)
    assert result.kl is not None and abs(result.kl) < 1e-3
    assert result.entropy == pytest.approx(-drawn["ref_logprob_sum"].sum() / drawn["num_tokens"].sum(), abs=1e-3)


def test_a_server_that_is_killed_ends_the_run_in_the_stated_time(
    engine: ServerEngine, server: tuple[str, "subprocess.Popen[bytes]"], demo: Path
) -> None:
    """The last one here: all share the server."""
    url, process = server
    with open_engine(str(demo / "model"), config(url, give_up_after_s=5), engine.tokenizer) as impatient:
        stream = impatient.sample(requests(engine, 200), Sampling(1.0, 1.0, 48, ()))
        found = [next(stream)]
        end(process)
        died = time.monotonic()
        with pytest.raises(UserError, match="no valid answer from it for 5 s") as caught:
            found += stream
        assert 4 < time.monotonic() - died < 40
        assert url in str(caught.value) and len(found) < 800
