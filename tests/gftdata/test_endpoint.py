"""The endpoint that gives text, against a real HTTP server that fails on demand."""

import json
import logging
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from aid.fault_server import Body, FaultServer, reply
from tenacity import wait_random_exponential

from gftdata.config import OpenaiConfig
from gftdata.engines import remote
from gftdata.engines.endpoint import Endpoint, check_key, open_endpoint, without
from gftdata.errors import UserError
from gftdata.types import Message, Refusal, Sample, SampleRequest, Sampling, Seed

KEY = "sk-secret/0123+456789abcdef"
SAMPLING = Sampling(temperature=0.7, top_p=0.9, max_tokens=8, stop=())
Open = Callable[..., Endpoint]
PATH = "/v1/chat/completions"
NO_IDS = np.zeros(0, np.int32)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BACK_OFF", wait_random_exponential(multiplier=0.01, max=0.1))
    monkeypatch.setenv("TEST_KEY", KEY)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def open_at() -> Iterator[Open]:
    endpoints = []

    def start(fault: FaultServer, **settings: Any) -> Endpoint:
        settings = {"max_in_flight": 4, "timeout_s": 20, "give_up_after_s": 20, "api_key_env": "TEST_KEY"} | settings
        config = OpenaiConfig(name="openai", base_url=f"{fault.url}/v1", **settings)
        endpoints.append(open_endpoint("big-model", config))
        return endpoints[-1]

    yield start
    for endpoint in endpoints:
        endpoint.close()


def requests(count: int) -> list[SampleRequest]:
    return [
        SampleRequest(f"p{i}", 0, (Message("system", "Be brief."), Message("user", f"question {i}")), NO_IDS, Seed(i))
        for i in range(count)
    ]


def index(body: Body) -> int:
    return int(body["messages"][-1]["content"].split()[-1])


def answered(endpoint: Endpoint, count: int) -> dict[str, str]:
    """Draw samples: each request once, each with the answer to its own question. Prompt -> reason of the refusals."""
    counts: Counter[str] = Counter()
    refusals: dict[str, str] = {}
    for answer in endpoint.sample(iter(requests(count)), SAMPLING):
        counts[answer.request.prompt_id] += 1
        if isinstance(answer, Refusal):
            refusals[answer.request.prompt_id] = answer.reason
        else:
            assert answer.text == reply([{"content": answer.request.messages[-1].content}])
            assert (len(answer.response_ids), len(answer.behavior_logprobs), answer.num_tokens) == (0, 0, 7)
            assert (answer.finish_reason, answer.seed) == ("stop", None)
    assert counts == Counter(f"p{i}" for i in range(count))
    return refusals


def completion(**choice: Any) -> tuple[str, Body]:
    message = {"role": "assistant", "content": choice.pop("content", "text")}
    usage = choice.pop("usage", {"completion_tokens": 5})
    return "answer", {"choices": [{"finish_reason": "stop", "message": message} | choice], "usage": usage}


def only(endpoint: Endpoint) -> Sample | Refusal:
    (answer,) = endpoint.sample(requests(1), SAMPLING)
    return answer


def test_what_is_asked_and_what_comes_of_it(open_at: Open) -> None:
    with FaultServer() as fault:
        endpoint = open_at(fault, extra={"reasoning_effort": "low"})
        assert answered(endpoint, 30) == {}
        assert Counter(seen.path for seen in fault.seen) == {PATH: 30}
        seen = next(seen for seen in fault.seen if index(seen.body) == 3)
        assert seen.headers["authorization"] == f"Bearer {KEY}"
        assert seen.body == {
            "model": "big-model",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "question 3"}],
            "temperature": 0.7,
            "top_p": 0.9,
            "max_tokens": 8,
            "seed": 3,
            "reasoning_effort": "low",
        }
        assert endpoint.version.startswith("openai ")


def test_stop_texts_and_settings_that_are_left_out(open_at: Open) -> None:
    with FaultServer() as fault:
        endpoint = open_at(fault, extra={"seed": None, "top_p": None})
        list(endpoint.sample(requests(1), Sampling(1.0, 1.0, 8, ("\n\n",))))
        body = fault.seen[0].body
        assert body["stop"] == ["\n\n"] and "seed" not in body and "top_p" not in body


