"""What is said of an output from its folder alone."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gftdata.errors import UserError
from gftdata.events import Event
from gftdata.manifest import DATA, MANIFEST, WORK
from gftdata.prepare import PLAN
from gftdata.shards import shard_name
from gftdata.status import SILENT_S, TASKS, Attempt, read_status, reporting
from gftdata.store import FolderStore
from gftdata.tasks import Stopped, Task, new_attempt

NOW = 1_000_000.0


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    """An output of 10 shards of 4 prompts, the last one of 2, with 3 samples of each; shards 0 and 3 are there."""
    store = FolderStore(tmp_path / "out")
    nothing = dict.fromkeys(("prompts_too_long", "duplicates", "near_duplicates", "duplicates_removed"), 0)
    counts = {"rows_read": 38, "prompts": 38, "contaminated": 0, "given_missing": 0, "given_left_out": 0} | nothing
    plan = {
        "recipe": {"shards": {"groups_per_shard": 4}},
        "models": [],
        "tokenizer": {"hash": "", "template_hash": "", "end_id": 0, "stop_ids": []},
        "source_sha256": None,
        "prompts": counts,
        "num_shards": 10,
        "samples": 38 * 3,
        "prompts_in": "p",
        "derived": [],
    }
    store.write(PLAN, json.dumps(plan).encode())
    for shard in (0, 3):
        store.write(f"{DATA}/{shard_name(shard, 10)}", b"")
    return store


def attempt(store: FolderStore, name: str, **fields: Any) -> None:
    known: dict[str, Any] = {
        "task": 0,
        "tasks": 2,
        "state": "running",
        "reason": "",
        "host": "node1",
        "process": 7,
        "job": "",
        "phase": "self",
        "started": NOW - 1000,
        "updated": NOW - 10,
        "samples": 10,
        "tokens": 1000,
        "samples_per_s": 0.5,
        "tokens_per_s": 50.0,
    }
    store.write(f"{TASKS}/{name}.json", Attempt(**known | fields).model_dump_json().encode())


def test_running_silent_failed_and_superseded_attempts(store: FolderStore) -> None:
    attempt(store, "1-a", state="failed", reason="out of memory", samples=3)
    attempt(store, "2-a", samples=20)
    attempt(store, "2-b", task=1, updated=NOW - SILENT_S - 1)
    attempt(store, "3-c", task=2, tasks=3, state="failed", reason="no such model")
    status = read_status(store, NOW)
    assert [(one.attempt.task, one.attempt.tasks, one.state, one.shards_left) for one in status.latest] == [
        (0, 2, "running", 4),  # of 2, 4, 6, 8 and 0, which is there
        (1, 2, "silent", 4),  # of 1, 5, 7, 9 and 3
        (2, 3, "failed", 3),  # of 2, 5, 8
    ]
    assert (status.shards, status.shards_done, status.shards_running, status.shards_missing) == (10, 2, 4, 4)
    assert (status.prompts, status.prompts_done, status.earlier) == (38, 8, 1)
    assert (status.samples, status.samples_drawn) == (114, 43)
    assert (status.samples_per_s, status.tokens_per_s) == (0.5, 50.0)
    assert status.seconds_left == pytest.approx((114 - 43) / 0.5)
    assert not status.final


def test_nobody_at_work_has_no_time_left(store: FolderStore) -> None:
    attempt(store, "1-a", state="stopped", reason="SIGTERM")
    status = read_status(store, NOW)
    assert status.seconds_left is None and status.shards_running == 0 and status.shards_missing == 8


def test_a_finished_output(store: FolderStore) -> None:
    attempt(store, "1-a", state="done")
    store.write(MANIFEST, b"{}")
    status = read_status(store, NOW)
    assert status.final and status.seconds_left is None


def test_no_output_and_one_whose_prompts_are_being_read(tmp_path: Path, one_line: Callable[..., str]) -> None:
    store = FolderStore(tmp_path)
    with pytest.raises(UserError) as caught:
        read_status(store)
    assert "not an output of gft generate, or not begun yet" in one_line(caught.value)
    attempt(store, "1-a")
    with pytest.raises(UserError) as caught:
        read_status(store)
    assert "1 tasks have begun, and the prompts are still being read" in one_line(caught.value)


def test_a_file_of_another_version_is_named(store: FolderStore, one_line: Callable[..., str]) -> None:
    store.write(f"{TASKS}/1-a.json", b"{}")
    with pytest.raises(UserError) as caught:
        read_status(store)
    assert f"{TASKS}/1-a.json: not written by this version of gft" in one_line(caught.value)


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (None, "done", ""),
        (UserError("no such model"), "failed", "no such model"),
        (RuntimeError("CUDA error\nof many lines"), "failed", "RuntimeError: CUDA error"),
        (Stopped("SIGTERM"), "stopped", "SIGTERM"),
        (KeyboardInterrupt(), "stopped", "KeyboardInterrupt"),
    ],
)
def test_how_an_attempt_ended_is_in_its_file(
    store: FolderStore, error: BaseException | None, state: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    heard: list[Event] = []

    def work() -> None:
        with reporting(store, new_attempt(), Task(1, 2, "test"), heard.append) as listener:
            (begun,) = read_status(store).latest
            assert (begun.state, begun.attempt.samples, begun.attempt.process) == ("running", 0, os.getpid())
            listener(Event("phase", "self", 9))
            for _ in range(5):
                listener(Event("sample", "self", tokens=20))
            if error is not None:
                raise error

    if error is None:
        work()
    else:
        with pytest.raises(type(error)):
            work()
    (seen,) = read_status(store).latest
    found = seen.attempt
    assert (seen.state, found.reason, found.job, found.phase) == (state, reason, "12_3", "self")
    assert (found.samples, found.tokens, len(heard)) == (5, 100, 6)


def test_a_sign_that_cannot_be_written_does_not_hide_why_the_work_ended(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("disk full")

    with pytest.raises(Stopped, match="SIGTERM"), reporting(store, "1-a", Task(0, 1, "test"), lambda event: None):
        monkeypatch.setattr(FolderStore, "write", full)
        raise Stopped("SIGTERM")


def test_a_running_attempt_gives_signs_and_rates(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gftdata.status.BEAT_S", 0.05)

    def signs(listener: Callable[[Event], None]) -> Iterator[Attempt]:
        for _ in range(200):
            listener(Event("sample", "self", tokens=10))
            time.sleep(0.02)
            yield read_status(store).latest[0].attempt

    with reporting(store, new_attempt(), Task(0, 1, "test"), lambda event: None) as listener:
        found = next(sign for sign in signs(listener) if sign.samples > 10)
    assert 0 < found.samples_per_s < 60
    assert found.tokens_per_s == pytest.approx(10 * found.samples_per_s)
    assert store.names(f"{WORK}/tasks") == [f"{path.name}" for path in (store.folder / TASKS).iterdir()]
