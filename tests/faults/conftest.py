"""The fault suite: how many cases a test tries, from which seed, and the table of promises at the end.

`make test-faults` tries a sample of each kind of fault, `make faults-full` (`--full`) all of them. Every random choice
comes from `--fault-seed`, which is printed, so that a failure can be tried again.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from random import Random

import pytest
from aid.broken import World, open_world

PROMISE, CASES = "promise", "cases"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the full count of cases, not a sample")
    parser.addoption("--fault-seed", type=int, default=0, help="of every random choice of the suite")


def pytest_report_header(config: pytest.Config) -> str:
    counts = "full counts" if config.getoption("--full") else "a sample (--full: all)"
    return f"faults: {counts}, --fault-seed {config.getoption('--fault-seed')}"


Count = Callable[[int, int], int]


@pytest.fixture
def num_cases(request: pytest.FixtureRequest) -> Count:
    """`num_cases(sample, full)`: how many cases to try in this run."""
    return lambda sample, full: full if request.config.getoption("--full") else sample


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> Random:
    """A generator of the test's own: the suite's seed and the test's name."""
    return Random(f"{request.config.getoption('--fault-seed')} {request.node.nodeid}")


Tried = Callable[[str, int], None]


@pytest.fixture
def tried(request: pytest.FixtureRequest) -> Tried:
    """`tried(promise, cases)`: say before the assertions which promise is tested by how many cases; for the table."""

    def say(promise: str, cases: int) -> None:
        request.node.user_properties += [(PROMISE, promise), (CASES, cases)]

    return say


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The commands that are broken on purpose, and what they work on."""
    with ExitStack() as stack:
        try:
            found = stack.enter_context(open_world(tmp_path_factory.mktemp("world")))
        except FileNotFoundError:
            pytest.skip("the faults of a file system are a C library (Linux), and there is no compiler `cc`")
        yield found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A line for each promise: cases tried, and tests that failed."""
    cases: dict[str, int] = {}
    failed: dict[str, int] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            named = [value for name, value in report.user_properties if name == PROMISE]
            counts = [value for name, value in report.user_properties if name == CASES]
            for promise, count in zip(named, counts, strict=True):
                if report.when == "call":
                    cases[promise] = cases.get(promise, 0) + count
                    failed[promise] = failed.get(promise, 0) + (outcome == "failed")
    if not cases:
        return
    terminalreporter.section("faults")
    width = max(map(len, cases))
    terminalreporter.line(f"{'promise':<{width}}  cases  tests failed")
    for promise in sorted(cases):
        terminalreporter.line(f"{promise:<{width}}  {cases[promise]:>5,}  {failed[promise]:>12,}")
