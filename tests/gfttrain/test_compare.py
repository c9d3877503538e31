"""A comparison trains and evaluates each method, once, whatever interrupts it; what its settings may be."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_helpers import DEMO, MODEL

from gftdata.config import validate_config
from gftdata.errors import UserError
from gfttrain import compare as comparing
from gfttrain.compare import Listeners, compare, plan
from gfttrain.compare_config import CompareConfig, Run, load_compare, runs
from gfttrain.comparison import tabulate, write_comparison
from gfttrain.config import ObjectiveConfig, TrainConfig
from gfttrain.presets import METHODS
from gfttrain.results import read_results
from gfttrain.train import Event

TRAIN = {
    "optim": {"lr": 1e-3},
    "batch": {"groups_per_step": 8, "micro_batch_tokens": 1024},
    "max_steps": 2,
    "device": "cpu",
}
PROMPTS = {"columns": {"ground_truth": "answer"}, "limit": 6}
EVAL = {
    "benchmarks": [
        {"name": "sums", "prompts": {"path": str(DEMO / "eval.jsonl"), **PROMPTS}},
        {"name": "subtraction", "prompts": {"path": str(DEMO / "subtraction.jsonl"), **PROMPTS}, "num_samples": 1},
    ],
    "reward": {"name": "numeric", "workers": 1},
    "num_samples": 2,
    "greedy": False,
    "max_tokens": 32,
    "engine": {"device": "cpu"},
}


def settings(data: Path | str, out: Path | str, **overrides: Any) -> dict[str, Any]:
    return {
        "model": str(MODEL),
        "data": str(data),
        "out": str(out),
        "methods": ["SFT", "GFT w/o DCR"],
        "train": TRAIN,
        "eval": EVAL,
        "untrained": ["subtraction"],
        **overrides,
    }


def config(data: Path | str, out: Path | str, **overrides: Any) -> CompareConfig:
    return validate_config(CompareConfig, settings(data, out, **overrides), "test")


# settings


def test_runs_differ_in_objective_and_seed_only() -> None:
    made = config("data", "out", objectives={"GFT tau 0.1": {"tau": 0.1}}, seeds=[0, 3])
    base, *trained = runs(made)
    assert (base.method, base.seed, base.training) == ("base", None, None)
    assert base.evaluation.model == str(MODEL) and base.folder == Path("out/base")
    names = ["sft", "sft-seed-3", "gft-wo-dcr", "gft-wo-dcr-seed-3", "gft-tau-0.1", "gft-tau-0.1-seed-3"]
    assert [run.folder for run in trained] == [Path("out") / name for name in names]
    objectives = [METHODS["SFT"], METHODS["GFT w/o DCR"], ObjectiveConfig(tau=0.1)]
    for run, objective, seed in zip(trained, [o for o in objectives for _ in range(2)], [0, 3] * 3, strict=True):
        plain = {"model": str(MODEL), "data": "data", "out": str(run.folder), "objective": objective, "seed": seed}
        assert run.training == TrainConfig(**plain, **TRAIN)
        assert run.evaluation.model == run.evaluation.out == str(run.folder)
        assert run.evaluation.benchmarks == base.evaluation.benchmarks


def test_another_seed_later_leaves_the_first_where_it_is() -> None:
    one, three = (runs(config("data", "out", seeds=seeds)) for seeds in ([0], [0, 1, 2]))
    assert {run.folder for run in one} < {run.folder for run in three}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"methods": ["SFT", "GFTT"]}, "found GFTT"),
        ({"methods": []}, "nothing to train"),
        ({"objectives": {"sft": {}}}, "share a folder: sft"),
        ({"objectives": {"base": {}}}, "share a folder: base"),
        ({"objectives": {"SFT seed 1": {}}, "seeds": [0, 1]}, "share a folder: sft-seed-1"),
        ({"objectives": {"../x": {}}}, "found ../x"),
        ({"seeds": [1, 1]}, "same seed twice"),
        ({"seeds": []}, "`seeds`"),
        ({"untrained": ["reversal"]}, "no benchmark is named reversal"),
        ({"eval": {**EVAL, "engine": {"name": "server", "urls": ["http://x"]}}}, "a server serves one model"),
        ({"train": {**TRAIN, "objective": {"tau": 1}}}, "unknown key `train.objective`"),
    ],
)
def test_what_is_refused(overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        config("data", "out", **overrides)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_blocks_may_be_the_files_of_gft_train_and_gft_eval(tmp_path: Path) -> None:
    named = {"model": "m", "data": ["d"], "out": "elsewhere", "objective": {"tau": 0.1}, "seed": 7}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({**named, **TRAIN}))
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump({"model": "m", "out": "elsewhere", **EVAL}))
    file = tmp_path / "compare.yaml"
    file.write_text(yaml.safe_dump({"train": "train.yaml", "eval": "eval.yaml", "out": "o", "untrained": ["sums"]}))
    made = load_compare(file, ["train.optim.lr=0.5"], {"out": "other"})
    expected = config("d", "other", model="m", methods=list(METHODS), untrained=["sums"])
    assert made.train.optim.lr == 0.5
    train = made.train.model_copy(update={"optim": expected.train.optim})
    assert made.model_copy(update={"train": train}) == expected
    file.write_text(yaml.safe_dump({"train": "no.yaml", "eval": "eval.yaml", "out": "o"}))
    with pytest.raises(UserError, match=r"no\.yaml: no such config file"):
        load_compare(file)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({**named, "epoch": 2}))
    file.write_text(yaml.safe_dump({"train": "train.yaml", "eval": "eval.yaml", "out": "o"}))
    with pytest.raises(UserError, match=r"unknown key `train\.epoch`; did you mean `epochs`"):
        load_compare(file)


# the whole


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> CompareConfig:
    made = config(data, tmp_path_factory.mktemp("compare") / "runs")
    begun: list[tuple[str, str]] = []

    def begin(run: Run, what: str) -> None:
        begun.append((run.method, what))

    outcomes = list(compare(made, Listeners(on_begin=begin)))
    trained = [(method, what) for method in made.methods for what in ("training", "evaluation")]
    assert begun == [("base", "evaluation"), *trained]
    assert [outcome.run for outcome in outcomes] == runs(made)
    for outcome in outcomes:
        assert {outcome.of} == {len(outcomes)}
        assert read_results(outcome.run.folder) == outcome.results
        model = MODEL if outcome.run.training is None else outcome.run.folder / "final"
        assert {Path(result.model) for result in outcome.results.values()} == {model}
        assert math.isfinite(outcome.results["sums"].pass_at[1].value)
    return made


def test_what_is_finished_is_not_done_again(finished: CompareConfig) -> None:
    before = {path: path.read_bytes() for path in Path(finished.out).rglob("*") if path.is_file()}
    steps: list[Event] = []
    assert len(list(compare(finished, Listeners(on_train=steps.append)))) == 3
    assert not steps
    assert {path: path.read_bytes() for path in Path(finished.out).rglob("*") if path.is_file()} == before


def test_a_lost_run_is_trained_again_to_the_same_results(finished: CompareConfig, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    shutil.copytree(finished.out, out)
    shutil.rmtree(out / "sft")
    again = finished.model_copy(update={"out": str(out)})
    for outcome in compare(again):
        expected = read_results(Path(finished.out) / outcome.run.folder.name)
        for name, result in outcome.results.items():
            assert result.pass_at == expected[name].pass_at


def test_a_plan_says_what_is_left_and_writes_nothing(finished: CompareConfig, data: Path, tmp_path: Path) -> None:
    base, *trained = plan(finished)
    assert base.evaluation is not None and all(one.result for one in base.evaluation.benchmarks)
    assert all(one.prepared and one.prepared.finished and one.forecast is None for one in trained)
    base, *trained = plan(config(data, tmp_path / "new"))
    assert base.evaluation is not None and not any(one.result for one in base.evaluation.benchmarks)
    assert all(one.forecast and one.forecast.seconds > 0 and one.evaluation is None for one in trained)
    assert len({one.forecast.gemm_flops_per_second for one in trained if one.forecast}) == 1, "measured once"
    assert not (tmp_path / "new").exists()


def test_a_mistake_in_the_last_run_shows_before_the_first_begins(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any) -> None:
        raise AssertionError("nothing may begin")

    monkeypatch.setattr(comparing.training, "train", never)
    monkeypatch.setattr(comparing.evaluation, "evaluate", never)
    made = config(data, tmp_path / "runs", objectives={"nobody": {"sources": ["teacher:nobody"]}})
    with pytest.raises(UserError, match="teacher:nobody"):
        list(compare(made))
    assert not (tmp_path / "runs" / "sft").exists()


def test_two_at_once_in_one_folder_are_refused(finished: CompareConfig) -> None:
    first = compare(finished)
    next(first)
    with pytest.raises(UserError, match="another gft compare is writing there"):
        next(compare(finished))
    first.close()
    next(compare(finished))


def test_several_processes_train_by_the_command(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be started is a `gft train` config that says the same; the processes themselves are test_ranks'."""
    started: list[TrainConfig] = []

    def launch(nproc: int, command: list[str]) -> int:
        from gftdata.config import load_config

        assert nproc == 2 and command[-2] == "train"
        started.append(load_config(TrainConfig, command[-1]))
        comparing.training.train(started[-1])
        return 0

    monkeypatch.setattr(comparing, "launch", launch)
    made = config(data, tmp_path / "runs", methods=["GFT"])
    assert len(list(compare(made, nproc=2))) == 2
    assert started == [run.training for run in runs(made) if run.training is not None]
    monkeypatch.setattr(comparing, "launch", lambda nproc, command: 75)
    with pytest.raises(comparing.training.Stopped, match="the same command continues"):
        list(compare(config(data, tmp_path / "runs", methods=["RFT"]), nproc=2))


