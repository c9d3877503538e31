"""benchmarks/run.py: every entry can be started; one that fails stops no other."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_every_entry_is_a_script_and_what_it_needs_can_be_made(module: Callable[[str], ModuleType]) -> None:
    run = module("run")
    names = [entry.name for entry in run.ENTRIES]
    assert len(set(names)) == len(names)
    assert all(entry.script.is_file() for entry in run.ENTRIES)
    makefile = (ROOT / "Makefile").read_text()
    for needed in (path for entry in run.ENTRIES for path in entry.needs):
        target = run.MADE_BY[needed].removeprefix("make ")
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE)
        assert target in re.search(r"^bench:(.*)$", makefile, re.MULTILINE)[1]  # type: ignore[index]


def test_what_fails_is_named_at_the_end_and_the_rest_is_run(
    module: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = module("run")
    scripts = {
        "bad": "print('halfway'); raise SystemExit(3)",
        "good": "print('a table')",
        "alone": "raise SystemExit(9)",
    }
    for name, text in scripts.items():
        (tmp_path / f"{name}.py").write_text(text)
    needs = {"alone": (run.TRL,)}
    monkeypatch.setattr(run, "ROOT", tmp_path)  # where there is no environment of TRL
    entries = tuple(run.Entry(name, f"{name}.py", name, needs.get(name, ())) for name in scripts)
    monkeypatch.setattr(run, "ENTRIES", entries)
    results = tmp_path / "results.md"
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(results)])
    with pytest.raises(SystemExit, match=r"failed: bad: exit code 3; alone: \.venv-trl/bin/python is missing: make"):
        run.main()
    assert "halfway\n" in (shown := capfd.readouterr().out) and "a table\n" in shown
    text = results.read_text()
    assert re.search(r"^\d+ cores, commit \S+$", text, re.MULTILINE) and "torch 2." in text
    assert "**exit code 3**\n\n```\nhalfway\n```" in text and "```\na table\n```" in text
    monkeypatch.setattr(sys, "argv", ["run.py", "--only", "good", "--out", str(results)])
    run.main()
    assert "halfway" not in results.read_text()


def test_an_unknown_name_is_refused(module: Callable[[str], ModuleType]) -> None:
    with pytest.raises(SystemExit, match="no benchmark nonsense; there are own_cost, "):
        module("run").chosen(["formats", "nonsense"])
