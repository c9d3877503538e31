"""samples/paper as it stands: every config is read, and run dry with a tiny model and tiny files in its places."""

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from gftcli.main import app
from gftdata.config import GenerateConfig, load_config
from gftdata.imports import INSTRUCTION
from gfttrain.compare_config import load_compare
from gfttrain.config import EvalConfig, TrainConfig

ROOT = Path(__file__).resolve().parents[2]
PAPER, DEMO = ROOT / "samples" / "paper", ROOT / "samples" / "demo"
HF = ["--set", "eval.engine={name: hf, device: cpu}", "--set", "train.device=cpu"]


@pytest.fixture(scope="module")
def benchmarks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("paper_benchmarks", PAPER / "benchmarks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ROWS = {
    "amc23": ({"id": 0, "question": "1+1=", "answer": "2.0", "url": ""}, "1+1=", "2.0"),
    "math500": ({"problem": "1+1=", "solution": "...", "answer": "2", "level": 1}, "1+1=", "2"),
    "olympiad": ({"question": "1+1=", "final_answer": ["2", "3"], "context": None}, "1+1=", "2, 3"),
    "minerva": ({"question": "1+1=", "answer": "2"}, "1+1=", "2"),
    "mawps": ({"question": "1+1=", "result": "2", "result_float": 2.0}, "1+1=", "2.0"),
    "svamp": ({"Body": "One and one ", "Question": "are?", "Answer": "2.0"}, "One and one are?", "2.0"),
    "mmlu_stem": ({"question": "1+1=", "choices": ["3", "2"], "answer": 1}, "1+1=\n(A) 3\n(B) 2", "B"),
}


def test_a_line_of_each_benchmark(benchmarks: ModuleType, tmp_path: Path) -> None:
    assert set(benchmarks.BENCHMARKS) == set(ROWS)
    for name, (row, question, answer) in ROWS.items():
        path = benchmarks.write(name, [row], tmp_path)
        assert json.loads(path.read_text()) == {"question": f"{question} {INSTRUCTION}", "answer": answer}
    with pytest.raises(KeyError, match="math500: its rows have no column 'answer'"):
        benchmarks.write("math500", [{"problem": ""}], tmp_path)


def test_every_config_is_read_and_says_what_the_paper_says() -> None:
    groups, single = (load_config(GenerateConfig, PAPER / f"{name}.yaml") for name in ("generate", "generate-single"))
    assert [source.count for source in (groups.responses.expert, *groups.responses.teachers)] == [1, 3]
    assert groups.responses.own.count == 4 and groups.prompts.limit == 10_000
    assert groups.prompts.max_prompt_tokens == 1024 and groups.responses.max_tokens == 2048
    assert single.responses.size == 1 and single.prompts.limit == 100_000
    train = load_config(TrainConfig, PAPER / "train.yaml")
    assert (train.optim.lr, train.batch.groups_per_step, train.epochs, train.objective.tau) == (1e-6, 64, 1, 0.7)
    for name in ("eval", "diversity", "kl"):
        load_config(EvalConfig, PAPER / f"{name}.yaml")
    evaluated = load_config(EvalConfig, PAPER / "eval.yaml")
    assert {b.num_samples for b in evaluated.benchmarks} == {16} and evaluated.sampling.temperature == 0.5
    for name, methods in (("compare", 10), ("compare-single", 3)):
        assert len(load_compare(PAPER / f"{name}.yaml").methods) == methods


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the paper's files in small: 8 prompts of sums in the authors' layout, benchmarks of two."""
    folder = tmp_path_factory.mktemp("paper")
    rows = [json.loads(line) for line in (DEMO / "train.jsonl").read_text().splitlines()[:8]]
    published = [
        {
            "data_source": "numina_cot",
            "prompt": [{"role": "user", "content": row["question"]}],
            "reward_model": {"style": "rule", "ground_truth": row["answer"]},
            "extra_info": {"index": n, "answer": row["expert"], "model_answer": [row["answer"]] * 8},
        }
        for n, row in enumerate(rows)
    ]
    pq.write_table(pa.Table.from_pylist(published), folder / "numina.parquet")
    places = folder / "runs/paper/benchmarks"
    places.mkdir(parents=True)
    for name in ROWS:
        answer = "B" if name == "mmlu_stem" else "2"
        (places / f"{name}.jsonl").write_text(json.dumps({"question": "1+1=", "answer": answer}) + "\n")
    (folder / "samples").symlink_to(ROOT / "samples")
    shutil.copytree(DEMO / "model", folder / "model")
    shape = json.loads((folder / "model/config.json").read_text())
    (folder / "model/config.json").write_text(json.dumps({**shape, "max_position_embeddings": 8192}))
    return folder


def gft(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_from_the_authors_file_to_the_comparison_dry(paper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(paper)
    model = ["--model", "model"]
    gft("import", "authors", "numina.parquet", "--out", "runs/paper/prompts", *model)
    small = [*model, "--set", "engine={name: hf, device: cpu}", "--set", "reward.workers=1"]
    for name in ("generate", "generate-single"):
        assert "nothing was written" in gft("generate", f"samples/paper/{name}.yaml", *small, "--dry-run")
    gft("generate", "samples/paper/generate.yaml", *small, "--set", "responses.max_tokens=32")
    shown = gft("compare", "samples/paper/compare.yaml", *model, *HF, "--dry-run")
    assert "GFT tau 0.9" in shown and "14 runs" in shown and "olympiad" in shown
    for name in ("eval", "diversity", "kl"):
        reference = ["--set", "reference=model"] if name == "kl" else []
        out = ["--out", f"runs/{name}", *model, "--set", "engine={name: hf, device: cpu}"]
        assert "nothing was written" in gft("eval", f"samples/paper/{name}.yaml", *out, *reference, "--dry-run")
    assert not (paper / "runs/paper/qwen2.5-math-1.5b").exists()


def test_the_script_of_the_composition(paper: Path, tmp_path: Path) -> None:
    """The commands it gives, by a `gft` that writes them down; each generation's settings are read as they are."""
    written = tmp_path / "commands"
    stub = tmp_path / "bin" / "gft"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\nprintf "%s\\037" "$@" >> {written}\necho >> {written}\n')
    stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{stub.parent}:{os.environ['PATH']}"}
    subprocess.run(["sh", PAPER / "composition.sh", "--nproc", "8"], env=environment, check=True)
    commands = [line.split("\x1f")[:-1] for line in written.read_text().splitlines()]
    assert [command[0] for command in commands] == ["generate", "compare"] * 5 + ["report"]
    sizes = []
    for command in commands[:-1:2]:
        overrides = [command[i + 1] for i, word in enumerate(command) if word == "--set"]
        made = load_config(GenerateConfig, ROOT / command[1], overrides).responses
        given = made.expert.count + sum(teacher.count for teacher in made.teachers)
        assert made.size == 8 and command[command.index("--out") + 1].endswith(f"{given}-{made.own.count}/groups")
        sizes.append((given, made.own.count))
    assert sizes == [(8, 0), (6, 2), (4, 4), (2, 6), (0, 8)]
    for command in commands[1:-1:2]:
        overrides = [command[i + 1] for i, word in enumerate(command) if word == "--set"]
        made_of = load_compare(ROOT / command[1], overrides)
        assert made_of.methods == ("GFT",) and made_of.objectives == {} and command[-2:] == ["--nproc", "8"]
