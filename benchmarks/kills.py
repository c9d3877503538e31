"""`gft generate` killed with SIGKILL at random moments and continued: what is lost, what is done twice.

    python benchmarks/kills.py                                 # engine hf, 20 kills of the whole tree
    sglang="--python .venv-sglang/bin/python --prompts 512"    # SGLang on a CPU
    python benchmarks/kills.py $sglang --kills 3
    python benchmarks/kills.py $sglang --kills 2 --scheduler   # only its scheduler

Three lives in four end at a moment drawn evenly from the time that a whole run took from its first sample on, counted
from this life's own first sample; the others during their start. Of each kill the table says what was in journals and
shards then; every such sample must be in the finished data set as it was, and none may have been drawn a second time. A
run that ends is checked, and the next kill begins a new one.
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
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
from measure import ROOT, print_end

from gftdata.journal import read_journal
from gftdata.manifest import DATA, QUARANTINE, WORK, read_manifest
from gftdata.shards import verify
from gftdata.store import FolderStore

OWN, SHARD, MAX_TOKENS = 4, 8, 48
Drawn = dict[tuple[str, str, int], tuple[str, tuple[int, ...]]]  # prompt, source, k -> text, ids

CPU_SGLANG = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch_native",
    "disable_overlap_schedule": True,
    "disable_cuda_graph": True,
    "mem_fraction_static": 0.3,
    "max_total_tokens": 32768,
}


def write_config(folder: Path, python: str | None, num_prompts: int) -> Path:
    """The demo's prompts and model; a teacher too, with engine hf, so that kills fall into either phase."""
    model = str(ROOT / "samples" / "demo" / "model")
    engine: dict[str, Any] = {"name": "hf", "device": "cpu", "batch_size": 8}
    if python is not None:
        engine = {"name": "sglang", "python": str(Path(python).absolute()), "max_in_flight": 32, "options": CPU_SGLANG}
    teachers = [] if python else [{"name": "again", "model": model, "count": 1}]
    config = {
        "model": model,
        "out": str(folder / "data"),
        "prompts": {
            "path": str(ROOT / "samples" / "demo" / "train.jsonl"),
            "columns": {"ground_truth": "answer", "expert": "expert"},
            "limit": num_prompts,
        },
        "reward": {"name": "exact", "workers": 1},
        "responses": {"max_tokens": MAX_TOKENS, "self": {"count": OWN}, "teachers": teachers},
        "engine": engine,
        "shards": {"groups_per_shard": SHARD},
    }
    path = folder / "generate.yaml"
    path.write_text(json.dumps(config))
    return path


def start(config: Path) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "sglang" / "aid"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "gftcli.main", "generate", str(config)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)


def journals(out: Path) -> set[str]:
    """The attempts that have samples in a journal."""
    return {path.stem for path in (out / WORK / "journal").rglob("*.jsonl")}


def kill_tree(process: "subprocess.Popen[bytes]") -> None:
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in tree:
        member.suspend()  # all of them stop before the first one dies
    for member in tree:
        member.kill()
    process.wait()
    psutil.wait_procs(tree)


def kill_scheduler(process: "subprocess.Popen[bytes]") -> bool:
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.name().startswith("sglang::schedul") or any("sglang::schedul" in part for part in child.cmdline()[:1]):
            child.send_signal(signal.SIGKILL)
            return True
    return False


def drawn(out: Path) -> tuple[Drawn, int]:
    """Every sample that is safe, and how many of the journal's are there twice."""
    found: Drawn = {}
    doubled = 0
    prompts = out / WORK / "prompts"
    for path in sorted(prompts.glob("*/*.jsonl")):
        ids = [json.loads(line.split("\t", 2)[2])["prompt_id"] for line in path.read_text().splitlines()]
        attempts = sorted((out / WORK / "journal" / path.stem).glob("*.jsonl"))
        keys: Counter[tuple[str, int, int]] = Counter()
        for attempt in attempts:
            lines = attempt.read_bytes().split(b"\n")[:-1]
            records = [json.loads(line[9:]) for line in lines]
            keys.update((record["source"], record["row"], record["k"]) for record in records)
        doubled += sum(count - 1 for count in keys.values())
        for (source, row, k), entry in read_journal(FolderStore(out), int(path.stem)).items():
            found[ids[row], source, k] = entry.text, tuple(entry.response_ids.tolist()) if source == "self" else ()
    for path in sorted((out / DATA).glob("*.parquet")):
        found |= published(path)
    return found, doubled