def test_seeds_have_31_bits(open_at: Open) -> None:
    with FaultServer() as fault:
        request = SampleRequest("p", 0, (Message("user", "question 1"),), NO_IDS, Seed(2**63 - 5))
        list(open_at(fault).sample([request], SAMPLING))
        assert 0 <= fault.seen[0].body["seed"] < 2**31


@pytest.mark.parametrize(
    ("answer", "text", "tokens", "reason"),
    [
        (completion(finish_reason="length"), "text", 5, "length"),
        (completion(content=None), "", 5, "stop"),
        (completion(content="", finish_reason="length"), "", 5, "length"),
        (completion(usage=None), "text", 0, "stop"),
        (completion(usage={"completion_tokens": None}), "text", 0, "stop"),
        (completion(usage={"completion_tokens": -1}), "text", 0, "stop"),
    ],
)
def test_answers_that_are_valid(open_at: Open, answer: tuple[str, Body], text: str, tokens: int, reason: str) -> None:
    with FaultServer(fault=lambda body, _: answer) as fault:
        sample = only(open_at(fault))
        assert isinstance(sample, Sample)
        assert (sample.text, sample.num_tokens, sample.finish_reason) == (text, tokens, reason)
        assert len(fault.seen) == 1


def test_a_content_filter_is_a_refusal(open_at: Open) -> None:
    with FaultServer(fault=lambda body, _: completion(finish_reason="content_filter", content=None)) as fault:
        refusal = only(open_at(fault))
        assert isinstance(refusal, Refusal) and "content filter" in refusal.reason
        assert len(fault.seen) == 1


FAULTS = [
    "garbage",
    "html",
    "shape",
    "empty",
    "truncated",
    "short",
    "close",
    ("status", 429, {}, "{}"),
    ("status", 429, {"Retry-After": "0.05"}, "{}"),
    ("status", 429, {"Retry-After": "0.05", "x-should-retry": "false"}, "{}"),
    ("status", 500, {}, "Internal Server Error"),
    ("status", 503, {"retry-after-ms": "50"}, '{"error": {"message": "busy"}}'),
    ("status", 409, {}, ""),
    ("status", 204, {}, ""),
    ("answer", []),
    ("answer", {"error": {"message": "upstream failed", "code": 502}}),
    ("answer", {"choices": []}),
    ("answer", {"choices": None}),
    ("answer", {"choices": [{"finish_reason": "stop", "message": None}]}),
    ("answer", {"choices": [{"finish_reason": "stop"}]}),
    completion(finish_reason=None),
    completion(finish_reason="tool_calls", content=None),
    completion(finish_reason="error"),
    completion(content=["a", "b"]),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_what_fails_a_few_times_is_answered_in_the_end(open_at: Open, fault: Any) -> None:
    def twice(body: Body, attempt: int) -> Any:
        return fault if index(body) % 3 == 0 and attempt < 2 else None

    with FaultServer(fault=twice) as faulty:
        assert answered(open_at(faulty), 12) == {}
        assert Counter(index(seen.body) for seen in faulty.seen) == {i: 3 if i % 3 == 0 else 1 for i in range(12)}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("shape", "another shape"),
        ("truncated", "no JSON"),
        ("short", "complete message body"),
        (completion(finish_reason="tool_calls"), "tool_calls"),
        (("answer", {"error": {"message": "upstream failed"}}), "upstream failed"),
        (("status", 500, {}, '{"error": {"message": "out of\\nmemory"}}'), "answered 500: out of memory"),
    ],
    ids=str,
)
def test_what_always_fails_is_refused_alone(open_at: Open, fault: Any, said: str) -> None:
    with FaultServer(fault=lambda body, _: fault if index(body) in (3, 9) else None) as faulty:
        refusals = answered(open_at(faulty), 20)
        assert set(refusals) == {"p3", "p9"}
        assert all(said in reason and str(remote.TRIES) in reason for reason in refusals.values())


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_that_is_refused_is_refused_alone_and_at_once(open_at: Open, status: int) -> None:
    fault = ("status", status, {}, '{"error": {"message": "flagged as unsafe"}}')
    with FaultServer(fault=lambda body, _: fault if index(body) == 5 else None) as faulty:
        assert answered(open_at(faulty), 20) == {"p5": f"answered {status}: flagged as unsafe"}
        assert len(faulty.seen) == 20


