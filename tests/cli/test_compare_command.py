"""`gft compare`: what it prints before, during and after; `gft init`'s config for it; what `gft fetch` reads of it."""

import json
import re
from pathlib import Path

import yaml
from aid.commands import Gft, refused

from gftdata.config import GenerateConfig, load_config, validate_config
from gftdata.generate import generate
from gfttrain.compare_config import CompareConfig, load_compare
from gfttrain.config import EvalConfig, TrainConfig
from gfttrain.fetch import wanted_by

DEMO = Path(__file__).resolve().parents[2] / "samples" / "demo"
PROMPTS = {"columns": {"ground_truth": "answer"}, "limit": 4}


def write_files(folder: Path, data: str) -> None:
    """train.yaml, eval.yaml and compare.yaml for two methods on the demo's model."""
    train = {"model": str(DEMO / "model"), "data": data, "out": "unused", "max_steps": 1, "device": "cpu"}
    (folder / "train.yaml").write_text(yaml.safe_dump(train | {"batch": {"groups_per_step": 4}}))
    names = ("eval", "reversal")
    evaluation = {
        "model": "unused",
        "benchmarks": [{"name": n, "prompts": {"path": str(DEMO / f"{n}.jsonl"), **PROMPTS}} for n in names],
        "reward": {"name": "numeric", "workers": 1},
        "num_samples": 2,
        "max_tokens": 32,
        "engine": {"device": "cpu"},
    }
    (folder / "eval.yaml").write_text(yaml.safe_dump(evaluation))
    compare = {"train": "train.yaml", "eval": "eval.yaml", "out": "runs", "methods": ["SFT", "GFT"]}
    (folder / "compare.yaml").write_text(yaml.safe_dump(compare | {"untrained": ["reversal"]}))


def test_compare(gft: Gft, tmp_path: Path) -> None:
    sums = {"path": str(DEMO / "train.jsonl"), "columns": {"ground_truth": "answer", "expert": "expert"}, "limit": 4}
    settings = {
        "model": str(DEMO / "model"),
        "out": "data",
        "prompts": sums,
        "reward": {"name": "numeric", "workers": 1},
        "responses": {"self": {"count": 3}, "max_tokens": 32},
        "engine": {"device": "cpu"},
    }
    generate(validate_config(GenerateConfig, settings, "test"))
    write_files(tmp_path, "data")
    dry = gft("compare", "compare.yaml", "--dry-run")
    assert dry.code == 0, dry.err
    assert "2 runs, about" in dry.out and "3 of 3" in dry.out and "(nothing was written)" in dry.out
    assert not (tmp_path / "runs").exists()
    assert "runs[v2]/sft" in gft("compare", "compare.yaml", "--dry-run", "--out", "runs[v2]").out

    done = gft("compare", "compare.yaml")
    assert done.code == 0, done.err
    assert re.search(r"1/3 +base +eval \d\.\d{3} +reversal \d\.\d{3}", done.out)
    assert "not trained: what falls is forgotten" in done.out and "One training seed" in done.out
    written = json.loads((tmp_path / "runs" / "comparison.json").read_text())
    table = {row["method"]: {cell["benchmark"]: cell for cell in row["cells"]} for row in written["rows"]}
    lines = {line.split()[0]: line.split()[1] for line in done.out.splitlines() if line.startswith(("base ", "SFT "))}
    for method, shown in lines.items():
        assert shown == f"{table[method]['reversal']['pass_at']['1']['value']:.3f}", "the last table that names it"
    assert "runs/report.html" in done.out
    assert '"label":"gft"' in (tmp_path / "runs" / "report.html").read_text().replace(" ", "")
    assert "0 runs" in gft("compare", "compare.yaml", "--dry-run").out
    assert (tmp_path / "runs" / "sft" / "final").is_dir()

    refused(gft, "compare", "compare.yaml", "--set", "methods=[GFTT]", saying=("GFTT", "GFT w/o DCR"))
    refused(gft, "compare", "compare.yaml", "--set", "train.optim.lr=0.1", saying=("`optim.lr`", "name another"))


def test_the_starter_is_read(gft: Gft, tmp_path: Path) -> None:
    assert gft("init", "mine", "--model", "some/model", "--prompts", "p.jsonl").code == 0
    made = load_compare(tmp_path / "mine" / "compare.yaml")
    train = load_config(TrainConfig, tmp_path / "mine" / "train.yaml")
    evaluation = load_config(EvalConfig, tmp_path / "mine" / "eval.yaml")
    assert (made.model, made.data) == (train.model, train.data)
    assert made.train.model_dump() == train.model_dump(include=type(made.train).model_fields.keys())
    assert made.eval.benchmarks == evaluation.benchmarks
    stated = CompareConfig(model=made.model, data=made.data, out=made.out, eval=made.eval)
    assert (made.objectives, made.seeds, made.untrained) == (stated.objectives, stated.seeds, stated.untrained)


def test_fetch_reads_a_comparison(tmp_path: Path) -> None:
    write_files(tmp_path, "hf://datasets/some/groups")
    file = tmp_path / "compare.yaml"
    file.write_text(file.read_text() + "model: some/model\n")
    assert [(wanted.kind, wanted.name) for wanted in wanted_by([file])] == [
        ("model", "some/model"),
        ("groups", "hf://datasets/some/groups"),
    ]
