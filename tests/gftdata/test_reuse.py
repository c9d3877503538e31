"""Prompts and responses of an earlier data set, for another model or another round."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from gftdata.config import GenerateConfig, validate_config
from gftdata.errors import UserError
from gftdata.generate import generate
from gftdata.manifest import read_manifest
from gftdata.prompts import read_prompts
from gftdata.reuse import find_data
from gftdata.schema import table_to_groups
from gftdata.shards import shard_paths, verify
from gftdata.tokens import encode_prompt, encode_response, load_tokenizer
from gftdata.types import Group


@pytest.fixture(scope="module")
def first(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Expert, a teacher's column, self; responses of at most 12 tokens, so that some self samples are cut."""
    folder = tmp_path_factory.mktemp("first")
    rows = [json.loads(line) for line in (demo / "train.jsonl").read_text().splitlines()[:9]]
    for n, row in enumerate(rows):
        row |= {"book": [f"<think>{n}</think>{row['answer']}", "7", "8"], "id": n, "note": {"n": n}}
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": str(demo / "model"),
        "out": str(folder / "data"),
        "prompts": {
            "path": str(folder / "prompts.jsonl"),
            "columns": {"ground_truth": "answer", "expert": "expert", "id": "id", "extra": ["note"]},
        },
        "reward": {"name": "exact", "workers": 1},
        "responses": {
            "max_tokens": 40,
            "self": {"count": 3, "sampling": {"stop": [";"]}},
            "teachers": [{"name": "book", "column": "book", "count": 3}],
        },
        "engine": {"device": "cpu"},
        "shards": {"groups_per_shard": 4, "row_group_size": 3},
    }
    generate(validate_config(GenerateConfig, config, "test"))
    return folder / "data"


def reusing(data: Path | str, model: Path, out: Path, **responses: Any) -> GenerateConfig:
    config = {
        "model": str(model),
        "out": str(out),
        "prompts": {"reuse": str(data)},
        "reward": {"name": "exact", "workers": 1},
        "responses": {"max_tokens": 60, "self": {"count": 2}} | responses,
        "engine": {"device": "cpu"},
        "shards": {"groups_per_shard": 5, "row_group_size": 3},
    }
    return validate_config(GenerateConfig, config, "test")


def groups_in(out: Path) -> list[Group]:
    return [group for path in shard_paths(out, read_manifest(out)) for group in table_to_groups(pq.read_table(path))]


def texts(group: Group, source: str) -> list[str]:
    return [r.completion.text for r in group.responses if r.completion.source == source]


def test_another_model_gets_the_same_texts_in_its_own_tokens(
    first: Path, chat_model: Path, tmp_path: Path, naive_logprobs: Callable[..., Any]
) -> None:
    teachers = [
        {"name": "book", "reused": "teacher:book", "count": 2, "remove_thinking": True},
        {"name": "earlier", "reused": "self", "count": 2},
    ]
    generate(reusing(first, chat_model, tmp_path / "out", teachers=teachers))
    assert verify(tmp_path / "out") == []
    tokenizer = load_tokenizer(str(chat_model))
    for old, new in zip(groups_in(first), groups_in(tmp_path / "out"), strict=True):
        # the same prompt, in the other model's tokens
        assert old.prompt == new.prompt and old.prompt.extra != "{}" and old.prompt.source_id is not None
        assert new.prompt_ids.tolist() == encode_prompt(tokenizer, old.prompt.messages).tolist()
        assert Counter(r.completion.source for r in new.responses) == {
            "expert": 1,
            "teacher:book": 2,
            "teacher:earlier": 2,
            "self": 2,
        }
        assert texts(new, "expert") == texts(old, "expert")
        assert texts(new, "teacher:book") == [t.rpartition("</think>")[2] for t in texts(old, "teacher:book")[:2]]
        assert texts(new, "teacher:earlier") == texts(old, "self")[:2]
        written = {r.completion.text: r.completion for r in old.responses if r.completion.source == "self"}
        for response in new.responses:
            completion = response.completion
            if completion.source == "teacher:earlier":
                then = written[completion.text]
                assert (completion.model, completion.finish_reason) == (then.model, then.finish_reason)
            if completion.source != "self":
                ended = completion.finish_reason != "length"
                ids = encode_response(tokenizer, completion.text, ended=ended)
                assert completion.response_ids.tolist() == ids.tolist()
                assert completion.behavior_logprobs is None
        response = new.responses[0]
        wanted = naive_logprobs(chat_model, new.prompt_ids, response.completion.response_ids)
        assert abs(response.ref_logprobs - wanted).max() < 1e-4


def test_what_the_reused_data_set_lacks_is_said(first: Path, demo: Path, tmp_path: Path) -> None:
    config = reusing(first, demo / "model", tmp_path / "out", teachers=[{"name": "x", "reused": "teacher:big"}])
    with pytest.raises(UserError, match=r"no responses of `teacher:big` .*it has: expert, teacher:book, self"):
        generate(config)
    for data, said in [(tmp_path, "no manifest.json"), ("./gone", "no such data set folder")]:
        with pytest.raises(UserError, match=said):
            generate(reusing(data, demo / "model", tmp_path / "out"))
    with pytest.raises(UserError, match="org/none: no such folder, and the Hub has not given it"):
        generate(reusing("org/none", demo / "model", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_settings_that_cannot_apply_are_refused() -> None:
    base = {"model": "m", "out": "o", "prompts": {"reuse": "d"}}
    for change, said in [
        ({"prompts": {"reuse": "d", "template": "{question}!"}}, "template cannot be set"),
        ({"prompts": {"reuse": "d", "path": "p"}}, "exactly one of path, dataset, reasoning_gym, reuse"),
        ({"responses": {"teachers": [{"name": "t", "column": "c"}]}}, "is a column, and prompts.reuse has none"),
        (
            {
                "prompts": {"path": "p", "columns": {"expert": "e"}},
                "responses": {"teachers": [{"name": "t", "reused": "self"}]},
            },
            "prompts.reuse names none",
        ),
    ]:
        with pytest.raises(UserError, match=said):
            validate_config(GenerateConfig, {**base, **change}, "test")


def test_prompt_ids_stay_the_same(first: Path, demo: Path, tmp_path: Path) -> None:
    config = reusing(first, demo / "model", tmp_path / "out")
    reused = list(read_prompts(config.prompts, {}, needs_ground_truth=True))
    assert [p.prompt_id for p in reused] == [g.prompt.prompt_id for g in groups_in(first)]
    limited = config.prompts.model_copy(update={"limit": 3})
    assert len(list(read_prompts(limited, {}, needs_ground_truth=True))) == 3


def test_a_data_set_of_the_hub_is_found_in_the_cache(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HF_HUB_OFFLINE=1, as in all tests: what was downloaded before is used."""
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "datasets--org--groups"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    snapshot = repo / "snapshots" / commit
    (snapshot / "data").mkdir(parents=True)
    (snapshot / "manifest.json").symlink_to(first / "manifest.json")
    for shard in (first / "data").iterdir():
        (snapshot / "data" / shard.name).symlink_to(shard)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert find_data("org/groups") == snapshot
    assert verify(find_data("org/groups")) == []
