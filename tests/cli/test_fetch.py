"""`gft fetch` from a Hub on this machine, and the commands without it afterwards."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from aid.download_hub import DownloadHub

from gftdata.config import GenerateConfig, load_config
from gftdata.generate import generate
from gftdata.shards import verify

SMALL = {"reward": {"name": "numeric", "workers": 1}}
COLUMNS = {"ground_truth": "answer", "expert": "expert"}


@pytest.fixture
def hub(tmp_path: Path, demo: Path) -> Iterator[DownloadHub]:
    """org/tiny (with weights in other formats too), org/teacher, org/sums (prompts), org/held (an evaluation set)."""
    root = tmp_path / "hub"
    for name in ("tiny", "teacher"):
        shutil.copytree(demo / "model", root / "models" / "org" / name)
    for name in ("pytorch_model.bin", "original/consolidated.safetensors", "tiny.gguf"):
        path = root / "models" / "org" / "tiny" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"not to be fetched")
    for name, rows in (("sums", "train"), ("held", "eval")):
        folder = root / "datasets" / "org" / name
        folder.mkdir(parents=True)
        shutil.copy(demo / f"{rows}.jsonl", folder / ("test.jsonl" if name == "held" else "train.jsonl"))
    hub = DownloadHub(root)
    yield hub
    hub.stop()


def gft(hub: DownloadHub, home: Path, *words: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: the endpoint is read when huggingface_hub is imported."""
    environment = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_ENDPOINT": "http://127.0.0.1:9" if offline else hub.url,
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
    }
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_TOKEN"):
        environment.pop(name, None)
    command = [sys.executable, "-W", "ignore", "-m", "gftcli.main", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def write(path: Path, settings: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(settings))
    return str(path)


@pytest.fixture
def configs(tmp_path: Path) -> list[str]:
    data, run = str(tmp_path / "data"), str(tmp_path / "run")
    ask = {"name": "far", "model": "org/nowhere", "count": 1, "engine": {"name": "openai"}}
    given = {
        "model": "org/tiny",
        "out": data,
        "prompts": {"dataset": "org/sums", "columns": COLUMNS, "limit": 4},
        "decontaminate": [{"dataset": "org/held"}],
        "responses": {"self": {"count": 2}, "max_tokens": 32, "teachers": [ask]},
        "engine": {"device": "cpu"},
    }
    held = {"dataset": "org/held", "split": "test", "columns": {"ground_truth": "answer"}, "limit": 2}
    test = {"name": "held", "prompts": held}
    sizes = {"num_samples": 2, "k": [1], "max_tokens": 16, "engine": {"device": "cpu"}}
    skip = {"unjudged_groups": "skip"}
    return [
        write(tmp_path / "generate.yaml", {**SMALL, **given}),
        write(tmp_path / "train.yaml", {"model": "org/tiny", "data": data, "out": run, "device": "cpu", **skip}),
        write(tmp_path / "eval.yaml", {**SMALL, **sizes, "model": f"{run}/final", "benchmarks": [test]}),
    ]


def test_fetch_and_then_work_without_a_network(
    hub: DownloadHub, configs: list[str], tmp_path: Path, demo: Path
) -> None:
    home = tmp_path / "home"
    dry = gft(hub, home, "fetch", *configs, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    listed = [line.split() for line in dry.stdout.splitlines()[1:]]
    assert [words[0] for words in listed] == ["org/tiny", "org/sums", "org/held", "all"]  # each once
    assert not list(home.rglob("*.safetensors")) and not list(home.rglob("*.arrow"))
    weights = (demo / "model" / "model.safetensors").stat().st_size
    assert float(listed[0][2]) == pytest.approx(weights / 1e9, abs=2e-3) and listed[-1][-1] != "0.000"

    done = gft(hub, home, "fetch", *configs)
    assert done.returncode == 0, done.stderr
    assert "export HF_HUB_OFFLINE=1" in done.stdout
    fetched = {path.name for path in (home / "hub" / "models--org--tiny").rglob("*") if not path.is_dir()}
    assert "model.safetensors" in fetched and not {"pytorch_model.bin", "consolidated.safetensors"} & fetched
    asked = len(hub.asked)
    commands = (["generate", configs[0], "--set", "responses.teachers=[]"], ["train", configs[1]], ["eval", configs[2]])
    for words in commands:
        ran = gft(hub, home, *words, offline=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr
    assert verify(tmp_path / "data") == [] and len(hub.asked) == asked

    again = gft(hub, home, "fetch", *configs, "--dry-run")
    assert again.stdout.splitlines()[-1].split()[-1] == "0.000"


def test_only_a_tokenizer_is_fetched_of_a_model_that_a_server_has(hub: DownloadHub, tmp_path: Path) -> None:
    served = {"name": "server", "urls": ["http://node:30000"]}
    settings = {
        "model": "org/tiny",
        "out": "data",
        "prompts": {"path": "prompts.jsonl"},
        "engine": served,
        "responses": {
            "expert": {"count": 0},
            "teachers": [{"name": "big", "model": "org/teacher", "engine": {"name": "hf"}}],
        },
    }
    done = gft(hub, tmp_path / "home", "fetch", write(tmp_path / "generate.yaml", settings))
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:3]] == [
        ["org/tiny", "tokenizer"],
        ["org/teacher", "model"],
    ]
    (only,) = (tmp_path / "home").rglob("*.safetensors")
    assert "models--org--teacher" in str(only)


def test_groups_of_the_hub(hub: DownloadHub, tmp_path: Path, demo: Path) -> None:
    out = tmp_path / "hub" / "datasets" / "org" / "groups"
    values = {
        "model": str(demo / "model"),
        "out": str(out),
        "prompts.path": str(demo / "train.jsonl"),
        "prompts.limit": 4,
        "responses.self.count": 1,
        "engine.device": "cpu",
    }
    generate(load_config(GenerateConfig, demo / "generate.yaml", (), values))
    shutil.rmtree(out / ".work", ignore_errors=True)
    home = tmp_path / "home"
    settings = {"model": str(demo / "model"), "data": "hf://datasets/org/groups", "out": str(tmp_path / "run")}
    train = write(tmp_path / "train.yaml", {**settings, "device": "cpu", "unjudged_groups": "skip"})
    reuse = {
        "model": str(demo / "model"),
        "out": str(tmp_path / "again"),
        "prompts": {"reuse": "org/groups"},
        "responses": {"self": {"count": 1}, "max_tokens": 32},
        "engine": {"device": "cpu"},
    }
    config = write(tmp_path / "generate.yaml", {**SMALL, **reuse})
    done = gft(hub, home, "fetch", train, config)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("groups") == 3  # named and fetched once
    for words in (["train", train], ["generate", config]):
        ran = gft(hub, home, *words, offline=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr
    again = gft(hub, home, "fetch", train, "--dry-run")
    assert again.stdout.splitlines()[-1].split()[-1] == "0.000"


def test_what_cannot_be_had_is_said_in_a_line(hub: DownloadHub, tmp_path: Path, demo: Path) -> None:
    def said(settings: dict[str, Any], offline: bool = False) -> str:
        done = gft(hub, tmp_path / "home", "fetch", write(tmp_path / "eval.yaml", settings), offline=offline)
        assert done.returncode == 2, done.stdout + done.stderr
        lines = done.stderr.splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    sums = {"name": "sums", "prompts": {"path": str(demo / "eval.jsonl"), "columns": {"ground_truth": "answer"}}}
    assert "org/none (model): no such folder here, and the Hub" in said({"model": "org/none", "benchmarks": [sums]})
    assert "HF_HUB_OFFLINE is set" in said({"model": "org/tiny", "benchmarks": [sums]}, offline=True)
    (tmp_path / "hub" / "models" / "org" / "bare").mkdir()
    (tmp_path / "hub" / "models" / "org" / "bare" / "config.json").write_text("{}")
    assert "no weights" in said({"model": "org/bare", "benchmarks": [sums]})
    nothing = {"model": str(demo / "model"), "benchmarks": [{"name": "none", "prompts": {"dataset": "org/none"}}]}
    assert "org/none (prompts): no such folder here, and the Hub" in said(nothing)
    assert "did you mean `benchmarks`?" in said({"model": "org/tiny", "benchmark": [sums]})
    local = write(tmp_path / "eval.yaml", {"model": str(demo / "model"), "benchmarks": [sums]})
    assert gft(hub, tmp_path / "home", "fetch", local).stdout.startswith("nothing to fetch")
