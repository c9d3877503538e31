"""plan_scale.py, formats.py and startup.py as they stand, in their smallest sizes."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def test_planning_is_measured_for_each_size(benchmark: Callable[..., list[str]], tmp_path: Path) -> None:
    lines = benchmark("plan_scale.py", "--groups", "200", "500", "--folder", str(tmp_path))
    rows = [line.split() for line in lines[1:3]]
    assert [row[:2] for row in rows] == [["256", "1"], ["512", "2"]]
    assert " x " not in lines[1] and lines[2].count(", x ") == 4
    assert not list(tmp_path.iterdir())


def test_all_formats_give_the_same_and_are_measured(benchmark: Callable[..., list[str]], tmp_path: Path) -> None:
    lines = benchmark("formats.py", "--smoke", "--folder", str(tmp_path))
    for name in ("synthetic", "demo"):
        (start,) = (number for number, line in enumerate(lines) if line.startswith(f"{name}: "))
        rows = lines[start + 2 : start + 11]
        assert [row[:18].strip() for row in rows] == [
            *(["gft shards"] * 4),
            "JSON Lines + zstd",
            *(["row a response"] * 3),
            "gft export trl-sft",
        ]
        assert all(float(row.split()[-1]) > 0 for row in rows)
    assert not list(tmp_path.iterdir())


def test_a_format_that_gives_something_else_ends_the_run(module: Callable[[str], ModuleType]) -> None:
    formats = module("formats")
    same = {key: formats.Read(1.0, 10, 55, -0.0 if key[0] == formats.EXPORT else -3.5) for key in formats.READERS}
    formats.check_same(same)
    for wrong in (formats.Read(1.0, 9, 55, -3.5), formats.Read(1.0, 10, 54, -3.5), formats.Read(1.0, 10, 55, -3.4)):
        with pytest.raises(SystemExit, match="not the same content: JSON Lines"):
            formats.check_same(same | {(formats.JSONL, "orjson, rows"): wrong})


def test_commands_are_timed_and_their_modules_counted(benchmark: Callable[..., list[str]]) -> None:
    lines = benchmark("startup.py", "--repeats", "2", "--trl", "", "--only", "python -c pass", "gft --help")
    plain, help_ = lines[1].split(), lines[2].split()
    assert plain[:3] == ["python", "-c", "pass"] and help_[:2] == ["gft", "--help"]
    assert plain[-1] == help_[-1] == "no"  # torch
    assert int(plain[-2]) < int(help_[-2].replace(",", ""))
