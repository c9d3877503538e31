"""`gft train` killed with SIGKILL at random moments and started again: what differs from a run that was never stopped.

    python benchmarks/train_kills.py               # one process, 10 kills
    python benchmarks/train_kills.py --nproc 2     # two processes (gloo); the launcher is killed, its ranks end with it

The demo's model on groups of the demo's prompts, PSFT with an old policy that is refreshed every 7 steps, so that a
checkpoint has more to carry than weights. A life ends at a moment drawn evenly from the time that the uninterrupted run
took from its first step on, counted from its own first sign of life; one in four ends while it starts. When a run has
finished it is compared, bit by bit, and the next kill begins a new one.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from measure import ROOT, print_end
from safetensors.torch import load_file

MODEL = ROOT / "samples" / "demo" / "model"
START_S = 8.0  # a life that is to end while it starts ends within so many seconds


def gft(*words: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "gftcli.main", *words]


def write_yaml(path: Path, settings: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(settings))
    return path


def make_data(folder: Path) -> Path:
    """96 groups of 1 expert and 3 self responses."""
    settings = {
        "model": str(MODEL),
        "out": str(folder / "data"),
        "prompts": {
            "path": str(ROOT / "samples" / "demo" / "train.jsonl"),
            "limit": 96,
            "columns": {"question": "question", "ground_truth": "answer", "expert": "expert"},
        },
        "reward": {"name": "numeric", "workers": 1},
        "responses": {"self": {"count": 3}, "max_tokens": 48},
        "engine": {"device": "cpu"},
    }
    subprocess.run(gft("generate", str(write_yaml(folder / "generate.yaml", settings))), cwd=ROOT, check=True)
    return folder / "data"


def train_config(folder: Path, data: Path, out: str, steps: int) -> Path:
    settings = {
        "model": str(MODEL),
        "data": str(data),
        "out": str(folder / out),
        "objective": {
            "sources": ["expert", "self"],
            "advantage": "one",
            "coefficient": "clipped_ratio",
            "old_policy": "refreshed",
            "refresh_every": 7,
        },
        "optim": {"lr": 1.0e-4, "schedule": "cosine"},
        "batch": {"groups_per_step": 8, "micro_batch_tokens": 256},
        "checkpoint": {"every_steps": 5, "keep": 2},
        "epochs": -(-steps * 8 // 96),
        "max_steps": steps,
        "device": "cpu",
    }
    return write_yaml(folder / f"{out}.yaml", settings)


def lines(out: Path) -> list[dict[str, Any]]:
    path = out / "metrics.jsonl"
    complete = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in complete]


def differences(found: Path, expected: Path) -> list[str]:
    """What a finished run has that the uninterrupted one has not, or otherwise."""
    weights = [load_file(out / "final" / "model.safetensors") for out in (found, expected)]
    wrong = [name for name, tensor in weights[1].items() if not torch.equal(weights[0][name], tensor)]
    times = ("seconds", "tokens_per_second", "data_wait_fraction")
    kept = [[{k: v for k, v in line.items() if k not in times} for line in lines(out)] for out in (found, expected)]
    return [f"weights {', '.join(wrong)}"] * bool(wrong) + ["metrics"] * (kept[0] != kept[1])


def killed(command: list[str], out: Path, whole_s: float, rng: random.Random) -> str | None:
    """One life. Returns when it was killed, None where it ended by itself before."""
    before, starts = len(lines(out)), rng.random() < 0.25
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    if not starts:
        while process.poll() is None and len(lines(out)) <= before:
            time.sleep(0.01)
    try:
        process.wait(rng.uniform(0, START_S if starts else whole_s))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        done, saved = len(lines(out)), sorted((out / "checkpoints").glob("step-*"))
        return f"after {done} steps, {saved[-1].name if saved else 'nothing saved'}" + (", starting" if starts else "")
    if process.returncode:
        raise SystemExit(f"the run failed by itself with exit code {process.returncode}")
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None, help="of the moments; default: another one each time")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    ranks = ("--nproc", str(options.nproc))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make_data(folder)
        subprocess.run(
            gft("train", str(train_config(folder, data, "whole", options.steps)), *ranks),
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        whole_s = sum(line["seconds"] for line in lines(folder / "whole"))
        print(f"uninterrupted: {options.steps} steps, {whole_s:.1f} s in them, {options.nproc} processes\n")
        command = gft("train", str(train_config(folder, data, "run", options.steps)), *ranks)
        kills = finished = 0
        different: list[str] = []
        while kills < options.kills or (folder / "run").exists():
            moment = None
            if kills < options.kills:
                moment = killed(command, folder / "run", whole_s, rng)
            else:
                subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            if moment is not None:
                kills += 1
                print(f"kill {kills:2d}: {moment}", flush=True)
                continue
            finished += 1
            different += differences(folder / "run", folder / "whole")
            shutil.rmtree(folder / "run")
        print(f"\n{kills} kills, {finished} finished runs, differing from the uninterrupted one: {different or 'none'}")
    print_end("torch", "transformers")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
