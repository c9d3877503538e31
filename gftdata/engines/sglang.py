"""SGLang's offline engine in a supervised child process. A Sampler and a Scorer, safe to use from several threads.

A dead scheduler kills its whole process tree, so the engine lives in `sglang_worker.py`, run by this interpreter or by
`engine.python`. A supervisor thread starts it, reads its answers, and when it dies starts it again with back-off and
sends the unfinished requests once more. Those that were there at two deaths are suspects and are sent by halves, so
that one which brings the engine down is soon there alone, and is given up (a Refusal) without the others.

Every request is n = 1 with its own seed. Log-probs of samples are decode-time, temperature-scaled; reference log-probs
come from `score`, a pass over given ids at temperature 1.
"""

import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from gftdata.config import SglangConfig
from gftdata.engines.sglang_api import (
    BadAnswerError,
    failure_of,
    prompt_number,
    sampling_arguments,
    scored,
    scoring_arguments,
    to_sample,
)
from gftdata.engines.sglang_worker import LOGPROBS
from gftdata.errors import UserError
from gftdata.tokens import Tokenizer
from gftdata.types import (
    LogProbs,
    Refusal,
    Sample,
    SampleRequest,
    Sampling,
    ScoreRequest,
    TokenIds,
    Unscored,
)

WORKER = Path(__file__).with_name("sglang_worker.py")
BACK_OFF_S = (1.0, 5.0, 15.0, 60.0)  # before a restart, growing while restarts bring no answer
TRIES = 3  # how often a request may fail, or be there when the engine dies, before it is given up
AGAIN_S = 1.0  # before a request that failed is sent again, times its failures: an engine that is dying fails at once
SUSPECT_AFTER = 2  # deaths: the first may have had any cause
STOP_S = 20.0  # how long an idle engine may take to end by itself
READ_BYTES = 2**16  # of answers at once: what a pipe holds

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class EngineDied(Exception):
    """The engine cannot be brought up again."""


@dataclass(slots=True, eq=False)
class _Job:
    """A request on its way: what to send, where its answer goes, how often it has failed."""

    arguments: Mapping[str, Any]
    read: Callable[[dict[str, Any]], Any]
    answers: "queue.SimpleQueue[tuple[_Job, Any]]"  # what was read, or a UserError
    failures: list[str] = field(default_factory=list)
    deaths: int = 0  # of the engine, while it was there


