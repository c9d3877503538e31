"""What the benchmarks share: a process with its peak memory, medians with quartiles, tables, the command at the end.

Nothing is run from here, and only the standard library is imported: a process that is started is counted with at least
the memory that its parent held then (Linux), so whoever measures others has to stay small itself.
"""

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent
THREADS = ("OMP_", "GOMP_", "KMP_", "MKL_")  # variables that say what threads do: they cost or save a tenth and more

T = TypeVar("T")


class Failed(Exception):
    """A process that did not end well: exit code (negative: a signal), what it said, its command."""


@dataclass(frozen=True, slots=True)
class Ran:
    """A process that ended well."""

    stdout: str
    seconds: float
    cpu_seconds: float  # user and system, of all its threads
    peak_gib: float  # resident, of the process itself or of the largest child that it waited for


def run_process(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Ran:
    """Run a command in the repository's folder, without the Hub. Raises Failed when its exit code is not 0."""
    offline = {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **offline, **(environment or {})}, stdout=out, stderr=errors
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        text, said = out.read().decode(errors="replace"), errors.read().decode(errors="replace")
    if process.returncode:
        raise Failed(process.returncode, f"{text[-500:]}{said[-3000:]}", list(command))
    return Ran(text, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20)


def peak_megabytes() -> float:
    """The peak resident size of this process so far, counted from its start: not what its parent held (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def last_json(ran: Ran) -> dict[str, Any]:
    """The object on the last line that a process printed."""
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def end(failed: Failed) -> None:
    """Ends the program, saying which process failed and how."""
    code, said, command = failed.args
    sys.exit(f"{said}\nexit code {code} of: {shlex.join(command)[:300]}")


def linears(model: str) -> list[tuple[int, int]]:
    """Inputs and outputs of the linears of one layer of a Llama-shaped model."""
    config = json.loads((Path(model) / "config.json").read_text())
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv = (config["head_dim"] * config[key] for key in ("num_attention_heads", "num_key_value_heads"))
    return [(width, heads), (width, kv), (width, kv), (heads, width), (width, inner), (width, inner), (inner, width)]


@dataclass(frozen=True, slots=True)
class Spread:
    """The middle half of some measurements."""

    low: float  # lower quartile
    median: float
    high: float  # upper quartile

    def text(self, spec: str = ",.1f") -> str:
        """`median (low to high)`."""
        return f"{self.median:{spec}} ({self.low:{spec}} to {self.high:{spec}})"


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles (linear between the two nearest values, as numpy counts them)."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(low, median, high)


def alternating(sides: Sequence[T], repeats: int) -> Iterator[T]:
    """Each side once a repeat, in turn from the front and from the back: what drifts meets all of them alike."""
    for repeat in range(repeats):
        yield from sides if repeat % 2 == 0 else reversed(sides)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Columns as wide as their widest cell; the first `left` are set left, numbers are set right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        wide = enumerate(zip(row, widths, strict=True))
        cells = [cell.ljust(width) if place < left else cell.rjust(width) for place, (cell, width) in wide]
        print("  ".join(cells).rstrip(), flush=True)


def print_end(*packages: str) -> None:
    """What it was measured with, and the command that prints it again."""
    versions = [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)]
    script = Path(sys.argv[0]).resolve().relative_to(ROOT)
    command = ["python", str(script), *sys.argv[1:]]
    threads = [f"{name}={shlex.quote(os.environ[name])}" for name in sorted(os.environ) if name.startswith(THREADS)]
    print(f"\n{os.cpu_count()} cores; {', '.join(versions)}\n{' '.join([*threads, shlex.join(command)])}")
