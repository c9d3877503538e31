"""Response groups by job arrays on a real Slurm: lost tasks and nodes, pre-emption, copies; the chain to an eval."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import slurm
import yaml

from gftdata.manifest import MANIFEST, read_manifest
from gftdata.shards import shard_paths, verify
from gfttrain.results import read_results

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
DEMO, SLURM = SAMPLES / "demo", SAMPLES / "slurm"
GENERATE = str(SLURM / "generate.sbatch")
ONE_CORE = ("--cpus-per-task=1", "--gpus-per-task=1")
PROMPTS, SHARDS = 192, 24
Write = Callable[[str, dict[str, Any]], str]


@pytest.fixture
def config(write_yaml: Write, tmp_path: Path) -> str:
    """192 prompts in 24 shards, drawn a few at a time."""
    settings = {
        "model": str(DEMO / "model"),
        "out": str(tmp_path / "data"),
        "prompts": {
            "path": str(DEMO / "train.jsonl"),
            "columns": {"ground_truth": "answer", "expert": "expert"},
            "limit": PROMPTS,
        },
        "reward": {"name": "numeric", "workers": 1},
        "responses": {"self": {"count": 3}, "max_tokens": 48},
        "shards": {"groups_per_shard": PROMPTS // SHARDS},
        "engine": {"device": "cpu", "batch_size": 8},
    }
    return write_yaml("generate", settings)


def published(out: Path) -> int:
    return len(list((out / "data").glob("*.parquet")))


def halted(cluster: slurm.Slurm, out: Path, job: str) -> None:
    """Stop the tasks (SIGSTOP) when some shards are published, so that what follows happens in the middle."""
    slurm.wait_until(lambda: published(out) >= 2, 180, cluster)
    slurm.signal_steps(cluster, job, "STOP")
    assert published(out) < SHARDS and not (out / MANIFEST).exists()


def assert_whole(out: Path, prompts: int = PROMPTS) -> None:
    """Complete, valid, every prompt once, every group of full size."""
    assert verify(out) == []
    tables = [pq.read_table(path, columns=["prompt_id", "responses"]) for path in shard_paths(out, read_manifest(out))]
    rows = [row for table in tables for row in table.to_pylist()]
    assert len(rows) == len({row["prompt_id"] for row in rows}) == prompts
    assert {len(row["responses"]) for row in rows} == {4}


def test_a_task_is_cancelled_and_a_node_goes_down_and_three_tasks_finish(
    cluster: slurm.Slurm, config: str, tmp_path: Path
) -> None:
    out = tmp_path / "data"
    job = slurm.submit(cluster, "--array=0-3", *ONE_CORE, GENERATE, config)
    slurm.wait_until(lambda: [each.state for each in slurm.jobs(cluster, job)] == ["RUNNING"] * 4, 60, cluster)
    halted(cluster, out, job)
    cancelled, *others = slurm.jobs(cluster, job)
    lost = next(each for each in others if each.node != cancelled.node)
    slurm.signal_steps(cluster, cancelled.id, "CONT")  # a job that ends while it is halted stays STOPPED for Slurm
    slurm.command(cluster, "scancel", cancelled.id)
    slurm.command(cluster, "scontrol", "update", f"nodename={lost.node}", "state=down", "reason=test")
    slurm.attempt(cluster, "scancel", "--signal=CONT", job)
    ended = {each.id: each for each in slurm.wait_for(cluster, job)}
    assert ended[cancelled.id].state == "CANCELLED"
    assert ended[lost.id].state == "COMPLETED" and ended[lost.id].restarts == 1 and ended[lost.id].node != lost.node
    assert published(out) < SHARDS and not (out / MANIFEST).exists()

    slurm.attempt(cluster, "scontrol", "update", f"nodename={lost.node}", "state=resume")  # or it came back by itself
    again = slurm.submit(cluster, "--array=0-2", *ONE_CORE, GENERATE, config)
    assert [each.state for each in slurm.wait_for(cluster, again)] == ["COMPLETED"] * 3, slurm.printed(cluster, again)
    assert_whole(out)


def test_pre_empted_tasks_save_and_queue_themselves_again(cluster: slurm.Slurm, config: str, tmp_path: Path) -> None:
    out = tmp_path / "data"
    job = slurm.submit(cluster, "--array=0-1", *ONE_CORE, GENERATE, config)
    halted(cluster, out, job)
    signalled, requeued = slurm.jobs(cluster, job)
    slurm.signal_steps(cluster, signalled.id, "USR1")
    slurm.command(cluster, "scontrol", "requeue", requeued.id)
    slurm.signal_steps(cluster, signalled.id, "CONT")
    ended = slurm.wait_for(cluster, job)
    assert [(each.state, each.restarts) for each in ended] == [("COMPLETED", 1)] * 2, slurm.printed(cluster, job)
    assert "Exited with exit code 75" in slurm.printed(cluster, f"{job}-0")
    assert_whole(out)


def test_two_copies_of_the_same_tasks_make_one_data_set(cluster: slurm.Slurm, config: str, tmp_path: Path) -> None:
    both = [slurm.submit(cluster, "--array=0-1", *ONE_CORE, GENERATE, config) for _ in range(2)]
    for job in both:
        assert [each.state for each in slurm.wait_for(cluster, job)] == ["COMPLETED"] * 2, slurm.printed(cluster, job)
    assert_whole(tmp_path / "data")


def test_tasks_of_one_step(cluster: slurm.Slurm, config: str, tmp_path: Path) -> None:
    """`srun -n 3` instead of an array, over two nodes."""
    few = ("--set", "prompts.limit=24")
    slurm.command(cluster, "srun", "-N2", "-n3", "gft", "generate", config, *few, timeout=120, PATH=path(cluster))
    assert_whole(tmp_path / "data", 24)


def path(cluster: slurm.Slurm) -> str:
    return f"{cluster.environment['VENV']}/bin:{cluster.environment['PATH']}"


def test_a_teachers_server_is_there_while_the_groups_are_made(
    cluster: slurm.Slurm, config: str, tmp_path: Path, write_yaml: Write
) -> None:
    """samples/teacher-server, with something that waits in place of SGLang: its jobs, and the URL in the config."""
    server = tmp_path / "server"
    server.write_text('#!/bin/sh\necho "serving $*"; exec sleep 600\n')
    server.chmod(0o755)
    settings = yaml.safe_load(Path(config).read_text())
    settings["prompts"] |= {"limit": 8, "data_source": "TEACHER_URL"}
    config = write_yaml("generate", settings)
    options = {
        "TEACHER_JOB": f"--nodes=2 --cpus-per-task=1 --gpus-per-node=1 --output={cluster.folder}/job-teacher.txt",
        "GENERATE_JOB": f"--array=0-0 --cpus-per-task=1 --output={cluster.folder}/job-%A-%a.txt --gpus-per-task=1",
        "TEACHER_WAIT": "",
        "SGLANG_PYTHON": str(server),
    }
    serve = str(SAMPLES / "teacher-server" / "serve.sh")
    said = slurm.command(cluster, serve, "some/model", config, **options)
    teacher, generate = re.findall(r"\d+", said)
    assert [each.state for each in slurm.wait_for(cluster, generate)] == ["COMPLETED"], slurm.printed(cluster, generate)
    assert [each.state for each in slurm.wait_for(cluster, teacher, 60)] == ["CANCELLED"]
    assert_whole(tmp_path / "data", 8)
    assert read_manifest(tmp_path / "data").recipe["prompts"]["data_source"] == "http://n1:30000"
    served = [line for line in slurm.printed(cluster, "teacher").splitlines() if "serving" in line]
    assert sorted(line.split()[-1] for line in served) == ["0", "1"]  # --node-rank


def test_the_chain_ends_in_a_trained_model_and_its_evaluation(
    cluster: slurm.Slurm, config: str, tmp_path: Path, write_yaml: Write
) -> None:
    out = tmp_path / "out"
    columns = {"question": "question", "ground_truth": "answer"}
    training = {
        "model": str(DEMO / "model"),
        "device": "cpu",
        "batch": {"groups_per_step": 8, "micro_batch_tokens": 1024},
        "epochs": 1,
    }
    measuring = {
        "benchmarks": [
            {"name": "sums", "prompts": {"path": str(DEMO / "eval.jsonl"), "columns": columns, "limit": 16}}
        ],
        "num_samples": 2,
        "k": [1],
        "reference": str(DEMO / "model"),
        "engine": {"device": "cpu"},
    }
    configs = (config, write_yaml("train", training), write_yaml("eval", measuring))
    options = {
        "GENERATE_JOB": "--array=0-1 --cpus-per-task=1 --gpus-per-task=0",  # as where there are no GPUs
        "TRAIN_JOB": "--ntasks-per-node=1 --cpus-per-task=1 --gpus-per-node=0",
        "EVAL_JOB": "--cpus-per-task=1 --gpus-per-task=0",
        "MASTER_ADDR": "localhost",
    }

    def submit(**changes: str) -> dict[str, str]:
        """The chain's jobs: name -> number."""
        command = [str(SLURM / "chain.sh"), *configs, str(out)]
        folder = {"SBATCH_OUTPUT": f"{cluster.folder}/job-%j.txt"}
        done = slurm.attempt(cluster, *command, **{**options, **folder, **changes})
        assert done.returncode == 0, done.stderr
        return dict(line.split() for line in done.stderr.splitlines())

    def state(job: str) -> str:
        return slurm.jobs(cluster, job)[-1].state

    # a train job that may not queue itself again: it fails with 75, and nothing is measured
    jobs = submit(TRAIN_JOB=f"{options['TRAIN_JOB']} --no-requeue")
    assert list(jobs) == ["generate", "finalize", "train", "eval"]
    metrics = out / "train" / "metrics.jsonl"
    slurm.wait_until(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 2, 240, cluster)
    slurm.signal_steps(cluster, jobs["train"], "STOP")
    assert state(jobs["finalize"]) == "COMPLETED" and state(jobs["eval"]) == "PENDING"
    slurm.signal_steps(cluster, jobs["train"], "USR1")
    slurm.signal_steps(cluster, jobs["train"], "CONT")
    (train,) = slurm.wait_for(cluster, jobs["train"])
    assert (train.state, train.exit_code, train.restarts) == ("FAILED", 75, 0)
    slurm.wait_until(lambda: state(jobs["eval"]) == "CANCELLED", 60, cluster)
    assert not (out / "train" / "final").exists() and not (out / "train" / "evals.jsonl").exists()

    again = submit()
    assert slurm.wait_for(cluster, again["eval"], 240)[0].state == "COMPLETED", slurm.printed(cluster)
    assert_whole(out / "data")
    assert metrics.read_text().count("\n") == PROMPTS // 8
    result = read_results(out / "train")["sums"]
    assert 0 <= result.pass_at[1].value <= 1 and result.kl is not None and result.kl > 0
