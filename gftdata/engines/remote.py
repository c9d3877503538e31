"""What engines behind a network share: requests kept in flight, and what is done when an attempt fails.

One asyncio loop in a daemon thread sends the requests of all callers' threads; an attempt is a coroutine of the
engine's (`Ask`), which raises `Failed`, `Refused` or UserError for what is no valid answer. What the request and the
answer are is the engine's own affair.

    Failed     tried again, with back-off and jitter, at the next URL where there are several
    Refused    the server does not take this request: given up at once, alone
    UserError  nothing will be answered: everything ends

A failure that may be the request's own counts against it, and after TRIES of them it is given up, provided that other
requests were answered meanwhile. When nobody has had a valid answer for `give_up_after_s`, everything ends, unless the
engine can tell that its servers are well (`is_well`): then those requests are to blame that have failed so often.
"""

import asyncio
import json
import math
import queue
import random
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from gftdata.errors import UserError

TRIES = 8  # counted failures, before a request is given up
BACK_OFF = wait_random_exponential(multiplier=1, max=30)  # seconds: uniform in [0, min(30, 2^(n-1))] after n failures
ASIDE = 256  # requests that wait for another try, beside which others are sent
DOWN_S = 10.0  # how long a server that could not be reached is passed over, where there are others
CONNECT_S = 10.0  # how long a connection may take
STOP_S = 5.0  # how long the loop may take to end
MAX_QUOTE = 300  # characters of a server's message

Request = TypeVar("Request")
Answer = TypeVar("Answer")
Result = TypeVar("Result")
Ask = Callable[[Request, str], Awaitable[Answer]]  # one attempt at one URL


class Failed(Exception):
    """An attempt brought no valid answer; another may. `retry_after`: what the server asked for, in seconds."""

    def __init__(self, reason: str, *, counts: bool, retry_after: float | None = None, lost: bool = False) -> None:
        super().__init__(reason)
        self.counts = counts  # whether it may be the request's own fault
        self.retry_after = retry_after
        self.lost = lost  # whether the server could not be reached


class Refused(Exception):
    """The server does not take this request, now or later."""


@dataclass(slots=True, eq=False)
class _Job:
    """A request on its way. `events` brings (job, None) when it starts to wait for another try, then its outcome."""

    request: Any
    ask: Ask[Any, Any]
    home: int  # index of the URL that is asked first
    events: "queue.SimpleQueue[tuple[_Job, _Event]]"
    failures: int = 0
    counted: int = 0
    answers_before: int = 0  # of all requests, at the first failure
    last_failure: str = ""
    task: "asyncio.Task[None] | None" = None


@dataclass(frozen=True, slots=True)
class _Event:
    """`aside`: it waits for another try. `outcome`: an answer, or the UserError of one request. `end`: of all."""

    kind: str
    value: Any = None


