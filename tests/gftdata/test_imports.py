"""verl's and the authors' files -> prompts and a config that `gft generate` takes as it is."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gftdata.config import GenerateConfig, load_config, validate_config
from gftdata.errors import UserError
from gftdata.exports import export
from gftdata.generate import generate
from gftdata.imports import INSTRUCTION, Imported, Places, import_prompts, prompt_row, unusable
from gftdata.layouts import Candidate, ExportOptions, GroupRow, rows_of
from gftdata.manifest import read_manifest
from gftdata.prompts import read_prompts
from gftdata.schema import table_to_groups
from gftdata.shards import shard_paths, verify

OneLine = Callable[[BaseException], str]
Write = Callable[..., Path]


def authors_row(number: int, question: str, expert: str, teachers: list[str | None], truth: str) -> dict[str, Any]:
    """A row as the authors' loader reads it."""
    asked = f"{question} {INSTRUCTION}"
    return {
        "source": "synthetic_math",
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": expert}],
        "data_source": "numina_cot",
        "prompt": [{"role": "user", "content": asked}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {
            "split": "train",
            "index": number,
            "answer": expert,
            "question": question,
            "model_answer": teachers,
        },
    }


def verl_row(number: int) -> dict[str, Any]:
    return {
        "data_source": f"set{number % 2}",
        "prompt": [{"role": "user", "content": f"{number}+{number}="}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(2 * number)},
        "extra_info": {"split": "train", "index": number, "answer": f"{2 * number}", "tags": ["a", None], "level": 0.5},
    }


def lines(made: Imported) -> list[dict[str, Any]]:
    return [json.loads(line) for line in made.prompts.read_text(encoding="utf-8").splitlines()]


def test_the_authors_file_becomes_groups(demo: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (demo / "train.jsonl").read_text().splitlines()[:6]]
    source = tmp_path / "numina.parquet"
    published = [
        authors_row(n, row["question"], row["expert"], [f"{n};{k}" for k in range(8)], row["answer"])
        for n, row in enumerate(rows)
    ]
    for row in published:  # the demo's model knows digits only
        row["prompt"][0]["content"] = row["extra_info"]["question"]
    published[5]["extra_info"]["model_answer"] = [None, "1", "", "2", None, None, None, None]
    pq.write_table(pa.Table.from_pylist(published), source)
    made = import_prompts("authors", str(source), tmp_path / "in", model=str(demo / "model"))
    assert (made.rows_read, made.rows, made.with_expert, made.teacher_texts, made.max_teacher_texts) == (6, 6, 6, 42, 8)
    assert made.instructed == 0 and made.left_out == {}
    overrides = ["reward.name=numeric", "reward.workers=1", "responses.max_tokens=48", "responses.self.count=2"]
    config = load_config(GenerateConfig, made.config, overrides)
    assert config.responses.size == 1 + 3 + 2, "the authors' loader: the expert, then the first three"
    generate(config)
    out = Path(config.out)
    assert verify(out) == []
    groups = [g for path in shard_paths(out, read_manifest(out)) for g in table_to_groups(pq.read_table(path))]
    for number, (group, row) in enumerate(zip(groups, published, strict=True)):
        texts = [r.completion.text for r in group.responses]
        given = [row["extra_info"]["answer"], *[t for t in row["extra_info"]["model_answer"] if t][:3]]
        assert texts[: len(given)] == given
        assert [r.completion.source for r in group.responses[1:2]] == ["teacher:qwen2.5-math-72b"]
        assert group.prompt.source_id == str(number) and group.prompt.data_source == "numina_cot"
        kept = json.loads(group.prompt.extra)["verl"]["row"]
        assert kept["source"] == "synthetic_math" and kept["messages"] == row["messages"]


def test_the_instruction_is_found_in_the_prompt_and_not_added(tmp_path: Path, write_jsonl: Write) -> None:
    source = write_jsonl([authors_row(0, "1+1?", "2", ["2"] * 8, "2")])
    made = import_prompts("authors", str(source), tmp_path / "in")
    assert made.instructed == 1
    config = load_config(GenerateConfig, made.config)
    assert config.prompts.template is None and config.model == "PATH-OR-HUB-ID"
    prompt = next(iter(read_prompts(config.prompts, {}, needs_ground_truth=True)))
    assert prompt.messages[0].content == f"1+1? {INSTRUCTION}"


def test_a_verl_file_comes_back_as_it_was(demo: Path, tmp_path: Path) -> None:
    source = tmp_path / "verl.parquet"
    rows = [verl_row(n) for n in range(10, 17)]
    pq.write_table(pa.Table.from_pylist(rows), source)
    made = import_prompts("verl", str(source), tmp_path / "in", expert="extra_info.answer", model=str(demo / "model"))
    overrides = ["reward.name=numeric", "reward.workers=1", "responses.max_tokens=16", "responses.self.count=1"]
    config = load_config(GenerateConfig, made.config, overrides)
    generate(config)
    exported = export(config.out, "verl", tmp_path / "back.parquet")
    assert pq.read_table(exported.path).to_pylist() == rows
    assert exported.left_out == {"responses of self": 7}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=2),
    max_leaves=4,
)


