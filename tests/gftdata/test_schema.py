"""Groups <-> rows <-> files; and what anyone else's reader makes of the files."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gftdata.errors import UserError
from gftdata.schema import (
    PER_RESPONSE,
    SCHEMA_VERSION,
    VERSION_KEY,
    check_rows,
    check_schema,
    groups_to_table,
    parquet_options,
    schema,
    table_to_groups,
)
from gftdata.types import Completion, Group, LogProbs, Message, Prompt, Response, TokenIds, Verdict

TEXTS = ["", "46", "é😀中\u2028", "a\nb\r\n\x00", "\\boxed{1}", '{"json": [1]}', "x" * 300]
VERDICTS = [
    Verdict(1.0, "ok"),
    Verdict(0.0, "ok"),
    Verdict(0.1, "ok"),
    Verdict(None, "timeout"),
    Verdict(None, "error:x"),
]


def random_response(rng: np.random.Generator) -> Response:
    length = int(rng.integers(1, 30))
    given = rng.random() < 0.4
    behavior = None if given or rng.random() < 0.3 else -rng.exponential(size=length).astype(np.float32)
    return Response(
        Completion(
            str(rng.choice(["expert", "teacher:t-1", "self"])),
            TEXTS[rng.integers(len(TEXTS))],
            rng.integers(0, 2**31 - 1, length).astype(np.int32),
            "given" if given else "stop" if rng.random() < 0.5 else "length",
            "data" if given else "m@1",
            None if given else int(rng.integers(0, 2**63 - 1)),
            behavior,
        ),
        VERDICTS[rng.integers(len(VERDICTS))],
        -rng.exponential(size=length).astype(np.float32),
    )


def random_group(rng: np.random.Generator, number: int) -> Group:
    def text_or_none() -> str | None:
        return None if rng.random() < 0.3 else TEXTS[rng.integers(len(TEXTS))]

    messages = tuple(Message(r, TEXTS[rng.integers(len(TEXTS))]) for r in ("system", "user")[rng.integers(2) :])
    question = messages[-1].content
    extra = json.dumps({"n": number})
    prompt = Prompt(f"id{number}", text_or_none(), messages, text_or_none(), "src", (), extra, question)
    responses = tuple(random_response(rng) for _ in range(rng.integers(0, 7)))
    return Group(prompt, rng.integers(0, 2**31 - 1, rng.integers(1, 9)).astype(np.int32), responses)


def random_groups(seed: int) -> list[Group]:
    rng = np.random.default_rng(seed)
    return [random_group(rng, number) for number in range(rng.integers(1, 30))]


def stored(logprobs: LogProbs | None, dtype: str) -> LogProbs | None:
    return None if logprobs is None else logprobs.astype(dtype).astype(np.float32)


def assert_same(found: Sequence[Group], expected: Sequence[Group], dtype: str = "float32") -> None:
    def equal(a: TokenIds | LogProbs | None, b: TokenIds | LogProbs | None) -> bool:
        if a is None or b is None:
            return a is b
        return a.dtype == b.dtype and np.array_equal(a, b)

    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.prompt == b.prompt
        assert equal(a.prompt_ids, b.prompt_ids)
        assert len(a.responses) == len(b.responses)
        for x, y in zip(a.responses, b.responses, strict=True):
            fields = ("source", "text", "finish_reason", "model", "seed")
            assert [getattr(x.completion, f) for f in fields] == [getattr(y.completion, f) for f in fields]
            assert equal(x.completion.response_ids, y.completion.response_ids)
            assert equal(x.completion.behavior_logprobs, stored(y.completion.behavior_logprobs, dtype))
            assert equal(x.ref_logprobs, stored(y.ref_logprobs, dtype))
            assert x.verdict.status == y.verdict.status
            reward = y.verdict.reward
            assert x.verdict.reward == (None if reward is None else float(np.float32(reward)))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("seed", range(12))
def test_groups_survive_the_table_and_the_file(tmp_path: Path, seed: int, dtype: str) -> None:
    groups = random_groups(seed)
    table = groups_to_table(groups, dtype)
    table.validate(full=True)
    assert_same(list(table_to_groups(table)), groups, dtype)
    path = tmp_path / "x.parquet"
    pq.write_table(table, path, row_group_size=5, **parquet_options(dtype))
    with pq.ParquetFile(path) as file:
        check_schema(file.schema_arrow, "x")
        assert file.schema_arrow.equals(schema(dtype), check_metadata=True)
        again = file.read()
    assert again.equals(table)
    assert_same(list(table_to_groups(again)), groups, dtype)
    assert check_rows(again, "x") == []


def test_no_groups_and_groups_of_nothing() -> None:
    for groups in ([], [replace(group, responses=()) for group in random_groups(0)]):
        table = groups_to_table(groups)
        table.validate(full=True)
        assert_same(list(table_to_groups(table)), groups)
        assert check_rows(table, "x") == []


def test_columns_are_those_of_the_design() -> None:
    """SCHEMA.md's table, column by column."""
    assert [f"{field.name}: {field.type}".replace("element: ", "").replace("item: ", "") for field in schema()] == [
        "prompt_id: string",
        "source_id: string",
        "prompt: list<struct<role: string, content: string>>",
        "ground_truth: string",
        "data_source: string",
        "responses: list<string>",
        "sources: list<string>",
        "rewards: list<float>",
        "reward_status: list<string>",
        "finish_reasons: list<string>",
        "num_tokens: list<int32>",
        "models: list<string>",
        "seeds: list<int64>",
        "ref_logprob_means: list<float>",
        "num_prompt_tokens: int32",
        "prompt_ids: list<int32>",
        "response_ids: list<list<int32>>",
        "ref_logprobs: list<list<float>>",
        "behavior_logprobs: list<list<float>>",
        "extra: string",
    ]
    lists = {f.name for f in schema() if pa.types.is_list(f.type)} - {"prompt", "prompt_ids"}
    assert set(PER_RESPONSE) == lists


