"""Means over seeds and their intervals, against closed forms."""

import errno
import math
from pathlib import Path

import pytest

from gftdata.errors import UserError
from gfttrain.comparison import make_row, over_seeds, t_test
from gfttrain.curves import read_history
from gfttrain.results import Estimate, read_results


def estimates(*values: float) -> list[Estimate]:
    return [Estimate(value, value - 1.0, value + 1.0) for value in values]


def test_one_seed_is_its_own_estimate() -> None:
    (only,) = estimates(0.4)
    assert over_seeds([only]) == only


def test_the_interval_over_seeds_is_students() -> None:
    # three values 0.1 apart: s = 0.1, and 97.5 % of Student's t with 2 degrees of freedom is 4.302652729911275
    found = over_seeds(estimates(0.4, 0.5, 0.6))
    half = 4.302652729911275 * 0.1 / math.sqrt(3)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5 - half, 0.5 + half), rel=1e-9)


def test_seeds_that_agree_have_no_width() -> None:
    assert over_seeds(estimates(0.25, 0.25)) == Estimate(0.25, 0.25, 0.25)


def test_the_t_test_is_two_sided() -> None:
    # t = mean / (s / sqrt(n)) = 2 sqrt(3); with 2 degrees of freedom p = 1 - t / sqrt(t^2 + 2)
    t = 2 * math.sqrt(3)
    expected = 1 - t / math.sqrt(t**2 + 2)
    assert t_test([0.1, 0.2, 0.3]) == pytest.approx(expected, rel=1e-9)
    assert t_test([-0.1, -0.2, -0.3]) == pytest.approx(expected, rel=1e-9)
    assert t_test([0.0, 0.0]) == 1.0
    assert t_test([0.1, 0.1]) is None, "no spread, which is no certainty"


def test_results_that_are_hidden_are_no_missing_row(tmp_path: Path) -> None:
    """A file that vanishes for a moment: the table would say that the run diverged."""
    (tmp_path / "run" / "evals" / "sums").mkdir(parents=True)
    assert make_row("GFT", [tmp_path / "run"], None, ["sums"], []).cells == ()
    (tmp_path / "run" / "evals" / "sums" / "samples.parquet").touch()
    with pytest.raises(UserError, match=r"run/evals\.jsonl: is not there, and evaluations are"):
        make_row("GFT", [tmp_path / "run"], None, ["sums"], [])


@pytest.mark.parametrize("read", [read_results, lambda folder: read_history(folder / "metrics.jsonl")])
def test_a_file_that_cannot_be_read_is_named(read: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system's error, of a file that was opened, names none."""

    def refuse(path: Path) -> bytes:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(PermissionError) as raised:
        read(tmp_path)  # type: ignore[operator]
    assert str(tmp_path) in str(raised.value.filename)
