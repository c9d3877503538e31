"""Storage that fails: one clear line, what was finished is intact, and the same command goes on when it is mended."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
from aid.broken import NAMES, REPO, Command, World, check, command, equal, expected, is_done, progress
from aid.injector import CHANGES, Ended, Fault, How, Kind, Operation, moments
from test_crashes import case_of, finish

Count = Callable[[int, int], int]
Tried = Callable[[str, int], None]

PAGE = 4096
ON_HUB = ("push", "push-parts", "pull")  # the client's cache is its own
SPACE = Kind.CREATE | Kind.WRITE | Kind.SYNC | Kind.MKDIR
NAMING = Kind.CREATE | Kind.NAME | Kind.REMOVE | Kind.MKDIR
FAULTS = {
    "disk full": (errno.ENOSPC, SPACE),
    "quota": (errno.EDQUOT, SPACE),
    "read-only": (errno.EROFS, CHANGES),
    "permission denied": (errno.EACCES, NAMING | Kind.READ),
    "input/output error": (errno.EIO, CHANGES | Kind.READ),
    "stale file handle": (errno.ESTALE, CHANGES | Kind.READ),
    "a file vanishes": (errno.ENOENT, Kind.NAME | Kind.READ),
    "renaming fails": (errno.EXDEV, Kind.NAME),
}


@pytest.mark.parametrize("name", NAMES)
def test_an_operation_fails(name: str, world: World, rng: Random, num_cases: Count, tried: Tried) -> None:
    """Once, or from then on; in a run that begins, or that goes on from where an earlier one was killed."""
    wanted = expected(world, name, case_of(world))
    failing: list[tuple[str, Fault, Operation]] = []
    what = command(name, world, case_of(world))
    counted = world.warm.gft(*what.words, fault=Fault(How.COUNT, 0, CHANGES | Kind.READ), constants=what.constants)
    assert counted.code == 0, counted.said
    for promise, (number, kinds) in FAULTS.items():
        of_kinds = [operation for operation in counted.operations if operation.kind in kinds]
        for nth, operation in moments(of_kinds, rng, num_cases(2, 8)):
            how = rng.choice([How.FAIL_ONCE, How.FAIL_ON])
            failing.append((f"storage: {promise}", Fault(how, nth, kinds, number), operation))
    failing = rng.sample(failing, min(len(failing), num_cases(5, len(failing))))
    wrong = []
    for promise, fault, operation in failing:
        tried(promise, 1)
        what = command(name, world, case_of(world))
        if rng.random() < 0.5:
            killed = world.warm.gft(*what.words, fault=Fault(How.KILL, rng.randrange(1, 40)), constants=what.constants)
            assert killed.code in (0, -9), killed.said
        print(name, fault, operation)
        before, safe = {part: value for part, value in what.parts().items() if part in wanted}, progress(what)
        ended = world.warm.gft(*what.words, fault=fault, constants=what.constants)
        try:
            if ended.code == 0:
                assert equal(what.parts(), wanted), "it says that it has ended well"
            elif not (what.refuses and what.refuses in ended.said):
                said_of(world, name, ended, fault.error)
            check(what, wanted)
            after = what.parts()
            gone = [part for part in before if equal(before[part], wanted[part]) and part not in after]
            assert not gone and progress(what) >= safe, f"what was safe is not there any more: {gone}"
            finish(world, what, wanted)
        except AssertionError as error:
            wrong.append(f"{fault} {operation}\n    {str(error)[:700]}")
    assert not wrong, "\n".join(wrong)


def said_of(world: World, name: str, ended: Ended, number: int) -> None:
    """One line, with the file and, in the system's words, what failed."""
    line = ended.error
    assert os.strerror(number) in line or number == errno.ENOENT, line
    assert str(world.warm.disk) in line or (name in ON_HUB and line.startswith(f"error: {REPO}")), line


