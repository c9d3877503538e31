"""Settings files: what is read, what is refused and how it is said."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gftdata.config import GenerateConfig, load_config, recipe_differences, validate_config
from gftdata.errors import UserError

MINIMAL: dict[str, Any] = {
    "model": "m",
    "out": "o",
    "prompts": {"path": "p.jsonl", "columns": {"expert": "solution"}},
}


def write(tmp_path: Path, data: Any) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


def changed(**changes: Any) -> GenerateConfig:
    return validate_config(GenerateConfig, MINIMAL | changes, "test")


def refusal(one_line: Callable[[BaseException], str], path: Path, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(UserError) as caught:
        load_config(GenerateConfig, path, overrides)
    return one_line(caught.value)


def test_the_defaults_are_the_papers_group(tmp_path: Path) -> None:
    config = load_config(GenerateConfig, write(tmp_path, MINIMAL))
    assert (config.responses.expert.count, config.responses.own.count, config.responses.max_tokens) == (1, 4, 2048)
    assert config.responses.size == 5  # without teachers; the paper's three come from one that the user names
    teacher = {"name": "big", "column": "solutions"}
    assert changed(responses={"teachers": [teacher]}).responses.size == 8


@pytest.mark.parametrize(
    ("data", "key", "nearest"),
    [
        ({"modle": "x"}, "modle", "model"),
        ({"responses": {"max_token": 3}}, "responses.max_token", "max_tokens"),
        ({"responses": {"self": {"samplng": {}}}}, "responses.self.samplng", "sampling"),
        ({"responses": {"own_": {}}}, "responses.own_", None),
        (
            {"responses": {"teachers": [{"name": "t", "column": "c", "cuont": 2}]}},
            "responses.teachers.0.cuont",
            "count",
        ),
        (
            {"prompts": {"reasoning_gym": {"task": "x", "sizes": 3}, "columns": {"expert": "e"}}},
            "prompts.reasoning_gym.sizes",
            "size",
        ),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(
    tmp_path: Path, one_line: Callable[[BaseException], str], data: dict[str, Any], key: str, nearest: str | None
) -> None:
    said = refusal(one_line, write(tmp_path, MINIMAL | data))
    assert f"unknown key `{key}`" in said and "config.yaml" in said
    if nearest is not None:
        assert f"did you mean `{nearest}`?" in said


def test_a_key_like_no_other_is_answered_with_all_that_are_valid(
    tmp_path: Path, one_line: Callable[[BaseException], str]
) -> None:
    said = refusal(one_line, write(tmp_path, MINIMAL | {"reward": {"zzzz": 1}}))
    assert "valid keys here: name, timeout_s, workers, memory_gb" in said


def test_overrides_are_read_as_yaml_and_may_reach_into_blocks_that_are_not_there(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    config = load_config(
        GenerateConfig,
        path,
        (
            "seed=7",
            "responses.self.sampling.temperature=2e-6",
            "responses.self.sampling.stop=[a, 'b c']",
            "prompts.template='{question} = {{x}}'",
            "engine.batch_size=4",
            "model=a=b",
        ),
    )
    assert config.seed == 7
    assert config.responses.own.sampling.temperature == 2e-6
    assert config.responses.own.sampling.stop == ("a", "b c")
    assert config.engine.batch_size == 4
    assert config.model == "a=b"
    assert config.prompts.template == "{question} = {{x}}"
    assert config.prompts.path == "p.jsonl", "an override leaves its neighbours alone"


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("seed", "expected key=value"),
        ("=3", "expected key=value"),
        ("model.x=3", "`model` is not a block"),
        ("seed=[1", "not valid YAML"),
        ("sed=1", "did you mean `seed`?"),
        ("responses.max_tokens=many", "`responses.max_tokens`"),
    ],
)
def test_bad_overrides(tmp_path: Path, one_line: Callable[[BaseException], str], override: str, part: str) -> None:
    assert part in refusal(one_line, write(tmp_path, MINIMAL), (override,))


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ({"seed": "one"}, ("`seed`", "'one'")),
        ({"engine": {"batch_size": 0}}, ("`engine.batch_size`", "0")),
        ({"engine": {"name": "vllm"}}, ("`engine.name`", "'vllm'")),
        ({"responses": {"self": {"sampling": {"top_p": 1.5}}}}, ("`responses.self.sampling.top_p`", "1.5")),
        ({"responses": {"self": {"sampling": {"temperature": 0}}}}, ("temperature", "0")),
        ({"responses": {"self": {"sampling": {"temperature": float("nan")}}}}, ("temperature", "nan")),
        ({"responses": {"expert": {"count": -1}}}, ("`responses.expert.count`", "-1")),
        ({"prompts": None}, ("`prompts`",)),
        ({"prompts": {"columns": {"expert": "e"}}}, ("exactly one of path, dataset, reasoning_gym",)),
        ({"prompts": {"path": "a", "dataset": "b", "columns": {"expert": "e"}}}, ("exactly one of",)),
        ({"prompts": {"path": "a", "template": "no place"}}, ("{question}",)),
        ({"prompts": {"path": "a", "columns": {"question": "q", "messages": "m"}}}, ("either question or messages",)),
        ({"prompts": {"path": "a"}}, ("prompts.columns.expert", "count to 0")),
        ({"responses": {"expert": {"count": 0}, "self": {"count": 0}}}, ("every count is 0",)),
        ({"responses": {"teachers": [{"name": "t"}]}}, ("exactly one of column, reused and model",)),
        ({"responses": {"teachers": [{"name": "a:b", "column": "c"}]}}, ("`responses.teachers.0.name`", "a:b")),
        ({"responses": {"teachers": [{"name": "t", "column": c} for c in "ab"]}}, ("two teachers", "'t'")),
    ],
)
def test_bad_values(
    tmp_path: Path, one_line: Callable[[BaseException], str], data: dict[str, Any], parts: tuple[str, ...]
) -> None:
    said = refusal(one_line, write(tmp_path, MINIMAL | data))
    assert "config.yaml" in said
    for part in parts:
        assert part in said


def test_missing_keys_are_named(tmp_path: Path, one_line: Callable[[BaseException], str]) -> None:
    said = refusal(one_line, write(tmp_path, {"model": "m", "prompts": MINIMAL["prompts"]}))
    assert "missing key `out`" in said


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("a: [1,\nb: {", "not valid YAML"),
        ("a: b: c", "not valid YAML"),
        ("a: \t- x\n\t b", "not valid YAML"),
        ("- 1\n- 2\n", "found list"),
        ("", "found NoneType"),
        ("just words", "found str"),
    ],
)
def test_files_that_hold_no_settings(
    tmp_path: Path, one_line: Callable[[BaseException], str], content: str, part: str
) -> None:
    said = refusal(one_line, write(tmp_path, content))
    assert "config.yaml" in said and part in said


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path, one_line: Callable[[BaseException], str]) -> None:
    assert "no such config file" in refusal(one_line, tmp_path / "none.yaml")
    assert "no such config file" in refusal(one_line, tmp_path)
    binary = tmp_path / "config.yaml"
    binary.write_bytes(b"a: \xff\xfe")
    assert "not valid YAML" in refusal(one_line, binary)


COMPUTE_ONLY: list[dict[str, Any]] = [
    {"out": "elsewhere"},
    {"engine": {"batch_size": 3}},
    {"engine": {"batch_tokens": 100}},
    {"engine": {"device": "cpu"}},
    {"reward": {"workers": 5}},
]


@pytest.mark.parametrize("change", COMPUTE_ONLY)
def test_settings_that_only_change_how_it_is_computed_are_not_in_the_recipe(change: dict[str, Any]) -> None:
    assert changed(**change).recipe() == changed().recipe()
    assert changed(**change) != changed()


def leaves(data: Any, path: str = "") -> list[str]:
    if not isinstance(data, dict) or not data:
        return [path]
    return [leaf for key, value in data.items() for leaf in leaves(value, f"{path}.{key}" if path else key)]


def test_every_other_setting_is_in_the_recipe() -> None:
    everything = leaves(changed().model_dump(mode="json", by_alias=True))
    excluded = {"out", "engine.batch_size", "engine.batch_tokens", "engine.device", "reward.workers"}
    assert excluded < set(everything)
    assert set(leaves(changed().recipe())) == set(everything) - excluded


def test_a_recipe_survives_json_and_reads_back_as_the_same_config() -> None:
    import json

    config = changed(responses={"self": {"sampling": {"temperature": 0.1, "stop": ["x"]}}}, seed=3)
    recipe = json.loads(json.dumps(config.recipe()))
    assert recipe_differences(recipe, config.recipe()) == ""
    assert validate_config(GenerateConfig, recipe | {"out": "o"}, "test") == config


@pytest.mark.parametrize(
    ("change", "key", "values"),
    [
        ({"seed": 5}, "seed", ("0", "5")),
        ({"model": "n"}, "model", ("'m'", "'n'")),
        ({"responses": {"self": {"sampling": {"top_p": 0.5}}}}, "responses.self.sampling.top_p", ("1.0", "0.5")),
        ({"shards": {"groups_per_shard": 1}}, "shards.groups_per_shard", ("256", "1")),
        ({"reward": {"name": "exact"}}, "reward.name", ("'math'", "'exact'")),
    ],
)
def test_a_difference_is_named_with_both_values(change: dict[str, Any], key: str, values: tuple[str, str]) -> None:
    said = recipe_differences(changed().recipe(), changed(**change).recipe())
    assert said == f"`{key}` was {values[0]} and is now {values[1]}"


def test_further_differences_are_listed() -> None:
    said = recipe_differences(changed().recipe(), changed(seed=1, model="n").recipe())
    assert "`model` was 'm' and is now 'n'" in said and "`seed`" in said
    assert recipe_differences({"a": 1}, {"a": 1, "b": 2}) == "`b` was None and is now 2"
    assert recipe_differences({"a": 1, "b": 2}, {"a": 1}) == "`b` was 2 and is now None"


def with_engines(engine: dict[str, Any], teacher_engine: dict[str, Any] | None = None) -> GenerateConfig:
    teacher = {"name": "t", "model": "big", **({"engine": teacher_engine} if teacher_engine else {})}
    return changed(engine=engine, responses={"teachers": [teacher]})


def test_of_sglangs_settings_only_those_that_change_the_output_are_in_the_recipe() -> None:
    plain = with_engines({"name": "sglang", "options": {"quantization": "fp8"}})
    moved = {"python": "p", "max_in_flight": 3, "options": {"quantization": "fp8", "tp_size": 2, "log_level": "info"}}
    assert with_engines({"name": "sglang", **moved}).recipe() == plain.recipe()
    other = with_engines({"name": "sglang", "options": {"quantization": "awq"}})
    assert "quantization" in recipe_differences(plain.recipe(), other.recipe())
    assert "engine.name" in recipe_differences(plain.recipe(), with_engines({}).recipe())


def test_a_block_of_a_list_is_overridden_by_its_name(tmp_path: Path) -> None:
    teachers = [{"name": name, "model": "big"} for name in ("a", "b")]
    path = write(tmp_path, MINIMAL | {"responses": {"teachers": teachers}})
    config = load_config(
        GenerateConfig, path, ["responses.teachers.b.count=7", "responses.teachers.b.sampling.top_p=0.5"]
    )
    assert [(t.count, t.sampling.top_p) for t in config.responses.teachers] == [(3, 1.0), (7, 0.5)]
    with pytest.raises(UserError, match="nothing is named `c` there; there are: a, b"):
        load_config(GenerateConfig, path, ["responses.teachers.c.count=7"])


def test_a_teacher_may_have_an_engine_of_its_own() -> None:
    from gftdata.prepare import phases

    teacher, own = phases(with_engines({}, {"name": "sglang", "max_in_flight": 2}))
    assert (teacher.engine.name, own.engine.name) == ("sglang", "hf")
    teacher, own = phases(with_engines({"batch_size": 3}))
    assert teacher.engine == own.engine
    faster = with_engines({}, {"name": "sglang", "max_in_flight": 9})
    assert faster.recipe() == with_engines({}, {"name": "sglang"}).recipe()
    assert faster.recipe() != with_engines({}).recipe()


def test_a_mistake_in_an_engine_is_named_as_the_file_has_it(
    tmp_path: Path, one_line: Callable[[BaseException], str]
) -> None:
    said = refusal(one_line, write(tmp_path, MINIMAL | {"engine": {"name": "sglang", "option": {}}}))
    assert "unknown key `engine.option`; did you mean `options`?" in said
    said = refusal(one_line, write(tmp_path, MINIMAL | {"engine": {"name": "vllm"}}))
    assert "`engine.name`" in said and "'sglang'" in said and "'vllm'" in said


def test_a_teacher_is_not_drawn_from_the_students_servers() -> None:
    engine = {"name": "server", "urls": ["http://a:1"]}
    data = {"model": "small", "out": "o", "prompts": {"path": "p", "columns": {"expert": "e"}}, "engine": engine}

    def responses(**teacher: object) -> dict[str, object]:
        return {"responses": {"teachers": [{"name": "t", **teacher}]}}

    with pytest.raises(UserError, match="teacher:t needs an engine of its own"):
        validate_config(GenerateConfig, data | responses(model="big"), "test")
    for teacher in ({"model": "small"}, {"column": "c"}, {"model": "big", "engine": {"name": "hf"}}):
        validate_config(GenerateConfig, data | responses(**teacher), "test")
