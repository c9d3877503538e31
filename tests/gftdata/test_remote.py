"""Requests kept in flight and what becomes of failures, with attempts that are plain coroutines.

What HTTP does to them is in test_server.py and test_endpoint.py.
"""

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from email.utils import formatdate
from typing import Any

import httpx2
import pytest
from tenacity import wait_random_exponential

from gftdata.engines import remote
from gftdata.engines.remote import Failed, Refused, Remote, message_of, of_status, of_transport, quoted, retry_after
from gftdata.errors import UserError

Open = Callable[..., Remote]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BACK_OFF", wait_random_exponential(multiplier=0.01, max=0.1))


@pytest.fixture
def open_remote() -> Iterator[Open]:
    remotes = []

    def start(
        urls: tuple[str, ...] = ("http://a",),
        max_in_flight: int = 4,
        timeout_s: float = 20,
        give_up_after_s: float = 20,
    ) -> Remote:
        remotes.append(
            Remote("test", urls, max_in_flight=max_in_flight, timeout_s=timeout_s, give_up_after_s=give_up_after_s)
        )
        return remotes[-1]

    yield start
    for each in remotes:
        each.close(nothing)


async def nothing() -> None:
    pass


def failed(reason: str = "a reason", counts: bool = True, **more: Any) -> Failed:
    return Failed(reason, counts=counts, **more)


def split(answers: Iterator[tuple[int, Any]]) -> tuple[dict[int, Any], dict[int, str]]:
    """Answers and refusals, each request once."""
    found = list(answers)
    assert max(Counter(request for request, _ in found).values()) == 1
    refusals = {request: str(answer) for request, answer in found if isinstance(answer, UserError)}
    return {request: answer for request, answer in found if request not in refusals}, refusals


def test_every_request_is_answered_once_with_its_own_answer(open_remote: Open) -> None:
    async def ask(request: int, url: str) -> int:
        await asyncio.sleep(random.uniform(0, 0.01))
        if random.random() < 0.3:
            raise failed(counts=False)
        return request * request

    answers, refusals = split(open_remote().stream(range(200), ask))
    assert answers == {i: i * i for i in range(200)}
    assert not refusals


def test_the_number_in_flight_is_kept_up_and_never_exceeded(open_remote: Open) -> None:
    """Each waits until the three after it are on their way, and the first one for all: only refilling gets through."""
    started = [asyncio.Event() for _ in range(40)]
    working = most = 0

    async def ask(request: int, url: str) -> int:
        nonlocal working, most
        working += 1
        most = max(most, working)
        started[request].set()
        await started[min(request + 3, 39) if request else 39].wait()
        working -= 1
        return request

    order = [request for request, _ in open_remote(max_in_flight=5, timeout_s=5).stream(range(40), ask)]
    assert sorted(order) == list(range(40))
    assert most == 5
    assert 0 in order[-5:]


def test_requests_are_taken_as_there_is_room(open_remote: Open) -> None:
    taken = 0

    def counted() -> Iterator[int]:
        nonlocal taken
        for i in range(30):
            taken += 1
            yield i

    async def ask(request: int, url: str) -> int:
        return request

    for done, _ in enumerate(open_remote(max_in_flight=3).stream(counted(), ask)):
        assert taken <= done + 3


