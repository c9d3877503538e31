"""growth.py as it stands, in its smallest sizes, and its exponent."""

import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def test_growth_prints_and_draws_four_panels(benchmark: Callable[..., list[str]], tmp_path: Path) -> None:
    figure = tmp_path / "figures" / "growth.svg"
    lines = benchmark("growth.py", "--smoke", "--figure", str(figure))
    assert sum(line.startswith("exponent ") for line in lines) == 4
    assert [line.split("  ")[0] for line in lines if "a response token" in line] == [
        "group size, responses",
        "prompt length, tokens",
        "vocabulary, tokens",
        "shards with the same groups, files",
    ]
    drawn = ET.parse(figure).getroot()
    assert sum(element.get("id", "").startswith("axes_") for element in drawn.iter()) == 4


def test_the_exponent_is_that_of_a_power(module: Callable[[str], ModuleType]) -> None:
    growth = module("growth")
    panel = growth.Panel("size", "prompt", (2, 4, 16), "ms")
    found = {("prompt", n): growth.Spread(0, 3 * n**1.5 if n < 16 else 3 * 4**1.5, 0) for n in panel.sizes}
    ends, last = growth.exponents(panel, found)
    assert ends == pytest.approx(1.5 * 1 / 3) and last == 0.0
