"""Who is at work on an output, and how far it is: what attempts leave in `.work/tasks/`, and what that says together.

An attempt is one start of one task; it writes its own file anew every BEAT_S seconds. Reading looks only at the output,
so that a running job, a dead one and a finished one are looked at in the same way.
"""

import os
import platform
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ValidationError

from gftdata.errors import UserError, first_line
from gftdata.events import Event, Listener
from gftdata.manifest import MANIFEST, RECORD, WORK
from gftdata.prepare import quarantined, read_plan, rows_of_shard
from gftdata.shards import published
from gftdata.store import Store
from gftdata.tasks import Stopped, Task, owned

TASKS = f"{WORK}/tasks"
BEAT_S = 15.0
SILENT_S = 120.0  # without a sign for so long: dead; clocks of different machines are not the same either
RATE_S = 300.0  # rates are those of so long ago until now


class Attempt(BaseModel):
    """One start of a task, as it says itself."""

    model_config = RECORD

    task: int
    tasks: int
    state: Literal["running", "done", "stopped", "failed"]
    reason: str  # of stopped and failed, one line
    host: str
    process: int
    job: str  # the cluster's number of it, where there is one
    phase: str  # the source it draws from; empty before its first
    started: float  # seconds since 1970
    updated: float
    samples: int  # drawn in this attempt
    tokens: int  # in them
    samples_per_s: float  # lately
    tokens_per_s: float


