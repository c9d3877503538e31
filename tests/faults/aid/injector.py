"""Faults at the n-th operation on a file system: the library that makes them (faults.c), and commands run under it."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum, IntFlag
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any

AID = Path(__file__).parent
ROOT = AID.parents[2]
MODEL = ROOT / "samples" / "demo" / "model"


class Kind(IntFlag):
    """Kinds of operations, as in faults.c."""

    CREATE, WRITE, SYNC, NAME, REMOVE, MKDIR, READ = 1, 2, 4, 8, 16, 32, 64


class How(IntEnum):
    """What becomes of the n-th operation, as in faults.c."""

    COUNT, KILL, TEAR, FAIL_ONCE, FAIL_ON = range(5)


CHANGES = Kind.CREATE | Kind.WRITE | Kind.SYNC | Kind.NAME | Kind.REMOVE | Kind.MKDIR


@dataclass(frozen=True)
class Fault:
    """At the `nth` operation of these kinds the process dies, or it fails, alone or with all that follow."""

    how: How
    nth: int
    kinds: Kind = CHANGES
    error: int = 0

    def __str__(self) -> str:
        name = f" {errno.errorcode[self.error]}" if self.error else ""
        return f"{self.how.name}{name} at operation {self.nth} of {self.kinds!r}"


@dataclass(frozen=True)
class Operation:
    """One line of the library's log."""

    kind: Kind
    what: str
    path: str


@dataclass(frozen=True)
class Ended:
    """How a command ended: a negative code is a signal."""

    code: int
    said: str
    operations: list[Operation]  # that were counted; under a fault the one that was hit

    @property
    def error(self) -> str:
        """The one line for the user, where that is how it ended."""
        lines = [line for line in self.said.splitlines() if line.startswith("error: ")]
        assert self.code == 2 and len(lines) == 1 and "Traceback" not in self.said, self
        return lines[0]


def build(folder: Path) -> Path | None:
    """Compile the library; None where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        return None
    target = folder / "faults.so"
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(target), str(AID / "faults.c"), "-ldl"]
    subprocess.run(command, check=True)
    return target


class Warm:
    """Runs `gft` commands, each in a process of its own, on what is below `disk`; only that may fail."""

    def __init__(self, library: Path, folder: Path, disk: Path, **environment: str) -> None:
        self.disk = disk
        self._output, self._log = folder / "output", folder / "operations"
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(AID / "warm.py"), str(library), str(MODEL)],
            cwd=ROOT,
            env={**os.environ, "LD_PRELOAD": str(library), "TOKENIZERS_PARALLELISM": "false", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.process_id = 0  # of the last command
        if self._answer() != "ready":
            self.close()
            raise RuntimeError("the process that runs commands has not started: see what it wrote to stderr")

    def gft(
        self,
        *arguments: str | Path,
        fault: Fault | None = None,
        lag: dict[str, Any] | None = None,
        constants: Sequence[tuple[str, str, Any]] = (),
    ) -> Ended:
        """Run the command; `lag` as `warm.lag` takes it, `constants` (module, name, value) are others for this run."""
        self._log.unlink(missing_ok=True)
        told = None if fault is None else {**asdict(fault), "below": str(self.disk), "log": str(self._log)}
        order = {"arguments": list(map(str, arguments)), "output": str(self._output), "fault": told, "lag": lag}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({**order, "constants": constants}) + "\n")
        self._process.stdin.flush()
        self.process_id = int(self._answer())
        code = int(self._answer())
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        parts = [line.split(" ", 2) for line in lines]
        operations = [Operation(Kind(int(kind)), what, path) for kind, what, path in parts]
        return Ended(code, self._output.read_text(errors="replace"), operations)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def moments(operations: Sequence[Operation], rng: Random, most: int) -> list[tuple[int, Operation]]:
    """At most so many of the operations, by their numbers from 1; of many writes in a row to a file three at most."""
    found: list[tuple[int, Operation]] = []
    numbered = enumerate(operations, start=1)
    for (kind, _), run in groupby(numbered, key=lambda item: (item[1].kind, item[1].path)):
        group = list(run)
        if kind in (Kind.WRITE, Kind.READ) and len(group) > 3:
            group = [group[0], rng.choice(group[1:-1]), group[-1]]
        found += group
    return sorted(rng.sample(found, min(most, len(found))), key=lambda item: item[0])
