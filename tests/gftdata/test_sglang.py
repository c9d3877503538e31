"""The supervision of a SGLang child, with a stand-in that fails on demand. The real engine is met in tests/sglang."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gftdata.config import GenerateConfig, SglangConfig, validate_config
from gftdata.engines import sglang
from gftdata.engines.sglang_api import BadAnswerError, scored
from gftdata.errors import UserError
from gftdata.events import Event
from gftdata.generate import generate
from gftdata.shards import verify
from gftdata.tokens import Tokenizer, load_tokenizer
from gftdata.types import Refusal, Sample, SampleRequest, Sampling, ScoreRequest, Seed, Unscored

FAKE = Path(__file__).parent / "aid" / "fake_sglang_worker.py"
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_tokens=8, stop=())
Open = Callable[..., sglang.SglangEngine]


@pytest.fixture(scope="module")
def tokenizer(demo: Path) -> Tokenizer:
    return load_tokenizer(str(demo / "model"))


@pytest.fixture
def open_fake(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    monkeypatch.setattr(sglang, "WORKER", FAKE)
    monkeypatch.setattr(sglang, "BACK_OFF_S", (0.01, 0.01, 0.01))
    monkeypatch.setattr(sglang, "AGAIN_S", 0.01)
    engines = []

    def start(max_in_flight: int = 8, **options: Any) -> sglang.SglangEngine:
        options["log"] = str(tmp_path / "requests.log")
        config = SglangConfig(name="sglang", max_in_flight=max_in_flight, options=options)
        engines.append(sglang.SglangEngine("none", config, tokenizer))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def requests(*last_ids: int) -> list[SampleRequest]:
    return [SampleRequest(f"p{i}", 0, (), np.array([2, i], np.int32), Seed(i)) for i in last_ids]


def answered(engine: sglang.SglangEngine, *last_ids: int) -> tuple[Counter[str], dict[str, str]]:
    """Prompt -> how often it was answered, and the refusals with their reasons; checks each sample's content."""
    counts: Counter[str] = Counter()
    refusals: dict[str, str] = {}
    for answer in engine.sample(requests(*last_ids), SAMPLING):
        counts[answer.request.prompt_id] += 1
        if isinstance(answer, Refusal):
            refusals[answer.request.prompt_id] = answer.reason
        else:
            assert isinstance(answer, Sample)
            last = int(answer.request.prompt_ids[-1])
            assert answer.response_ids.tolist() == [last, last + 1, 1]
    return counts, refusals


def sent(tmp_path: Path) -> Counter[int]:
    return Counter(json.loads(line)[-1] for line in (tmp_path / "requests.log").read_text().splitlines())


def test_every_request_is_answered_once(open_fake: Open, tmp_path: Path) -> None:
    counts, refusals = answered(open_fake(), *range(3, 15))
    assert counts == Counter(f"p{i}" for i in range(3, 15))
    assert not refusals
    assert set(sent(tmp_path).values()) == {1}


def test_a_group_goes_to_one_replica_and_all_replicas_are_used(open_fake: Open, tmp_path: Path) -> None:
    engine = open_fake(dp_size=2)
    answered(engine, *range(3, 15), *range(3, 15))
    engine.score([ScoreRequest(np.array([2, i], np.int32), np.array([7, 1], np.int32)) for i in range(3, 15)])
    prompts = [json.loads(line)[1] for line in (tmp_path / "requests.log").read_text().splitlines()]
    ranks = [json.loads(line) for line in (tmp_path / "requests.log.ranks").read_text().splitlines()]
    rank_of = dict(zip(prompts, ranks, strict=True))
    assert len(prompts) == 36 and set(ranks) == {0, 1}
    assert ranks == [rank_of[prompt] for prompt in prompts]


def test_a_death_loses_and_doubles_nothing(open_fake: Open) -> None:
    engine = open_fake(die_once=[9])
    counts, refusals = answered(engine, *range(3, 15))
    assert counts == Counter(f"p{i}" for i in range(3, 15))
    assert not refusals
    assert engine.restarts == 1


