"""samples/study/figures.py: a picture of the charts that are named, and of no others."""

import struct
from pathlib import Path

import figures
import pytest
from playwright.sync_api import Browser


def size(photo: Path) -> tuple[int, int]:
    """Width and height of a PNG, from its header."""
    found: tuple[int, int] = struct.unpack(">II", photo.read_bytes()[16:24])
    return found


def test_only_the_charts_that_are_named(chromium: Browser, runs: list[Path], tmp_path: Path) -> None:
    sizes = []
    for charts in (("Loss",), ("Loss", "Entropy"), ("Loss", "Entropy", "Gradient norm")):
        figures.photograph(chromium, runs[1:], charts, tmp_path / "report.html", tmp_path / "photo.png")
        sizes.append(size(tmp_path / "photo.png"))
    (_, one), (width, two), (_, three) = sizes
    assert one == pytest.approx(two, abs=60) and three > 1.5 * two  # two charts to a row
    assert 900 < width <= figures.WIDTH


def test_a_chart_that_is_not_there_is_named(chromium: Browser, runs: list[Path], tmp_path: Path) -> None:
    charts = ("Loss", "Evaluation during training")
    with pytest.raises(SystemExit, match="has no chart Evaluation during training"):
        figures.photograph(chromium, runs[1:], charts, tmp_path / "report.html", tmp_path / "photo.png")
