"""On a compute node without internet: HF_HUB_OFFLINE=1, models and prompts from the Hub's cache."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gftdata.manifest import read_manifest
from gftdata.shards import verify

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, demo: Path) -> Path:
    """HF_HOME with the model org/tiny and the data set org/groups of a first run, as a download leaves them."""
    model = tmp_path / "home" / "hub" / "models--org--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    shutil.copytree(demo / "model", model / "snapshots" / COMMIT)
    return tmp_path / "home"


def gft(hub: Path, *arguments: str) -> str:
    """Run the command; whoever asks the Hub anything finds a closed door."""
    environment = {**os.environ, "HF_HOME": str(hub), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", "gftcli.main", *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_generate_reuse_and_train_from_the_cache(hub: Path, demo: Path, tmp_path: Path) -> None:
    config = {
        "model": "org/tiny",
        "out": str(tmp_path / "data"),
        "prompts": {
            "path": str(demo / "train.jsonl"),
            "columns": {"ground_truth": "answer", "expert": "expert"},
            "limit": 4,
        },
        "reward": {"name": "numeric", "workers": 1},
        "responses": {"self": {"count": 2}, "max_tokens": 32},
        "engine": {"device": "cpu"},
    }
    generate = tmp_path / "generate.yaml"
    generate.write_text(json.dumps(config))
    gft(hub, "generate", str(generate))
    manifest = read_manifest(tmp_path / "data")
    assert verify(tmp_path / "data") == []
    assert {(m.role, m.name, m.revision) for m in manifest.models} == {
        ("reference", "org/tiny", COMMIT),
        ("self", "org/tiny", COMMIT),
    }

    # the data set is shared, downloaded, and reused
    groups = hub / "hub" / "datasets--org--groups"
    (groups / "refs").mkdir(parents=True)
    (groups / "refs" / "main").write_text(COMMIT)
    shutil.copytree(tmp_path / "data", groups / "snapshots" / COMMIT, ignore=shutil.ignore_patterns(".work"))
    config["prompts"] = {"reuse": "org/groups"}
    again = tmp_path / "again.yaml"
    again.write_text(json.dumps(config))
    gft(hub, "generate", str(again), "--out", str(tmp_path / "again"))
    assert read_manifest(tmp_path / "again").prompts.prompts == 4

    train = tmp_path / "train.yaml"
    settings = {"model": "org/tiny", "data": str(tmp_path / "again"), "out": str(tmp_path / "run"), "device": "cpu"}
    train.write_text(json.dumps({**settings, "unjudged_groups": "skip"}))
    gft(hub, "train", str(train))
    assert (tmp_path / "run" / "final" / "config.json").is_file()
