"""Exports in TRL's own trainers: what they make of them, token by token, and that they train."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from gftdata.exports import export
from gftdata.layouts import ExportOptions
from gftdata.manifest import read_manifest
from gftdata.schema import table_to_groups
from gftdata.shards import shard_paths
from gftdata.tokens import load_tokenizer
from gftdata.types import Group

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "samples/demo/model"
AID = Path(__file__).parent / "aid"


def groups_in(out: Path) -> list[Group]:
    return [group for path in shard_paths(out, read_manifest(out)) for group in table_to_groups(pq.read_table(path))]


@pytest.fixture(scope="module")
def folder(data: Path, chat_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of export of the two data sets."""
    out = tmp_path_factory.mktemp("exported")
    every = ("expert", "self")
    exports: list[tuple[str, Path, str, ExportOptions]] = [
        ("sft", data, "trl-sft", ExportOptions(sources=every)),
        ("sft-ids", data, "trl-sft", ExportOptions(sources=every, tokens=True)),
        ("dpo", data, "trl-dpo", ExportOptions(pairs="all")),
        ("dpo-ids", data, "trl-dpo", ExportOptions(pairs="all", tokens=True)),
        ("kto", data, "trl-kto", ExportOptions()),
        ("grpo", data, "trl-grpo", ExportOptions()),
        ("chat-sft", chat_data, "trl-sft", ExportOptions()),
        ("chat-dpo-ids", chat_data, "trl-dpo", ExportOptions(tokens=True)),
        ("chat-kto", chat_data, "trl-kto", ExportOptions(truncated=True)),
        ("chat-grpo", chat_data, "trl-grpo", ExportOptions()),
    ]
    for name, source, kind, options in exports:
        export(str(source), kind, out / f"{name}.parquet", options)
    return out


@pytest.fixture(scope="module")
def report(folder: Path, chat_model: Path, run_there: Callable[..., str]) -> dict[str, Any]:
    run_there(AID / "train_with_trl.py", folder, MODEL, chat_model)
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


@pytest.mark.parametrize("name", ["sft", "sft-ids"])
def test_sft_trains_on_the_tokens_of_the_data_set(data: Path, report: dict[str, Any], name: str) -> None:
    """With --tokens always; as texts too here, where a token is a character and no sample was cut."""
    expected = [(g.prompt_ids, r.completion.response_ids) for g in groups_in(data) for r in g.responses]
    assert report[name]["input_ids"] == [[*p, *r] for p, r in expected]
    assert report[name]["labels"] == [[-100] * len(p) + [*r] for p, r in expected]
    assert all(math.isfinite(loss) for loss in report[name]["losses"]) and len(report[name]["losses"]) == 2


def test_a_chat_template_goes_on_after_the_end_token(chat_data: Path, chat_model: Path, report: dict[str, Any]) -> None:
    """What the note of the export says: TRL's last tokens are those that ChatML writes after a turn."""
    tokenizer = load_tokenizer(str(chat_model))
    after = tokenizer.backend("\n", add_special_tokens=False)["input_ids"]
    groups = groups_in(chat_data)
    for group, ids in zip(groups, report["chat-sft"]["input_ids"], strict=True):
        assert ids == [*group.prompt_ids, *group.responses[0].completion.response_ids, *after]


def test_dpo_computes_the_log_probs_that_are_stored(folder: Path, report: dict[str, Any]) -> None:
    stored = pq.read_table(folder / "dpo.parquet")
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        np.testing.assert_allclose(report["dpo"][column], stored[column].to_numpy(), atol=1e-4)
    ids = pq.read_table(folder / "dpo-ids.parquet").to_pylist()
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert report["dpo"][column] == [row[column] for row in ids]
    assert report["dpo"]["losses"][0] == pytest.approx(math.log(2), abs=1e-4)


def test_dpo_of_trl_does_not_take_stored_log_probs_by_itself(report: dict[str, Any]) -> None:
    """Why samples/rl/dpo.py overrides a method; where this fails, TRL takes them, and it need not."""
    assert "ref_chosen_logps" in report["dpo"]["error"]


@pytest.mark.parametrize("name", ["dpo-ids", "chat-dpo-ids"])
def test_dpo_with_stored_tokens_and_log_probs(
    folder: Path, chat_model: Path, run_there: Callable[..., str], tmp_path: Path, name: str
) -> None:
    """The model is the reference, so the loss before the first update is log 2 when both fit the tokens."""
    model = chat_model if name.startswith("chat") else MODEL
    arguments = ("--model", model, "--pairs", folder / f"{name}.parquet", "--out", tmp_path, "--steps", 3)
    said = run_there(ROOT / "samples/rl/dpo.py", *arguments)
    assert "loss before the first update: 0.6931 (log 2 is 0.6931)" in said
    assert (tmp_path / "final" / "model.safetensors").is_file()


def test_unpaired_preference(report: dict[str, Any], folder: Path) -> None:
    for name in ("kto", "chat-kto"):
        assert report[name]["labels"] == pq.read_table(folder / f"{name}.parquet")["label"].to_pylist()
        assert all(math.isfinite(loss) for loss in report[name]["losses"])


@pytest.mark.parametrize("name", ["grpo", "chat-grpo"])
def test_grpo_with_the_rewards_of_the_data_set(
    folder: Path, chat_model: Path, run_there: Callable[..., str], tmp_path: Path, name: str
) -> None:
    model = MODEL if name == "grpo" else chat_model
    arguments = ("--model", model, "--prompts", folder / f"{name}.parquet", "--reward", "numeric", "--out", tmp_path)
    said = run_there(ROOT / "samples/rl/grpo.py", *arguments, "--steps", 1, "--prompts-per-step", 4)
    assert "rewards/numeric/mean" in said and (tmp_path / "final" / "config.json").is_file()
