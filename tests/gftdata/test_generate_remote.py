"""`gft generate` against servers that fail: what is in the data set is what they answered, once, whatever else came."""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from aid.fault_server import Body, FaultServer, logprob, reply, response_ids
from tenacity import wait_random_exponential

from gftdata.config import GenerateConfig, validate_config
from gftdata.engines import remote, server
from gftdata.errors import UserError
from gftdata.events import Event
from gftdata.generate import generate
from gftdata.manifest import read_manifest
from gftdata.schema import table_to_groups
from gftdata.shards import shard_paths, verify
from gftdata.tokens import encode_response, load_tokenizer
from gftdata.types import Group

KEY = "sk-secret-0123456789"
NUM_PROMPTS = 20
Make = Callable[..., GenerateConfig]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BACK_OFF", wait_random_exponential(multiplier=0.01, max=0.1))
    monkeypatch.setattr(server, "POLL_S", 0.05)
    monkeypatch.setenv("FAR_KEY", KEY)


@pytest.fixture
def make(demo: Path, tmp_path: Path) -> Iterator[Make]:
    """Self samples and scores from SGLang servers, a teacher behind an endpoint."""

    def config(*servers: FaultServer, **settings: Any) -> GenerateConfig:
        limits = {"timeout_s": 1.0, "give_up_after_s": 20.0, "max_in_flight": 8} | settings
        serves = {"serves": "/models/demo/model"}
        asked = {"template": "{question}?", "system": "Add."}
        far = {"name": "openai", "base_url": f"{servers[0].url}/v1", "api_key_env": "FAR_KEY", **limits}
        data = {
            "model": str(demo / "model"),
            "out": str(tmp_path / "data"),
            "prompts": {
                "path": str(demo / "train.jsonl"),
                "columns": {"ground_truth": "answer", "expert": "expert"},
                "limit": NUM_PROMPTS,
            },
            "reward": {"name": "exact", "workers": 1},
            "responses": {
                "max_tokens": 48,
                "teachers": [
                    {"name": "far", "model": "big", "engine": far, "count": 2, **asked},
                ],
                "self": {"count": 2},
            },
            "engine": {"name": "server", "urls": [server.url for server in servers], **serves, **limits},
            "shards": {"groups_per_shard": 6},
        }
        return validate_config(GenerateConfig, data, "test")

    yield config


def groups_in(out: str) -> list[Group]:
    paths = shard_paths(Path(out), read_manifest(Path(out)))
    return [group for path in paths for group in table_to_groups(pq.read_table(path))]


def check(config: GenerateConfig, demo: Path) -> None:
    """Every prompt once, no group short, and each response what the server says for that prompt."""
    assert verify(Path(config.out)) == []
    tokenizer = load_tokenizer(str(demo / "model"))
    groups = groups_in(config.out)
    rows = [json.loads(line) for line in (demo / "train.jsonl").read_text().splitlines()[:NUM_PROMPTS]]
    assert [group.prompt.messages[0].content for group in groups] == [row["question"] for row in rows]
    for group in groups:
        prompt_ids, question = group.prompt_ids.tolist(), group.prompt.messages[0].content
        sources = Counter(response.completion.source for response in group.responses)
        assert sources == {"expert": 1, "teacher:far": 2, "self": 2}
        for response in group.responses:
            completion, ids = response.completion, response.completion.response_ids.tolist()
            if completion.source == "self":
                assert ids == response_ids(prompt_ids)
                expected = [logprob(prompt_ids, token) for token in ids]
                np.testing.assert_allclose(completion.behavior_logprobs, expected, rtol=1e-5)
            elif completion.source == "teacher:far":
                assert completion.text == reply([{"content": f"{question}?"}])
                assert ids == encode_response(tokenizer, completion.text, ended=True).tolist()
                assert (completion.model, completion.seed) == ("big@endpoint", None)
            np.testing.assert_allclose(response.ref_logprobs, [logprob(prompt_ids, t) for t in ids], rtol=1e-5)
    assert not (Path(config.out) / "quarantine.jsonl").exists()
    for path in Path(config.out).rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path
            told = path.parent.name == "tasks"  # how an attempt ended, which stays in .work
            assert told or b"127.0.0.1" not in path.read_bytes(), path


FAULTS: list[Any] = [
    ("status", 429, {"Retry-After": "0.05"}, "slow down"),
    ("status", 429, {}, ""),
    ("status", 500, {}, "oh no"),
    ("status", 503, {}, "<html>"),
    "garbage",
    "shape",
    "empty",
    "truncated",
    "short",
    "close",
    "hang",
]


def test_no_sample_is_lost_or_invented(make: Make, demo: Path) -> None:
    rng = random.Random(1)
    kinds: Counter[str] = Counter()

    def fault(body: Body, attempt: int) -> Any:
        if attempt > 2 or rng.random() < 0.5:
            return None
        kind = rng.choice(FAULTS)
        kinds[str(kind)] += 1
        return kind

    with FaultServer(fault=fault) as one, FaultServer(fault=fault) as two:
        config = make(one, two)
        generate(config)
    check(config, demo)
    assert len(kinds) == len(FAULTS)
    asked = [seen.body["messages"] for seen in one.seen if seen.path == "/v1/chat/completions"]
    assert all(m[0] == {"role": "system", "content": "Add."} and m[1]["content"].endswith("=?") for m in asked)
    assert {seen.headers["authorization"] for seen in one.seen if "messages" in seen.body} == {f"Bearer {KEY}"}


@pytest.mark.parametrize("dies", ["teacher:far", "self"])
def test_a_server_that_dies_ends_the_run_and_another_continues_it(make: Make, demo: Path, dies: str) -> None:
    drawn: Counter[str] = Counter()

    def listen(event: Event) -> None:
        drawn[event.source] += event.kind == "sample"
        if event.kind == "sample" and event.source == dies and drawn[dies] == 9:
            first.stop()

    with FaultServer() as first:
        config = make(first, give_up_after_s=1.0)
        with pytest.raises(UserError, match=r"no valid answer .* for 1 s .*the same command continues"):
            generate(config, listen)
    assert 9 <= drawn[dies] < 2 * NUM_PROMPTS
    with FaultServer() as second:
        generate(make(second), listen)
    check(config, demo)
    assert drawn["teacher:far"] == drawn["self"] == 2 * NUM_PROMPTS, "what was there was not asked for again"