def test_what_fails_while_the_engine_is_dying_is_asked_again(open_fake: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang, "AGAIN_S", 1.0)
    engine = open_fake(dying=[9, 10])
    counts, refusals = answered(engine, *range(3, 15))
    assert counts == Counter(f"p{i}" for i in range(3, 15))
    assert not refusals
    assert engine.restarts == 1


@pytest.mark.parametrize("kind", ["torn", "short"])
def test_a_torn_answer_is_asked_again(open_fake: Open, kind: str) -> None:
    engine = open_fake(**{kind: [9]})
    counts, refusals = answered(engine, *range(3, 15))
    assert counts == Counter(f"p{i}" for i in range(3, 15))
    assert not refusals
    assert engine.restarts == 1


@pytest.mark.parametrize("poison", [[3], [9], [14], [5, 6], [3, 8, 14]])
def test_what_kills_the_engine_is_found_and_the_others_are_answered(open_fake: Open, poison: list[int]) -> None:
    counts, refusals = answered(open_fake(die=poison), *range(3, 15))
    assert counts == Counter(f"p{i}" for i in range(3, 15))
    assert set(refusals) == {f"p{i}" for i in poison}
    assert all("died" in reason for reason in refusals.values())


@pytest.mark.parametrize(("kind", "said"), [("nan", "NaN"), ("abort", "no room")])
def test_an_answer_that_is_none_is_asked_again_and_then_refused(
    open_fake: Open, tmp_path: Path, kind: str, said: str
) -> None:
    engine = open_fake(**{kind: [9]})
    counts, refusals = answered(engine, *range(3, 15))
    assert counts == Counter(f"p{i}" for i in range(3, 15))
    assert set(refusals) == {"p9"} and said in refusals["p9"]
    assert sent(tmp_path)[9] == sglang.TRIES
    assert engine.restarts == 0


def test_the_last_id_of_the_vocabulary_may_be_reported_as_0_and_no_other(tokenizer: Tokenizer) -> None:
    last = len(tokenizer.backend) - 1

    def answer(*tokens: int) -> dict[str, Any]:
        return {"input_token_logprobs": [[None, *[-0.5] * len(tokens)], [9, *tokens]]}

    request = ScoreRequest(np.array([2, 9], np.int32), np.array([last, 4, last, 1], np.int32))
    for tokens in ((last, 4, last, 1), (0, 4, 0, 1)):
        np.testing.assert_array_equal(scored(tokenizer, request, answer(*tokens)), np.full(4, -0.5, np.float32))
    for tokens in ((last, 0, last, 1), (0, 4, 0, 0), (0, 4, 0)):
        with pytest.raises(BadAnswerError, match="other tokens"):
            scored(tokenizer, request, answer(*tokens))


def test_an_engine_that_does_not_start_says_why(open_fake: Open) -> None:
    with pytest.raises(UserError, match="ValueError: this model cannot be loaded"):
        open_fake(no_start=True)


def test_never_more_in_flight_than_asked(open_fake: Open) -> None:
    engine = open_fake(max_in_flight=3)
    taken = 0

    def counted() -> Iterator[SampleRequest]:
        nonlocal taken
        for request in requests(*range(3, 15)):
            taken += 1
            yield request

    for done, _ in enumerate(engine.sample(counted(), SAMPLING)):
        assert taken <= done + 3


def test_a_dropped_stream_leaves_the_engine_usable(open_fake: Open) -> None:
    engine = open_fake()
    stream = engine.sample(requests(*range(3, 15)), SAMPLING)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    counts, refusals = answered(engine, *range(3, 15))
    assert counts == Counter(f"p{i}" for i in range(3, 15)) and not refusals


def test_two_streams_at_once_do_not_mix(open_fake: Open) -> None:
    engine = open_fake(die_once=[12])
    first = engine.sample(requests(3, 4, 5, 6), SAMPLING)
    second = engine.sample(requests(10, 11, 12, 13), SAMPLING)
    found = [answer.request.prompt_id for pair in zip(first, second, strict=True) for answer in pair]
    assert Counter(found) == Counter(f"p{i}" for i in (3, 4, 5, 6, 10, 11, 12, 13))
    assert {int(p[1:]) < 9 for p in found[::2]} == {True}


