"""`gft train --nproc 2` against one process: gradients, resumption on another number of ranks, signals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from training_helpers import DEMO, ROOT, distance, train_settings

from gfttrain.train import train

EVERY_STEP = {"every_steps": 1, "keep": 99}
# budgets small enough for several micro-batches a rank, and steps that one rank has nothing of
CASES: dict[str, dict[str, Any]] = {
    "GFT": {"batch": {"micro_batch_tokens": 150}, "gradient_checkpointing": "selective"},
    "padded, PSFT, one reduction a step": {
        "batch": {"layout": "padded", "micro_batch_tokens": 200},
        "objective": {
            "sources": ["expert"],
            "advantage": "one",
            "coefficient": "clipped_ratio",
            "old_policy": "refreshed",
            "refresh_every": 2,
        },
        "reduce_once": True,
    },
    "one group a step, LoRA": {
        "batch": {"groups_per_step": 1},
        "objective": {"kl_coef": 0.1},
        "lora": {"rank": 4},
        "evaluation": {
            "every_steps": 2,
            "num_samples": 2,
            "max_tokens": 16,
            "prompts": {"path": str(DEMO / "eval.jsonl"), "limit": 4, "columns": {"ground_truth": "answer"}},
            "reward": {"name": "numeric", "workers": 1},
            "engine": {"device": "cpu"},
        },
    },
}


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def tensors(checkpoint: Path, part: str) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of the optimizer's `part`, whole, whatever number of ranks wrote it."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    state = json.loads((checkpoint / "state.json").read_text())
    wanted = {name: torch.zeros(kind[1]) for name, kind in state["tensors"].items() if name.endswith(part)}
    load(wanted, storage_reader=HuggingFaceStorageReader(str(checkpoint / "shards")), no_dist=True)
    return wanted


def command(folder: Path, config: Any, *options: str) -> list[str]:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
    return [sys.executable, "-W", "ignore", "-m", "gftcli.main", "train", str(path), *options]


def run(folder: Path, config: Any, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, config, *options), cwd=ROOT, capture_output=True, text=True)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_take_the_same_steps_as_one(name: str, data: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 3, "checkpoint": EVERY_STEP, **CASES[name]}
    train(train_settings(data, tmp_path / "one", **settings))
    done = run(tmp_path, train_settings(data, tmp_path / "two", **settings), "--nproc", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Trained model:") == 1  # one rank talks
    for found, expected in zip(lines(tmp_path / "two"), lines(tmp_path / "one"), strict=True):
        assert found.keys() == expected.keys()
        assert found.get("eval/pass@1") == expected.get("eval/pass@1")
        if found["step"] == 0:
            assert name == "one group a step, LoRA" and "eval/pass@1" in found and "loss" not in found
            continue
        for key in ("data/loss_tokens", "computed_tokens", "epoch", "data/groups_with_signal"):
            assert found[key] == expected[key]
        for key in ("loss", "grad_norm", "entropy"):
            assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key
    # Adam's first moment after one step is the gradient, times 0.1: losses after Adam would hide its scale
    first = "checkpoints/step-00000001"
    gradients = [tensors(tmp_path / out / first, ".exp_avg") for out in ("one", "two")]
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    one, two = (torch.cat([g[key].flatten() for key in sorted(g)]) for g in gradients)
    assert distance(two, one) < 1e-5 and one.norm() > 0
    finals = [load_file(tmp_path / out / "final" / "model.safetensors") for out in ("one", "two")]
    assert finals[0].keys() == finals[1].keys()


def stopped_after(folder: Path, config: Any, step: int) -> tuple[int, str]:
    """Start 2 ranks, send the launcher SIGTERM after `step` steps."""
    process = subprocess.Popen(
        command(folder, config, "--nproc", "2"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    metrics = Path(config.out) / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") >= step):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def test_stopped_by_a_signal_and_continued_on_two_ranks_and_on_one(data: Path, tmp_path: Path) -> None:
    done = run(tmp_path, train_settings(data, tmp_path / "whole", epochs=2), "--nproc", "2")
    assert done.returncode == 0, done.stderr
    config = train_settings(data, tmp_path / "run", epochs=2)
    code, output = stopped_after(tmp_path, config, 3)
    assert code == 75, output
    assert output.count("and saved; the same command continues") == 1
    saved = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert int(saved.name[5:]) == len(lines(tmp_path / "run"))  # nothing is done again
    assert not (tmp_path / "run" / "final").exists()
    shutil.copytree(tmp_path / "run", tmp_path / "on one")

    # on as many ranks as before: the same bits as a run that was never stopped
    done = run(tmp_path, config, "--nproc", "2")
    assert done.returncode == 0, done.stderr
    found, expected = (load_file(tmp_path / out / "final" / "model.safetensors") for out in ("run", "whole"))
    assert all(torch.equal(found[key], expected[key]) for key in expected)

    # on another number: the same batches, and losses to rounding
    train(train_settings(data, tmp_path / "on one", epochs=2))
    on_one, on_two = lines(tmp_path / "on one"), lines(tmp_path / "whole")
    assert [line["step"] for line in on_one] == list(range(1, 13))
    for one, two in zip(on_one, on_two, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5, abs=1e-5)


def test_a_mistake_is_said_once(data: Path, tmp_path: Path) -> None:
    config = train_settings(data, tmp_path / "run", objective={"sources": ["expert"]})
    done = run(tmp_path, config, "--nproc", "2")
    assert done.returncode == 2
    assert done.stderr.count("error: no group has a training signal") == 1 and "Traceback" not in done.stderr