class Reporter:
    """Counts the events of an attempt and writes its file."""

    def __init__(self, store: Store, name: str, task: Task, on_event: Listener) -> None:
        self._store = store
        self._name = f"{TASKS}/{name}.json"
        self._task = task
        self._forward = on_event
        self._started = time.time()
        self._phase = ""
        self._samples = self._tokens = 0
        self._lately: deque[tuple[float, int, int]] = deque([(time.monotonic(), 0, 0)])
        self._ended = threading.Event()

    def on_event(self, event: Event) -> None:
        if event.kind == "phase":
            self._phase = event.source
            # anew, in one step: what an engine draws while it starts says nothing of how fast it will be
            self._lately = deque([(time.monotonic(), self._samples, self._tokens)])
        elif event.kind == "sample":
            self._samples += 1
            self._tokens += event.tokens
        self._forward(event)

    def write(self, state: Literal["running", "done", "stopped", "failed"], reason: str = "") -> None:
        now, lately = time.monotonic(), self._lately
        while len(lately) > 1 and now - lately[0][0] > RATE_S:
            lately.popleft()
        since, samples, tokens = lately[0]
        seconds = max(now - since, 1e-9)
        lately.append((now, self._samples, self._tokens))
        attempt = Attempt(
            task=self._task.index,
            tasks=self._task.count,
            state=state,
            reason=reason,
            host=platform.node(),
            process=os.getpid(),
            job=_job(),
            phase=self._phase,
            started=self._started,
            updated=time.time(),
            samples=self._samples,
            tokens=self._tokens,
            samples_per_s=(self._samples - samples) / seconds,
            tokens_per_s=(self._tokens - tokens) / seconds,
        )
        self._store.write(self._name, attempt.model_dump_json(indent=2).encode())

    def keep_writing(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                self.write("running")
            except (UserError, OSError):  # a sign of life that is missed; what the work itself cannot write ends it
                continue

    def end(self) -> None:
        self._ended.set()


@contextmanager
def reporting(store: Store, name: str, task: Task, on_event: Listener) -> Iterator[Listener]:
    """Keep the attempt's file up to date until the block ends, and say there how it ended."""
    reporter = Reporter(store, name, task, on_event)
    reporter.write("running")
    thread = threading.Thread(target=reporter.keep_writing, daemon=True)
    thread.start()

    def end(state: Literal["done", "stopped", "failed"], reason: str) -> None:
        reporter.end()
        thread.join()
        with suppress(UserError, OSError):  # what cannot be written any more does not hide why the work has ended
            reporter.write(state, reason)

    try:
        yield reporter.on_event
    except (Stopped, KeyboardInterrupt) as error:
        end("stopped", first_line(error))
        raise
    except UserError as error:
        end("failed", first_line(error))
        raise
    except BaseException as error:
        end("failed", f"{type(error).__name__}: {first_line(error)}")
        raise
    end("done", "")


def _job() -> str:
    env = os.environ
    if array := env.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{env.get('SLURM_ARRAY_TASK_ID', '')}"
    return env.get("SLURM_JOB_ID") or env.get("HOSTNAME", "") * ("JOB_COMPLETION_INDEX" in env)


@dataclass(frozen=True, slots=True)
class Seen:
    """An attempt as it is seen from outside, at one moment."""

    attempt: Attempt
    state: Literal["running", "silent", "done", "stopped", "failed"]
    seconds_since: float  # its last sign
    shards_left: int  # its own that are not published


@dataclass(frozen=True, slots=True)
class Status:
    """How far an output is."""

    final: bool
    shards: int
    shards_done: int
    shards_running: int  # a running attempt has them
    prompts: int
    prompts_done: int
    prompts_quarantined: int
    samples: int  # to be drawn
    samples_drawn: int  # as the attempts have counted; two that do the same work both count
    samples_per_s: float
    tokens_per_s: float
    seconds_left: float | None  # at that rate; None: nobody is at work, or its rate is not known yet
    latest: tuple[Seen, ...]  # the last attempt of each task, in their order
    earlier: int  # attempts before those

    @property
    def shards_missing(self) -> int:
        return self.shards - self.shards_done - self.shards_running


def read_status(store: Store, now: float | None = None) -> Status:
    """Raises UserError where no output of `gft generate` is."""
    plan = read_plan(store)
    attempts = _attempts(store)
    if plan is None:
        if attempts:
            raise UserError(
                f"{store.location}: {len(attempts)} tasks have begun, and the prompts are still being read: see again "
                "in a minute"
            )
        raise UserError(f"{store.location}: not an output of gft generate, or not begun yet")
    now = time.time() if now is None else now
    done = published(store, plan.num_shards)
    unfinished = sorted(set(range(plan.num_shards)) - set(done))
    latest = {(attempt.task, attempt.tasks): attempt for attempt in attempts}  # later ones come later
    seen = tuple(_seen(latest[key], unfinished, now) for key in sorted(latest, key=lambda key: (key[1], key[0])))
    running = [one for one in seen if one.state == "running"]
    held = {shard for one in running for shard in owned(_task(one.attempt), unfinished)}
    samples, drawn = plan.samples, sum(attempt.samples for attempt in attempts)
    rate = sum(one.attempt.samples_per_s for one in running)
    final = store.exists(MANIFEST)
    return Status(
        final=final,
        shards=plan.num_shards,
        shards_done=len(done),
        shards_running=len(held),
        prompts=plan.prompts.prompts,
        prompts_done=sum(rows_of_shard(plan, shard) for shard in done),
        prompts_quarantined=len(quarantined(store)),
        samples=samples,
        samples_drawn=drawn,
        samples_per_s=rate,
        tokens_per_s=sum(one.attempt.tokens_per_s for one in running),
        seconds_left=max(0, samples - drawn) / rate if rate and not final else None,
        latest=seen,
        earlier=len(attempts) - len(latest),
    )


def _task(attempt: Attempt) -> Task:
    return Task(attempt.task, attempt.tasks)


def _seen(attempt: Attempt, unfinished: Sequence[int], now: float) -> Seen:
    silent = attempt.state == "running" and now - attempt.updated > SILENT_S
    return Seen(
        attempt=attempt,
        state="silent" if silent else attempt.state,
        seconds_since=max(0.0, now - attempt.updated),
        shards_left=len(owned(_task(attempt), unfinished)),
    )


def _attempts(store: Store) -> list[Attempt]:
    """In the order in which they began."""
    found = []
    for name in store.names(TASKS):
        try:
            found.append(Attempt.model_validate_json(store.read(f"{TASKS}/{name}")))
        except FileNotFoundError:
            continue
        except ValidationError:
            raise UserError(f"{store.location}/{TASKS}/{name}: not written by this version of gft") from None
    return found
