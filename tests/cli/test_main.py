"""The command as a user meets it: help without heavy imports, dry runs, and mistakes that end in one line."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from aid.commands import Gft, refused, tree

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "samples" / "demo"


def write_config(path: Path, **changes: object) -> Path:
    """A small generate config; a change's key may be dotted."""
    data: dict[str, object] = {
        "model": str(DEMO / "model"),
        "out": "data",
        "prompts": {
            "path": str(DEMO / "train.jsonl"),
            "columns": {"ground_truth": "answer", "expert": "expert"},
            "limit": 12,
        },
        "reward": {"name": "numeric", "workers": 1},
        "responses": {"self": {"count": 3}, "max_tokens": 48},
    }
    path.write_text(yaml.safe_dump(_changed(data, changes)))
    return path


def write_train_config(path: Path, **changes: object) -> Path:
    data: dict[str, object] = {
        "model": str(DEMO / "model"),
        "data": "data",
        "out": "run",
        "optim": {"lr": 1e-4},
        "batch": {"groups_per_step": 4},
    }
    path.write_text(yaml.safe_dump(_changed(data, changes)))
    return path


def _changed(data: dict[str, object], changes: dict[str, object]) -> dict[str, object]:
    for dotted, value in changes.items():
        *parents, leaf = dotted.split("__")
        block: dict[str, object] = data
        for parent in parents:
            block = block.setdefault(parent, {})  # type: ignore[assignment]
        block[leaf] = value
    return data


@pytest.mark.parametrize("command", [[], ["inspect"]])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['gft', *{command}, '--help']\n"
        "from gftcli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'sglang', 'pyarrow', 'polars'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ("--strict" if command else "generate") in done.stdout