def test_an_engine_that_is_gone_answers_everybody_with_an_error(open_fake: Open) -> None:
    engine = open_fake(die=[2])  # in every prompt
    with pytest.raises(UserError, match="died"):
        answered(engine, *range(3, 15))
    with pytest.raises(UserError, match="died"):
        answered(engine, 3)
    closed = open_fake()
    closed.close()
    with pytest.raises(UserError, match="closed"):
        answered(closed, 3)


def test_closing_while_another_thread_waits_ends_its_waiting(open_fake: Open) -> None:
    engine = open_fake(slow=60)
    failures: list[BaseException] = []

    def wait() -> None:
        try:
            answered(engine, 3)
        except UserError as error:
            failures.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)
    sglang_stop = sglang.STOP_S
    try:
        sglang.STOP_S = 0.1  # type: ignore[misc]
        engine.close()
    finally:
        sglang.STOP_S = sglang_stop  # type: ignore[misc]
    thread.join(10)
    assert not thread.is_alive() and len(failures) == 1


def test_closed_between_two_lives_it_stays_closed(open_fake: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang, "BACK_OFF_S", (5.0, 5.0, 5.0))
    engine = open_fake()
    assert engine._process is not None
    engine._process.kill()
    engine._process.wait()
    time.sleep(0.3)  # it is in its back-off now
    engine.close()
    time.sleep(0.3)
    assert engine._process is None or engine._process.poll() is not None
    assert not any(t.name == "sglang-supervisor" and t.is_alive() for t in threading.enumerate())


def config_of(demo: Path, out: Path, **options: Any) -> GenerateConfig:
    return validate_config(
        GenerateConfig,
        {
            "model": str(demo / "model"),
            "out": str(out),
            "prompts": {
                "path": str(demo / "train.jsonl"),
                "columns": {"ground_truth": "answer", "expert": "expert"},
                "limit": 20,
            },
            "reward": {"name": "numeric", "workers": 1},
            "responses": {"self": {"count": 2}, "max_tokens": 48},
            "shards": {"groups_per_shard": 4},
            "engine": {
                "name": "sglang",
                "max_in_flight": 6,
                "options": options | {"log": str(out.with_suffix(".log"))},
            },
        },
        "test",
    )


def with_prompts(config: GenerateConfig, path: Path) -> GenerateConfig:
    return config.model_copy(update={"prompts": config.prompts.model_copy(update={"path": str(path)})})


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang, "WORKER", FAKE)
    monkeypatch.setattr(sglang, "BACK_OFF_S", (0.01, 0.01, 0.01))
    monkeypatch.setattr(sglang, "AGAIN_S", 0.01)
    monkeypatch.setattr(sglang, "check_python", lambda config: None)


def test_generate_finishes_shards_beside_the_sampling(fake: None, demo: Path, tmp_path: Path) -> None:
    manifest = generate(config_of(demo, tmp_path / "data", die_once=[9]))
    assert verify(tmp_path / "data") == []
    assert (manifest.summary.groups, manifest.summary.responses) == (20, 60)
    assert manifest.engine == "sglang fake"
    assert manifest.prompts_quarantined == 0


@pytest.mark.parametrize("kind", ["die", "nan", "error"])
def test_a_prompt_that_the_engine_cannot_take_is_quarantined(
    fake: None, demo: Path, tmp_path: Path, tokenizer: Tokenizer, kind: str
) -> None:
    out = tmp_path / "data"
    minus = tokenizer.backend.convert_tokens_to_ids("-")
    rows = [json.loads(line) for line in (demo / "train.jsonl").read_text().splitlines()[:20]]
    rows[7]["question"] = "99-11="
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(demo, out, **{kind: [minus]})
    config = with_prompts(config, tmp_path / "p.jsonl")
    manifest = generate(config)
    assert verify(out) == []
    assert (manifest.summary.groups, manifest.prompts_quarantined) == (19, 1)
    (entry,) = (json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines())
    assert entry["source"] == "self" and entry["reason"]