class Remote:
    """Keeps requests to `urls` going, `max_in_flight` at a time over all threads that call. Close it."""

    def __init__(
        self,
        name: str,
        urls: Sequence[str],
        *,
        max_in_flight: int,
        timeout_s: float,
        give_up_after_s: float,
        is_well: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        self._name = name
        self._urls = tuple(urls)
        self._max_in_flight = max_in_flight
        self._give_up_after_s = give_up_after_s
        self._attempt_s = min(timeout_s, give_up_after_s)  # a server that hangs must be found out before the end
        self._is_well = is_well
        self._stopped = False  # whether the loop takes nothing more
        self._lock = threading.Lock()  # of `_stopped`
        self._closing = threading.Lock()
        # all below belongs to the loop's thread
        self._slots = asyncio.Semaphore(max_in_flight)
        self._jobs: set[_Job] = set()
        self._failing: set[_Job] = set()
        self._answers = 0
        self._held: dict[str, float] = {}  # URL -> until when its server wants to be left alone
        self._down: dict[str, float] = {}  # URL -> until when its server is passed over
        self._alarm: asyncio.TimerHandle | None = None  # set while requests are out, from the last answer on
        self._last_failure = "no answer"
        self._deciding: asyncio.Task[None] | None = None
        self._gone: Exception | None = None  # why nothing will be answered any more
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"{name}-requests", daemon=True)
        self._thread.start()

    def stream(
        self, requests: Iterable[Request], ask: Ask[Request, Answer], home: Callable[[Request], int] = lambda _: 0
    ) -> Iterator[tuple[Request, Answer | UserError]]:
        """Yield each request with its answer, or the reason why it was given up, in order of completion.

        Requests are taken as there is room for them: `max_in_flight` that have not failed yet, so that one which waits
        for another try keeps nobody waiting. `home(request)`, modulo the number of URLs, is the URL that is asked
        first. Raises UserError when the engine has ended. A stream that is dropped half way cancels its requests.
        """
        events: queue.SimpleQueue[tuple[_Job, _Event]] = queue.SimpleQueue()
        waiting: set[_Job] = set()
        aside: set[_Job] = set()
        source = iter(requests)
        exhausted = False
        try:
            while True:
                while not exhausted and len(waiting) - len(aside) < self._max_in_flight and len(aside) < ASIDE:
                    try:
                        request = next(source)
                    except StopIteration:
                        exhausted = True
                        break
                    job = _Job(request, ask, home(request) % len(self._urls), events)
                    waiting.add(job)
                    self._call(self._start, job)
                if not waiting:
                    return
                job, event = events.get()
                if event.kind == "end":
                    if isinstance(event.value, UserError):  # each thread raises its own
                        raise UserError(str(event.value))
                    raise event.value
                if event.kind == "aside":
                    aside.add(job)
                    continue
                waiting.discard(job)
                aside.discard(job)
                yield job.request, event.value
        finally:
            if waiting:
                with suppress(UserError):
                    self._call(self._drop, waiting)

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run something else in the loop's thread, and wait for it."""
        future: Future[Result] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        return future.result()

    def close(self, close_clients: Callable[[], Awaitable[None]]) -> None:
        """End the loop; whoever waits for an answer gets a UserError. May be called again."""
        with self._closing:
            if self._stopped:
                return
            try:
                self.run(self._shut(close_clients))
            finally:
                with self._lock:
                    self._stopped = True  # what was called before this is run before the loop stops
                    self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join()
                self._loop.close()

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        with self._lock:
            if self._stopped:
                raise UserError(f"engine {self._name}: it was closed")
            self._loop.call_soon_threadsafe(function, *arguments)

    async def _shut(self, close_clients: Callable[[], Awaitable[None]]) -> None:
        self._end(UserError(f"engine {self._name}: it was closed"))
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                await asyncio.gather(*others, return_exceptions=True)
                await close_clients()

    def _start(self, job: _Job) -> None:
        if self._gone is not None:
            job.events.put((job, _Event("end", self._gone)))
            return
        self._jobs.add(job)
        job.task = self._loop.create_task(self._handle(job))
        job.task.add_done_callback(lambda _: self._forget(job))

    def _forget(self, job: _Job) -> None:
        self._jobs.discard(job)
        self._failing.discard(job)
        if not self._jobs:
            self._calm()

    def _drop(self, jobs: Iterable[_Job]) -> None:
        for job in jobs:
            if job.task is not None:
                job.task.cancel()

    def _end(self, error: Exception) -> None:
        """Nothing will be answered any more. The first reason stays."""
        if self._gone is None:
            self._gone = error
        for job in self._jobs:
            job.events.put((job, _Event("end", self._gone)))
        self._drop(self._jobs)

    async def _handle(self, job: _Job) -> None:
        """See one request to its end."""
        attempts = AsyncRetrying(
            retry=retry_if_exception_type(Failed),
            stop=lambda _: job.counted >= TRIES and self._answers > job.answers_before,
            wait=lambda state: self._pause(job, state),
            sleep=asyncio.sleep,
            reraise=True,
        )
        try:
            outcome: Any = await attempts(self._attempt, job)
        except Failed as error:
            outcome = UserError(f"given up after {job.counted} tries: {error}")
        except Refused as error:
            outcome = UserError(str(error))
        except Exception as error:  # a UserError, or a mistake of ours: nobody may be left waiting
            self._end(error)
            return
        job.events.put((job, _Event("outcome", outcome)))

    def _pause(self, job: _Job, state: RetryCallState) -> float:
        """Another server is asked at once; the same ones again after a while."""
        return 0.0 if job.failures % len(self._urls) else BACK_OFF(state)

    async def _attempt(self, job: _Job) -> Any:
        """Ask once, when there is room and the server may be asked."""
        while True:
            _, wait = self._choose(job)
            if wait > 0:
                await asyncio.sleep(wait + random.uniform(0, min(1.0, wait)))
                continue
            async with self._slots:
                url, wait = self._choose(job)
                if wait > 0:  # it has asked to be left alone meanwhile
                    continue
                if self._alarm is None:
                    self._set_alarm()
                try:
                    answer = await self._ask(job, url)
                except Failed as error:
                    self._failed(job, url, error)
                    raise
                except UserError as error:
                    raise UserError(f"engine {self._name}: {shown(url)}: {error}") from None
                self._answers += 1
                self._down.pop(url, None)
                self._set_alarm()
                return answer

    async def _ask(self, job: _Job, url: str) -> Any:
        try:
            async with asyncio.timeout(self._attempt_s):
                return await job.ask(job.request, url)
        except TimeoutError:
            raise Failed(f"no answer within {self._attempt_s:g} s", counts=True, lost=True) from None
        except OSError as error:
            raise Failed(f"{type(error).__name__}: {error}", counts=False, lost=True) from None

    def _choose(self, job: _Job) -> tuple[str, float]:
        """The URL to be asked, and for how many seconds not yet: home first, after a failure the next one."""
        now = self._loop.time()
        first = job.home + job.failures
        order = [self._urls[(first + i) % len(self._urls)] for i in range(len(self._urls))]
        free = [url for url in order if self._held.get(url, 0.0) <= now]
        if not free:
            soonest = min(order, key=lambda url: self._held[url])
            return soonest, self._held[soonest] - now
        return next((url for url in free if self._down.get(url, 0.0) <= now), free[0]), 0.0

    def _failed(self, job: _Job, url: str, error: Failed) -> None:
        now = self._loop.time()
        if error.retry_after is not None:
            until = now + min(error.retry_after, self._give_up_after_s)
            self._held[url] = max(until, self._held.get(url, 0.0))
        if error.lost:
            self._down[url] = now + DOWN_S
        if not job.failures:
            job.answers_before = self._answers
            job.events.put((job, _Event("aside")))
        job.failures += 1
        job.counted += error.counts
        self._failing.add(job)
        job.last_failure = str(error)
        self._last_failure = f"{shown(url)}: {error}"

    def _set_alarm(self) -> None:
        self._calm()
        self._alarm = self._loop.call_later(self._give_up_after_s, self._give_up)

    def _calm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _give_up(self) -> None:
        self._alarm = None
        self._deciding = self._loop.create_task(self._decide())

    async def _decide(self) -> None:
        """Nothing was answered for so long: are requests to blame, or the servers?"""
        if self._is_well is not None and await self._is_well():
            blamed = [j for j in self._failing if j.counted >= TRIES and j.task is not None and not j.task.done()]
        else:
            blamed = []
        if blamed:
            for job in blamed:
                reason = UserError(f"given up after {job.counted} tries: {job.last_failure}")
                job.events.put((job, _Event("outcome", reason)))
            self._drop(blamed)
            self._set_alarm()
            return
        where = "it" if len(self._urls) == 1 else f"any of {len(self._urls)} servers"
        self._end(
            UserError(
                f"engine {self._name}: {self._last_failure}; no valid answer from {where} for "
                f"{self._give_up_after_s:g} s (engine.give_up_after_s): the same command continues where it stopped"
            )
        )


