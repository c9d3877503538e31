"""The killable process pool that runs rewards: each judgement has a time limit, each worker a memory limit.

What a reward is, and what its verdicts mean, is said in `rewards.py`.
"""

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Future, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pebble import CONSTS, ProcessExpired, ProcessPool

from gftdata.config import RewardConfig
from gftdata.errors import UserError
from gftdata.rewards import BUILTIN, judge, resolve
from gftdata.types import Prompt, Verdict

Submit = Callable[[Prompt, str], Future[Verdict]]

MAX_WORKERS = 8  # by default: judging is seldom what takes long, and each worker holds some 150 MB
MAX_BREAKS = 3  # of the pool, with the same judgement among those that may have run
START_LIMIT_S = 300.0  # for the first worker to be up
ORPHAN_LIMIT_S = 5.0  # past its time limit, a worker nobody killed ends itself
WORKER_DIED = Verdict(None, "error:worker_died")

_WARM_UP = Prompt("", None, (), "1", "", (), "{}", "")


@dataclass(slots=True, eq=False)
class _Job:
    prompt: Prompt
    text: str
    future: Future[Verdict]
    num_breaks: int = 0


def default_workers() -> int:
    """One for each usable core, 8 at most."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(cores, MAX_WORKERS)


def open_judges(config: RewardConfig) -> AbstractContextManager[Submit]:
    """`judge_pool` as the settings say."""
    return judge_pool(config.name, timeout_s=config.timeout_s, workers=config.workers, memory_gb=config.memory_gb)


@contextmanager
def judge_pool(name: str, *, timeout_s: float, workers: int | None, memory_gb: float) -> Iterator[Submit]:
    """Start processes that judge with reward `name`; yields `submit(prompt, text) -> Future[Verdict]`.

    The future ends in a verdict whatever the reward does: `timeout` after `timeout_s` seconds from its start in a
    worker, `error:worker_died` when its process ended, `error:<kind>` otherwise. `memory_gb` (2**30 bytes) is the
    address space a worker may take on top of what it has after its imports (Linux only). `workers` defaults to
    `default_workers()`. Leaving waits for what was submitted; leaving by an exception kills the workers at once and
    the futures left over raise CancelledError. Raises UserError when the reward or its processes cannot be had.
    """
    resolve(name)
    num_workers = default_workers() if workers is None else workers
    pool = _start_pool(name, num_workers, timeout_s, memory_gb)
    lock = threading.RLock()
    jobs: dict[_Job, None] = {}  # unfinished ones, in the order in which workers take them
    stoppers: list[threading.Thread] = []
    closing = False

    def finish(job: _Job, verdict: Verdict) -> None:
        with lock:
            if job not in jobs:
                return
            del jobs[job]
        job.future.set_result(verdict)

    def schedule(job: _Job) -> None:
        used = pool
        inner: Future[Verdict] = used.schedule(judge_in_worker, args=(job.prompt, job.text), timeout=timeout_s)
        inner.add_done_callback(lambda done: settle(job, done, used))

    def settle(job: _Job, done: Future[Verdict], used: ProcessPool) -> None:
        error = CancelledError() if done.cancelled() else done.exception()
        if isinstance(error, BrokenExecutor | CancelledError):
            replace(used)
        elif error is None:
            finish(job, done.result())
        elif isinstance(error, ProcessExpired):
            finish(job, WORKER_DIED)
        elif isinstance(error, TimeoutError):  # the reward's own TimeoutError is a verdict already
            finish(job, Verdict(None, "timeout"))
        else:
            finish(job, Verdict(None, f"error:{type(error).__name__}"))

    def replace(broken: ProcessPool) -> None:
        # A worker that dies while no task is known to run breaks the whole of pebble's pool (an idle worker taken by
        # the out-of-memory killer, say), and tasks still queued there would never end: all of them start anew.
        nonlocal pool
        given_up: list[_Job] = []
        with lock:
            if closing or broken is not pool:
                return
            while True:
                # In a thread: this may run in one of the threads of the pool, which cannot wait for itself.
                stoppers.append(threading.Thread(target=_stop, args=(pool,)))
                stoppers[-1].start()
                pool = _new_pool(name, num_workers, timeout_s, memory_gb)
                for job in islice(jobs, num_workers):
                    job.num_breaks += 1
                given_up = [job for job in jobs if job.num_breaks >= MAX_BREAKS]
                try:
                    for job in tuple(jobs):
                        if job.num_breaks < MAX_BREAKS:
                            schedule(job)
                    break
                except RuntimeError:  # broken again already; ends, as each round counts against the first jobs
                    continue
        for job in given_up:
            finish(job, WORKER_DIED)

    def submit(prompt: Prompt, text: str) -> Future[Verdict]:
        job = _Job(prompt, text, Future())
        job.future.set_running_or_notify_cancel()
        with lock:
            if closing:
                raise RuntimeError("the judging pool is closed")
            jobs[job] = None
            try:
                schedule(job)
            except RuntimeError:  # how pebble says that the pool is broken
                replace(pool)
        return job.future

    def unfinished() -> tuple[_Job, ...]:
        with lock:
            return tuple(jobs)

    try:
        yield submit
        while waiting := [job.future for job in unfinished()]:
            wait(waiting, timeout=1.0)
            if not pool.active:
                replace(pool)
    finally:
        with lock:
            closing = True
        _stop(pool)
        for stopper in stoppers:
            stopper.join()
        for job in unfinished():
            job.future.set_exception(CancelledError())


def _start_pool(name: str, num_workers: int, timeout_s: float, memory_gb: float) -> ProcessPool:
    pool = _new_pool(name, num_workers, timeout_s, memory_gb)
    try:
        pool.schedule(is_ready).result(timeout=START_LIMIT_S)
    except (BrokenExecutor, TimeoutError) as error:
        _stop(pool)
        raise UserError(
            f"the processes of reward {name!r} do not start ({error or type(error).__name__}): "
            f"what they wrote to stderr says why; is memory_gb {memory_gb:g} enough for its imports?"
        ) from error
    except BaseException:
        _stop(pool)
        raise
    return pool


def _new_pool(name: str, num_workers: int, timeout_s: float, memory_gb: float) -> ProcessPool:
    here = str(Path.cwd())
    CONSTS.term_timeout = 0.0  # seconds from pebble's SIGTERM, which workers ignore, to its SIGKILL
    return ProcessPool(
        max_workers=num_workers,
        initializer=prepare_worker,
        initargs=(name, here, timeout_s, memory_gb),
        # spawn, since the parent has torch and its threads in it
        context=multiprocessing.get_context("spawn"),
    )


def _stop(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()


_in_worker: dict[str, tuple[float, int]] = {}  # reward's name: its time limit, a descriptor of /dev/null


def prepare_worker(name: str, directory: str, timeout_s: float, memory_gb: float) -> None:
    """Runs first in each worker, outside any time limit: imports, then limits."""
    # A cluster that stops a job signals all of its processes, and a judge's death would be a verdict. pebble ends a
    # worker with SIGKILL at once, see _new_pool, which also works in the midst of a long C call.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if directory not in sys.path:
        sys.path.insert(0, directory)
    resolve(name)
    if name in BUILTIN:
        judge(name, _WARM_UP, "\\boxed{1}")
    _in_worker[name] = timeout_s, os.open(os.devnull, os.O_WRONLY)
    if sys.platform == "linux":
        import resource

        page = os.sysconf("SC_PAGE_SIZE")
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * page
        limit = mapped + int(memory_gb * 2**30)
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    while parent is not None and os.getppid() == parent.pid:
        time.sleep(1.0)
    os._exit(1)


def is_ready() -> bool:
    """Runs in a worker: that it answers is the answer."""
    return True


def judge_in_worker(prompt: Prompt, text: str) -> Verdict:
    """Runs in a worker: the verdict of the reward it was prepared for."""
    ((name, (timeout_s, devnull)),) = _in_worker.items()
    # Should the parent be gone, this ends a C call that never lets _end_with_parent have the interpreter.
    faulthandler.dump_traceback_later(timeout_s + ORPHAN_LIMIT_S, exit=True, file=devnull)
    try:
        return judge(name, prompt, text)
    finally:
        faulthandler.cancel_dump_traceback_later()