def test_a_response_that_cannot_be_scored_quarantines_its_prompt(
    fake: None, demo: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    out = tmp_path / "data"
    minus = tokenizer.backend.convert_tokens_to_ids("-")
    rows = [json.loads(line) for line in (demo / "train.jsonl").read_text().splitlines()[:20]]
    rows[3]["expert"] = "1-1=0"
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(demo, out, unscorable=[minus])
    config = with_prompts(config, tmp_path / "p.jsonl")
    manifest = generate(config)
    assert verify(out) == []
    assert (manifest.summary.groups, manifest.prompts_quarantined) == (19, 1)
    assert "too long" in (out / "quarantine.jsonl").read_text()


def test_a_refused_prompt_that_is_all_that_is_left_is_quarantined_again(
    demo: Path, tmp_path: Path, fake: None, write_jsonl: Callable[..., Path], tokenizer: Tokenizer
) -> None:
    """In an extension all others are carried over, and no answer tells that the engine is well."""
    rows = [json.loads(line) for line in (demo / "train.jsonl").read_text().splitlines()[:20]]
    rows[3]["question"] = "1-2-3="
    path = write_jsonl(rows)
    minus = tokenizer.backend.convert_tokens_to_ids("-")
    first = with_prompts(config_of(demo, tmp_path / "a" / "data", error=[minus]), path)
    assert generate(first).prompts_quarantined == 1
    second = with_prompts(config_of(demo, tmp_path / "b" / "data", error=[minus]), path)
    manifest = generate(second.model_copy(update={"extend": str(tmp_path / "a" / "data")}))
    assert (manifest.summary.groups, manifest.prompts_quarantined) == (19, 1)


@pytest.mark.parametrize("kind", ["error", "unscorable", "nan"])
def test_an_engine_that_refuses_everything_quarantines_nothing(
    fake: None, demo: Path, tmp_path: Path, kind: str
) -> None:
    everything = list(range(18))
    with pytest.raises(UserError, match=r"refused|could be scored"):
        generate(config_of(demo, tmp_path / "data", **{kind: everything}))
    assert not (tmp_path / "data" / "manifest.json").exists()
    assert not list(tmp_path.rglob("quarantine/*.json"))


def test_a_second_run_on_the_same_output_is_refused(fake: None, demo: Path, tmp_path: Path) -> None:
    config = config_of(demo, tmp_path / "data")
    refusals: list[str] = []

    def listen(event: Event) -> None:
        if event.kind == "sample" and not refusals:
            try:
                generate(config)
            except UserError as error:
                refusals.append(str(error))

    generate(config, listen)
    assert len(refusals) == 1 and "another gft command" in refusals[0]
    assert verify(tmp_path / "data") == []


def test_ctrl_c_ends_a_run_that_waits_for_its_engine(demo: Path, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from gftdata import generate as g\n"
        "from gftdata.engines import sglang\n"
        "from gftdata.config import GenerateConfig, load_config\n"
        f"sglang.WORKER = Path({str(FAKE)!r})\n"
        "sglang.STOP_S = 0.1\n"
        "sglang.check_python = lambda config: None\n"
        "if __name__ == '__main__':\n"
        "    config = load_config(GenerateConfig, sys.argv[1])\n"
        "    g.generate(config, lambda event: print(event.kind, flush=True))\n"
    )
    (tmp_path / "run.py").write_text(script)
    config = config_of(demo, tmp_path / "data", slow=0.3)
    (tmp_path / "c.yaml").write_text(config.model_dump_json(by_alias=True))
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "c.yaml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while "sample" not in process.stdout.readline():
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in error


@pytest.mark.timeout(60)
def test_long_requests_and_long_answers_do_not_wait_for_each_other(open_fake: Open) -> None:
    """More than a pipe holds, in both directions, to a child that does one thing at a time."""
    engine = open_fake(max_in_flight=30)
    long = np.arange(2, 5002, dtype=np.int32)
    wanted = [ScoreRequest(np.array([2, n], np.int32), long) for n in range(30)]
    scores = engine.score(wanted)
    assert [len(score) for score in scores if not isinstance(score, Unscored)] == [5000] * 30