def published(path: Path) -> Drawn:
    """Samples of a shard; a teacher's have other ids there, those of the starting model, and none are compared."""
    found: Drawn = {}
    for row in pq.read_table(path).to_pylist():
        seen: Counter[str] = Counter()
        for k, source in enumerate(row["sources"]):
            ids = tuple(row["response_ids"][k]) if source == "self" else ()
            if source != "expert":
                found[row["prompt_id"], source, seen[source]] = row["responses"][k], ids
            seen[source] += 1
    return found


def check(out: Path, kept: list[Drawn], num_prompts: int) -> str:
    """What a finished data set lacks, against the recipe and against what was safe at each kill."""
    problems = verify(out)
    final: Drawn = {}
    rows: list[dict[str, Any]] = []
    for record in read_manifest(out).shards:
        rows += pq.read_table(out / DATA / record.name).to_pylist()
        final |= published(out / DATA / record.name)
    ids = [row["prompt_id"] for row in rows]
    short = sum(Counter(row["sources"])["self"] != OWN or "expert" not in row["sources"] for row in rows)
    # a teacher's text of nothing, or longer than the limit in the starting model's tokens, is left out
    changed = sum(
        final.get(key) != value and not (key[1] != "self" and not 0 < len(value[0]) < MAX_TOKENS)
        for safe in kept
        for key, value in safe.items()
    )
    if problems or len(set(ids)) != len(ids) or len(ids) != num_prompts or short or changed:
        given_up = out / f"{QUARANTINE}.jsonl"
        return (
            f"BAD: {problems} {len(ids)} rows, {len(set(ids))} prompts, {short} short groups, {changed} samples changed"
            + (f"\ngiven up: {given_up.read_text()}" if given_up.is_file() else "")
        )
    return f"whole: {len(ids)} prompts once, {len(final)} samples"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--python", help="interpreter that has SGLang: use that engine")
    parser.add_argument("--scheduler", action="store_true", help="kill SGLang's scheduler only")
    parser.add_argument("--prompts", type=int, default=96, help="at most 512")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config, out = write_config(folder, options.python, options.prompts), folder / "data"
        began = time.monotonic()
        process = start(config)
        while process.poll() is None and not journals(out):
            time.sleep(0.05)
        first = time.monotonic() - began
        if code := process.wait():
            sys.exit(f"a run that nobody killed ended with exit code {code}")
        whole = time.monotonic() - began
        print(f"a whole run: first sample after {first:.0f} s, all after {whole:.0f} s")
        print(f"{check(out, [], options.prompts)}\n")
        shutil.rmtree(out)
        print(f"{'kill':>4} {'after':>7} {'safe then':>10} {'drawn twice':>12}   state")
        failed = False
        kills, kept, work = 0, [], whole - first
        while True:
            new, attempts, began = not out.exists(), journals(out), time.monotonic()
            process = start(config)
            in_start = rng.random() < 0.25 and not options.scheduler
            while not in_start and process.poll() is None and journals(out) <= attempts:
                time.sleep(0.05)
            sampling = time.monotonic()
            try:
                pause = rng.uniform(0, first if in_start else work)
                code = process.wait(pause if kills < options.kills else None)
                if new and not in_start:  # a whole run
                    work = min(work, time.monotonic() - sampling)  # the machine has become faster
            except subprocess.TimeoutExpired:
                if options.scheduler and not kill_scheduler(process):
                    sys.exit("the scheduler is not to be found")
                if not options.scheduler:
                    kill_tree(process)
                kills += 1
                safe, doubled = drawn(out)
                kept.append(safe)
                failed |= doubled > 0
                what = "scheduler killed" if options.scheduler else "killed"
                after = time.monotonic() - began
                print(f"{kills:>4} {after:>5.1f} s {len(safe):>10} {doubled:>12}   {what}", flush=True)
                if not options.scheduler:
                    continue
                code = process.wait()
            verdict = check(out, kept, options.prompts) if code == 0 else f"BAD: exit code {code}"
            failed |= verdict.startswith("BAD")
            print(f"{'':>36}   finished: {verdict}", flush=True)
            kept = []
            shutil.rmtree(out)
            if kills >= options.kills:
                break
    print_end("torch", "transformers")
    sys.exit(failed)


if __name__ == "__main__":
    main()
