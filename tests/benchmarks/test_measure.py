"""benchmarks/measure.py: what all benchmarks count with."""

import os
import sys
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st


def test_quartiles_are_numpys(module: Callable[[str], ModuleType]) -> None:
    measure = module("measure")

    @given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
    def holds(values: list[float]) -> None:
        found = measure.spread(values)
        wanted = np.quantile(values, [0.25, 0.5, 0.75])
        assert np.allclose([found.low, found.median, found.high], wanted, rtol=1e-9, atol=1e-6)

    holds()


def test_a_process_is_counted_with_its_memory_and_a_failing_one_is_named(module: Callable[[str], ModuleType]) -> None:
    measure = module("measure")
    small, large = (
        measure.run_process([sys.executable, "-c", f"print(len(bytearray(b'1' * {size})))"]) for size in (1, 2**28)
    )
    assert (small.stdout, large.stdout) == ("1\n", f"{2**28}\n")
    assert large.peak_gib > 0.5 and large.peak_gib >= small.peak_gib  # two copies of 256 MiB
    assert 0 < small.seconds < 60 and 0 < small.cpu_seconds < 60
    with pytest.raises(measure.Failed) as failed:
        measure.run_process([sys.executable, "-c", "import sys; print('before'); sys.exit('what went wrong')"])
    code, said, command = failed.value.args
    assert code == 1 and "before" in said and "what went wrong" in said and command[0] == sys.executable
    with pytest.raises(SystemExit, match="what went wrong"):
        measure.end(failed.value)


def test_sides_take_turns_in_going_first(module: Callable[[str], ModuleType]) -> None:
    assert list(module("measure").alternating("abc", 3)) == list("abccbaabc")


def test_columns_are_as_wide_as_their_widest_cell(
    module: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    module("measure").print_table(("name", "n"), [("a", "1,000"), ("longer", "2")])
    assert capsys.readouterr().out == "name        n\na       1,000\nlonger      2\n"


def test_the_command_has_what_says_what_threads_do(
    module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = module("measure")
    for name in [name for name in os.environ if name.startswith(measure.THREADS)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", [str(measure.ROOT / "benchmarks" / "growth.py"), "--repeats", "5"])
    measure.print_end("numpy")
    assert capsys.readouterr().out.splitlines()[-1] == "python benchmarks/growth.py --repeats 5"
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    measure.print_end("numpy")
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == "MKL_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/growth.py --repeats 5"
