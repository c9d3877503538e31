"""benchmarks/ as its scripts see it: a folder of modules that import each other."""

import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports one of them by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def benchmark() -> Callable[..., list[str]]:
    """Runs one with arguments; gives the lines that it printed, without empty ones."""

    def run(*arguments: str) -> list[str]:
        command = [sys.executable, f"benchmarks/{arguments[0]}", *arguments[1:]]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        assert re.match(rf"([A-Z_]+=\S+ )*python benchmarks/{re.escape(arguments[0])}", lines[-1])
        assert " cores; Python 3." in lines[-2]
        return lines

    return run
