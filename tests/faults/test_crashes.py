"""SIGKILL at any operation on the disk, any request to the Hub, or by the clock; then the same command again."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from aid.broken import (
    NAMES,
    Command,
    Parts,
    World,
    check,
    command,
    equal,
    expected,
    generation,
    groups_of,
    is_done,
    progress,
    run_of,
    training,
    write,
)
from aid.injector import ROOT, Fault, How, Kind, moments

Count = Callable[[int, int], int]
Tried = Callable[[str, int], None]


def case_of(world: World) -> Path:
    return world.warm.disk / "case"


def finish(world: World, what: Command, wanted: Parts) -> None:
    """The same command again: it ends well, with what a run has that nothing disturbed."""
    done = is_done(what)
    ended = world.warm.gft(*what.words, constants=what.constants)
    if what.refuses and done:
        assert what.refuses in ended.error
    else:
        assert ended.code == 0, ended.said
    found = what.parts()
    assert found.keys() == wanted.keys()
    assert all(equal(found[part], wanted[part]) for part in wanted)


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_any_operation_on_the_disk(
    name: str, world: World, rng: Random, num_cases: Count, tried: Tried
) -> None:
    """At each the process dies before it, or, at a write, when half of it is there; some lives end so early twice.

    `pull` downloads in threads that wait for each other's locks, by creating them again and again: the last operations
    that were counted may not be reached in another run, which then ends well.
    """
    wanted = expected(world, name, case_of(world))
    what = command(name, world, case_of(world))
    counted = world.warm.gft(*what.words, fault=Fault(How.COUNT, 0), constants=what.constants)
    assert counted.code == 0, counted.said
    points = moments(counted.operations, rng, num_cases(6, 60))
    kills = 0
    try:
        for number, operation in points:
            what = command(name, world, case_of(world))
            how = How.TEAR if operation.kind == Kind.WRITE and rng.random() < 0.7 else How.KILL
            lives = [Fault(how, number)]
            if rng.random() < 0.3:
                lives.append(Fault(rng.choice([How.TEAR, How.KILL]), rng.randrange(1, len(counted.operations))))
            safe = progress(what)
            for fault in lives:
                print(name, fault, operation)
                ended = world.warm.gft(*what.words, fault=fault, constants=what.constants)
                may_end = (0, 2) if fault is not lives[0] else (0,) if name == "pull" else ()
                assert ended.code in (-9, *may_end), ended
                kills += ended.code == -9
                check(what, wanted)
                before, safe = safe, progress(what)
                assert safe >= before, "what was safe is not there any more"
            finish(world, what, wanted)
        assert 2 * kills >= len(points)
    finally:
        tried("crashes: SIGKILL at an operation on the disk, then the same command", kills)


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("name", ["push", "push-parts", "pull"])
def test_killed_at_any_request_to_the_hub(
    name: str, answered: bool, world: World, rng: Random, num_cases: Count, tried: Tried
) -> None:
    """When the request is on its way, or when the Hub has done what it asks and the answer is on its way."""
    wanted = expected(world, name, case_of(world))
    what = command(name, world, case_of(world))
    world.hub.asked.clear()
    assert world.warm.gft(*what.words, constants=what.constants).code == 0
    total = len(world.hub.asked)
    points = sorted(rng.sample(range(1, total + 1), min(total, num_cases(4, total))))
    for number in points:
        tried("crashes: SIGKILL at a request to the Hub, then the same command", 1)
        what = command(name, world, case_of(world))
        world.hub.asked.clear()
        print(name, "request", number, "of", total)

        def kill(asked: str, number: int = number) -> str | None:
            if len(world.hub.asked) == number:
                os.kill(world.warm.process_id, signal.SIGKILL)
                return None if answered else "cut"
            return None

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(world.hub, "fault", kill)
            ended = world.warm.gft(*what.words, constants=what.constants)
        assert ended.code == -9, ended
        check(what, wanted)
        finish(world, what, wanted)


@pytest.mark.parametrize("kind", ["generate", "generate in tasks", "train", "train on 2 ranks"])
def test_killed_by_the_clock(
    kind: str, world: World, rng: Random, num_cases: Count, tried: Tried, tmp_path: Path
) -> None:
    """The command as from a shell, with its judges, its ranks, other tasks; at moments drawn from the time it takes."""
    settings, whole, out = tmp_path / "settings.yaml", tmp_path / "whole", tmp_path / "out"
    makes = kind.partition(" ")[0]
    words = [makes, str(settings), *(["--nproc", "2"] if "ranks" in kind else [])]

    def make(place: Path) -> None:
        made = generation(place, engine={"device": "cpu", "batch_size": 1})
        made["prompts"]["limit"] = 8
        write(settings, made if makes == "generate" else training(place, world.data, epochs=8))

    def parts(place: Path) -> Parts:
        return groups_of(place, by_content=True) if makes == "generate" else run_of(place)

    make(whole)
    began = time.monotonic()
    assert gft(words).wait() == 0
    seconds = time.monotonic() - began
    make(out)
    for _ in range(num_cases(2, 10)):
        tried(f"crashes: SIGKILL by the clock, gft {kind}", 1)
        count = rng.choice([2, 3, 4]) if "tasks" in kind else 0
        lives = [gft([*words, "--task", f"{task}/{count}"]) for task in range(count)] or [gft(words)]
        moment = rng.uniform(0.3, 1.0) * seconds * max(1, count)
        print(kind, f"{moment:.1f} of {seconds:.1f} s, {len(lives)} at a time")
        try:
            for life in lives:
                life.wait(max(0.0, moment))
        except subprocess.TimeoutExpired:
            for life in lives:
                os.killpg(life.pid, signal.SIGKILL)
        codes = [life.wait() for life in lives]
        assert set(codes) <= {0, -9}, codes
        if set(codes) == {0}:
            assert equal(parts(out), parts(whole))
            shutil.rmtree(out)
    assert gft(words).wait() == 0
    assert equal(parts(out), parts(whole))


def gft(words: list[str]) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-W", "ignore", "-m", "gftcli.main", *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
