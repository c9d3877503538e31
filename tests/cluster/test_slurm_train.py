"""Training by samples/slurm on a real Slurm: srun alone, torchrun, saved and requeued at the time limit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import slurm
import torch
from safetensors.torch import load_file

from gftdata.config import load_config
from gfttrain.config import TrainConfig
from gfttrain.train import train

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
DEMO, SLURM = SAMPLES / "demo", SAMPLES / "slurm"
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=1")
STEPS = 32  # of 8 groups, four times over the 64 of the data set
Write = Callable[[str, dict[str, Any]], str]


def settings(data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    batch = {"groups_per_step": 8, "micro_batch_tokens": 1024}
    own = {"model": str(DEMO / "model"), "data": str(data), "out": str(out), "device": "cpu", "batch": batch}
    return {**own, "epochs": 4, "checkpoint": {"every_steps": 4}, **changes}


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
    if not (out / "metrics.jsonl").is_file():
        return []
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
    assert steps(tmp_path / "run") == list(range(1, STEPS + 1))
    assert slurm.printed(cluster, job).count("Trained model:") == 1  # one rank talks


def halted(cluster: slurm.Slurm, out: Path, job: str, step: int) -> None:
    """Stop the ranks (SIGSTOP) after so many steps, so that what follows happens in the middle on any machine."""
    slurm.wait_until(lambda: len(steps(out)) >= step, 120, cluster)
    slurm.signal_steps(cluster, job, "STOP")
    assert len(steps(out)) < STEPS - 4


def test_before_the_time_limit_the_run_saves_and_queues_itself_again(
    cluster: slurm.Slurm, data: Path, weights: dict[str, torch.Tensor], tmp_path: Path, write_yaml: Write
) -> None:
    out = tmp_path / "run"
    config = write_yaml("train", settings(data, out, checkpoint={"every_steps": 1000}))
    # Slurm looks every 30 s, and sends the signal up to 60 s early: here 30 to 60 s after the start. What was stopped
    # it lets continue first.
    limit = ("--time=2", "--signal=USR1@60")
    job = slurm.submit(cluster, *TWO_NODES, *limit, str(SLURM / "train.sbatch"), config, MASTER_ADDR="localhost")
    after = slurm.submit(cluster, f"--dependency=afterok:{job}", f"--wrap=test -d {out}/final")
    halted(cluster, out, job, step=2)
    (ended,) = slurm.wait_for(cluster, job)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), slurm.printed(cluster, job)
    assert [each.state for each in slurm.wait_for(cluster, after)] == ["COMPLETED"]  # it did not start too early
    assert steps(out) == list(range(1, STEPS + 1))
    assert_close(out / "final", weights)


def test_torchrun_saves_and_queues_itself_again(
    cluster: slurm.Slurm, data: Path, weights: dict[str, torch.Tensor], tmp_path: Path, write_yaml: Write
) -> None:
    out = tmp_path / "run"
    config = write_yaml("train", settings(data, out, checkpoint={"every_steps": 1000}))
    script = str(SLURM / "train-torchrun.sbatch")
    job = slurm.submit(cluster, *TWO_NODES, script, config, MASTER_ADDR="localhost")
    halted(cluster, out, job, step=2)
    slurm.signal_steps(cluster, job, "USR1")
    slurm.signal_steps(cluster, job, "CONT")
    (ended,) = slurm.wait_for(cluster, job)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), slurm.printed(cluster, job)
    assert steps(out) == list(range(1, STEPS + 1))
    assert_close(out / "final", weights)


def test_a_requeue_by_the_administrator(
    cluster: slurm.Slurm, data: Path, weights: dict[str, torch.Tensor], tmp_path: Path, write_yaml: Write
) -> None:
    out = tmp_path / "run"
    config = write_yaml("train", settings(data, out))
    job = slurm.submit(cluster, *TWO_NODES, str(SLURM / "train.sbatch"), config, MASTER_ADDR="localhost")
    slurm.wait_until(lambda: len(steps(out)) >= 6, 120, cluster)
    slurm.command(cluster, "scontrol", "requeue", job)
    (ended,) = slurm.wait_for(cluster, job)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), slurm.printed(cluster, job)
    assert_close(out / "final", weights)


def test_a_cancelled_run_saves_and_stays_cancelled(
    cluster: slurm.Slurm, data: Path, tmp_path: Path, write_yaml: Write
) -> None:
    out = tmp_path / "run"
    config = write_yaml("train", settings(data, out, checkpoint={"every_steps": 1000}))
    job = slurm.submit(cluster, *TWO_NODES, str(SLURM / "train.sbatch"), config, MASTER_ADDR="localhost")
    halted(cluster, out, job, step=2)
    slurm.signal_steps(cluster, job, "CONT")
    slurm.command(cluster, "scancel", job)
    (ended,) = slurm.wait_for(cluster, job)
    assert (ended.state, ended.restarts) == ("CANCELLED", 0)
    assert len(list((out / "checkpoints").glob("step-*"))) == 1


def test_names_that_do_not_resolve_are_said(
    cluster: slurm.Slurm, data: Path, tmp_path: Path, write_yaml: Write
) -> None:
    config = write_yaml("train", settings(data, tmp_path / "run"))
    job = slurm.submit(cluster, *TWO_NODES, str(SLURM / "train.sbatch"), config)
    (ended,) = slurm.wait_for(cluster, job, 60)
    assert (ended.state, ended.exit_code) == ("FAILED", 2)
    said = [line for line in slurm.printed(cluster, job).splitlines() if "error: rank" in line]
    assert len(said) == 2 and all("the name n1" in line and "set MASTER_ADDR" in line for line in said)