@pytest.mark.parametrize(
    ("words", "given", "expected"),
    [
        (["generate", "--help"], None, "PASSIVE"),
        (["train", "--help"], None, None),
        (["train", "--help"], "PASSIVE", "PASSIVE"),
        (["eval", "--help"], "ACTIVE", "ACTIVE"),
    ],
)
def test_threads_wait_as_is_best_for_the_command(words: list[str], given: str | None, expected: str | None) -> None:
    code = (
        "import os, sys\n"
        f"sys.argv = ['gft', *{words}]\n"
        "from gftcli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"assert os.environ.get('OMP_WAIT_POLICY') == {expected!r}, os.environ.get('OMP_WAIT_POLICY')\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": given} if given else {}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_generate_validate_train_eval(gft: Gft, tmp_path: Path) -> None:
    config = write_config(tmp_path / "generate.yaml")
    planned = gft("generate", config, "--dry-run")
    assert planned.code == 0, planned.err
    assert "12 of 12 rows" in planned.out
    assert not (tmp_path / "data").exists()

    made = gft("generate", config)
    assert made.code == 0, made.err
    assert "expert" in made.out and "self" in made.out
    again = gft("generate", config)
    assert again.code == 0, again.err
    assert gft("validate", "data").code == 0

    training = write_train_config(tmp_path / "train.yaml")
    planned = gft("train", training, "--dry-run")
    assert planned.code == 0, planned.err
    assert "3 of 4 groups" in planned.out
    assert not (tmp_path / "run").exists()
    trained = gft("train", training)
    assert trained.code == 0, trained.err
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()

    evaluation = tmp_path / "eval.yaml"
    prompts = {"path": str(DEMO / "eval.jsonl"), "columns": {"ground_truth": "answer"}, "limit": 4}
    evaluation.write_text(
        yaml.safe_dump(
            {
                "model": "run/final",
                "benchmarks": [{"name": "sums", "prompts": prompts}],
                "reward": {"name": "numeric", "workers": 1},
                "num_samples": 4,
                "k": [1, 4],
                "max_tokens": 48,
            }
        )
    )
    planned = gft("eval", evaluation, "--dry-run")
    assert planned.code == 0, planned.err
    assert planned.out.splitlines()[1].split() == ["sums", "4", "0", "20", "960", "numeric", "0", "samples"]
    assert not (tmp_path / "run" / "evals").exists()
    measured = gft("eval", evaluation)
    assert measured.code == 0, measured.err
    assert "pass@4" in measured.out
    (line,) = (tmp_path / "run" / "evals.jsonl").read_text().splitlines()
    result = json.loads(line)
    assert result["prompts"] == 4
    assert 0.0 <= result["pass_at"]["1"]["value"] <= result["pass_at"]["4"]["value"] <= 1.0
    base = gft("eval", evaluation, "--model", DEMO / "model", "--out", "base", "--against", "run")
    assert base.code == 0, base.err
    assert [line.split()[:2] for line in base.out.splitlines() if line.startswith("sums ")][1:] == [
        ["sums", "pass@1"],
        ["sums", "greedy"],
    ]
    again = gft("eval", evaluation, "--dry-run")
    assert again.out.splitlines()[1].split()[-2:] == ["numeric", "finished"]
    assert "sums: already there" in gft("eval", evaluation).out
    assert (tmp_path / "run" / "evals.jsonl").read_text().splitlines() == [line]
    otherwise = gft("eval", evaluation, "--dry-run", "--set", "seed=7")
    assert "sums begins anew, and the samples there go: `seed` was 0 and is now 7" in otherwise.out

    shard = next((tmp_path / "data" / "data").glob("*.parquet"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    damaged = gft("validate", "data")
    assert damaged.code == 1
    assert shard.name in damaged.out and "sha256" in damaged.out


def test_a_pilot_measures_and_keeps_nothing(gft: Gft, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml")
    before = tree(tmp_path)
    refused(gft, "generate", config, "--pilot", "3", saying=("--dry-run",))
    measured = gft("generate", config, "--dry-run", "--pilot", "3")
    assert measured.code == 0, measured.err
    assert tree(tmp_path) == before
    whole = gft("generate", config)
    assert whole.code == 0, whole.err
    summary = json.loads((tmp_path / "data" / "manifest.json").read_text())["summary"]
    expected = int(re.search(r"expected +([\d,]+) response tokens", measured.out)[1].replace(",", ""))  # type: ignore[index]
    assert 0.5 < expected / summary["response_tokens"] < 2.0
    assert "3 groups" in measured.out and "% of the groups" in measured.out


def test_experts_that_fail_the_reward_are_pointed_out(gft: Gft, tmp_path: Path) -> None:
    rows = [{"question": "1+2+3=", "answer": a, "expert": "6"} for a in ("6", "7", "6", "8")]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = gft("generate", write_config(tmp_path / "c.yaml", prompts__path="p.jsonl"))
    assert made.code == 0, made.err
    assert "note: 2 of 4 judged expert responses" in made.out
    good = gft("generate", write_config(tmp_path / "d.yaml", out="good"))
    assert good.code == 0 and "note:" not in good.out


def test_missing_config_file(gft: Gft) -> None:
    refused(gft, "generate", "nothing.yaml", saying=("nothing.yaml", "gft init"))


def test_missing_prompt_file(gft: Gft, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", prompts__path="nothing.jsonl")
    refused(gft, "generate", config, saying=("nothing.jsonl", "prompts.path"))
    refused(gft, "generate", config, "--dry-run", saying=("nothing.jsonl",))


def test_unknown_key_names_the_nearest(gft: Gft, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", responses__max_token=48)
    refused(gft, "generate", config, saying=("`responses.max_token`", "`max_tokens`"))
    config = write_config(tmp_path / "c.yaml")
    refused(gft, "generate", config, "--set", "reward.nme=math", saying=("`reward.nme`", "`name`"))
    training = write_train_config(tmp_path / "t.yaml", optim__learning_rate=1e-6)
    refused(gft, "train", training, saying=("`optim.learning_rate`",))


def test_missing_column_names_those_there_are(gft: Gft, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", prompts__columns__ground_truth="solution")
    refused(gft, "generate", config, saying=("row 1", "`solution`", "question, answer, expert"))


def test_empty_prompt_file(gft: Gft, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    config = write_config(tmp_path / "c.yaml", prompts__path="empty.jsonl")
    refused(gft, "generate", config, saying=("empty.jsonl", "no prompts"))


def test_prompt_over_the_limit_by_policy(gft: Gft, tmp_path: Path) -> None:
    rows = [{"question": q, "answer": "3", "expert": "3"} for q in ("1+2=", "10000+20000+30000=", "2+1=")]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = write_config(tmp_path / "c.yaml", prompts__path="p.jsonl", prompts__max_prompt_tokens=8)
    refused(gft, "generate", config, "--set", "prompts.on_too_long=error", saying=("prompt 2", "18 tokens", "=8"))
    skipped = gft("generate", config)
    assert skipped.code == 0, skipped.err
    assert "1 prompts too long" in skipped.out
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert manifest["prompts"]["prompts"] == 2
    assert manifest["prompts"]["prompts_too_long"] == 1
    short = write_config(tmp_path / "d.yaml", prompts__path="p.jsonl", prompts__max_prompt_tokens=2, out="other")
    refused(gft, "generate", short, saying=("no prompt is left of 3",))


def test_output_folder_of_something_else(gft: Gft, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.tex").write_text("years of work")
    config = write_config(tmp_path / "c.yaml")
    refused(gft, "generate", config, saying=("data", "not empty"))


def test_tokenizer_of_another_model_and_run_folder_of_something_else(gft: Gft, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert gft("generate", write_config(tmp_path / "c.yaml")).code == 0
    other = tmp_path / "other"
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    tokenizer.add_tokens(["x"])
    tokenizer.save_pretrained(other)
    AutoModelForCausalLM.from_pretrained(DEMO / "model").save_pretrained(other)
    refused(gft, "train", write_train_config(tmp_path / "t.yaml", model="other"), saying=("tokenizer", "other"))

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    refused(gft, "train", write_train_config(tmp_path / "t.yaml"), saying=("run", "not empty"))


def test_data_of_an_unfinished_or_missing_run(gft: Gft, tmp_path: Path) -> None:
    refused(gft, "train", write_train_config(tmp_path / "t.yaml", data="nowhere"), saying=("nowhere",))
    (tmp_path / "data" / ".work").mkdir(parents=True)
    refused(gft, "train", write_train_config(tmp_path / "t.yaml"), saying=("unfinished", "the command that makes it"))
    refused(gft, "validate", "data", saying=("unfinished",))


def test_group_without_judged_responses(gft: Gft, tmp_path: Path) -> None:
    rows = [{"question": "1+2+3=", "answer": a, "expert": "6"} for a in ("6", "6", None)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = write_config(tmp_path / "c.yaml", prompts__path="p.jsonl")
    refused(gft, "generate", config, saying=("row 3", "no ground truth", "on_missing_ground_truth=keep"))
    assert gft("generate", config, "--set", "prompts.on_missing_ground_truth=keep").code == 0
    training = write_train_config(tmp_path / "t.yaml", objective__advantage="one")
    refused(gft, "train", training, saying=("1 of 3 groups", "unjudged_groups=skip"))
    assert gft("train", training, "--set", "unjudged_groups=skip").code == 0


def test_tasks_their_status_and_the_end(gft: Gft, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", shards__groups_per_shard=1)
    refused(gft, "status", "data", saying=("data", "not begun yet"))
    refused(gft, "finalize", "data", saying=("data", "not begun yet"))
    refused(gft, "generate", config, "--task", "2/2", saying=("--task 2/2", "counted from 0"))
    assert "are for task 1 of 2" in gft("generate", config, "--task", "1/2", "--dry-run").out
    made = gft("generate", config, "--task", "1/2")
    assert made.code == 0
    assert "task 1 of 2 is done; other tasks' shards are missing still" in made.out
    status = gft("status", "data")
    assert status.code == 0
    assert "nobody is at work; the command that makes it, given again, continues" in status.out
    assert re.search(r"^1/2 +done ", status.out, re.MULTILINE)
    found = json.loads(gft("status", "data", "--json").out)
    assert found["shards_done"] == found["shards"] // 2 and found["shards_missing"] > 0 and not found["final"]
    assert found["latest"][0]["attempt"]["task"] == 1
    before = tree(tmp_path)
    assert gft("finalize", "data").code == 2
    assert tree(tmp_path) == before
    assert gft("generate", config, "--task", "0/2").code == 0
    assert "finished" in gft("status", "data").out
    assert "shards, " in gft("finalize", "data").out
    assert gft("validate", "data").code == 0


def test_misspelt_reward_and_bad_model(gft: Gft, tmp_path: Path) -> None:
    refused(gft, "generate", write_config(tmp_path / "c.yaml", reward__name="numerik"), saying=("numeric",))
    refused(gft, "generate", write_config(tmp_path / "c.yaml", model="./no-model"), saying=("no-model",))
    (tmp_path / "empty-model").mkdir()
    refused(gft, "generate", write_config(tmp_path / "c.yaml", model="empty-model"), saying=("config.json",))


def test_another_config_for_the_same_output(gft: Gft, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml")
    assert gft("generate", config).code == 0
    refused(gft, "generate", config, "--set", "seed=1", saying=("`seed` was 0 and is now 1",))
    assert gft("generate", config, "--set", "engine.batch_size=2").code == 0


def test_init_writes_configs_that_load_and_state_the_defaults(gft: Gft, tmp_path: Path) -> None:
    from gftdata.config import GenerateConfig, load_config
    from gfttrain.config import EvalConfig, TrainConfig

    written = gft("init", "mine", "--model", "some/model", "--prompts", "p.jsonl")
    assert written.code == 0, written.err
    made = load_config(GenerateConfig, tmp_path / "mine" / "generate.yaml")
    yours = {"prompts": made.prompts.model_dump(include={"path", "columns", "template"}), "model": "some/model"}
    assert made == GenerateConfig(**yours, out="runs/data")
    trained = load_config(TrainConfig, tmp_path / "mine" / "train.yaml")
    assert trained == TrainConfig(model="some/model", data=("runs/data",), out="runs/train")
    measured = load_config(EvalConfig, tmp_path / "mine" / "eval.yaml")
    (mine,) = measured.benchmarks
    stated = {"name": "mine", "prompts": mine.prompts.model_dump(include={"path", "columns", "template"})}
    assert measured == EvalConfig(model="runs/train/final", benchmarks=[{**stated, "k": [1, 16]}], k=(1, 16))
    assert mine.ks == EvalConfig(model="m", benchmarks=[stated]).benchmarks[0].ks
    refused(gft, "init", "mine", saying=("generate.yaml", "not overwritten"))
    text = (tmp_path / "mine" / "eval.yaml").read_text()
    (tmp_path / "mine" / "eval.yaml").unlink()  # as if it had been cut off
    refused(gft, "init", "mine", "--model", "other/model", saying=("generate.yaml", "not overwritten"))
    assert gft("init", "mine", "--model", "some/model", "--prompts", "p.jsonl").code == 0
    assert (tmp_path / "mine" / "eval.yaml").read_text() == text


def test_an_error_of_the_system_is_one_line(gft: Gft) -> None:
    config = write_config(Path("generate.yaml"))
    refused(gft, "generate", config, "--out", "x" * 300, saying=("x" * 300, "File name too long", "kept"))


def test_eval_finds_mistakes_before_it_samples_and_overwrites_nothing_of_yours(gft: Gft, tmp_path: Path) -> None:
    config = tmp_path / "eval.yaml"
    settings = {
        "model": str(DEMO / "model"),
        "benchmarks": [
            {
                "name": "sums",
                "prompts": {"path": str(DEMO / "eval.jsonl"), "columns": {"ground_truth": "answer"}, "limit": 2},
            }
        ],
        "reward": {"name": "numeric", "workers": 1},
        "num_samples": 1,
        "sampling": {"temperature": 1.0},
        "max_tokens": 48,
    }
    config.write_text(yaml.safe_dump(settings))
    (tmp_path / "folder" / "evals" / "sums").mkdir(parents=True)
    (tmp_path / "folder" / "evals" / "sums" / "mine.txt").write_text("mine")
    (tmp_path / "prompts.jsonl").write_text('{"mine": 1}\n')
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "evals.jsonl").write_text('{"mine": 1}\n')
    refused(gft, "eval", config, saying=("no run of gft train", "--out"))
    refused(gft, "eval", config, "--out", "folder", saying=("evals/sums", "not of gft eval"))
    refused(gft, "eval", config, "--out", "prompts.jsonl", saying=("prompts.jsonl is a file",))
    refused(gft, "eval", config, "--out", "other", saying=("evals.jsonl, line 1", "no result of gft eval"))
    refused(gft, "eval", config, "--out", "s3://bucket/evals", saying=("a folder",))
    refused(gft, "eval", config, "--out", "new", "--set", "reference=./no-model", saying=("no-model",))
    refused(gft, "eval", config, "--out", "new", "--against", "other", saying=("evals.jsonl, line 1",))
    refused(gft, "eval", config, "--out", "new", "--against", "nowhere", saying=("nowhere: has no results",))
    refused(gft, "eval", config, "--out", "new", "--set", "max_tokens=5000", saying=("benchmark sums", "max_tokens"))
    assert gft("eval", config, "--out", "2026").code == 0, "a name that YAML would read as a number"
    assert json.loads((tmp_path / "2026" / "evals.jsonl").read_text())["benchmark"] == "sums"


def test_a_dry_run_finds_a_missing_device_or_engine(gft: Gft, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml")
    refused(gft, "generate", config, "--dry-run", "--set", "engine.device=cuda:7", saying=("cuda:7",))
    bare = "engine={name: sglang, python: no-such-python}"
    refused(gft, "generate", config, "--dry-run", "--set", bare, saying=("no-such-python", "engine.python"))


def test_weights_that_cannot_be_loaded_leave_nothing_behind(gft: Gft, tmp_path: Path) -> None:
    shutil.copytree(DEMO / "model", tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    config = write_config(tmp_path / "c.yaml", model="m")
    refused(gft, "generate", config, saying=("m: cannot load this model",))
    shutil.copy(DEMO / "model" / "model.safetensors", tmp_path / "m" / "model.safetensors")
    assert gft("generate", config).code == 0


def test_a_run_that_fails_early_takes_back_only_its_own(
    gft: Gft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gftdata import generate as generation
    from gftdata.errors import UserError

    def another_run_begins(*_: object) -> None:
        (tmp_path / "runs" / "other").mkdir()
        (tmp_path / "runs" / "other" / "data").write_text("days of work")
        raise UserError("this one fails")

    monkeypatch.setattr(generation, "open_engine", another_run_begins)
    failed = gft("generate", write_config(tmp_path / "c.yaml", out="runs/mine"))
    assert failed.code == 2 and "this one fails" in failed.err
    assert sorted(tree(tmp_path / "runs")) == ["other", "other/data"]
