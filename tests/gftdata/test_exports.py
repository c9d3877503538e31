"""Groups -> files for TRL and verl: every row against the groups themselves, and everything left out counted."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gftdata import exports
from gftdata.config import GenerateConfig, validate_config
from gftdata.errors import UserError
from gftdata.exports import Exported, export
from gftdata.generate import generate
from gftdata.layouts import FORMATS, Candidate, ExportOptions, pairs_of
from gftdata.manifest import read_manifest
from gftdata.schema import table_to_groups
from gftdata.shards import shard_paths
from gftdata.types import Group, Response

OneLine = Callable[[BaseException], str]
NUM_GROUPS = 24


def generated(model: Path, demo: Path, folder: Path, *, system: str | None = None) -> Path:
    """Expert, a teacher that is wrong at times, self; short enough that some self samples are cut, some judged null."""
    rows = [json.loads(line) for line in (demo / "train.jsonl").read_text().splitlines()[:NUM_GROUPS]]
    for number, row in enumerate(rows):
        row |= {
            "expert": row["expert"].rpartition(";")[2],
            "book": row["answer"] if number % 3 else "1",
            "id": number,
            "note": {"n": number},
        }
        row["answer"] = None if number == 5 else row["answer"]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": str(model),
        "out": str(folder / "data"),
        "prompts": {
            "path": str(folder / "prompts.jsonl"),
            "columns": {"ground_truth": "answer", "expert": "expert", "id": "id", "extra": ["note"]},
            "on_missing_ground_truth": "keep",
            "system": system,
        },
        "reward": {"name": "numeric", "workers": 1},
        "responses": {
            "max_tokens": 12,
            "self": {"count": 3},
            "teachers": [{"name": "book", "column": "book", "count": 1}],
        },
        "engine": {"device": "cpu"},
        "shards": {"groups_per_shard": 10, "row_group_size": 4},
    }
    generate(validate_config(GenerateConfig, config, "test"))
    return folder / "data"


@pytest.fixture(scope="module")
def data(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model without a chat template."""
    return generated(demo / "model", demo, tmp_path_factory.mktemp("exports"))


@pytest.fixture(scope="module")
def groups(data: Path) -> list[Group]:
    return groups_in(data)