class SglangEngine:
    """A running engine. Close it, or use it as a context manager, to end its processes."""

    concurrent = True

    def __init__(self, model: str, config: SglangConfig, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.honours_seeds = bool(config.options.get("enable_deterministic_inference"))
        self._max_in_flight = config.max_in_flight
        self._python = config.python or sys.executable
        self._options = {"model_path": model, "log_level": "error", **config.options}
        self._log = Path(tempfile.mkdtemp(prefix="gft-engine-")) / "engine.log"
        self._lock = threading.Lock()
        self._jobs: dict[int, _Job] = {}  # sent, or to be sent when the engine is up
        self._suspects: list[int] = []  # were there at two deaths; sent by halves, nothing else meanwhile
        self._tried: set[int] = set()  # the suspects that are with the engine
        self._try_next = 1  # how many to send together next
        self._next = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._up = False  # whether it takes requests
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()  # lines for the child; None is the end
        self._closed = threading.Event()
        self._gone: UserError | None = None  # why nothing will be answered any more
        self._started = ""  # SGLang's version, once it has been up
        self.restarts = 0
        self._ready: queue.SimpleQueue[UserError | None] = queue.SimpleQueue()
        threading.Thread(target=self._supervise, name="sglang-supervisor", daemon=True).start()
        if (error := self._ready.get()) is not None:
            raise error

    @property
    def version(self) -> str:
        return f"sglang {self._started}"

    def __enter__(self) -> "SglangEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def sample(self, requests: Iterable[SampleRequest], sampling: Sampling) -> Iterator[Sample | Refusal]:
        """Draw one response for each request, in order of completion, `max_in_flight` at a time. See `Sampler`."""

        def arguments(request: SampleRequest) -> dict[str, Any]:
            asked = sampling_arguments(self.tokenizer, sampling, request, honours_seeds=self.honours_seeds)
            return asked | self._replica(request.prompt_ids)

        def read(request: SampleRequest, answer: dict[str, Any]) -> Sample:
            return to_sample(self.tokenizer, request, answer, honours_seeds=self.honours_seeds)

        for request, answer in self._stream(requests, arguments, read):
            yield Refusal(request, str(answer)) if isinstance(answer, UserError) else answer

    def score(self, requests: Sequence[ScoreRequest]) -> list[LogProbs | Unscored]:
        """log pi of given response tokens at temperature 1, by a prefill of prompt + response. See `Scorer`."""
        numbered = list(enumerate(requests))
        scores: list[LogProbs | Unscored] = [Unscored("not asked")] * len(requests)

        def arguments(item: tuple[int, ScoreRequest]) -> dict[str, Any]:
            _, request = item
            return scoring_arguments(request) | self._replica(request.prompt_ids)

        def read(item: tuple[int, ScoreRequest], answer: dict[str, Any]) -> LogProbs:
            return scored(self.tokenizer, item[1], answer)

        for (i, _), answer in self._stream(numbered, arguments, read):
            scores[i] = Unscored(str(answer)) if isinstance(answer, UserError) else answer
        return scores

    def close(self) -> None:
        """End the engine and all its processes."""
        self._closed.set()
        self._give_up(UserError("engine sglang: it was closed"))
        with self._lock:
            process = self._process
            self._outbox.put(None)
        if process is None:
            return
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        _kill_tree(process)
        if self.restarts == 0:  # else its log may still be wanted
            shutil.rmtree(self._log.parent, ignore_errors=True)

    def _replica(self, prompt_ids: TokenIds) -> dict[str, int]:
        replicas = int(self._options.get("dp_size", 1))
        return {"routed_dp_rank": prompt_number(prompt_ids) % replicas} if replicas > 1 else {}

    def _stream(
        self,
        requests: Iterable[Request],
        arguments: Callable[[Request], dict[str, Any]],
        read: Callable[[Request, dict[str, Any]], Answer],
    ) -> Iterator[tuple[Request, Answer | UserError]]:
        """Keep `max_in_flight` requests with the engine; yield each with its answer as it is done.

        `read` makes something of an answer, and raises BadAnswerError where it is none: the request is sent again.
        """
        answers: queue.SimpleQueue[tuple[_Job, Any]] = queue.SimpleQueue()
        waiting: dict[_Job, Request] = {}
        source = iter(requests)
        exhausted = False
        try:
            while True:
                while not exhausted and len(waiting) < self._max_in_flight:
                    try:
                        request = next(source)
                    except StopIteration:
                        exhausted = True
                        break
                    job = _Job(arguments(request), partial(read, request), answers)
                    waiting[job] = request
                    self._submit(job)
                if not waiting:
                    return
                job, answer = answers.get()
                if isinstance(answer, UserError) and answer is self._gone:
                    raise answer
                yield waiting.pop(job), answer
        finally:
            if waiting:  # a stream that is dropped half way wants no more answers
                self._drop(waiting)

    def _drop(self, jobs: Container[_Job]) -> None:
        with self._lock:
            had_suspects = bool(self._suspects)
            self._jobs = {number: job for number, job in self._jobs.items() if job not in jobs}
            self._suspects = [number for number in self._suspects if number in self._jobs]
            self._tried &= set(self._suspects)
            if had_suspects and not self._tried:
                self._send_next()

    def _submit(self, job: _Job) -> None:
        with self._lock:
            number = self._next
            self._next += 1
            if self._gone is not None:
                job.answers.put((job, self._gone))
                return
            self._jobs[number] = job
            if not self._suspects:  # else it is sent when they have been cleared
                self._send(number, job)

    def _send(self, number: int, job: _Job) -> None:
        if self._up:  # otherwise it is sent when the engine is
            self._outbox.put(json.dumps({"id": number, "arguments": job.arguments}).encode() + b"\n")

    def _supervise(self) -> None:
        """Whatever ends the supervision, nobody is left waiting."""
        try:
            self._keep_running()
        except Exception as error:
            self._give_up(UserError(f"engine sglang: {type(error).__name__}: {error}"))

    def _keep_running(self) -> None:
        """Own the child: start it, hand out answers, start it again when it dies."""
        fruitless = 0
        while True:
            self._forget_process()
            try:
                answered = self._run_once(first=not self._started)
            except EngineDied as error:
                self._give_up(UserError(f"engine sglang: {error}"))
                return
            if self._closed.is_set():
                return
            self.restarts += 1
            fruitless = 0 if answered else fruitless + 1
            if fruitless > 2 * (SUSPECT_AFTER + self._max_in_flight.bit_length()):  # more than culprits take to find
                self._give_up(
                    UserError(f"engine sglang: died {fruitless} times without an answer: {self._last_words()}")
                )
                return
            if self._closed.wait(BACK_OFF_S[min(fruitless, len(BACK_OFF_S) - 1)]):
                return

    def _run_once(self, *, first: bool) -> bool:
        """One life of the child; returns whether it gave any answer."""
        reading, writing = os.pipe()
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [self._python, str(WORKER), str(writing), json.dumps(self._options)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=(writing,),
                start_new_session=True,
            )
        os.close(writing)
        with self._lock:
            self._process, self._outbox = process, queue.SimpleQueue()
        writer = threading.Thread(target=_write_lines, args=(process, self._outbox), daemon=True)
        writer.start()
        if self._closed.is_set():  # closed while it was being started
            _kill_tree(process)
        ready = answered = False
        with os.fdopen(reading, "rb", buffering=READ_BYTES) as pipe:
            while (line := pipe.readline()).endswith(b"\n"):
                message = json.loads(line)
                numbers = pipe.read(message["bytes"])
                if len(numbers) < message["bytes"]:
                    break
                if "ready" in message:
                    ready = True
                    self._on_ready(message["ready"], first)
                else:
                    answered = True
                    self._on_answer(message, numbers)
        _kill_tree(process)
        self._outbox.put(None)
        writer.join(STOP_S)  # a process outside the group might hold its pipe
        if not self._started:
            raise EngineDied(f"did not start: {self._last_words()}")
        if ready:  # otherwise it is the start that failed, and no request is to blame
            self._on_death(process)
        return answered

    def _on_ready(self, version: str, first: bool) -> None:
        with self._lock:
            self._started = version
            self._up = True
            self._send_next()
        if first:
            self._ready.put(None)

    def _on_answer(self, message: dict[str, Any], numbers: bytes) -> None:
        number = message["id"]
        with self._lock:
            job = self._jobs.get(number)
        if job is None:
            return
        failure, found = message.get("error") or failure_of(message["answer"]), None
        if not failure:
            try:
                found = job.read(unpacked(message["answer"], numbers))
            except BadAnswerError as error:
                failure = str(error)
        with self._lock:
            if number not in self._jobs:  # dropped meanwhile
                return
            if failure and len(job.failures) + 1 < TRIES:
                job.failures.append(failure)
                again = threading.Timer(AGAIN_S * len(job.failures), self._send_again, (number, job, self._process))
                again.daemon = True
                again.start()
                return
            del self._jobs[number]
            if failure:
                job.failures.append(failure)
            if number in self._suspects:
                self._suspects.remove(number)
                self._tried.discard(number)
                if not self._tried:
                    self._send_next()
        job.answers.put((job, UserError(failure) if failure else found))

    def _send_again(self, number: int, job: _Job, process: "subprocess.Popen[bytes] | None") -> None:
        """After a failure, unless the engine has died since: then all that waits is sent to the next one."""
        with self._lock:
            if number in self._jobs and self._process is process:
                self._send(number, job)

    def _send_next(self) -> None:
        """The next few suspects, or, when all have been cleared, everything that waits."""
        self._tried = set(self._suspects[: self._try_next])
        self._try_next *= 2  # if these are innocent
        for number in list(self._tried) or list(self._jobs):
            self._send(number, self._jobs[number])

    def _on_death(self, process: "subprocess.Popen[bytes]") -> None:
        """Blame what was with the engine: who is there alone, after a death in company or two alone, is given up."""
        given_up = None
        with self._lock:
            if self._closed.is_set():
                return
            there = [number for number in self._suspects if number in self._tried] or list(self._jobs)
            for number in there:
                self._jobs[number].deaths += 1
                self._jobs[number].failures.clear()  # they speak of an engine that was about to die
            if len(there) == 1 and self._jobs[there[0]].deaths >= TRIES:
                given_up = self._jobs.pop(there[0])
                given_up.failures.append(f"the engine died (exit code {process.returncode}): {self._last_error()}")
            others = [number for number in self._suspects if number not in there]
            there = [n for n in there if n in self._jobs and self._jobs[n].deaths >= SUSPECT_AFTER]
            self._suspects = [*there, *others]
            self._try_next = max(1, len(there) // 2)
            self._tried = set()
        if given_up is not None:
            given_up.answers.put((given_up, UserError(given_up.failures[-1])))

    def _forget_process(self) -> None:
        with self._lock:
            self._process, self._up = None, False

    def _give_up(self, error: UserError) -> None:
        with self._lock:
            self._gone = error = self._gone or error  # jobs know the engine's end by this one error
            jobs, self._jobs, self._suspects, self._tried = list(self._jobs.values()), {}, [], set()
        if not self._started:
            self._ready.put(error)
        for job in jobs:
            job.answers.put((job, error))

    def _last_words(self) -> str:
        """The last error that the engine wrote, and where the rest is."""
        return f"{self._last_error()} (all of it is in {self._log})"

    def _last_error(self) -> str:
        lines = self._log.read_text(errors="replace").split("\n") if self._log.exists() else []
        said = [line.strip() for line in lines if line.strip()] or ["it said nothing"]
        errors = [line for line in said if re.match(r"[\w.]*(Error|Exception|Killed)\b", line)]
        return (errors or said)[-1][:300]


def unpacked(answer: dict[str, Any], numbers: bytes) -> dict[str, Any]:
    """The inverse of the worker's `packed`, with arrays for lists and NaN for None."""
    start = 0

    def take(kind: type[np.generic], length: int) -> npt.NDArray[Any]:
        nonlocal start
        found = np.frombuffer(numbers, kind, length, start)
        start += found.nbytes
        return found

    full = {"finish_reason": answer["finish_reason"]}
    if "output_ids" in answer:
        full["output_ids"] = take(np.int32, answer["output_ids"])
    for name in LOGPROBS:
        if name in answer:
            full[name] = [take(np.float32, answer[name]), take(np.int32, answer[name])]
    return full


def open_engine(model: str, config: SglangConfig, tokenizer: Tokenizer) -> SglangEngine:
    """Start the engine; returns when it is ready. Raises UserError when it does not come up."""
    return SglangEngine(model, config, tokenizer)


def check_python(config: SglangConfig) -> None:
    """Raise UserError where the interpreter that is to run the engine is missing, or has no SGLang."""
    if config.python is not None and not Path(config.python).is_file():
        raise UserError(f"{config.python}: no such interpreter (engine.python)")
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('sglang') is None)"
    try:
        found = subprocess.run([config.python or sys.executable, "-c", look], check=False).returncode == 0
    except OSError as error:
        raise UserError(f"{config.python}: cannot be run (engine.python): {error}") from None
    if not found:
        raise UserError(
            f"{config.python or sys.executable}: has no SGLang; install it in an environment of its own "
            "(pip install -c constraints-sglang.txt sglang) and name that one's interpreter as engine.python"
        )


def _kill_tree(process: "subprocess.Popen[bytes]") -> None:
    """End the child and everything it started: it is the leader of a session of its own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _write_lines(process: "subprocess.Popen[bytes]", lines: "queue.SimpleQueue[bytes | None]") -> None:
    """Runs in a thread of its own, so that a pipe that is full holds up nobody who could empty it.

    What a dead child has not taken is sent to the next one by the supervisor.
    """
    assert process.stdin is not None
    with suppress(OSError), process.stdin as pipe:
        while (line := lines.get()) is not None:
            pipe.write(line)
            if lines.empty():
                pipe.flush()