@given(
    truth=json_values,
    answer=st.none() | st.text(max_size=5),
    answers=st.none() | st.lists(st.text(min_size=1, max_size=3), max_size=3),
    info=st.dictionaries(st.text("xyz", min_size=1, max_size=2), json_values, max_size=3),
    more=st.dictionaries(st.sampled_from(["ability", "source", "messages"]), json_values, max_size=3),
    mapped=st.booleans(),
)
def test_whatever_a_row_holds_comes_back(
    truth: Any, answer: str | None, answers: Any, info: dict[str, Any], more: dict[str, Any], mapped: bool
) -> None:
    """Import and export of one row, with `gft generate` between them played by its field mapping."""
    row = {
        "data_source": "s",
        "prompt": [{"role": "user", "content": "?"}],
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": info | {"answer": answer, "model_answer": answers},
    } | more
    before = json.dumps(row)
    assert unusable(row) == ""
    places = Places("extra_info.answer", "extra_info.model_answer") if mapped else Places()
    made = json.loads(json.dumps(prompt_row(row, places)))
    assert json.dumps(row) == before, "the row that was read is left alone"
    texts = [("expert", made["expert"])] if made["expert"] else []
    texts += [("teacher:t", text) for text in made["teacher"] or []]
    group = GroupRow(
        number=0,
        prompt_id="p",
        source_id=made["id"],
        messages=tuple(made["prompt"]),
        ground_truth=made["ground_truth"],
        data_source=made["data_source"],
        extra=json.dumps({"verl": made["verl"]}),
        prompt_ids=(),
        responses=tuple(Candidate(text, source, None, False, "data", 0.0, ()) for source, text in texts),
    )
    left_out: Counter[str] = Counter()
    (back,) = rows_of("verl", ExportOptions(), frozenset(), False)(group, left_out)
    assert back == row
    assert sum(left_out.values()) == 0


def test_rows_that_cannot_be_prompts_are_counted(tmp_path: Path, write_jsonl: Write) -> None:
    rows: list[Any] = [verl_row(n) for n in range(7)]
    rows[1]["prompt"] = "1+1="
    rows[2]["prompt"].append({"role": "assistant", "content": "4"})
    rows[3]["prompt"][0]["content"] = [{"type": "text", "text": "6"}]
    rows[4]["data_source"] = None
    rows[5]["prompt"][0]["content"] = "\ud800"
    rows[6]["reward_model"]["ground_truth"] = None
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = import_prompts("verl", str(source), tmp_path / "in")
    assert made.left_out == {
        "whose prompt is not a chat of texts that ends with the user's": 3,
        "without the name of a data source": 1,
        "with half of a surrogate pair in a text": 1,
    }
    assert made.rows == len(lines(made)) == 2 and made.rows_read == 7 and made.without_ground_truth == 1
    assert load_config(GenerateConfig, made.config).responses.size == 4, "no expert, no teacher"


def test_a_ground_truth_that_is_no_text_is_json_and_stays(tmp_path: Path, write_jsonl: Write) -> None:
    row = verl_row(3)
    row["reward_model"]["ground_truth"] = {"target": [3, 4]}
    (line,) = lines(import_prompts("verl", str(write_jsonl([row])), tmp_path / "in"))
    assert line["ground_truth"] == '{"target": [3, 4]}'
    assert line["verl"]["row"]["reward_model"] == row["reward_model"]


