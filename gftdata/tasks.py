"""Task i of n: which of several processes on a cluster this is, and which shards are its own.

A shard belongs to task `shard % n`, so n may be another one each time the job is submitted: what is published stays,
and what was drawn for a shard is found by whoever has it next. Nothing rests on a task being the only one of its kind.
"""

import os
import re
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from gftdata.errors import UserError

GFT_TASKS = "GFT_TASKS"  # a Kubernetes Job does not tell its pods how many they are


@dataclass(frozen=True, slots=True)
class Task:
    """Which one of how many, and what said so; nothing: this process is the only one."""

    index: int = 0
    count: int = 1
    named_by: str = ""

    @property
    def alone(self) -> bool:
        return not self.named_by

    def owns(self, shard: int) -> bool:
        return shard % self.count == self.index

    def __str__(self) -> str:
        return f"task {self.index} of {self.count}"


def find_task(flag: str | None, environment: Mapping[str, str] = os.environ) -> Task:
    """The task that `--task i/n` names, or else the environment. Raises UserError where either makes no sense.

    In the environment: torchrun's RANK; Slurm's array (SLURM_ARRAY_TASK_ID), its step (SLURM_PROCID of srun -n), or
    both together; Kubernetes' JOB_COMPLETION_INDEX, with the number of completions in GFT_TASKS.
    """
    if flag is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", flag)
        if not match or int(match[1]) >= int(match[2]):
            raise UserError(f"--task {flag}: expected i/n, i counted from 0: the first of four is 0/4, the last 3/4")
        return Task(int(match[1]), int(match[2]), "--task")

    def number(name: str, default: int = 0) -> int:
        value = environment.get(name, "")
        if value and not value.isdigit():
            raise UserError(f"{name}={value}: expected a number; --task i/n says which task this is without it")
        return int(value or default)

    def checked(index: int, count: int, named_by: str) -> Task:
        if not 0 <= index < count:
            raise UserError(f"{named_by}: task {index} of {count} is none; --task i/n says which task this is")
        return Task(index, count, named_by)

    if "RANK" in environment and number("WORLD_SIZE", 1) > 1:
        return checked(number("RANK"), number("WORLD_SIZE"), "RANK")
    steps, step = number("SLURM_STEP_NUM_TASKS", 1), number("SLURM_PROCID")
    if "SLURM_ARRAY_TASK_ID" in environment:
        first, stride = number("SLURM_ARRAY_TASK_MIN"), max(1, number("SLURM_ARRAY_TASK_STEP", 1))
        place, count = number("SLURM_ARRAY_TASK_ID") - first, number("SLURM_ARRAY_TASK_COUNT", 1)
        # an array of chosen numbers, as in --array=1,5,6, has gaps: its places cannot be told apart by arithmetic
        if place % stride or place // stride >= count:
            raise UserError(
                f"SLURM_ARRAY_TASK_ID={environment['SLURM_ARRAY_TASK_ID']} of {count}: an array with gaps; submit one "
                "from 0 to n-1 (any n will do: what is there is not made again), or say --task i/n"
            )
        return checked(place // stride * steps + (step if steps > 1 else 0), count * steps, "SLURM_ARRAY_TASK_ID")
    if steps > 1:
        return checked(step, steps, "SLURM_PROCID")
    if "JOB_COMPLETION_INDEX" in environment:
        if GFT_TASKS not in environment:
            raise UserError(f"JOB_COMPLETION_INDEX is set and {GFT_TASKS} is not: set it to the Job's completions")
        return checked(number("JOB_COMPLETION_INDEX"), number(GFT_TASKS), "JOB_COMPLETION_INDEX")
    return Task()


def owned(task: Task, shards: Sequence[int]) -> list[int]:
    """Those of the shards that are the task's."""
    return [shard for shard in shards if task.owns(shard)]


def new_attempt() -> str:
    """A name for this start of a task that no other start has; later ones sort after earlier ones."""
    return f"{int(time.time()):010d}-{uuid.uuid4().hex[:8]}"


class Stopped(BaseException):
    """A signal asked for the end. What is finished is safe; the same command goes on from there."""


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Within it the first SIGTERM or SIGUSR1 (Slurm's --signal) raises Stopped; outside the main thread nothing does.

    Processes that are this one's get the same signal from Slurm: those whose death would say something of the data
    have to ignore it (`judging.py`).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGUSR1)

    def stop(number: int, frame: FrameType | None) -> None:
        for other in numbers:  # what follows is putting away, and is not to be cut short by the next one
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