def test_a_method_that_diverges_costs_the_others_nothing(data: Path, tmp_path: Path) -> None:
    mad = {"optim": {"lr": 1e30}, "batch": TRAIN["batch"], "max_steps": 4, "device": "cpu"}
    made = config(data, tmp_path / "runs", methods=["SFT", "GFT"], train=mad)
    base, *trained = compare(made)
    assert base.results and not base.diverged
    for outcome in trained:
        assert not outcome.results and "nothing was updated" in outcome.diverged
    assert [len(row.cells) for row in tabulate(made)] == [2, 0, 0]
    written = comparing.write_report(made)
    assert written.runs == 3 and written.path == tmp_path / "runs" / "report.html"


# the table


def test_the_table_is_what_the_folders_hold(finished: CompareConfig) -> None:
    rows = tabulate(finished)
    assert [row.method for row in rows] == ["base", "SFT", "GFT w/o DCR"]
    for row in rows:
        assert [(cell.benchmark, cell.forgets) for cell in row.cells] == [("sums", False), ("subtraction", True)]
        results = read_results(Path(row.folders[0]))
        for cell in row.cells:
            assert cell.pass_at == results[cell.benchmark].pass_at
            if row.method == "base":
                assert cell.change is None and cell.p is None
            else:
                base = read_results(Path(finished.out) / "base")[cell.benchmark].pass_at[1].value
                assert cell.change is not None and cell.p is not None
                assert cell.change.value == pytest.approx(cell.pass_at[1].value - base, abs=1e-12)
                assert 0 <= cell.p <= 1
    written = json.loads(write_comparison(finished, rows).read_text())
    assert CompareConfig.model_validate(written["config"]) == finished
    assert [row["method"] for row in written["rows"]] == [row.method for row in rows]