def test_wrong_columns_are_named_with_the_nearest(tmp_path: Path, write_jsonl: Write, one_line: OneLine) -> None:
    source = str(write_jsonl([verl_row(1)]))
    with pytest.raises(UserError) as caught:
        import_prompts("verl", source, tmp_path / "in", expert="extra_info.answr")
    assert "no column `extra_info.answr` (--expert); did you mean `extra_info.answer`?" in one_line(caught.value)
    with pytest.raises(UserError, match=r"row 1: no column `extra_info.model_answer`"):
        import_prompts("authors", source, tmp_path / "in")
    other = str(write_jsonl([{"promt": "?", "x": {"y": 1}}], "other.jsonl"))
    with pytest.raises(UserError, match="no column `prompt`; did you mean `promt`"):
        import_prompts("verl", other, tmp_path / "in")
    assert not (tmp_path / "in" / "prompts.jsonl").exists() and list((tmp_path / "in").iterdir()) == []


def test_what_is_refused(tmp_path: Path, write_jsonl: Write, one_line: OneLine) -> None:
    source = write_jsonl([verl_row(1)])
    with pytest.raises(UserError, match="unknown format 'trl': expected authors or verl"):
        import_prompts("trl", str(source), tmp_path / "in")
    with pytest.raises(UserError, match="no such file"):
        import_prompts("verl", str(tmp_path / "none.parquet"), tmp_path / "in")
    empty = write_jsonl([verl_row(1) | {"prompt": []}], "empty.jsonl")
    with pytest.raises(UserError, match=r"no row of it can be a prompt \(1 whose prompt is not a chat"):
        import_prompts("verl", str(empty), tmp_path / "in")
    images = tmp_path / "images.parquet"
    pq.write_table(pa.Table.from_pylist([verl_row(1) | {"images": b"\x89PNG"}]), images)
    with pytest.raises(UserError) as caught:
        import_prompts("verl", str(images), tmp_path / "in")
    assert "column `images` holds what JSON cannot" in one_line(caught.value)
    import_prompts("verl", str(source), tmp_path / "in")
    with pytest.raises(UserError, match=r"prompts.jsonl: exists already and is not overwritten"):
        import_prompts("verl", str(source), tmp_path / "in")


def test_a_data_source_for_each_row_must_be_a_name(write_jsonl: Write) -> None:
    path = write_jsonl([{"question": "?", "from": "a"}, {"question": "!", "from": 3}])
    settings = {
        "model": "m",
        "out": "o",
        "prompts": {"path": str(path), "columns": {"data_source": "from"}},
        "responses": {"expert": {"count": 0}},
    }
    prompts = read_prompts(validate_config(GenerateConfig, settings, "t").prompts, {}, needs_ground_truth=False)
    assert next(prompts).data_source == "a"
    with pytest.raises(UserError, match="row 2: column `from`: expected the name of a data set, found 3"):
        next(prompts)
    settings["prompts"] = {**settings["prompts"], "data_source": "b"}  # type: ignore[dict-item]
    with pytest.raises(UserError, match="set one of the two"):
        validate_config(GenerateConfig, settings, "t")


def test_an_import_that_was_cut_off_before_its_config_goes_on(
    tmp_path: Path, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl([verl_row(1)])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("gftdata.imports.write_atomic", raise_interrupt)
        import_prompts("verl", str(source), tmp_path / "in")
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["prompts.jsonl"]
    other = write_jsonl([verl_row(2)], "other.jsonl")
    before = (tmp_path / "in" / "prompts.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"prompts.jsonl: exists already and is not overwritten"):
        import_prompts("verl", str(other), tmp_path / "in")
    assert [path.read_bytes() for path in (tmp_path / "in").iterdir()] == [before]
    assert import_prompts("verl", str(source), tmp_path / "in").rows == 1
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["generate.yaml", "prompts.jsonl"]


def raise_interrupt(*args: object) -> None:
    raise KeyboardInterrupt
