"""The real TRL and verl, in an environment of their own: GFT_TRL_PYTHON names its interpreter."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gftdata.config import GenerateConfig, validate_config
from gftdata.generate import generate

AID = Path(__file__).parent / "aid"
ROOT = AID.parents[2]
NUM_GROUPS = 24


@pytest.fixture(scope="session")
def trl_python() -> str:
    python = os.environ.get("GFT_TRL_PYTHON")
    if python is None:
        pytest.fail("GFT_TRL_PYTHON names no interpreter with TRL and verl; run `make test-interchange`")
    return python


@pytest.fixture(scope="session")
def run_there(trl_python: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Run a script in that environment, with the repository's modules; returns what it printed."""
    folder = tmp_path_factory.mktemp("there")

    def run(script: str | Path, *arguments: str | Path) -> str:
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT), "HF_HOME": str(folder)}
        command = [trl_python, str(script), *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    return run


def generated(model: Path, folder: Path) -> Path:
    """Groups of 1 expert and 5 self responses to the demo's sums."""
    config: dict[str, Any] = {
        "model": str(model),
        "out": str(folder / "data"),
        "prompts": {
            "path": str(ROOT / "samples/demo/train.jsonl"),
            "columns": {"ground_truth": "answer", "expert": "expert"},
            "limit": NUM_GROUPS,
        },
        "reward": {"name": "numeric", "workers": 1},
        "responses": {"max_tokens": 48, "self": {"count": 5}},
        "engine": {"device": "cpu"},
        "shards": {"groups_per_shard": 16, "row_group_size": 8},
    }
    generate(validate_config(GenerateConfig, config, "test"))
    return folder / "data"


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the demo's model, which has no chat template."""
    return generated(ROOT / "samples/demo/model", tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="session")
def chat_data(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a tiny ChatML model."""
    return generated(chat_model, tmp_path_factory.mktemp("chat"))
