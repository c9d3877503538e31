"""Which task this is, and several of them at work on one output: at the same time, killed, and as copies."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from gftdata import generate as generation
from gftdata import prepare
from gftdata.config import GenerateConfig, validate_config
from gftdata.errors import UserError
from gftdata.finalize import finalize
from gftdata.generate import generate
from gftdata.manifest import DATA, MANIFEST, WORK, read_manifest
from gftdata.prepare import read_plan
from gftdata.shards import record_of, shard_paths, verify
from gftdata.status import TASKS, read_status
from gftdata.store import FolderStore
from gftdata.tasks import Stopped, Task, find_task, owned, stop_on_signals

Settings = Callable[..., dict[str, Any]]
NUM_PROMPTS, NUM_SHARDS = 22, 6


@pytest.fixture(scope="module")
def settings(demo: Path) -> Settings:
    """22 prompts in 6 shards, an expert and 2 self samples of each."""

    def make(out: Path, **changes: Any) -> dict[str, Any]:
        return {
            "model": str(demo / "model"),
            "out": str(out),
            "prompts": {
                "path": str(demo / "train.jsonl"),
                "columns": {"ground_truth": "answer", "expert": "expert"},
                "limit": NUM_PROMPTS,
            },
            "reward": {"name": "exact", "workers": 1},
            "responses": {"self": {"count": 2}, "max_tokens": 24},
            "shards": {"groups_per_shard": 4, "row_group_size": 4},
            "engine": {"device": "cpu", "batch_size": 4},
            **changes,
        }

    return make


def config_of(settings: dict[str, Any]) -> GenerateConfig:
    return validate_config(GenerateConfig, settings, "test")


def start(settings: dict[str, Any], task: Task) -> multiprocessing.process.BaseProcess:
    """A task in a process of its own, from a server that has torch loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gftdata.generate", "gftdata.engines.hf"])
    process = context.Process(target=run, args=(settings, task))
    process.start()
    return process


def run(settings: dict[str, Any], task: Task) -> None:
    generate(config_of(settings), task=task)


def assert_same(out: Path, expected: Path) -> None:
    """The same groups; log-probs to rounding, which depends on what is computed together."""
    found, wanted = contents(out), contents(expected)
    assert found.keys() == wanted.keys()
    for prompt_id, row in found.items():
        for name, value in row.items():
            if "logprob" in name:
                for mine, theirs in zip(value, wanted[prompt_id][name], strict=True):
                    np.testing.assert_allclose(mine or 0.0, theirs or 0.0, atol=1e-4)
            else:
                assert value == wanted[prompt_id][name], name


