"""The settings of an evaluation, and what is found out before a model is loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from training_helpers import DEMO, MODEL

from gftdata.config import load_config, validate_config
from gftdata.errors import UserError
from gfttrain.benchmarks import plan, results_folder, settings_of
from gfttrain.config import EvalConfig

SUMS = {"path": str(DEMO / "eval.jsonl"), "columns": {"ground_truth": "answer"}, "limit": 4}


def settings(prompts: dict[str, Any] | None = None, **changes: Any) -> EvalConfig:
    data: dict[str, Any] = {
        "model": str(MODEL),
        "out": "results",
        "benchmarks": [{"name": "sums", "prompts": prompts or SUMS}],
        "reward": {"name": "numeric"},
        "num_samples": 2,
        "max_tokens": 48,
    }
    return validate_config(EvalConfig, data | changes, "eval.yaml")


def refusal(**changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        settings(**changes)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# settings


def test_a_benchmark_is_measured_as_the_config_says_but_for_what_it_says_itself() -> None:
    own = {"name": "b", "prompts": SUMS, "num_samples": 8, "sampling": {"top_p": 0.9}, "reward": {"timeout_s": 3}}
    config = settings(
        benchmarks=[{"name": "a", "prompts": SUMS}, own], sampling={"temperature": 0.7}, k=[1], greedy=False
    )
    a, b = config.benchmarks
    assert (a.num_samples, a.sampling.temperature, a.sampling.top_p, a.reward.name) == (2, 0.7, 1.0, "numeric")
    assert (b.num_samples, b.sampling.temperature, b.sampling.top_p) == (8, 0.7, 0.9)
    assert (b.reward.name, b.reward.timeout_s, b.max_tokens, b.greedy, b.ks) == ("numeric", 3, 48, False, (1,))
    assert EvalConfig.model_validate(config.model_dump()) == config


def test_pass_at_k_is_of_1_and_of_all_samples_by_default() -> None:
    config = settings(benchmarks=[{"name": "a", "prompts": SUMS}, {"name": "b", "prompts": SUMS, "num_samples": 1}])
    assert [one.ks for one in config.benchmarks] == [(1, 2), (1,)]


def test_one_setting_of_one_benchmark_can_be_overridden(tmp_path: Path) -> None:
    path = tmp_path / "eval.yaml"
    path.write_text(json.dumps(settings(out="o").model_dump(mode="json", exclude_unset=True)))
    config = load_config(EvalConfig, path, ["benchmarks.sums.prompts.limit=2", "benchmarks.sums.num_samples=3"])
    assert (config.benchmarks[0].prompts.limit, config.benchmarks[0].num_samples) == (2, 3)
    with pytest.raises(UserError, match="nothing is named `other` there; there are: sums"):
        load_config(EvalConfig, path, ["benchmarks.other.num_samples=2"])
    with pytest.raises(UserError, match=r"benchmarks\.sums\.KEY=VALUE"):
        load_config(EvalConfig, path, ["benchmarks.sums=2"])


def test_mistakes_are_said_once_and_where_they_are() -> None:
    two = [{"name": n, "prompts": SUMS} for n in ("a", "b")]
    assert refusal(benchmarks=two, num_samples=0).count("num_samples") == 1
    assert "unknown key `benchmarks.0.num_sample`; did you mean `num_samples`?" in refusal(
        benchmarks=[{**two[0], "num_sample": 3}]
    )
    assert "at least 1 item" not in refusal(benchmarks=["gsm8k"]) and "`benchmarks.0`" in refusal(benchmarks=["gsm8k"])
    assert "missing key `benchmarks.1.prompts`" in refusal(benchmarks=[two[0], {"name": "c"}])
    assert "missing key `benchmarks`" in str(refusal_of_nothing())
    assert "`benchmarks`" in refusal(benchmarks=[])
    assert "two benchmarks have the same name: a, a" in refusal(benchmarks=[two[0], {**two[1], "name": "A"}])
    for name in ("../up", "a/b", ".hidden", "", "a b"):
        assert "`benchmarks.0.name`" in refusal(benchmarks=[{**two[0], "name": name}])
    assert "`benchmarks.0`: pass@16 needs num_samples of at least 16, found 2" in refusal(k=[1, 16])


def refusal_of_nothing() -> UserError:
    with pytest.raises(UserError) as caught:
        validate_config(EvalConfig, {"model": "m"}, "eval.yaml")
    return caught.value


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.5}, {"temperature": 1.5}, {"temperature": 1.0, "top_p": 0.9}, {"stop": [";"]}]
)
def test_a_reference_needs_samples_of_the_model_itself(sampling: dict[str, Any]) -> None:
    assert "the KL estimate needs" in refusal(sampling=sampling, reference="r")
    assert settings(sampling=sampling)


def test_a_reference_is_not_scored_by_the_models_own_servers() -> None:
    own = {"sampling": {"temperature": 1.0}, "reference": "r", "engine": {"name": "server", "urls": ["http://a:1"]}}
    assert "reference needs an engine of its own (reference_engine)" in refusal(**own)
    for engine in ({"name": "hf"}, {"name": "server", "urls": ["http://b:1"]}):
        assert settings(**own, reference_engine=engine)
    assert "`reference_engine.name`" in refusal(reference_engine={"name": "vllm"})


# where results go


def test_results_go_to_the_run_or_to_the_folder_that_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(MODEL, run / "final")
    (run / "run.json").write_text("{}")
    for model in (run, run / "final"):
        assert results_folder(settings(model=str(model), out=None)) == run
        assert plan(settings(model=str(model), out=None)).config.model == str(run / "final")
        assert results_folder(settings(model=str(model), out=str(tmp_path / "o"))) == tmp_path / "o"
    with pytest.raises(UserError, match="is no run of gft train, so results need a folder: name one"):
        results_folder(settings(out=None))
    with pytest.raises(UserError, match="no such model folder"):
        results_folder(settings(model="runs/not-yet/final", out=None))
    shutil.rmtree(run / "final")
    with pytest.raises(UserError, match="is not finished"):
        plan(settings(model=str(run), out=None))


# the plan


def test_a_plan_writes_nothing_and_says_what_there_is_to_do(tmp_path: Path) -> None:
    found = plan(settings(out=str(tmp_path / "new" / "results")))
    (one,) = found.benchmarks
    assert (len(one.questions.prompts), one.num_samples, one.num_drawn, one.result) == (4, 12, 0, None)
    assert not list(tmp_path.iterdir())
    recorded = settings_of(one)
    assert recorded["prompts"]["limit"] == 4 and recorded["k"] == [1, 2] and recorded["seed"] == 0
    assert json.loads(json.dumps(recorded)) == recorded


def test_the_recipe_is_what_is_asked_and_not_where_it_stands(tmp_path: Path) -> None:
    def recipe(config: EvalConfig) -> dict[str, Any]:
        return plan(config).benchmarks[0].recipe

    first = recipe(settings())
    shutil.copy(DEMO / "eval.jsonl", tmp_path / "moved.jsonl")
    shutil.copytree(MODEL, tmp_path / "copy")
    moved = {**SUMS, "path": str(tmp_path / "moved.jsonl"), "data_source": "eval.jsonl"}
    assert recipe(settings(moved, model=str(tmp_path / "copy"), k=[1], out="elsewhere")) == first
    assert recipe(settings(engine={"batch_size": 3}, reward={"name": "numeric", "workers": 2})) == first
    for change in ({"seed": 1}, {"max_tokens": 47}, {"greedy": False}, {"reward": {"name": "exact"}}):
        assert recipe(settings(**change)) != first
    assert recipe(settings({**SUMS, "template": "{question} "})) != first
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    assert recipe(settings(model=str(tmp_path / "copy"))) != first


def test_prompts_that_are_too_long_are_counted_or_an_error(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [{"question": q, "answer": "1"} for q in ("1+2+3=", "11+22+33=", "1+1+1=")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = {"path": str(path), "columns": {"ground_truth": "answer"}, "max_prompt_tokens": 7}
    questions = plan(settings(prompts)).benchmarks[0].questions
    assert (len(questions.prompts), len(questions.ids), questions.too_long) == (2, 2, 1)
    for unforgiving in ({"on_too_long": "error"}, {"max_prompt_tokens": 1}):
        with pytest.raises(UserError, match=r"sums: \d of 3 prompts are longer than prompts.max_prompt_tokens"):
            plan(settings(prompts | unforgiving))


def test_a_reference_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(MODEL, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["3"], vocab["4"] = vocab["4"], vocab["3"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="has another tokenizer"):
        plan(settings(reference=str(other), sampling={"temperature": 1.0}))


def test_missing_things_are_user_errors(tmp_path: Path) -> None:
    for change, said in (
        ({"model": str(tmp_path / "nowhere")}, "no such model folder"),
        ({"prompts": {"path": str(tmp_path / "none.jsonl")}}, "benchmark sums: .*no such prompt file"),
        ({"prompts": {**SUMS, "columns": {"ground_truth": "solution"}}}, "benchmark sums: .*no column `solution`"),
        ({"reward": {"name": "nimeric"}}, "did you mean 'numeric'"),
        ({"max_tokens": 5000}, "benchmark sums: .* tokens, but the longest prompt has"),
        ({"engine": {"device": "cuda:7"}}, "cuda:7"),
    ):
        with pytest.raises(UserError, match=said):
            plan(settings(**change))


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "evals" / "sums"
    folder.mkdir(parents=True)
    (folder / "samples.parquet").write_bytes(b"of a benchmark that was being begun anew")
    assert plan(settings(out=str(tmp_path))).benchmarks[0].num_drawn == 0
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not of gft eval; move it away"):
        plan(settings(out=str(tmp_path)))
