"""Rows of any source -> prompts; what is wrong with a row is said in one line."""

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gftdata.config import PromptsConfig, ReasoningGymConfig
from gftdata.errors import UserError
from gftdata.prompts import prompt_from_json, prompt_to_json, read_prompts
from gftdata.rewards import judge
from gftdata.types import GivenText, Message, Prompt

Given = Mapping[str, tuple[str, int]]
WriteJsonl = Callable[..., Path]
OneLine = Callable[[BaseException], str]

ROWS = [
    {"question": "1+1=", "answer": "2", "info": {"id": i, "solution": f"s{i}", "samples": ["a", "b"]}} for i in range(3)
]
COLUMNS = {"ground_truth": "answer", "id": "info.id", "expert": "info.solution", "extra": ["info.samples"]}


def read(
    source: Mapping[str, Any] | Path, *, given: Given | None = None, truth: bool = False, **settings: Any
) -> list[Prompt]:
    origin = {"path": str(source)} if isinstance(source, Path) else dict(source)
    config = PromptsConfig.model_validate(origin | settings)
    return list(read_prompts(config, given or {}, needs_ground_truth=truth))


def refusal(one_line: OneLine, source: Mapping[str, Any] | Path, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(source, **settings)
    return one_line(caught.value)


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_every_kind_of_file_gives_the_same_prompts(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    jsonl = write_jsonl(ROWS)
    settings: dict[str, Any] = {
        "columns": COLUMNS,
        "data_source": "sums",
        "given": {"expert": ("info.solution", 1), "teacher:big": ("info.samples", 1)},
    }
    expected = read(jsonl, **settings)
    first = expected[0]
    assert len(expected) == 3
    assert first.messages == (Message("user", "1+1="),)
    assert (first.ground_truth, first.source_id, first.data_source) == ("2", "0", "sums")
    assert first.given == (GivenText("expert", "s0"), GivenText("teacher:big", "a"))
    assert json.loads(first.extra) == {"info.samples": ["a", "b"]}
    assert read(parquet(tmp_path / "p.parquet", ROWS), **settings) == expected
    for name, write in (("folder/a.jsonl", write_jsonl), ("folder/a.parquet", None)):
        for old in folder.iterdir():
            old.unlink()
        if write is None:
            parquet(tmp_path / name, ROWS)
        else:
            write(ROWS, name)
        assert read({"dataset": str(folder)}, **settings) == expected


def test_parquet_of_many_row_groups_keeps_its_order(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}"} for i in range(2500)]
    path = tmp_path / "p.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=700)
    assert [p.messages[0].content for p in read(path)] == [row["question"] for row in rows]


def test_the_data_source_is_a_name_and_not_a_path(tmp_path: Path, write_jsonl: WriteJsonl) -> None:
    path = write_jsonl(ROWS, "sums.jsonl")
    assert {p.data_source for p in read(path)} == {"sums.jsonl"}
    folder = tmp_path / "my-sums"
    folder.mkdir()
    path.rename(folder / "train.jsonl")
    assert {p.data_source for p in read({"dataset": str(folder)})} == {"my-sums"}


def test_reasoning_gym_is_reproducible_and_carries_what_its_scorer_needs() -> None:
    import reasoning_gym

    task = {"task": "basic_arithmetic", "size": 12, "seed": 3, "options": {"max_terms": 3}}
    prompts = read({"reasoning_gym": task}, truth=True)
    assert prompts == read({"reasoning_gym": task}, truth=True)
    assert prompts != read({"reasoning_gym": task | {"seed": 4}}, truth=True)
    assert len(prompts) == 12
    entries = list(reasoning_gym.create_dataset("basic_arithmetic", size=12, seed=3, max_terms=3))
    for prompt, entry in zip(prompts, entries, strict=True):
        assert prompt.messages == (Message("user", entry["question"]),)
        assert prompt.ground_truth == entry["answer"]
        assert json.loads(prompt.extra)["reasoning_gym"] == {
            "task": "basic_arithmetic",
            "entry": json.loads(json.dumps(entry)),
        }


@pytest.mark.parametrize("task", [{"task": "no_such_task"}, {"task": "basic_arithmetic", "options": {"nonsense": 1}}])
def test_a_reasoning_gym_task_that_cannot_be_made(one_line: OneLine, task: dict[str, Any]) -> None:
    assert f"reasoning_gym task `{task['task']}`" in refusal(one_line, {"reasoning_gym": task})


def test_duplicates_are_told_apart_and_ids_come_from_the_content(write_jsonl: WriteJsonl) -> None:
    pairs = [(q, a) for q in ("x", "y") for a in ("1", "2", None)]
    rows = [{"question": q, "answer": a, "n": i} for i in range(3) for q, a in pairs]
    columns = {"ground_truth": "answer", "id": "n"}
    ids = [p.prompt_id for p in read(write_jsonl(rows), columns=columns)]
    assert len(set(ids)) == len(rows)
    assert ids[len(pairs) :] == [f"{i}-2" for i in ids[: len(pairs)]] + [f"{i}-3" for i in ids[: len(pairs)]]
    shuffled = random.Random(0).sample(rows, len(rows))
    found = read(write_jsonl(shuffled), columns=columns)
    assert sorted(p.prompt_id for p in found) == sorted(ids), "order of rows and their other columns do not matter"
    by_content = dict(zip(pairs, ids, strict=False))
    for prompt in found:
        assert prompt.prompt_id.partition("-")[0] == by_content[prompt.messages[0].content, prompt.ground_truth]


def test_the_id_is_the_documented_hash(write_jsonl: WriteJsonl) -> None:
    (prompt,) = read(write_jsonl([{"question": "é?", "answer": "2"}]), columns={"ground_truth": "answer"})
    canonical = '{"ground_truth":"2","messages":[{"content":"é?","role":"user"}]}'
    assert prompt.prompt_id == hashlib.sha256(canonical.encode()).hexdigest()
    for settings in ({"system": "Be brief."}, {"template": "{question}!"}):
        (other,) = read(
            write_jsonl([{"question": "é?", "answer": "2"}]), columns={"ground_truth": "answer"}, **settings
        )
        assert other.prompt_id != prompt.prompt_id


def test_template_and_system_message(write_jsonl: WriteJsonl) -> None:
    question = r"\frac{a}{b} {question} {0} {{x}}"
    template = r"{question} Put it in \boxed{}. {other} {{}}"
    (prompt,) = read(write_jsonl([{"question": question}]), template=template, system="Be brief.")
    assert prompt.messages == (
        Message("system", "Be brief."),
        Message("user", question + r" Put it in \boxed{}. {other} {{}}"),
    )


def test_messages(write_jsonl: WriteJsonl, one_line: OneLine) -> None:
    chat = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    path = write_jsonl([{"chat": chat}])
    (prompt,) = read(path, columns={"messages": "chat"}, system="s")
    assert [(m.role, m.content) for m in prompt.messages] == [
        ("system", "s"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
    ]
    bad: list[Any] = [
        chat[:2],
        [],
        None,
        "text",
        ["text"],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        {"role": "user", "content": "x"},
    ]
    for value in bad:
        path = write_jsonl([{"chat": chat}, {"chat": value}])
        said = refusal(one_line, path, columns={"messages": "chat"})
        assert f"{path}: row 2: column `chat`: expected" in said


@pytest.mark.parametrize("value", [None, "", 3, ["x"]])
def test_a_question_that_is_no_text(write_jsonl: WriteJsonl, one_line: OneLine, value: Any) -> None:
    path = write_jsonl([{"question": "ok"}, {"question": value}])
    assert f"{path}: row 2: column `question`: expected a question's text" in refusal(one_line, path)


@pytest.mark.parametrize(("value", "text"), [("2", "2"), (2, "2"), (2.5, "2.5"), ("", ""), (None, None)])
def test_ground_truth_is_text(write_jsonl: WriteJsonl, value: Any, text: str | None) -> None:
    (prompt,) = read(write_jsonl([{"question": "q", "answer": value}]), columns={"ground_truth": "answer"})
    assert prompt.ground_truth == text


def test_a_ground_truth_of_another_kind(write_jsonl: WriteJsonl, one_line: OneLine) -> None:
    path = write_jsonl([{"question": "q", "answer": ["2"]}])
    said = refusal(one_line, path, columns={"ground_truth": "answer"})
    assert f"{path}: row 1: column `answer`: expected a text or a number" in said


def test_missing_ground_truth_by_policy(write_jsonl: WriteJsonl, one_line: OneLine) -> None:
    path = write_jsonl([{"question": "q", "answer": a} for a in ("1", None)])
    named: dict[str, Any] = {"columns": {"ground_truth": "answer"}}
    said = refusal(one_line, path, truth=True, **named)
    assert f"{path}: row 2: no ground truth in column `answer`" in said and "on_missing_ground_truth=keep" in said
    said = refusal(one_line, path, truth=True)
    assert f"{path}: row 1: no ground truth (prompts.columns.ground_truth names no column)" in said
    assert [p.ground_truth for p in read(path, truth=False, **named)] == ["1", None]
    kept = read(path, truth=True, on_missing_ground_truth="keep", **named)
    assert [p.ground_truth for p in kept] == ["1", None]


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        ("one", ["one"]),
        (["one", "two", "three"], ["one", "two"]),
        ([None, "", "two", "three"], ["two", "three"]),
        ([], []),
        (None, []),
        ("", []),
    ],
)
def test_given_texts(write_jsonl: WriteJsonl, value: Any, taken: list[str]) -> None:
    path = write_jsonl([{"question": "q", "texts": value}])
    (prompt,) = read(path, given={"expert": ("texts", 2), "teacher:t": ("texts", 1)})
    assert [g.text for g in prompt.given if g.source == "expert"] == taken
    assert [g.text for g in prompt.given if g.source == "teacher:t"] == taken[:1]


@pytest.mark.parametrize("value", [3, ["a", 3], {"a": "b"}, [["a"]]])
def test_given_texts_of_another_kind(write_jsonl: WriteJsonl, one_line: OneLine, value: Any) -> None:
    path = write_jsonl([{"question": "q", "texts": value}])
    said = refusal(one_line, path, given={"expert": ("texts", 2)})
    assert f"{path}: row 1: column `texts`: expected a text or a list of texts" in said


@pytest.mark.parametrize(
    ("settings", "column", "key"),
    [
        ({"columns": {"question": "q"}}, "q", "prompts.columns.question"),
        ({"columns": {"messages": "chat"}}, "chat", "prompts.columns.messages"),
        ({"columns": {"ground_truth": "info.answer"}}, "info.answer", "prompts.columns.ground_truth"),
        ({"columns": {"ground_truth": "answer.value"}}, "answer.value", "prompts.columns.ground_truth"),
        ({"columns": {"id": "uid"}}, "uid", "prompts.columns.id"),
        ({"columns": {"extra": ["note"]}}, "note", "prompts.columns.extra"),
        ({"given": {"expert": ("solution", 1)}}, "solution", "prompts.columns.expert"),
        ({"given": {"teacher:t": ("samples", 1)}}, "samples", "responses.teachers.column"),
    ],
)
def test_a_missing_column_is_named_with_its_setting_and_what_there_is(
    tmp_path: Path, write_jsonl: WriteJsonl, one_line: OneLine, settings: dict[str, Any], column: str, key: str
) -> None:
    for path in (write_jsonl(ROWS), parquet(tmp_path / "p.parquet", ROWS)):
        said = refusal(one_line, path, **settings)
        assert said == f"{path}: row 1: no column `{column}` ({key}); it has: question, answer, info"


def test_a_column_whose_name_has_a_dot(write_jsonl: WriteJsonl) -> None:
    rows = [{"a.b": "whole", "a": {"b": "nested", "c": {"d": "deep"}}}]
    assert read(write_jsonl(rows), columns={"question": "a.b"})[0].messages[0].content == "whole"
    assert read(write_jsonl(rows), columns={"question": "a.c.d"})[0].messages[0].content == "deep"


def test_a_column_that_only_a_later_row_lacks(write_jsonl: WriteJsonl, one_line: OneLine) -> None:
    path = write_jsonl([{"question": "q", "answer": "1"}, {"question": "q"}])
    said = refusal(one_line, path, columns={"ground_truth": "answer"})
    assert f"{path}: row 2: no column `answer`" in said


@pytest.mark.parametrize(
    ("line", "part"),
    [
        (b'{"question": "q"', "not valid JSON"),
        (b"[1, 2]", "expected a JSON object, found list"),
        (b'"text"', "expected a JSON object, found str"),
        (b'{"question": "\xff"}', "not valid JSON"),
        (b'{"question": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b'{"question": "\\ud800"}', "surrogate"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, one_line: OneLine, line: bytes, part: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"question": "ok"}\n' + line + b"\n")
    said = refusal(one_line, path)
    assert part in said and str(path) in said and (": line 2: " in said or ": row 2: " in said)
    assert len(said) < 500, "not the whole line"


def test_surrogates_anywhere_in_a_row_that_is_kept(tmp_path: Path, one_line: OneLine) -> None:
    path = tmp_path / "p.jsonl"
    for column in ("answer", "expert", "note", "uid"):
        row = {"question": "q", "answer": "a", "expert": "e", "note": "n", "uid": "u"} | {column: "\ud800"}
        path.write_text(json.dumps(row) + "\n")
        said = refusal(
            one_line,
            path,
            columns={"ground_truth": "answer", "id": "uid", "extra": ["note"]},
            given={"expert": ("expert", 1)},
        )
        assert f"{path}: row 1" in said and "surrogate" in said


def test_a_pair_of_escapes_is_one_character(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"question": "\\ud83d\\ude00"}\n')
    assert read(path)[0].messages[0].content == "😀"


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes('{"question": "a\u2028b\x85c"}\r\n\n   \n{"question": "d"}'.encode())
    assert [p.messages[0].content for p in read(path)] == ["a\u2028b\x85c", "d"]


def test_sources_that_hold_nothing(tmp_path: Path, write_jsonl: WriteJsonl, one_line: OneLine) -> None:
    empty = write_jsonl([])
    assert refusal(one_line, empty) == f"{empty}: holds no prompts"
    empty.write_text("\n \n")
    assert refusal(one_line, empty) == f"{empty}: holds no prompts"
    path = tmp_path / "e.parquet"
    pq.write_table(pa.table({"question": pa.array([], pa.string())}), path)
    assert refusal(one_line, path) == f"{path}: holds no prompts"


def test_sources_that_are_not_there(tmp_path: Path, one_line: OneLine) -> None:
    for name in ("none.jsonl", "none.parquet"):
        path = tmp_path / name
        assert refusal(one_line, path) == f"{path}: no such prompt file (prompts.path)"
    assert "no such prompt file" in refusal(one_line, tmp_path)
    path = tmp_path / "p.csv"
    path.write_text("question\nx\n")
    assert refusal(one_line, path) == f"{path}: expected a .jsonl or .parquet file (prompts.path)"
    for name in (str(tmp_path / "no-folder"), "no-such-org/no-such-set"):
        assert f"{name}: cannot load this data set (prompts.dataset)" in refusal(one_line, {"dataset": name})


def test_a_data_set_without_the_split_or_with_a_broken_file(
    tmp_path: Path, write_jsonl: WriteJsonl, one_line: OneLine
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = write_jsonl(ROWS, "folder/train.jsonl")
    assert f"{folder}: cannot load" in refusal(one_line, {"dataset": str(folder)}, split="validation")
    path.write_text("{broken\n")
    assert f"{folder}: cannot load" in refusal(one_line, {"dataset": str(folder)})


def test_a_parquet_file_that_is_none_or_is_damaged(tmp_path: Path, one_line: OneLine) -> None:
    path = tmp_path / "p.parquet"
    path.write_text("no parquet")
    assert f"{path}: not a Parquet file" in refusal(one_line, path)
    path.write_bytes(b"")
    assert f"{path}: not a Parquet file" in refusal(one_line, path)
    parquet(path, [{"question": f"q{i}" * 50} for i in range(200)])
    damaged = bytearray(path.read_bytes())
    damaged[4:200] = b"\xff" * 196
    path.write_bytes(damaged)
    assert f"{path}: " in refusal(one_line, path)


def test_extra_that_is_not_json(tmp_path: Path, one_line: OneLine) -> None:
    path = parquet(tmp_path / "p.parquet", [{"question": "q", "blob": b"x"}])
    assert "row 1: extra columns must be JSON values" in refusal(one_line, path, columns={"extra": ["blob"]})


def test_the_limit_stops_before_what_comes_after(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl([{"question": "a"}, {"question": "b"}, {"nothing": 1}])
    assert [p.messages[0].content for p in read(path, limit=2)] == ["a", "b"]


def test_rows_are_streamed(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl([{"question": "a"}, {"nothing": 1}])
    stream = read_prompts(PromptsConfig(path=str(path)), {}, needs_ground_truth=False)
    assert next(stream).messages[0].content == "a"
    with pytest.raises(UserError):
        next(stream)


def test_a_prompt_survives_its_line_of_json(demo: Path) -> None:
    hard = Prompt(
        "id-2",
        None,
        (Message("system", "s\n\u2028"), Message("user", "é😀\x00\\boxed{}")),
        None,
        "src",
        (GivenText("expert", "a\r\nb"), GivenText("teacher:t", "")),
        '{"a": [1, null]}',
        "é",
    )
    given = {"expert": ("expert", 1)}
    prompts = read(demo / "train.jsonl", columns={"ground_truth": "answer"}, given=given)
    assert len(prompts) == 512
    for prompt in [hard, *prompts]:
        line = prompt_to_json(prompt)
        assert "\n" not in line
        assert prompt_from_json(line) == prompt


def test_a_task_whose_entries_hold_more_than_json_can() -> None:
    config = PromptsConfig(reasoning_gym=ReasoningGymConfig(task="gsm_symbolic", size=10, seed=0))
    prompts = list(read_prompts(config, {}, needs_ground_truth=True))
    assert len(prompts) == 10
    for prompt in prompts:  # the scorer gets what it needs
        assert prompt.ground_truth is not None
        assert judge("reasoning_gym", prompt, prompt.ground_truth).reward == 1.0