def test_two_threads_share_the_limit_and_get_their_own_answers(open_remote: Open) -> None:
    both = open_remote(max_in_flight=4)
    working = most = 0
    found: dict[str, list[tuple[int, str]]] = {}

    def run(name: str) -> None:
        async def ask(request: int, url: str) -> str:
            nonlocal working, most
            working += 1
            most = max(most, working)
            await asyncio.sleep(0.005)
            working -= 1
            if random.random() < 0.2:
                raise failed(counts=False)
            return f"{name}{request}"

        found[name] = list(both.stream(range(60), ask))  # type: ignore[arg-type]

    threads = [threading.Thread(target=run, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for name in "ab":
        assert sorted(found[name]) == sorted((i, f"{name}{i}") for i in range(60))
    assert most == 4


def test_a_dropped_stream_cancels_its_requests_and_no_others(open_remote: Open) -> None:
    shared = open_remote(max_in_flight=8)
    begun: list[int] = []
    cancelled: list[int] = []

    async def ask(request: int, url: str) -> int:
        begun.append(request)
        try:
            while request or len(begun) < 4:
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            cancelled.append(request)
            raise
        return request

    async def other(request: int, url: str) -> int:
        await asyncio.sleep(0.1)
        return request

    beside = shared.stream(range(100, 104), other)
    first = next(beside)
    stream = shared.stream(range(4), ask)
    assert next(stream) == (0, 0)
    stream.close()  # type: ignore[attr-defined]
    assert sorted([first, *beside]) == [(i, i) for i in range(100, 104)]
    deadline = time.monotonic() + 5
    while len(cancelled) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(cancelled) == [1, 2, 3]


def test_an_iterator_that_fails_cancels_what_it_started(open_remote: Open) -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise OSError("no disk")

    async def ask(request: int, url: str) -> int:
        raise failed()

    shared = open_remote()
    with pytest.raises(OSError, match="no disk"):
        list(shared.stream(broken(), ask))
    deadline = time.monotonic() + 5
    while shared._jobs and time.monotonic() < deadline:  # it may have been cancelled before it began
        time.sleep(0.01)
    assert not shared._jobs and shared._alarm is None


def test_what_always_fails_is_given_up_alone_when_others_are_answered(open_remote: Open) -> None:
    asked: Counter[int] = Counter()

    async def ask(request: int, url: str) -> int:
        asked[request] += 1
        if request in (3, 4):
            raise failed(f"bad {request}")
        return request

    for limit in (1, 2, 8):  # a limit that the failing ones alone would fill
        asked.clear()
        answers, refusals = split(open_remote(max_in_flight=limit).stream(range(40), ask))
        assert set(answers) == set(range(40)) - {3, 4}
        assert set(refusals) == {3, 4}
        assert "bad 3" in refusals[3] and str(remote.TRIES) in refusals[3]
        assert asked[3] >= remote.TRIES and asked[5] == 1


def test_what_fails_alone_is_tried_until_the_end(open_remote: Open) -> None:
    asked = 0

    async def ask(request: int, url: str) -> int:
        nonlocal asked
        asked += 1
        raise failed("answered 500: out of memory")

    started = time.monotonic()
    with pytest.raises(UserError, match=r"http://a: answered 500: out of memory; .* 1 s .*continues") as caught:
        list(open_remote(give_up_after_s=1.0).stream([7], ask))
    assert 0.9 < time.monotonic() - started < 10
    assert asked > remote.TRIES
    assert len(str(caught.value).splitlines()) == 1


def test_what_does_not_count_never_gives_a_request_up(open_remote: Open) -> None:
    asked: Counter[int] = Counter()

    async def ask(request: int, url: str) -> int:
        asked[request] += 1
        if request == 3 and asked[3] <= 3 * remote.TRIES:
            raise failed(counts=False)
        await asyncio.sleep(0.01)
        return request

    answers, refusals = split(open_remote(max_in_flight=2).stream(range(60), ask))
    assert set(answers) == set(range(60)) and not refusals


def test_an_answer_sets_the_clock_back(open_remote: Open) -> None:
    answered = 0

    async def ask(request: int, url: str) -> int:
        nonlocal answered
        if request == 0 and answered < 9:  # for longer than the time to give up
            raise failed(counts=False)
        await asyncio.sleep(0.3)
        answered += 1
        return request

    started = time.monotonic()
    assert len(list(open_remote(max_in_flight=1, give_up_after_s=1.5).stream(range(10), ask))) == 10
    assert time.monotonic() - started > 1.5


def test_one_refusal_is_alone(open_remote: Open) -> None:
    asked: Counter[int] = Counter()

    async def ask(request: int, url: str) -> int:
        asked[request] += 1
        if request == 5:
            raise Refused("answered 400: too long")
        return request

    answers, refusals = split(open_remote().stream(range(20), ask))
    assert refusals == {5: "answered 400: too long"}
    assert set(answers) == set(range(20)) - {5}
    assert set(asked.values()) == {1}


def test_a_user_error_ends_everything_and_stays(open_remote: Open) -> None:
    async def ask(request: int, url: str) -> int:
        if request == 5:
            raise UserError("answered 401: who are you; check the key")
        await asyncio.sleep(0.05 * request)
        return request

    shared = open_remote()
    for _ in range(2):
        with pytest.raises(UserError, match="engine test: http://a: answered 401: who are you; check the key"):
            list(shared.stream(range(20), ask))


def test_a_mistake_of_ours_is_not_waited_for(open_remote: Open) -> None:
    async def ask(request: int, url: str) -> int:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        list(open_remote().stream(range(3), ask))


@pytest.mark.parametrize("give_up", [False, True])
def test_a_server_that_hangs_is_found_out(open_remote: Open, give_up: bool) -> None:
    asked: Counter[int] = Counter()

    async def ask(request: int, url: str) -> int:
        asked[request] += 1
        if request == 2 and (give_up or asked[2] == 1):
            await asyncio.sleep(60)
        return request

    shared = open_remote(timeout_s=0.5, give_up_after_s=1.5)
    if give_up:
        with pytest.raises(UserError, match=r"no answer within 0\.5 s"):
            list(shared.stream([2], ask))
    else:
        assert dict(shared.stream(range(5), ask)) == {i: i for i in range(5)}
        assert asked[2] == 2


def test_an_attempt_never_takes_longer_than_the_time_to_give_up(open_remote: Open) -> None:
    async def ask(request: int, url: str) -> int:
        await asyncio.sleep(60)
        return request

    started = time.monotonic()
    with pytest.raises(UserError, match="no valid answer"):
        list(open_remote(timeout_s=600, give_up_after_s=0.5).stream([1], ask))
    assert time.monotonic() - started < 10


def test_closing_while_another_thread_waits_ends_its_waiting(open_remote: Open) -> None:
    errors: list[Exception] = []
    asked = threading.Event()

    async def ask(request: int, url: str) -> int:
        asked.set()
        await asyncio.sleep(60)
        return request

    shared = open_remote()

    def wait() -> None:
        try:
            list(shared.stream(range(9), ask))
        except UserError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    assert asked.wait(10)
    shared.close(nothing)
    shared.close(nothing)
    thread.join(10)
    assert not thread.is_alive() and "closed" in str(errors[0])
    with pytest.raises(UserError, match="closed"):
        list(shared.stream(range(9), ask))
    assert not shared._thread.is_alive()


def test_a_server_that_wants_to_be_left_alone_is_left_alone_by_all(open_remote: Open) -> None:
    held = 1.5
    asked: list[tuple[float, int]] = []
    told = 0.0

    async def ask(request: int, url: str) -> int:
        nonlocal told
        asked.append((time.monotonic(), request))
        await asyncio.sleep(0.02)
        if request == 6 and not told:
            told = time.monotonic()
            raise failed("busy", counts=False, retry_after=held)
        return request

    answers, _ = split(open_remote(max_in_flight=3).stream(range(20), ask))
    assert len(answers) == 20
    after = [at for at, _ in asked if at > told]
    assert len(after) >= 10 and min(after) >= told + held - 0.02


def test_what_waits_for_room_is_held_too_and_what_is_under_way_is_answered(open_remote: Open) -> None:
    shared = open_remote(max_in_flight=2)
    held = 1.5
    asked: list[float] = []
    told = slow_answered = 0.0

    async def ask(request: int, url: str) -> int:
        nonlocal told, slow_answered
        asked.append(time.monotonic())
        if request == 0:
            await asyncio.sleep(0.4)
            slow_answered = time.monotonic()
        elif not told:
            await asyncio.sleep(0.2)  # until both streams have requests that wait for room
            told = time.monotonic()
            raise failed("busy", counts=False, retry_after=held)
        return request

    def run() -> None:
        assert len(list(shared.stream(range(1, 9), ask))) == 8

    beside = threading.Thread(target=run)
    first = shared.stream([0], ask)
    beside_started = threading.Timer(0.05, beside.start)
    beside_started.start()
    assert list(first) == [(0, 0)]
    other = shared.stream(range(9, 17), ask)
    assert len(list(other)) == 8
    beside.join(10)
    assert told < slow_answered < told + 0.8 * held
    after = [at for at in asked if at > told]
    assert len(after) == 16 and min(after) >= told + held - 0.02


def test_the_end_cancels_what_is_under_way_at_once(open_remote: Open) -> None:
    cancelled: list[int] = []
    begun: list[int] = []

    async def ask(request: int, url: str) -> int:
        begun.append(request)
        if request == 1:
            while len(begun) < 4:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            raise UserError("answered 401")
        try:
            await asyncio.sleep(60 if request else 0)
        except asyncio.CancelledError:
            cancelled.append(request)
            raise
        return request

    stream = open_remote().stream(range(4), ask)
    assert next(stream) == (0, 0)
    deadline = time.monotonic() + 10
    while len(cancelled) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(cancelled) == [2, 3]
    with pytest.raises(UserError, match="401"):
        next(stream)


def test_a_wait_is_never_longer_than_the_time_to_give_up(open_remote: Open) -> None:
    async def ask(request: int, url: str) -> int:
        raise failed("come again tomorrow", counts=False, retry_after=86400)

    with pytest.raises(UserError, match="come again tomorrow"):
        list(open_remote(give_up_after_s=0.5).stream([1], ask))


def test_a_failed_attempt_goes_to_the_next_url_at_once(open_remote: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BACK_OFF", lambda state: 60.0)  # which is not to be needed
    urls = ("http://a", "http://b", "http://c")
    asked: Counter[tuple[int, str]] = Counter()

    async def ask(request: int, url: str) -> int:
        asked[request, url] += 1
        if url == "http://b":
            raise failed("dead", counts=False, lost=True)
        return request

    answers, refusals = split(open_remote(urls).stream(range(30), ask, lambda request: request))
    assert set(answers) == set(range(30)) and not refusals
    for request in range(30):
        if request % 3 != 1:  # the others' requests are at home
            assert asked[request, urls[request % 3]] == 1
            assert sum(asked[request, url] for url in urls) == 1
    assert sum(asked[request, "http://b"] for request in range(30)) < 10, "a dead server is passed over for a while"


def test_requests_of_a_held_server_go_to_another(open_remote: Open) -> None:
    asked: Counter[str] = Counter()

    async def ask(request: int, url: str) -> int:
        asked[url] += 1
        if url == "http://a":
            raise failed("busy", counts=False, retry_after=30)
        return request

    answers, _ = split(open_remote(("http://a", "http://b"), max_in_flight=1).stream(range(20), ask))
    assert len(answers) == 20
    assert asked == {"http://a": 1, "http://b": 20}


def test_a_server_that_is_held_for_long_is_asked_again_in_time(open_remote: Open) -> None:
    asked: Counter[str] = Counter()

    async def ask(request: int, url: str) -> int:
        asked[url] += 1
        if asked == {"http://a": 1}:
            raise failed("come again tomorrow", counts=False, retry_after=86400)
        await asyncio.sleep(0.1)
        return request

    shared = open_remote(("http://a", "http://b"), max_in_flight=1, give_up_after_s=1)
    assert len(list(shared.stream(range(20), ask))) == 20
    assert asked["http://a"] > 1 and asked["http://b"] > 1


def test_waiting_requests_do_not_pile_up(open_remote: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "ASIDE", 10)
    taken = 0

    def counted() -> Iterator[int]:
        nonlocal taken
        for i in range(10_000):
            taken += 1
            yield i

    async def ask(request: int, url: str) -> int:
        raise failed(counts=False)

    with pytest.raises(UserError):
        list(open_remote(max_in_flight=4, give_up_after_s=0.5).stream(counted(), ask))
    assert taken <= 14


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "2.5"}, 2.5),
        ({"retry-after-ms": "1500", "retry-after": "60"}, 1.5),
        ({"retry-after": "-5"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"retry-after": "Wed, 99 Oct 2015 07:28:00 GMT"}, None),
        ({}, None),
    ],
)
def test_what_a_server_says_of_when_to_come_again(headers: dict[str, str], expected: float | None) -> None:
    assert retry_after(httpx2.Headers(headers)) == expected


