"""`gft` as its user runs it, in this process: nothing is imported anew for each command."""

import sys
from pathlib import Path

import pytest
from aid.commands import Gft, Result

from gftcli import main as command


@pytest.fixture
def gft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Gft:
    """Run `gft ARGUMENTS` in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["gft", *map(str, arguments)])
        code = 0
        try:
            command.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run