def of_status(status: int, headers: Mapping[str, str], said: str, advice: Mapping[int, str]) -> Exception:
    """What an answer with another status than 200 means: Failed, Refused, or a UserError with the engine's advice.

    `said` is the server's message, already fit to be shown.
    """
    reason = f"answered {status}: {said}"
    if status in (400, 413, 422):
        return Refused(reason)
    if status in (408, 409, 425, 429) or status >= 500 or 200 <= status < 300:
        wait = retry_after(headers) if status in (429, 503) else None
        # a server that says when to come again is busy: not the request's fault
        return Failed(reason, counts=status != 429 and wait is None, retry_after=wait)
    return UserError(f"{reason}; {advice.get(status, 'no such answer was expected: check the URL')}")


def of_transport(error: Exception, said: str) -> Exception:
    """What an error of httpx2 means. `said` is its text, already fit to be shown."""
    reason = f"{type(error).__name__}: {said}"
    match error:
        case httpx2.RemoteProtocolError():  # no HTTP, or a body cut short, unless nothing came at all
            lost = "without sending a response" in str(error)
            return Failed(reason, counts=not lost, lost=lost)
        case httpx2.DecodingError():
            return Failed(reason, counts=True)
        case httpx2.LocalProtocolError() | httpx2.UnsupportedProtocol():
            return UserError(reason)
        case httpx2.TransportError():
            return Failed(reason, counts=False, lost=True)
        case _:
            return UserError(reason)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to be left alone for: `retry-after-ms`, or `retry-after` in seconds or as a date."""
    with suppress(KeyError, ValueError):
        return _seconds(float(headers["retry-after-ms"]) / 1000)
    with suppress(KeyError, ValueError):
        return _seconds(float(headers["retry-after"]))
    with suppress(KeyError, ValueError, TypeError, OverflowError):
        return _seconds(parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    return None


def _seconds(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError
    return max(value, 0.0)


def message_of(body: str) -> str:
    """What an error's body says: the message in its JSON, or its text."""
    found: Any = body
    with suppress(ValueError, RecursionError):
        found = json.loads(body)
    while isinstance(found, dict):
        inner = [found[key] for key in ("error", "message", "detail") if found.get(key)]
        if not inner:
            break
        found = inner[0]
    return found if isinstance(found, str) else body


def quoted(text: str) -> str:
    """A server's text in one line of a decent length."""
    line = " ".join(text.split())
    return (line[:MAX_QUOTE] + "..." if len(line) > MAX_QUOTE else line) or "nothing"


def shown(url: str) -> str:
    """A URL as it may be shown: without a password."""
    return str(httpx2.URL(url).copy_with(userinfo=b""))


def check_url(url: str, setting: str) -> str:
    """The URL without a slash at its end. Raises UserError for what is none."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise UserError(f"{setting}: {quoted(url)} is no URL; it should look like http://node1:30000")
    return url.rstrip("/")
