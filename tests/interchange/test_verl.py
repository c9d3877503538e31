"""Exports in verl's own reader, RLHFDataset, batched as its trainer does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from gftdata.exports import export
from gftdata.imports import import_prompts

AID = Path(__file__).parent / "aid"


def rows_of(batches: list[dict[str, list[Any]]]) -> list[dict[str, Any]]:
    return [dict(zip(batch, row, strict=True)) for batch in batches for row in zip(*batch.values(), strict=True)]


def test_verl_reads_an_export(chat_data: Path, chat_model: Path, run_there: Callable[..., str], tmp_path: Path) -> None:
    made = export(str(chat_data), "verl", tmp_path / "verl.parquet")
    run_there(AID / "read_with_verl.py", made.path, chat_model, tmp_path / "rows.json")
    rows, written = rows_of(json.loads((tmp_path / "rows.json").read_text())), pq.read_table(made.path).to_pylist()
    assert len(rows) == len(written) == made.rows == made.groups
    for number, (row, expected) in enumerate(zip(rows, written, strict=True)):
        assert {name: row[name] for name in expected} == expected
        assert row["raw_prompt"] == expected["prompt"] and row["index"] == number


def test_what_was_exported_is_imported_as_the_same_prompts(chat_data: Path, tmp_path: Path) -> None:
    made = export(str(chat_data), "verl", tmp_path / "verl.parquet")
    again = import_prompts("verl", str(made.path), tmp_path / "in", expert="extra_info.answer")
    assert (again.rows, again.with_expert, dict(again.left_out)) == (made.rows, made.rows, {})
