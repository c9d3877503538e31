"""A real Slurm for the tests of this folder, and a data set of the demo's for their training."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import slurm
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "samples" / "demo"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Slurm]:
    """Three nodes; their jobs find `gft` and this checkout."""
    if why := slurm.missing_parts():
        pytest.skip(why)
    paths = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "cli"), os.environ.get("PYTHONPATH")]))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))}
    own = {"PYTHONPATH": paths, "VENV": sys.prefix, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with slurm.running_slurm(tmp_path_factory.mktemp("slurm"), {**kept, **own}) as cluster:
        yield cluster


@pytest.fixture
def write_yaml(tmp_path: Path) -> Callable[[str, dict[str, Any]], str]:
    """The demo's settings of a command with changes, as a file of the test's own: its path."""

    def write(name: str, changes: dict[str, Any]) -> str:
        settings = yaml.safe_load((DEMO / f"{name}.yaml").read_text())
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**settings, **changes}))
        return str(path)

    return write


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 groups of the demo's prompts, of 1 expert and 3 self responses."""
    from gftdata.config import GenerateConfig, load_config
    from gftdata.generate import generate

    out = tmp_path_factory.mktemp("groups") / "data"
    values = {
        "model": str(DEMO / "model"),
        "out": str(out),
        "prompts.path": str(DEMO / "train.jsonl"),
        "prompts.limit": 64,
        "responses.self.count": 3,
        "engine.device": "cpu",
    }
    generate(load_config(GenerateConfig, DEMO / "generate.yaml", (), values))
    return out