@contextmanager
def mounted(place: Path, *options: str) -> Iterator[None]:
    """A file system of its own there. It takes root: elsewhere the test is skipped."""
    place.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *options, str(place)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a file system here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_disk_that_is_full(name: str, world: World, rng: Random, num_cases: Count, tried: Tried) -> None:
    """A real one, of some pages, that then gets more."""
    wanted, case = expected(world, name, case_of(world)), case_of(world)
    what = command(name, world, case)
    needed = used(world, what)
    for _ in range(num_cases(1, 8)):
        shutil.rmtree(case, ignore_errors=True)  # the one before was on the disk that is full
        pages = rng.randrange(1, max(2, needed // PAGE))
        with mounted(world.warm.disk, "-t", "tmpfs", "-o", "size=16m", "tmpfs"):
            what = command(name, world, case)
            filled = sum(path.stat().st_blocks * 512 for path in world.warm.disk.rglob("*"))
            resize(world.warm.disk, filled + pages * PAGE)
            tried("storage: a real disk that is full", 1)
            ended = world.warm.gft(*what.words, constants=what.constants)
            print(name, pages, "pages:", ended)
            if ended.code and "are free there" not in ended.error:  # `gft pull` looks before it downloads
                said_of(world, name, ended, errno.ENOSPC)
            check(what, wanted)
            resize(world.warm.disk, 256 * 2**20)
            finish(world, what, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_is_read_only(name: str, world: World, rng: Random, tried: Tried) -> None:
    """A real one, when a command begins, and when it goes on."""
    wanted = expected(world, name, case_of(world))
    disk = world.warm.disk
    for begun in (False, True):
        what = command(name, world, case_of(world))
        if begun:
            world.warm.gft(*what.words, fault=Fault(How.KILL, rng.randrange(1, 60)), constants=what.constants)
        before, done = what.parts(), is_done(what)
        with mounted(disk, "--bind", str(disk)):
            subprocess.run(["mount", "-o", "remount,ro,bind", str(disk)], check=True)
            tried("storage: a real folder that is read-only", 1)
            ended = world.warm.gft(*what.words, constants=what.constants)
            if not done and (ended.code or name not in ON_HUB):
                assert "ead-only" in ended.error and str(disk) in ended.error, ended
            assert what.parts() == before or name in ON_HUB
        finish(world, what, wanted)


def used(world: World, what: Command) -> int:
    """Bytes on the disk after the command, about."""
    assert world.warm.gft(*what.words, constants=what.constants).code == 0
    return sum(path.stat().st_blocks * 512 for path in world.warm.disk.rglob("*"))


def resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


@pytest.mark.parametrize("name", ["generate", "finalize", "train", "rejudge", "merge", "split", "pull"])
def test_listings_that_are_old(name: str, world: World, rng: Random, num_cases: Count, tried: Tried) -> None:
    """As of a shared file system: a run goes on, and sees folders now and then as they were before the last one."""
    wanted = expected(world, name, case_of(world))
    what = command(name, world, case_of(world))
    counted = world.warm.gft(*what.words, fault=Fault(How.COUNT, 0), constants=what.constants)
    for nth, operation in moments(counted.operations, rng, num_cases(3, 30)):
        what = command(name, world, case_of(world))
        early = rng.randrange(0, nth)
        if early:
            world.warm.gft(*what.words, fault=Fault(How.KILL, early), constants=what.constants)
        views = listings(case_of(world))
        world.warm.gft(*what.words, fault=Fault(How.KILL, nth - early), constants=what.constants)
        views = {folder: [] for folder in listings(case_of(world))} | views
        seed = rng.randrange(10**6)
        print(name, operation, "killed at", early, nth, "seed", seed)
        tried("storage: listings that are old", 1)
        done = is_done(what)
        ended = world.warm.gft(*what.words, lag={"seed": seed, "views": views}, constants=what.constants)
        assert ended.code == 0 or ended.error, ended
        assert is_done(what) or not done
        check(what, wanted)
        finish(world, what, wanted)


def listings(folder: Path) -> dict[str, list[str]]:
    folders = [path for path in (folder, *folder.rglob("*")) if path.is_dir()]
    return {str(path): [entry.name for entry in path.iterdir()] for path in folders}