def test_derived_columns() -> None:
    groups = random_groups(3)
    for row, group in zip(groups_to_table(groups).to_pylist(), groups, strict=True):
        assert row["num_prompt_tokens"] == len(group.prompt_ids)
        assert row["num_tokens"] == [len(r.completion.response_ids) for r in group.responses]
        means = [float(np.mean(r.ref_logprobs, dtype=np.float64)) for r in group.responses]
        np.testing.assert_allclose(row["ref_logprob_means"], means, rtol=1e-6)


def test_files_are_encoded_as_the_design_says(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    groups = [group for seed in range(20) for group in random_groups(seed)]
    pq.write_table(groups_to_table(groups), path, **parquet_options("float32"))
    with pq.ParquetFile(path) as file:
        group = file.metadata.row_group(0)
        columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    for name, column in columns.items():
        top = name.split(".")[0]
        assert column.has_offset_index, name
        assert ("BYTE_STREAM_SPLIT" in column.encodings) == (top in ("ref_logprobs", "behavior_logprobs")), name
        assert column.has_dictionary_page == (
            top in ("data_source", "sources", "reward_status", "finish_reasons", "models")
        ), name
    assert "ref_logprobs.list.element.list.element" in columns


def test_another_schema_is_refused_and_its_difference_named(one_line: Any) -> None:
    def refusal(found: pa.Schema) -> str:
        with pytest.raises(UserError) as caught:
            check_schema(found, "file.parquet")
        return one_line(caught.value)

    ours = schema()
    check_schema(ours, "x")
    check_schema(schema("float16"), "x")
    assert "schema version none, this toolkit reads version 1" in refusal(ours.remove_metadata())
    assert f"schema version 99, this toolkit reads version {SCHEMA_VERSION}" in refusal(
        ours.with_metadata({VERSION_KEY: b"99"})
    )
    number = ours.get_field_index("rewards")
    assert refusal(ours.remove(number)).endswith("columns differ from the schema: rewards")
    assert refusal(ours.set(number, pa.field("rewards", pa.string()))).endswith("schema: rewards")
    assert refusal(ours.append(pa.field("more", pa.string()))).endswith("schema: more")
    assert refusal(pa.schema(list(ours)[::-1], metadata=ours.metadata)).endswith("their order")


DAMAGES: dict[str, tuple[str, Any, str]] = {
    "one list shorter": ("responses", lambda v: v[:-1], "different lengths"),
    "one list null": ("seeds", lambda v: None, "different lengths"),
    "prompt length": ("num_prompt_tokens", lambda v: v + 1, "num_prompt_tokens is not the length"),
    "no prompt": ("prompt_ids", lambda v: [], "num_prompt_tokens is not the length"),
    "null prompt": ("prompt_ids", lambda v: None, "num_prompt_tokens is not the length"),
    "response length": ("num_tokens", lambda v: [*v[:-1], v[-1] + 1], "response 2: num_tokens, response_ids"),
    "null length": ("num_tokens", lambda v: [*v[:-1], None], "response 2: num_tokens, response_ids"),
    "log-probs shorter": ("ref_logprobs", lambda v: [v[0][:-1], *v[1:]], "response 0: num_tokens, response_ids"),
    "null log-probs": ("ref_logprobs", lambda v: [None, *v[1:]], "response 0: num_tokens, response_ids"),
    "null ids": ("response_ids", lambda v: [None, *v[1:]], "response 0: num_tokens, response_ids"),
    "empty response": ("response_ids", lambda v: [v[0], [], v[2]], "response 1: num_tokens, response_ids"),
    "negative id": ("response_ids", lambda v: [[-1, *v[0][1:]], *v[1:]], "response 0: negative"),
    "null id": ("response_ids", lambda v: [[None, *v[0][1:]], *v[1:]], "response 0: negative"),
    "positive log-prob": ("ref_logprobs", lambda v: [[0.1, *v[0][1:]], *v[1:]], "response 0: a reference log-prob"),
    "infinite log-prob": ("ref_logprobs", lambda v: [[-np.inf, *v[0][1:]], *v[1:]], "response 0: a reference log-prob"),
    "null log-prob": ("ref_logprobs", lambda v: [[None, *v[0][1:]], *v[1:]], "response 0: a reference log-prob"),
    "reward without ok": ("reward_status", lambda v: ["timeout", *v[1:]], "response 0: reward"),
    "infinite reward": ("rewards", lambda v: [np.inf, *v[1:]], "response 0: reward inf with status ok"),
    "no verdict": ("reward_status", lambda v: [None, *v[1:]], "response 0: reward"),
    "no source": ("sources", lambda v: [None, *v[1:]], "response 0: sources is null"),
    "no text": ("responses", lambda v: [None, *v[1:]], "response 0: responses is null"),
    "negative prompt id": ("prompt_ids", lambda v: [-1, *v[1:]], "a negative or null prompt token id"),
    "no messages": ("prompt", lambda v: [], "a prompt without messages"),
    "no role": ("prompt", lambda v: [{**v[0], "role": None}, *v[1:]], "a message without role or content"),
    "behaviour": ("behavior_logprobs", lambda v: [[np.nan] * 99, *v[1:]], "response 0: behavior_logprobs are"),
    "ok without reward": ("rewards", lambda v: [None, *v[1:]], "response 0: reward"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_rows_that_contradict_themselves_are_named(damage: str) -> None:
    rng = np.random.default_rng(5)
    group = random_group(rng, 0)
    ok = [replace(random_response(rng), verdict=Verdict(1.0, "ok")) for _ in range(3)]
    ok = [r for r in ok if len(r.ref_logprobs) > 1]
    assert len(ok) == 3
    table = groups_to_table([replace(group, responses=tuple(ok))] * 2)
    assert check_rows(table, "f") == []
    column, change, said = DAMAGES[damage]
    rows = table.to_pylist()
    rows[1][column] = change(rows[1][column])
    problems = check_rows(pa.Table.from_pylist(rows, schema=table.schema), "f")
    assert len(problems) == 1 and problems[0].startswith("f: row 1: ") and said in problems[0]


def test_a_row_of_nulls_is_named() -> None:
    table = groups_to_table(random_groups(1)[:1])
    rows = [dict.fromkeys(table.column_names)]
    (problem, *_) = check_rows(pa.Table.from_pylist(rows, schema=table.schema), "f")
    assert problem.startswith("f: row 0: ")