def test_a_date_to_come_again() -> None:
    wait = retry_after({"retry-after": formatdate(time.time() + 60, usegmt=True)})
    assert wait is not None and 55 < wait <= 60


@pytest.mark.parametrize("status", [400, 413, 422])
def test_statuses_that_refuse(status: int) -> None:
    assert isinstance(of_status(status, {}, "no", {}), Refused)


@pytest.mark.parametrize(
    ("status", "headers", "counts", "wait"),
    [
        (408, {}, True, None),
        (409, {}, True, None),
        (429, {}, False, None),
        (429, {"retry-after": "4"}, False, 4.0),
        (500, {}, True, None),
        (500, {"retry-after": "4"}, True, None),
        (502, {}, True, None),
        (503, {}, True, None),
        (503, {"retry-after": "4"}, False, 4.0),
        (529, {}, True, None),
        (204, {}, True, None),
    ],
)
def test_statuses_that_are_tried_again(status: int, headers: dict[str, str], counts: bool, wait: float | None) -> None:
    error = of_status(status, headers, "words", {})
    assert isinstance(error, Failed)
    assert (error.counts, error.retry_after) == (counts, wait)
    assert str(error) == f"answered {status}: words"


@pytest.mark.parametrize("status", [301, 401, 402, 403, 404, 405])
def test_statuses_that_end_the_run(status: int) -> None:
    error = of_status(status, {}, "words", {401: "check the key"})
    assert isinstance(error, UserError)
    assert ("check the key" in str(error)) == (status == 401)


