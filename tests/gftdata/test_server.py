"""The engine of SGLang servers, against a real HTTP server that fails on demand. tests/sglang meets the real one."""

import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aid.fault_server import Body, FaultServer, logprob, response_ids
from tenacity import wait_random_exponential

from gftdata.config import ServerConfig
from gftdata.engines import remote, server
from gftdata.engines.server import ServerEngine, open_engine
from gftdata.engines.sglang_api import prompt_number
from gftdata.errors import UserError
from gftdata.tokens import Tokenizer, load_tokenizer
from gftdata.types import Refusal, Sample, SampleRequest, Sampling, ScoreRequest, Seed, Unscored

SAMPLING = Sampling(temperature=0.7, top_p=0.9, max_tokens=8, stop=())
MODEL = "/models/demo/model"
Open = Callable[..., ServerEngine]


@pytest.fixture(scope="module")
def tokenizer(demo: Path) -> Tokenizer:
    return load_tokenizer(str(demo / "model"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BACK_OFF", wait_random_exponential(multiplier=0.01, max=0.1))
    monkeypatch.setattr(server, "POLL_S", 0.05)


@pytest.fixture
def open_server(tokenizer: Tokenizer) -> Iterator[Open]:
    engines = []

    def start(*servers: FaultServer, model: str = MODEL, **settings: Any) -> ServerEngine:
        settings = {"max_in_flight": 4, "timeout_s": 20, "give_up_after_s": 20} | settings
        config = ServerConfig(name="server", urls=tuple(s.url for s in servers), **settings)
        engines.append(open_engine(model, config, tokenizer))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def requests(count: int, first: int = 0) -> list[SampleRequest]:
    """Prompts that all differ, of ids of the demo's vocabulary."""
    return [
        SampleRequest(f"p{i}", 0, (), np.array([2, *(3 + (i // 7**k) % 7 for k in range(4))], np.int32), Seed(i))
        for i in range(first, first + count)
    ]


def index(body: Body) -> int:
    """Which of `requests` a body comes from."""
    return sum((token - 3) * 7**k for k, token in enumerate(body["input_ids"][1:5]))


def answered(engine: ServerEngine, wanted: list[SampleRequest]) -> dict[str, str]:
    """Draw samples: each request once, each with the answer to its own prompt. Prompt -> reason of the refusals."""
    counts: Counter[str] = Counter()
    refusals: dict[str, str] = {}
    for answer in engine.sample(iter(wanted), SAMPLING):
        counts[answer.request.prompt_id] += 1
        if isinstance(answer, Refusal):
            refusals[answer.request.prompt_id] = answer.reason
        else:
            check(answer)
    assert counts == Counter(request.prompt_id for request in wanted)
    return refusals


def check(sample: Sample) -> None:
    prompt = sample.request.prompt_ids.tolist()
    ids = response_ids(prompt)
    assert sample.response_ids.tolist() == ids
    assert sample.response_ids.dtype == np.int32 and sample.behavior_logprobs.dtype == np.float32
    np.testing.assert_allclose(sample.behavior_logprobs, [logprob(prompt, token) for token in ids], rtol=1e-5)
    assert (sample.num_tokens, sample.finish_reason, sample.seed) == (3, "stop", None)


def score_requests(count: int) -> list[ScoreRequest]:
    return [ScoreRequest(r.prompt_ids, np.array([4, 5 + i % 3, 1], np.int32)) for i, r in enumerate(requests(count))]


def expected_scores(request: ScoreRequest) -> list[float]:
    return [logprob(request.prompt_ids.tolist(), int(token)) for token in request.response_ids]


def test_what_is_asked_and_what_comes_of_it(open_server: Open, tokenizer: Tokenizer) -> None:
    with FaultServer() as fault:
        engine = open_server(fault)
        assert engine.version == "sglang 0.0.test server" and engine.concurrent
        wanted = requests(40)
        assert answered(engine, wanted) == {}
        assert len(fault.seen) == 40
        assert next(seen.body for seen in fault.seen if index(seen.body) == 0) == {
            "input_ids": wanted[0].prompt_ids.tolist(),
            "sampling_params": {
                "temperature": 0.7,
                "top_p": 0.9,
                "max_new_tokens": 8,
                "stop_token_ids": list(tokenizer.stop_ids),
                "stop": None,
                "no_stop_trim": True,
                "skip_special_tokens": True,
            },
            "return_logprob": True,
        }
        fault.seen.clear()
        to_score = score_requests(40)
        for request, scores in zip(to_score, engine.score(to_score), strict=True):
            assert isinstance(scores, np.ndarray) and scores.dtype == np.float32
            np.testing.assert_allclose(scores, expected_scores(request), rtol=1e-5)
        assert next(seen.body for seen in fault.seen if index(seen.body) == 0) == {
            "input_ids": [*wanted[0].prompt_ids.tolist(), 4, 5, 1],
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 4,
        }
        fault.seen.clear()
        list(engine.sample(wanted[:1], SAMPLING.greedily()))
        greedy = fault.seen[0].body["sampling_params"]
        assert (greedy["temperature"], greedy["top_k"], greedy["max_new_tokens"]) == (1.0, 1, 8)
        assert engine.score([]) == []


def test_seeds_are_sent_where_they_are_honoured(open_server: Open) -> None:
    with FaultServer(server_info={"enable_deterministic_inference": True}) as fault:
        samples = list(open_server(fault).sample(requests(5), SAMPLING))
        assert {s.seed for s in samples if isinstance(s, Sample)} == set(range(5))
        assert {seen.body["sampling_params"]["sampling_seed"] for seen in fault.seen} == set(range(5))


LOGPROBS = "output_token_logprobs"
FAULTS = [
    "garbage",
    "html",
    "shape",
    "empty",
    "truncated",
    "short",
    "close",
    "abort",
    "nan",
    "nan_logprob",
    "wrong_ids",
    "fewer",
    "none",
    ("status", 429, {}, "{}"),
    ("status", 429, {"Retry-After": "0.05"}, "{}"),
    ("status", 500, {}, "Internal Server Error"),
    ("status", 503, {"retry-after-ms": "50"}, '{"error": {"message": "busy"}}'),
    ("status", 408, {}, ""),
    ("answer", []),
    ("answer", {"output_ids": ["4"], "meta_info": {"finish_reason": {"type": "stop"}, LOGPROBS: [[-0.5, 4, None]]}}),
    (
        "answer",
        {"output_ids": [1] * 9, "meta_info": {"finish_reason": {"type": "stop"}, LOGPROBS: [[-0.5, 1, None]] * 9}},
    ),
    (
        "answer",
        {"output_ids": [4], "meta_info": {"finish_reason": {"type": "other"}, LOGPROBS: [[-0.5, 4, None]]}},
    ),
    ("answer", {"output_ids": [2**40], "meta_info": {"finish_reason": {"type": "stop"}}}),
    ("answer", {"output_ids": [4], "meta_info": {"finish_reason": None}}),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_what_fails_a_few_times_is_answered_in_the_end(open_server: Open, fault: Any) -> None:
    def twice(body: Body, attempt: int) -> Any:
        return fault if index(body) % 3 == 0 and attempt < 2 else None

    with FaultServer(fault=twice) as faulty:
        engine = open_server(faulty)
        assert answered(engine, requests(24)) == {}
        sent = Counter(index(seen.body) for seen in faulty.seen)
        assert sent == Counter({i: 3 if i % 3 == 0 else 1 for i in range(24)})


@pytest.mark.parametrize("fault", ["shape", "truncated", "nan_logprob", "wrong_ids", "fewer", "abort", "short"])
def test_scores_that_fail_a_few_times_are_those_of_their_requests(open_server: Open, fault: str) -> None:
    def twice(body: Body, attempt: int) -> Any:
        return fault if index(body) % 3 == 0 and attempt < 2 else None

    to_score = score_requests(24)
    with FaultServer(fault=twice) as faulty:
        for request, scores in zip(to_score, open_server(faulty).score(to_score), strict=True):
            np.testing.assert_allclose(scores, expected_scores(request), rtol=1e-5)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("abort", "no room"),
        ("nan", "NaN"),
        ("nan_logprob", "not finite"),
        ("wrong_ids", "other tokens"),
        ("fewer", "other tokens"),
        ("truncated", "no JSON"),
        ("short", "complete message body"),
        (("status", 500, {}, '{"error": {"message": "out of\\nmemory"}}'), "answered 500: out of memory"),
    ],
    ids=str,
)
def test_what_always_fails_is_refused_alone(open_server: Open, fault: Any, said: str) -> None:
    with FaultServer(fault=lambda body, _: fault if index(body) in (3, 9) else None) as faulty:
        engine = open_server(faulty)
        refusals = answered(engine, requests(20))
        assert set(refusals) == {"p3", "p9"}
        assert all(said in reason and str(remote.TRIES) in reason for reason in refusals.values())
        if fault == "nan":
            return
        scores = engine.score(score_requests(20))
        assert [i for i, found in enumerate(scores) if isinstance(found, Unscored)] == [3, 9]
        assert said in str(scores[3])


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_that_the_server_refuses_is_refused_alone_and_at_once(open_server: Open, status: int) -> None:
    fault = ("status", status, {}, '{"error": {"message": "Input length (99) exceeds the context"}}')
    with FaultServer(fault=lambda body, _: fault if index(body) == 5 else None) as faulty:
        engine = open_server(faulty)
        reason = f"answered {status}: Input length (99) exceeds the context"
        assert answered(engine, requests(20)) == {"p5": reason}
        assert sum(index(seen.body) == 5 for seen in faulty.seen) == 1
        assert engine.score(score_requests(7))[5] == Unscored(reason)


@pytest.mark.parametrize(("status", "advice"), [(401, "API key"), (403, "API key"), (404, "engine.urls")])
def test_an_answer_that_no_request_can_change_ends_the_run(
    open_server: Open, one_line: Callable[[BaseException], str], status: int, advice: str
) -> None:
    with FaultServer(fault=lambda body, _: ("status", status, {}, '{"detail": "no"}')) as faulty:
        with pytest.raises(UserError) as caught:
            answered(open_server(faulty), requests(20))
        assert f"{faulty.url}: answered {status}: no" in one_line(caught.value) and advice in str(caught.value)
        assert len(faulty.seen) <= 4


def test_the_number_in_flight_is_that_of_both_threads(open_server: Open) -> None:
    with FaultServer(delay_s=0.02) as faulty:
        engine = open_server(faulty, max_in_flight=5)
        scores: list[Any] = []
        to_score = score_requests(60)
        thread = threading.Thread(target=lambda: scores.extend(engine.score(to_score)))
        thread.start()
        assert answered(engine, requests(60)) == {}
        thread.join(20)
        for request, found in zip(to_score, scores, strict=True):
            np.testing.assert_allclose(found, expected_scores(request), rtol=1e-5)
        assert faulty.most == 5


def test_retry_after_is_kept_by_all(open_server: Open) -> None:
    told: list[float] = []

    def busy_once(body: Body, attempt: int) -> Any:
        if index(body) == 6 and attempt == 0:
            told.append(time.monotonic())
            return ("status", 429, {"Retry-After": "1"}, "{}")
        return None

    with FaultServer(fault=busy_once, delay_s=0.01) as faulty:
        assert answered(open_server(faulty), requests(40)) == {}
        after = [at for at in faulty.times() if at > told[0] + 0.5]
        assert len(after) >= 20 and min(after) >= told[0] + 1.0
        on_their_way = [at for at in faulty.times() if told[0] < at <= told[0] + 0.5]
        assert len(on_their_way) <= 12


def test_retry_after_as_a_date(open_server: Open) -> None:
    told: list[float] = []

    def busy_once(body: Body, attempt: int) -> Any:
        if attempt == 0:
            told.append(time.monotonic())
            date = formatdate(time.time() + 2, usegmt=True)  # whole seconds: 1 to 2 from now
            return ("status", 503, {"Retry-After": date}, "{}")
        return None

    with FaultServer(fault=busy_once) as faulty:
        assert answered(open_server(faulty), requests(1)) == {}
        assert faulty.times()[1] - told[0] > 0.9


def test_a_request_that_hangs_is_asked_again_and_keeps_nobody_waiting(open_server: Open) -> None:
    with FaultServer(fault=lambda body, n: "hang" if index(body) == 2 and n == 0 else None) as faulty:
        engine = open_server(faulty, timeout_s=1.5)
        found = [answer.request.prompt_id for answer in engine.sample(requests(30), SAMPLING)]
        assert sorted(found) == sorted(f"p{i}" for i in range(30))
        assert found[-1] == "p2"


def test_a_server_that_dies_ends_the_run_in_the_stated_time(
    open_server: Open, one_line: Callable[[BaseException], str]
) -> None:
    with FaultServer() as faulty:
        engine = open_server(faulty, give_up_after_s=1.5)
        stream = engine.sample(requests(300), SAMPLING)
        found = [next(stream)]
        url = faulty.url
    died = time.monotonic()
    with pytest.raises(UserError) as caught:
        found += stream
    assert 1.0 < time.monotonic() - died < 15
    text = one_line(caught.value)
    assert url in text and "1.5 s" in text and "Connect" in text and "same command continues" in text
    assert len(found) < 300
    with pytest.raises(UserError, match="same command continues"):
        engine.score(score_requests(3))


def test_a_server_that_comes_back_loses_and_doubles_nothing(open_server: Open) -> None:
    with FaultServer(delay_s=0.01) as first:
        engine = open_server(first)
        stream = engine.sample(requests(100), SAMPLING)
        found = [next(stream)]
        port = first.port
    with FaultServer(port=port):
        found += stream
    assert Counter(answer.request.prompt_id for answer in found) == Counter(f"p{i}" for i in range(100))
    for sample in found:
        assert isinstance(sample, Sample)
        check(sample)


def test_prompts_keep_to_their_servers(open_server: Open) -> None:
    with FaultServer() as a, FaultServer() as b, FaultServer() as c:
        engine = open_server(a, b, c)
        wanted = [request for request in requests(60) for _ in range(3)]
        list(engine.sample(wanted, SAMPLING))
        engine.score([ScoreRequest(r.prompt_ids, np.array([4, 1], np.int32)) for r in wanted])
        homes = [{tuple(seen.body["input_ids"][:5]) for seen in each.seen} for each in (a, b, c)]
        assert all(len(home) > 8 for home in homes)
        assert sum(len(home) for home in homes) == 60, "no prompt is computed twice"


def test_replicas_behind_each_server_all_get_their_share(open_server: Open) -> None:
    with FaultServer(server_info={"dp_size": 2}) as a, FaultServer() as b:
        engine = open_server(a, b)
        assert answered(engine, requests(80)) == {}
        ranks = Counter(seen.body["routed_dp_rank"] for seen in a.seen)
        assert set(ranks) == {0, 1} and min(ranks.values()) > 8
        assert all("routed_dp_rank" not in seen.body for seen in b.seen)
        again = {index(seen.body): seen.body["routed_dp_rank"] for seen in a.seen}
        engine.score(score_requests(80))
        assert all(again[index(seen.body)] == seen.body["routed_dp_rank"] for seen in a.seen)


@pytest.mark.parametrize("fault", ["dead", "hang", "close", ("status", 500, {}, "out of order"), "wrong_ids"], ids=str)
def test_one_bad_server_among_several_costs_nothing_else(open_server: Open, fault: Any) -> None:
    wanted = requests(60)
    at_home = sum(prompt_number(request.prompt_ids) % 3 == 2 for request in wanted)
    with FaultServer() as good, FaultServer() as fine, FaultServer(fault=lambda body, _: fault) as bad:
        engine = open_server(good, fine, bad, timeout_s=1.0, max_in_flight=16)
        if fault == "dead":
            bad.stop()
        assert answered(engine, wanted) == {}
        assert len(good.seen) + len(fine.seen) == 60
        assert len(bad.seen) <= at_home, "each of its requests has come once at most, and no other's"
        assert bad.seen or fault == "dead"


def test_a_dropped_stream_cancels_its_requests_at_the_server(open_server: Open) -> None:
    with FaultServer(delay_s=lambda body: 0.0 if index(body) == 0 else 60.0) as faulty:
        engine = open_server(faulty, max_in_flight=4)
        stream = engine.sample(requests(20), SAMPLING)
        next(stream)
        deadline = time.monotonic() + 10
        while faulty.working < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        stream.close()  # type: ignore[attr-defined]
        while faulty.working and time.monotonic() < deadline:
            time.sleep(0.01)
        assert faulty.working == 0 and faulty.cut >= 3
        faulty.delay_s = 0.0
        assert answered(engine, requests(20, first=20)) == {}


def test_it_waits_for_servers_that_are_not_up_yet(open_server: Open) -> None:
    with FaultServer() as up, FaultServer() as late:
        late.stop()
        timer = threading.Timer(0.7, late.start)
        timer.start()
        try:
            engine = open_server(up, late)
        finally:
            timer.join()
        assert answered(engine, requests(12)) == {}
        assert late.seen


def test_servers_that_do_not_come_up(open_server: Open, one_line: Callable[[BaseException], str]) -> None:
    with FaultServer() as gone:
        pass
    with FaultServer() as up:
        started = time.monotonic()
        with pytest.raises(UserError) as caught:
            open_server(up, gone, give_up_after_s=1.0)
        assert 0.9 < time.monotonic() - started < 15
        text = one_line(caught.value)
        assert gone.url in text and "1 s" in text and "launch_server" in text and up.url not in text


def test_what_is_no_sglang_server(open_server: Open, one_line: Callable[[BaseException], str]) -> None:
    faulty = FaultServer()
    faulty.about = lambda path: None  # type: ignore[method-assign]
    with faulty, pytest.raises(UserError, match=r"engine\.urls") as caught:
        open_server(faulty)
    assert faulty.url in one_line(caught.value)


def test_names_of_older_servers(open_server: Open) -> None:
    faulty = FaultServer()
    usual = faulty.about
    older = {"/health": "/health", "/get_model_info": "/model_info", "/get_server_info": "/server_info"}
    faulty.about = lambda path: usual(older[path]) if path in older else None  # type: ignore[method-assign]
    with faulty:
        assert answered(open_server(faulty), requests(5)) == {}


@pytest.mark.parametrize(
    ("model", "serves", "path", "info"),
    [
        ("Qwen/Qwen3-8B", None, "Qwen/Qwen3-8B", {}),
        ("./models/Qwen3-8B/", None, "/data/Qwen3-8B", {}),
        ("Qwen/Qwen3-8B", "/data/x", "/data/x", {}),
        ("Qwen/Qwen3-8B", "mine", "/data/x", {"served_model_name": "mine"}),
    ],
)
def test_a_server_with_the_right_model(
    open_server: Open, model: str, serves: str | None, path: str, info: Body
) -> None:
    with FaultServer(model_path=path, model_info=info) as faulty:
        open_server(faulty, model=model, serves=serves)


@pytest.mark.parametrize("serves", [None, "another"])
def test_a_server_with_another_model(
    open_server: Open, one_line: Callable[[BaseException], str], serves: str | None
) -> None:
    with FaultServer(model_path="Qwen/Qwen3-8B") as right, FaultServer(model_path="/data/x") as wrong:
        with pytest.raises(UserError) as caught:
            open_server(right, wrong, model="Qwen/Qwen3-8B", serves=serves)
        text = one_line(caught.value)
        assert wrong.url in text and "/data/x" in text and "Qwen/Qwen3-8B" in text and "set engine.serves" in text


def test_a_folder_that_every_run_has_says_nothing(open_server: Open, demo: Path, tmp_path: Path) -> None:
    """`final` of an earlier round, still being served, is not `final` of this one."""
    stale = FaultServer(model_path="/runs/0/train/final")
    with stale, pytest.raises(UserError, match=r"serves /runs/0/train/final"):
        open_server(stale, model="/runs/1/train/final")
    # both folders are here: their weights are compared
    shutil.copytree(demo / "model", tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text("{}")
    changed = FaultServer(model_path=str(tmp_path / "other"))
    with changed, pytest.raises(UserError, match="whose weights are not those of"):
        open_server(changed, model=str(demo / "model"), serves=str(tmp_path / "other"))
    with FaultServer(model_path=str(demo / "model")) as right:
        open_server(right, model=str(demo / "model"))


def test_servers_with_different_weights(open_server: Open) -> None:
    one, other = FaultServer(), FaultServer(model_info={"weight_version": "step-100"})
    with one, other, pytest.raises(UserError, match=r"step-100.*same model"):
        open_server(one, other)


def test_a_server_that_generates_nothing(open_server: Open) -> None:
    with FaultServer(model_info={"is_generation": False}) as embedder, pytest.raises(UserError, match="generates"):
        open_server(embedder)


@pytest.mark.parametrize("url", ["node1:30000", "ftp://node1", "http://", "http://[", "http://a:99999999"])
def test_what_is_no_url(tokenizer: Tokenizer, url: str) -> None:
    config = ServerConfig(name="server", urls=(url,))
    with pytest.raises(UserError, match=r"engine\.urls"):
        server.check_urls(config)
    with pytest.raises(UserError, match=r"engine\.urls"):
        open_engine(MODEL, config, tokenizer)


def test_a_closed_engine_leaves_nothing_behind(open_server: Open) -> None:
    with FaultServer() as faulty:
        engine = open_server(faulty)
        assert answered(engine, requests(5)) == {}
        engine.close()
        engine.close()
        with pytest.raises(UserError, match="closed"):
            answered(engine, requests(5))
    assert not any(thread.name == "server-requests" for thread in threading.enumerate())


@pytest.mark.parametrize("well", [True, False])
def test_what_always_fails_when_nothing_else_is_left(open_server: Open, well: bool) -> None:
    """A server that generates for itself is not to blame; of one that does not, nobody knows."""
    with FaultServer(fault=lambda body, _: ("status", 500, {}, "overflow") if index(body) == 2 else None) as faulty:
        faulty.well = well
        engine = open_server(faulty, give_up_after_s=2)
        if well:
            refused = answered(engine, requests(1, first=2))
            assert list(refused) == ["p2"] and "answered 500: overflow" in refused["p2"]
            assert answered(engine, requests(2)) == {}, "the engine goes on"
        else:
            with pytest.raises(UserError, match="the same command continues"):
                answered(engine, requests(1, first=2))