@pytest.fixture(scope="module")
def chat_data(chat_model: Path, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model with one."""
    return generated(chat_model, demo, tmp_path_factory.mktemp("chat"), system="Add.")


def groups_in(out: Path) -> list[Group]:
    return [group for path in shard_paths(out, read_manifest(out)) for group in table_to_groups(pq.read_table(path))]


def loaded(made: Exported) -> datasets.Dataset:
    data = datasets.load_dataset("parquet", data_files=str(made.path), split="train")
    assert len(data) == made.rows
    return data


def is_cut(response: Response) -> bool:
    return response.completion.finish_reason == "length"


def test_the_data_has_what_the_tests_need(groups: list[Group]) -> None:
    responses = [r for g in groups for r in g.responses]
    assert sum(map(is_cut, responses)) and sum(r.verdict.reward is None for r in responses) == 5


def test_sft_is_the_experts(data: Path, groups: list[Group], tmp_path: Path) -> None:
    made = export(str(data), "trl-sft", tmp_path)
    assert made.path == tmp_path / "train.parquet"
    rows = loaded(made).to_list()
    assert [(r["prompt"], r["completion"]) for r in rows] == [
        (g.prompt.question, r.completion.text) for g in groups for r in g.responses if r.completion.source == "expert"
    ]
    assert [r["extra"] for r in rows] == [g.prompt.extra for g in groups]
    assert made.left_out == {
        "responses of teacher:book (--source)": NUM_GROUPS,
        "responses of self (--source)": 3 * NUM_GROUPS,
    }


def test_rejection_sampling(data: Path, groups: list[Group], tmp_path: Path) -> None:
    options = ExportOptions(sources=("expert", "teacher", "self"), min_reward=1.0)
    made = export(str(data), "trl-sft", tmp_path / "rft.parquet", options)
    responses = [r for g in groups for r in g.responses]
    right = [r for r in responses if r.verdict.reward == 1.0 and not is_cut(r)]
    assert loaded(made)["completion"][:] == [r.completion.text for r in right]
    assert sum(made.left_out.values()) + made.rows == len(responses)
    assert made.left_out["responses that could not be judged"] == 5
    kept = export(str(data), "trl-sft", tmp_path / "cut.parquet", ExportOptions(("self",), truncated=True))
    assert kept.rows == 3 * NUM_GROUPS


def test_tokens_are_those_of_the_data_set(data: Path, groups: list[Group], tmp_path: Path) -> None:
    made = export(str(data), "trl-sft", tmp_path / "ids.parquet", ExportOptions(("self",), tokens=True))
    expected = [(g.prompt_ids, r.completion.response_ids) for g in groups for r in g.responses[2:]]
    for row, (prompt_ids, response_ids) in zip(loaded(made), expected, strict=True):
        assert row["input_ids"] == [*prompt_ids, *response_ids]
        assert row["labels"] == [-100] * len(prompt_ids) + response_ids.tolist()


@pytest.mark.parametrize("tokens", [False, True])
def test_dpo_is_the_first_best_against_the_first_worst(
    data: Path, groups: list[Group], tmp_path: Path, tokens: bool
) -> None:
    made = export(str(data), "trl-dpo", tmp_path / "dpo.parquet", ExportOptions(tokens=tokens))
    expected, without = [], Counter[str]()
    for group in groups:
        usable = [r for r in group.responses if r.verdict.reward is not None and (tokens or not is_cut(r))]
        rewards = [r.verdict.reward for r in usable]
        if len(usable) < 2 or max(rewards) == min(rewards):
            without["few" if len(usable) < 2 else "equal"] += 1
            continue
        expected.append((group, usable[rewards.index(max(rewards))], usable[rewards.index(min(rewards))]))
    rows = loaded(made)
    for row, (group, chosen, rejected) in zip(rows, expected, strict=True):
        assert row["ref_chosen_logps"] == pytest.approx(chosen.ref_logprobs.sum(dtype=np.float64), rel=1e-6)
        assert row["ref_rejected_logps"] == pytest.approx(rejected.ref_logprobs.sum(dtype=np.float64), rel=1e-6)
        assert (row["chosen_reward"], row["rejected_reward"]) == (chosen.verdict.reward, rejected.verdict.reward)
        if tokens:
            assert row["prompt_ids"] == group.prompt_ids.tolist() and "prompt" not in row
            assert row["chosen_ids"] == chosen.completion.response_ids.tolist()
            assert row["rejected_ids"] == rejected.completion.response_ids.tolist()
        else:
            assert (row["prompt"], row["chosen"]) == (group.prompt.question, chosen.completion.text)
            assert row["rejected"] == rejected.completion.text
    assert made.left_out.get("groups whose rewards are all equal", 0) == without["equal"]
    assert made.left_out.get("groups with fewer than two such responses", 0) == without["few"] == 1
    in_no_pair = sum(len([r for r in g.responses if tokens or not is_cut(r)]) - 2 for g, *_ in expected)
    assert made.left_out["responses in no pair"] == in_no_pair


def options_of_pairs() -> st.SearchStrategy[ExportOptions]:
    bounds = st.none() | st.sampled_from([0.25, 1.0])
    return st.builds(ExportOptions, pairs=st.sampled_from(["one", "all"]), min_reward=bounds)


@given(rewards=st.lists(st.sampled_from([0.0, 0.5, 1.0]), max_size=6), options=options_of_pairs())
def test_pairs(rewards: list[float], options: ExportOptions) -> None:
    usable = [Candidate(str(k), "self", reward, False, "m", -1.0, ()) for k, reward in enumerate(rewards)]
    left_out: Counter[str] = Counter()
    pairs = list(pairs_of(usable, options, left_out))
    bound = options.min_reward or 0.0
    every = {(a.text, b.text) for a in usable for b in usable if a.reward > b.reward and a.reward >= bound}  # type: ignore[operator]
    found = {(a.text, b.text) for a, b in pairs}
    if options.pairs == "all":
        assert found == every and len(pairs) == len(every)
    else:
        assert found <= every and len(pairs) == min(1, len(every))
    paired = {text for pair in found for text in pair}
    if pairs:
        assert left_out["responses in no pair"] == len(usable) - len(paired)
    else:
        assert sum(left_out.values()) == 1


def test_unpaired_preference(data: Path, groups: list[Group], tmp_path: Path) -> None:
    made = export(str(data), "trl-kto", tmp_path / "kto.parquet")
    used = [r for g in groups for r in g.responses if r.verdict.reward is not None and not is_cut(r)]
    assert loaded(made)["label"][:] == [r.verdict.reward == 1.0 for r in used]
    assert sum(made.left_out.values()) + made.rows == 5 * NUM_GROUPS
    low = export(str(data), "trl-kto", tmp_path / "low.parquet", ExportOptions(min_reward=0.0))
    assert all(loaded(low)["label"])


def test_grpo_prompts_carry_what_a_reward_needs(data: Path, groups: list[Group], tmp_path: Path) -> None:
    made = export(str(data), "trl-grpo", tmp_path / "grpo.parquet")
    rows = loaded(made).to_list()
    assert [(r["prompt"], r["ground_truth"], r["prompt_id"], r["extra"]) for r in rows] == [
        (g.prompt.question, g.prompt.ground_truth, g.prompt.prompt_id, g.prompt.extra) for g in groups
    ]
    assert made.left_out == {"responses: GRPO draws its own": 5 * NUM_GROUPS}


def test_chats_where_the_model_has_a_template(chat_data: Path, tmp_path: Path) -> None:
    group = groups_in(chat_data)[0]
    (row,) = loaded(export(str(chat_data), "trl-sft", tmp_path / "sft.parquet")).select([0])
    user = {"role": "user", "content": group.prompt.question}
    assert row["prompt"] == [{"role": "system", "content": "Add."}, user]
    assert row["completion"] == [{"role": "assistant", "content": group.responses[0].completion.text}]
    made = export(str(chat_data), "trl-grpo", tmp_path / "grpo.parquet")
    assert loaded(made)[0]["prompt"] == row["prompt"]


def test_verl_of_groups_that_never_were_verls(data: Path, groups: list[Group], tmp_path: Path) -> None:
    made = export(str(data), "verl", tmp_path / "verl.parquet")
    for number, (row, group) in enumerate(zip(loaded(made), groups, strict=True)):
        texts = [r.completion.text for r in group.responses]
        assert row == {
            "data_source": "prompts.jsonl",
            "prompt": [{"role": "user", "content": group.prompt.question}],
            "ability": "",
            "reward_model": {"style": "rule", "ground_truth": group.prompt.ground_truth},
            "extra_info": {
                "split": "train",
                "index": number,
                "question": group.prompt.question,
                "prompt_id": group.prompt.prompt_id,
                "source_id": str(number),
                "extra": json.dumps({"note": {"n": number}}),
                "answer": texts[0],
                "model_answer": texts[1:2],
            },
        }
    assert made.left_out == {"responses of self": 3 * NUM_GROUPS}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_file_says_what_it_cannot_hold(data: Path, tmp_path: Path, kind: str) -> None:
    made = export(str(data), kind, tmp_path / "new" / "file.parquet")
    assert (
        made.groups == NUM_GROUPS and made.no_place and [p.name for p in made.path.parent.iterdir()] == ["file.parquet"]
    )


def test_what_is_refused(data: Path, tmp_path: Path, one_line: OneLine) -> None:
    def refused(kind: str, saying: str, **options: Any) -> None:
        with pytest.raises(UserError) as caught:
            export(str(data), kind, tmp_path / "x.parquet", ExportOptions(**options))
        assert saying in one_line(caught.value)
        assert list(tmp_path.iterdir()) == []

    refused("trl-sftt", "did you mean trl-sft?")
    refused("json", "expected one of verl, trl-sft")
    refused("verl", "--source is for trl-sft, trl-dpo, trl-kto; leave it out for verl", sources=("self",))
    refused("trl-kto", "--tokens is for trl-sft, trl-dpo", tokens=True)
    refused("trl-sft", "--pairs is for trl-dpo", pairs="all")
    refused("trl-dpo", "leave --truncated out", tokens=True, truncated=True)
    refused("trl-dpo", "no responses of source `selv`; --source: expert, teacher:book, self", sources=("selv",))
    refused(
        "trl-sft",
        f"nothing of it can be exported so ({NUM_GROUPS} responses of expert",
        sources=("self",),
        min_reward=2,
    )
    (tmp_path / "x.parquet").touch()
    with pytest.raises(UserError, match="exists already and is not overwritten"):
        export(str(data), "verl", tmp_path / "x.parquet")


def test_an_export_that_is_stopped_leaves_nothing(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exports.pq.ParquetWriter, "write_table", fail)
    with pytest.raises(KeyboardInterrupt):
        export(str(data), "trl-sft", tmp_path / "sft.parquet")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_shard_is_named(data: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    shard = shard_paths(copy, read_manifest(copy))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train-00001-of-00003\.parquet: damaged or changed"):
        export(str(copy), "trl-sft", tmp_path / "sft.parquet")
    assert not (tmp_path / "sft.parquet").exists()


def test_rows_are_written_a_few_at_a_time(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = export(str(data), "verl", tmp_path / "whole.parquet")
    monkeypatch.setattr(exports, "ROWS_AT_A_TIME", 5)
    parts = export(str(data), "verl", tmp_path / "parts.parquet")
    assert pq.ParquetFile(parts.path).num_row_groups == 5
    digests = [hashlib.sha256(str(pq.read_table(made.path).to_pylist()).encode()).digest() for made in (whole, parts)]
    assert digests[0] == digests[1]


def test_kinds_that_parquet_cannot_hold_together_are_refused(one_line: OneLine) -> None:
    with pytest.raises(UserError) as caught:
        exports._inferred([{"x": {"y": 1}}, {"x": {"y": "one"}}], "data")
    assert "values of different kinds in one column" in one_line(caught.value)
    schema = exports._inferred([{"x": {"y": None}, "z": []}], "data")
    assert schema.field("x").type == pa.struct([("y", pa.string())])
