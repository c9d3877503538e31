"""Training by samples/slurm on a real Slurm: srun alone, torchrun, saved and requeued at the time limit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import slurm
import torch
from conftest import DEMO, ROOT
from safetensors.torch import load_file

from gftdata.config import load_config
from gfttrain.config import TrainConfig
from gfttrain.train import train

SLURM = ROOT / "samples" / "slurm"
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=1")
Write = Callable[[str, dict[str, Any]], str]


def settings(data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    batch = {"groups_per_step": 8, "micro_batch_tokens": 1024}
    own = {"model": str(DEMO / "model"), "data": str(data), "out": str(out), "device": "cpu", "batch": batch}
    return {**own, "epochs": 1, "checkpoint": {"every_steps": 4}, **changes}


@pytest.fixture(scope="session")
def weights(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What one process trains."""
    out = tmp_path_factory.mktemp("alone") / "run"
    final = train(load_config(TrainConfig, DEMO / "train.yaml", (), settings(data, out)))
    return load_file(final / "model.safetensors")


def assert_close(final: Path, weights: dict[str, torch.Tensor]) -> None:
    """The same weights but for the order of sums: Adam turns the noise of a zero gradient into a step of lr."""
    found, start = load_file(final / "model.safetensors"), load_file(DEMO / "model" / "model.safetensors")
    assert found.keys() == weights.keys()
    moved = torch.cat([(weights[name].float() - start[name].float()).flatten() for name in weights])
    apart = torch.cat([(weights[name].float() - found[name].float()).flatten() for name in weights])
    assert moved.norm() > 0 and apart.norm() < 1e-2 * moved.norm(), (apart.norm(), moved.norm())


def steps(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("script", ["train.sbatch", "train-torchrun.sbatch"])
def test_two_nodes_train_what_one_process_does(
    script: str,
    cluster: slurm.Slurm,
    data: Path,
    weights: dict[str, torch.Tensor],
    tmp_path: Path,
    write_yaml: Write,
) -> None:
    config = write_yaml("train", settings(data, tmp_path / "run"))
    job = slurm.submit(cluster, *TWO_NODES, str(SLURM / script), config, MASTER_ADDR="localhost")
    (ended,) = slurm.wait_for(cluster, job)
    assert (ended.state, ended.restarts) == ("COMPLETED", 0), slurm.printed(cluster)
    assert_close(tmp_path / "run" / "final", weights)
    assert steps(tmp_path / "run") == list(range(1, 9))
    assert slurm.printed(cluster, job).count("Trained model:") == 1  # one rank talks
