"""The demo, with one method instead of six, and the script that made its model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from gftcli import demo

DEMO = Path(__file__).resolve().parents[2] / "samples" / "demo"


def test_demo_runs_and_prints_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = demo.comparison_config
    monkeypatch.setattr(
        demo, "comparison_config", lambda *places: whole(*places).model_copy(update={"methods": ("GFT",)})
    )
    demo.run(Console(width=160), tmp_path)
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "gft" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 65))
    table = printed[printed.index("pass@16") :].splitlines()[1:3]
    (base_name, base), (name, trained) = ((cells[0], float(cells[1])) for cells in map(str.split, table))
    assert (base_name, name) == ("base", "GFT")
    assert 0.45 <= base <= 0.6, "the base model that the method needs"
    assert trained > base + 0.1
    assert "gft init" in printed
    assert (tmp_path / "gft" / "final" / "tokenizer.json").is_file()
    page = (tmp_path / "report.html").read_text()
    assert str(tmp_path / "report.html") in printed and "65+29+72=" in page


def test_make_base_writes_the_shipped_prompts(tmp_path: Path) -> None:
    arguments = ["--steps", "1", "1", "--batch", "4", "--out", tmp_path]
    subprocess.run([sys.executable, DEMO / "make_base.py", *map(str, arguments)], check=True, capture_output=True)
    for name in ("train", "eval", "subtraction", "reversal"):
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (DEMO / f"{name}.jsonl").read_bytes()
    for name in ("config.json", "tokenizer.json"):
        assert json.loads((tmp_path / "model" / name).read_text()) == json.loads((DEMO / "model" / name).read_text())
    assert (DEMO / "model" / "model.safetensors").stat().st_size < 1_000_000