def contents(out: Path) -> dict[str, Any]:
    """Prompt -> everything of its group."""
    rows = [row for path in shard_paths(out, read_manifest(out)) for row in pq.read_table(path).to_pylist()]
    found = {row["prompt_id"]: row for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.fixture(scope="module")
def alone(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes."""
    out = tmp_path_factory.mktemp("alone") / "data"
    generate(config_of(settings(out)))
    return out


@pytest.mark.parametrize(
    ("environment", "index", "count", "named_by"),
    [
        ({}, 0, 1, ""),
        ({"RANK": "2", "WORLD_SIZE": "4"}, 2, 4, "RANK"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, 0, 1, ""),
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}, 3, 4, "SLURM_ARRAY_TASK_ID"),
        (
            {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1"},
            2,
            3,
            "SLURM_ARRAY_TASK_ID",
        ),
        (
            {
                "SLURM_ARRAY_TASK_ID": "20",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_ARRAY_TASK_MIN": "10",
                "SLURM_ARRAY_TASK_STEP": "5",
            },
            2,
            3,
            "SLURM_ARRAY_TASK_ID",
        ),
        # one element, submitted or queued again by itself, takes all that is left
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "1", "SLURM_ARRAY_TASK_MIN": "7"}, 0, 1, "SLURM_A"),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, 1, 2, "SLURM_PROCID"),
        # a batch script has SLURM_PROCID too, and is no step of several
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, 0, 1, ""),
        (
            {
                "SLURM_ARRAY_TASK_ID": "1",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_PROCID": "1",
                "SLURM_STEP_NUM_TASKS": "2",
            },
            3,
            6,
            "SLURM_ARRAY_TASK_ID",
        ),
        ({"JOB_COMPLETION_INDEX": "4", "GFT_TASKS": "8"}, 4, 8, "JOB_COMPLETION_INDEX"),
    ],
)
def test_the_environment_says_which(environment: dict[str, str], index: int, count: int, named_by: str) -> None:
    found = find_task(None, environment)
    assert (found.index, found.count) == (index, count)
    assert found.named_by.startswith(named_by) and found.alone == (not named_by)


def test_the_flag_comes_first() -> None:
    assert find_task("1/3", {"RANK": "0", "WORLD_SIZE": "8"}) == Task(1, 3, "--task")


@pytest.mark.parametrize(
    ("flag", "environment", "said"),
    [
        ("3/3", {}, "counted from 0"),
        ("one/3", {}, "expected i/n"),
        ("-1/3", {}, "expected i/n"),
        ("0/0", {}, "expected i/n"),
        (None, {"JOB_COMPLETION_INDEX": "1"}, "GFT_TASKS is not"),
        (None, {"JOB_COMPLETION_INDEX": "8", "GFT_TASKS": "8"}, "task 8 of 8 is none"),
        (None, {"SLURM_ARRAY_TASK_ID": "x"}, "expected a number"),
        (None, {"SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1"}, "with gaps"),
    ],
)
def test_a_task_that_makes_no_sense_is_refused(
    flag: str | None, environment: dict[str, str], said: str, one_line: Callable[[BaseException], str]
) -> None:
    with pytest.raises(UserError) as caught:
        find_task(flag, environment)
    assert said in one_line(caught.value)


@pytest.mark.parametrize("count", [1, 3, 4, 40])
def test_every_shard_has_one_owner(count: int) -> None:
    shares = [owned(Task(index, count), range(17)) for index in range(count)]
    assert sorted(shard for share in shares for shard in share) == list(range(17))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_tasks_at_the_same_time_make_what_one_makes(settings: Settings, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    processes = [start(settings(out), Task(index, 3, "test")) for index in range(3)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert verify(out) == []
    assert_same(out, alone)
    assert sorted(p.name for p in (out / WORK).iterdir()) == ["engines", "lock", "plan.json", "records", "tasks"]


def test_each_task_does_its_own_and_the_last_one_finishes(settings: Settings, alone: Path, tmp_path: Path) -> None:
    config = config_of(settings(tmp_path / "data"))
    store = FolderStore(tmp_path / "data")
    for index in (2, 0):
        assert generate(config, task=Task(index, 3, "test")) is None
    names = [f"train-{shard:05d}-of-00006.parquet" for shard in (0, 2, 3, 5)]
    assert sorted(path.name for path in (tmp_path / "data" / DATA).iterdir()) == names
    with pytest.raises(UserError, match="2 of 6 shards are not there yet"):
        finalize(store)
    assert generate(config, task=Task(1, 3, "test")) == read_manifest(tmp_path / "data")
    assert_same(tmp_path / "data", alone)
    assert finalize(store) == read_manifest(tmp_path / "data")


def test_copies_of_a_task_at_the_same_time(settings: Settings, alone: Path, tmp_path: Path) -> None:
    """Each draws for the same shards; what is published first stays, and nothing is there twice."""
    out = tmp_path / "data"
    processes = [start(settings(out, engine={"batch_size": 2}), Task(0, 1, "test")) for _ in range(3)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert verify(out) == []
    assert_same(out, alone)


def test_a_copy_that_is_overtaken_ends_well(
    settings: Settings, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one has finished the data set and put away prompts and journals, which this one goes on to read."""
    out, draw, missed = tmp_path / "data", generation.draw, []
    data = settings(out, engine={"device": "cpu", "batch_size": 1})

    def overtaken(*args: Any, **kwargs: Any) -> Any:
        try:
            for number, shard in enumerate(draw(*args, **kwargs)):
                yield shard
                if number == 0:
                    other = start(data, Task(0, 1, "test"))
                    other.join()
                    assert other.exitcode == 0
        except FileNotFoundError as error:
            missed.append(error)
            raise

    monkeypatch.setattr(generation, "draw", overtaken)
    assert generate(config_of(data), task=Task(0, 1, "test")) == read_manifest(out)
    assert missed, "it had all its prompts already, and was not overtaken"
    states = [json.loads(path.read_bytes())["state"] for path in (out / TASKS).iterdir()]
    assert states == ["done", "done"]
    assert verify(out) == []
    assert_same(out, alone)


def test_samples_that_another_copy_has_taken_away_are_drawn_again(
    settings: Settings, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a shared file system, where the shard that it published may not be seen at once."""
    assemble, gone = generation.assemble, []

    def without(run: generation.Run, shard: int, tokenizer: Any) -> Any:
        if shard in (0, 3) and shard not in gone:
            gone.append(shard)
            run.store.remove(f"{WORK}/journal/{shard:05d}")
        return assemble(run, shard, tokenizer)

    monkeypatch.setattr(generation, "assemble", without)
    generate(config_of(settings(tmp_path / "data")), task=Task(0, 1, "test"))
    assert gone == [0, 3]
    assert verify(tmp_path / "data") == []
    assert_same(tmp_path / "data", alone)


def test_something_that_takes_away_journals_all_the_time_is_named(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "assemble", lambda *_: None)
    with pytest.raises(UserError, match=r"6 shards were drawn 3 times .*journal"):
        generate(config_of(settings(tmp_path / "data")), task=Task(0, 1, "test"))


def test_a_prompt_given_up_by_one_copy_and_published_by_another_is_in(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "data"
    config = config_of(settings(out))
    assert generate(config, task=Task(0, 2, "test")) is None
    plan = read_plan(FolderStore(out))
    assert plan is not None
    done, missing = (prepare.shard_prompts(FolderStore(out), plan, shard)[0].prompt.prompt_id for shard in (0, 1))
    for prompt_id in (done, missing):
        generation.quarantine(FolderStore(out), prompt_id, "self", "test")
    manifest = generate(config, task=Task(1, 2, "test"))
    assert manifest is not None and manifest.prompts_quarantined == 1
    assert verify(out) == []
    assert [json.loads(line)["prompt_id"] for line in (out / "quarantine.jsonl").read_text().splitlines()] == [missing]
    assert done in contents(out) and missing not in contents(out)


def test_a_shard_with_other_prompts_is_found_before_the_data_set_is_final(
    settings: Settings, tmp_path: Path, one_line: Callable[[BaseException], str]
) -> None:
    out = tmp_path / "data"
    generate(config_of(settings(out)), task=Task(0, 2, "test"))
    names = sorted(path.name for path in (out / DATA).iterdir())
    (out / DATA / names[1]).write_bytes((out / DATA / names[0]).read_bytes())
    (out / record_of(names[1])).unlink(missing_ok=True)  # is made again, and is true of that file
    with pytest.raises(UserError) as caught:
        generate(config_of(settings(out)), task=Task(1, 2, "test"))
    assert "lacks 4 of its prompts and has 4 that are not its own" in one_line(caught.value)
    assert not (out / MANIFEST).exists()


def test_a_task_and_a_command_that_is_none_do_not_meet(settings: Settings, tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "data")
    tasks = prepare.writing(store, alone=False), prepare.writing(store, alone=False)
    with tasks[0], tasks[1], pytest.raises(UserError, match="another gft command is writing to it"):
        generate(config_of(settings(tmp_path / "data")))
    with prepare.writing(store, alone=True), pytest.raises(UserError, match="not a task"):
        generate(config_of(settings(tmp_path / "data")), task=Task(0, 2, "test"))


def test_tasks_that_begin_together_share_one_plan(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second finds the first one's plan when it wants to write its own."""
    config, store = config_of(settings(tmp_path / "data")), FolderStore(tmp_path / "data")
    tokenizer = prepare.preflight(config)
    first = prepare.create_output(config, store, tokenizer)
    assert prepare.create_output(config, store, tokenizer) == first
    assert store.names(prepare.PROMPTS) == [first.prompts_in]
    other = config_of(settings(tmp_path / "data", seed=1))
    with pytest.raises(UserError, match="`seed` was 0 and is now 1"):
        prepare.create_output(other, store, tokenizer)


COMMAND = [sys.executable, "-m", "gftcli.main"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_all_processes_saves_and_ends_with_75(
    settings: Settings, alone: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """As Slurm does it: the judging processes get the signal too, and no verdict may come of that."""
    out, config = tmp_path / "data", tmp_path / "generate.yaml"
    config.write_text(json.dumps(settings(out, engine={"device": "cpu", "batch_size": 1})))
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [*COMMAND, "generate", str(config), "--task", "0/1"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    ) as process:
        while not list((out / DATA).glob("*")):
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, number)
        _, said = process.communicate()
    assert process.returncode == 75
    assert f"stopped by {number.name}; given again, the same command continues" in said
    (seen,) = read_status(FolderStore(out)).latest
    assert (seen.state, seen.attempt.reason) == ("stopped", number.name)
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert verify(out) == []
    assert_same(out, alone)


def test_signals_raise_once_and_only_within() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGUSR1"), stop_on_signals():
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # while it is putting away
    assert signal.getsignal(signal.SIGTERM) is before