@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (httpx2.ConnectError("refused"), False),
        (httpx2.ConnectTimeout("slow"), False),
        (httpx2.ReadError("reset"), False),
        (httpx2.RemoteProtocolError("Server disconnected without sending a response."), False),
        (httpx2.RemoteProtocolError("peer closed connection without sending complete message body"), True),
        (httpx2.RemoteProtocolError("illegal status line"), True),
        (httpx2.DecodingError("no gzip"), True),
    ],
)
def test_errors_of_the_connection(error: Exception, counts: bool) -> None:
    found = of_transport(error, str(error))
    assert isinstance(found, Failed) and found.counts == counts


def test_errors_of_the_connection_that_are_the_users() -> None:
    assert isinstance(of_transport(httpx2.UnsupportedProtocol("no scheme"), ""), UserError)
    assert isinstance(of_transport(httpx2.TooManyRedirects("circle"), ""), UserError)


def test_what_an_error_says() -> None:
    assert message_of('{"error": {"message": "too long", "code": 3}}') == "too long"
    assert message_of('{"error": "too long"}') == "too long"
    assert message_of('{"object": "error", "message": "too long"}') == "too long"
    assert message_of('{"detail": "Not Found"}') == "Not Found"
    assert message_of("<html>") == "<html>"
    assert message_of("[1, 2]") == "[1, 2]"
    assert message_of('{"error": {}}') == '{"error": {}}'
    assert quoted("  two\nlines ") == "two lines"
    assert quoted("") == "nothing"
    assert len(quoted("x" * 5000)) < 400