@pytest.mark.parametrize(("status", "advice"), [(401, "TEST_KEY"), (403, "TEST_KEY"), (404, "engine.base_url")])
def test_an_answer_that_no_request_can_change_ends_the_run(
    open_at: Open, one_line: Callable[[BaseException], str], status: int, advice: str
) -> None:
    with FaultServer(fault=lambda body, _: ("status", status, {}, '{"error": {"message": "no"}}')) as faulty:
        with pytest.raises(UserError) as caught:
            answered(open_at(faulty), 20)
        text = one_line(caught.value)
        assert f"{faulty.url}/v1: answered {status}: no" in text and advice in text
        assert len(faulty.seen) <= 4


@pytest.mark.parametrize(
    "error",
    [
        {
            "message": "Unsupported parameter: 'max_tokens' is not supported with this model. "
            "Use 'max_completion_tokens' instead.",
            "param": "max_tokens",
            "code": "unsupported_parameter",
        },
        {"message": "max_tokens: unsupported"},
    ],
)
def test_the_newer_name_of_the_limit(open_at: Open, error: Body) -> None:
    def newer(body: Body, attempt: int) -> Any:
        return ("status", 400, {}, json.dumps({"error": error})) if "max_tokens" in body else None

    with FaultServer(fault=newer) as faulty:
        endpoint = open_at(faulty)
        assert answered(endpoint, 20) == {}
        assert len(faulty.seen) <= 24, "it is learnt once"
        assert sum(seen.body.get("max_completion_tokens") == 8 for seen in faulty.seen) == 20


def test_a_limit_that_is_too_high_is_no_reason_for_another_name(open_at: Open) -> None:
    fault = ("status", 400, {}, '{"error": {"message": "max_tokens is larger than supported: 4"}}')
    with FaultServer(fault=lambda body, _: fault if index(body) == 0 else None) as faulty:
        assert set(answered(open_at(faulty), 5)) == {"p0"}
        assert all("max_tokens" in seen.body for seen in faulty.seen)


def test_retry_after_is_kept_by_all(open_at: Open) -> None:
    told: list[float] = []

    def busy_once(body: Body, attempt: int) -> Any:
        if index(body) == 6 and attempt == 0:
            told.append(time.monotonic())
            return ("status", 429, {"Retry-After": "1"}, "{}")
        return None

    with FaultServer(fault=busy_once, delay_s=0.01) as faulty:
        assert answered(open_at(faulty), 40) == {}
        after = [at for at in faulty.times(PATH) if at > told[0] + 0.5]
        assert len(after) >= 20 and min(after) >= told[0] + 1.0


def test_never_more_in_flight_than_asked(open_at: Open) -> None:
    with FaultServer(delay_s=0.02) as faulty:
        assert answered(open_at(faulty, max_in_flight=5), 60) == {}
        assert faulty.most == 5


def test_an_endpoint_that_dies_ends_the_run_in_the_stated_time(
    open_at: Open, one_line: Callable[[BaseException], str]
) -> None:
    with FaultServer() as faulty:
        endpoint = open_at(faulty, give_up_after_s=1.5)
        stream = endpoint.sample(requests(300), SAMPLING)
        found = [next(stream)]
        url = faulty.url
    died = time.monotonic()
    with pytest.raises(UserError) as caught:
        found += stream
    assert 1.0 < time.monotonic() - died < 15
    text = one_line(caught.value)
    assert f"{url}/v1" in text and "1.5 s" in text and "Connect" in text and "same command continues" in text


def test_an_endpoint_that_hangs_ends_the_run_in_the_stated_time(open_at: Open) -> None:
    with FaultServer(fault=lambda body, _: "hang") as faulty:
        started = time.monotonic()
        with pytest.raises(UserError, match=r"no answer within 0\.5 s"):
            answered(open_at(faulty, timeout_s=0.5, give_up_after_s=1.0), 20)
        assert time.monotonic() - started < 15


