"""A long run in a process of its own that watches itself: memory, descriptors, processes.

    python soak.py generate FOLDER GROUPS        tiny groups, against an engine that answers at once
    python soak.py train FOLDER GROUPS DATA      one group a step, a model of 0.2M parameters

Prints a JSON object: samples of (groups done, resident bytes), and descriptors, threads and children before and after.
"""

import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from aid.injector import MODEL, ROOT

SAMPLES = 200


def generate(folder: Path, groups: int, done: Callable[[int], None]) -> None:
    import gftdata.engines.sglang as sglang
    from gftdata.config import GenerateConfig, validate_config
    from gftdata.events import Event
    from gftdata.generate import generate as run
    from gftdata.tokens import encode_response, load_tokenizer

    sglang.WORKER = ROOT / "benchmarks" / "fake_engine.py"
    sglang.check_python = lambda config: None
    prompts = folder / "prompts.jsonl"
    with prompts.open("w") as file:
        for n in range(groups):
            question = f"{n // 8100 % 90 + 10}+{n // 90 % 90 + 10}+{n % 90 + 10}="
            file.write(json.dumps({"question": question, "answer": str(n), "expert": f"={n % 9}"}) + "\n")
    alphabet = encode_response(load_tokenizer(str(MODEL)), "0123456789", ended=True).tolist()
    settings = {
        "model": str(MODEL),
        "out": str(folder / "data"),
        "prompts": {"path": str(prompts), "columns": {"ground_truth": "answer", "expert": "expert"}},
        "reward": {"name": "exact", "workers": 1},
        "responses": {"self": {"count": 1}, "max_tokens": 4},
        "engine": {"name": "sglang", "options": {"num_tokens": 4, "alphabet": alphabet}},
    }
    finished = 0

    def listen(event: Event) -> None:
        nonlocal finished
        if event.kind == "shard":
            finished += event.count
            done(finished)

    manifest = run(validate_config(GenerateConfig, settings, "soak"), listen)
    assert manifest is not None and manifest.summary.groups == groups


def train(folder: Path, groups: int, done: Callable[[int], None], data: str) -> None:
    import torch

    from gftdata.config import validate_config
    from gftdata.manifest import read_manifest
    from gfttrain.config import TrainConfig
    from gfttrain.train import Event
    from gfttrain.train import train as run

    torch.set_num_threads(1)
    epochs = -(-groups // read_manifest(Path(data)).summary.groups)
    settings = {
        "model": str(MODEL),
        "data": data,
        "out": str(folder / "run"),
        "objective": {"advantage": "one"},
        "optim": {"lr": 1e-6},
        "batch": {"groups_per_step": 1, "micro_batch_tokens": 64},
        "checkpoint": {"every_steps": max(1, groups // 20)},
        "epochs": epochs,
        "max_steps": groups,
        "device": "cpu",
    }

    def listen(event: Event) -> None:
        if event.kind == "step":
            done(event.step)

    run(validate_config(TrainConfig, settings, "soak"), listen)


def held() -> dict[str, int]:
    this = psutil.Process()
    gc.collect()
    return {
        "descriptors": this.num_fds(),
        "threads": this.num_threads(),
        "children": len(this.children(recursive=True)),
    }


def main() -> None:
    what, folder, groups, *more = sys.argv[1:]
    samples: list[tuple[int, int]] = []
    page = os.sysconf("SC_PAGE_SIZE")

    def done(number: int) -> None:
        if number * SAMPLES // int(groups) >= len(samples):
            samples.append((number, int(Path("/proc/self/statm").read_text().split()[1]) * page))

    program: Any = {"generate": generate, "train": train}[what]
    first = Path(folder) / "first"
    first.mkdir()
    program(first, 64, lambda number: None, *more)  # what a run loads and starts once is there before it is counted
    before = held()
    program(Path(folder), int(groups), done, *more)
    print(json.dumps({"samples": samples, "before": before, "after": held()}))


if __name__ == "__main__":
    main()