def test_a_missing_key_is_said_before_anything_is_asked(
    monkeypatch: pytest.MonkeyPatch, one_line: Callable[[BaseException], str]
) -> None:
    config = OpenaiConfig(name="openai", base_url="http://127.0.0.1:1/v1", api_key_env="NO_SUCH_KEY")
    for value in (None, "", "  "):
        if value is not None:
            monkeypatch.setenv("NO_SUCH_KEY", value)
        for ask in (lambda: check_key(config), lambda: open_endpoint("m", config)):
            with pytest.raises(UserError, match="NO_SUCH_KEY") as caught:
                ask()
            assert "any text" in one_line(caught.value)
    monkeypatch.setenv("NO_SUCH_KEY", "x")
    check_key(config)


@pytest.mark.parametrize("key", ["sk-söcret", "sk-secret\nsk-other", "sk secret", "sk-\x07"])
def test_a_key_that_can_be_none_is_not_shown(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("TEST_KEY", key)
    with pytest.raises(UserError, match="TEST_KEY") as caught:
        check_key(OpenaiConfig(name="openai", api_key_env="TEST_KEY"))
    assert "sk" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [{"extra": {"n": 2}}, {"extra": {"max_tokens": 5}}, {"extra": {"seed": 5}}, {"extra": {"messages": None}}],
)
def test_what_cannot_be_set_as_extra(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"engine\.extra"):
        check_key(OpenaiConfig(name="openai", api_key_env="TEST_KEY", **settings))


def test_what_is_no_url() -> None:
    with pytest.raises(UserError, match=r"engine\.base_url"):
        check_key(OpenaiConfig(name="openai", api_key_env="TEST_KEY", base_url="localhost:8000/v1"))


ECHOES = [
    (
        "status",
        401,
        {"x-echo": KEY},
        f'{{"error": {{"message": "Incorrect API key provided: {KEY}", "code": "{KEY}"}}}}',
    ),
    ("status", 400, {}, f'{{"error": {{"message": "Bearer {KEY} may not", "param": "{KEY}"}}}}'),
    ("status", 500, {}, f"<html>{'x' * 265} Authorization: Bearer {KEY}</html>"),
    ("status", 500, {}, f"https://there/?key={KEY.replace('/', '%2F').replace('+', '%2B')}"),
    ("answer", {"error": {"message": f"bad key {KEY}"}}),
    ("answer", {"choices": [{"finish_reason": KEY, "message": {"content": "a"}}]}),
    ("status", 302, {"Location": f"ftp://{KEY}/"}, KEY),
    "garbage",
]


@pytest.mark.parametrize("fault", ECHOES, ids=str)
def test_the_key_is_nowhere(
    open_at: Open, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], fault: Any
) -> None:
    """What the endpoint echoes must not come out: not in a reason, an error, its traceback, a repr or a log of ours."""
    caplog.set_level(logging.DEBUG)
    said = []
    with FaultServer(fault=lambda body, _: fault if index(body) == 2 else None) as faulty:
        endpoint = open_at(faulty, give_up_after_s=5)
        said += [repr(endpoint), str(vars(endpoint)), endpoint.version]
        try:
            said += [repr(answer) for answer in endpoint.sample(requests(6), SAMPLING)]
        except UserError as error:
            said += [str(error), repr(error), "".join(traceback.format_exception(error))]
            assert error.__cause__ is None
    said += [record.getMessage() for record in caplog.records if not record.name.startswith("httpcore")]
    captured = capfd.readouterr()
    text = "\n".join([*said, captured.out, captured.err])
    assert "secret" not in text
    assert "456789abcdef" not in text
    assert "***" in text or fault == "garbage" or fault[1] == 302


def test_a_key_is_cut_out_in_every_form() -> None:
    assert without(KEY, f"a {KEY} b") == "a *** b"
    assert without('a"b', '{"x": "a\\"b"}') == '{"x": "***"}'
    assert without("a/b", "?k=a%2Fb") == "?k=***"
