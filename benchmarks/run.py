"""All benchmarks whose numbers the README states, one after the other: what `make bench` runs.

    python benchmarks/run.py --list                     # what there is
    python benchmarks/run.py                            # all of it; an hour and a half or so on 2 cores
    python benchmarks/run.py --only formats startup

Nothing is measured here: each entry is a command of its own, shown as it runs. What they printed goes into one file in
runs/bench/, with the commands, the number of cores and the versions in each environment. An entry that fails, or whose
environment is not there, stops nothing: it is named at the end, and the exit code is 1. The peers' environments are
made by `make bench`, or by the command that is then named.
"""

import argparse
import datetime
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from measure import ROOT

OUT = ROOT / "runs" / "bench"
TRL, SGLANG = ".venv-trl/bin/python", ".venv-sglang/bin/python"
SMOLLM2 = "runs/smollm2/tokenizer.json"  # the last of its files to be written
MADE_BY = {  # what an entry may need -> how it comes about
    TRL: "make .venv-trl/installed",
    SGLANG: "make .venv-sglang/installed",
    SMOLLM2: "make runs/smollm2/tokenizer.json",
}
PACKAGES = {  # interpreter -> packages whose versions matter
    sys.executable: ("torch", "transformers", "datasets", "pyarrow", "numpy", "polars"),
    TRL: ("trl", "torch", "transformers", "accelerate", "datasets"),
    SGLANG: ("sglang", "torch", "transformers"),
}
VERSIONS = (
    "import sys; from importlib.metadata import version; print(*(f'{n} {version(n)}' for n in sys.argv[1:]), sep=', ')"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A benchmark: its name and its command, without the interpreter."""

    name: str
    command: str
    says: str
    needs: tuple[str, ...] = ()

    @property
    def script(self) -> Path:
        return ROOT / self.command.split()[0]


ENTRIES = (
    Entry("own_cost", "benchmarks/own_cost.py", "gft generate without its engine: memory, processor time a sample"),
    Entry("own_cost_long", "benchmarks/own_cost.py --prompts 10000 --tokens 512", "the same, samples of 512 tokens"),
    Entry("throughput", "benchmarks/throughput.py", "gft generate (hf), the bare engine, datasets.map + generate"),
    Entry(
        "throughput_sglang",
        f"benchmarks/throughput.py --python {SGLANG} --cpu",
        "gft generate (SGLang) and the bare engine",
        (SGLANG,),
    ),
    Entry("formats", "benchmarks/formats.py", "shards, JSON Lines, a row a response: bytes and reading"),
    Entry("startup", "benchmarks/startup.py", "start-up of commands, and of trl"),
    Entry("train_vs_trl", "benchmarks/train_vs_trl.py --groups 1", "gft train and TRL", (TRL, SMOLLM2)),
    Entry(
        "train_vs_trl_grid",
        "benchmarks/train_vs_trl.py --grid",
        "the same over prompts, group sizes, groups without signal",
        (TRL, SMOLLM2),
    ),
    Entry("products", "benchmarks/products.py", "matrix products of MKL and oneDNN", (SMOLLM2,)),
    Entry("ladder", "benchmarks/ladder.py", "each part of the trainer by itself", (SMOLLM2,)),
    Entry("growth", "benchmarks/growth.py", "time a response token as groups, prompts, vocabulary and shards grow"),
    Entry("stream", "benchmarks/stream.py", "from shards to tensors: tokens a second, memory"),
    Entry("plan_scale", "benchmarks/plan_scale.py", "index, plan and layout for 10^4 to 10^6 groups"),
    Entry("inspect_scale", "benchmarks/inspect_scale.py", "gft inspect on a million groups"),
    Entry("report_scale", "benchmarks/report_scale.py", "gft report on 20 runs of 10,000 steps"),
    Entry("kills", "benchmarks/kills.py", "generation killed 20 times"),
    Entry("train_kills", "benchmarks/train_kills.py --steps 150", "training killed 10 times"),
    Entry("train_kills_2", "benchmarks/train_kills.py --nproc 2 --steps 100", "the same, of two processes"),
)


def chosen(only: Sequence[str]) -> list[Entry]:
    """The entries of these names, in the order in which they stand above; all where none is named."""
    known = [entry.name for entry in ENTRIES]
    if unknown := [name for name in only if name not in known]:
        raise SystemExit(f"no benchmark {', '.join(unknown)}; there are {', '.join(known)}")
    return [entry for entry in ENTRIES if not only or entry.name in only]


def missing(entry: Entry) -> str:
    """What an entry needs and is not there, and how to make it; empty where all is there."""
    return "; ".join(f"{path} is missing: {MADE_BY[path]}" for path in entry.needs if not (ROOT / path).exists())


def versions() -> list[str]:
    """A line for each environment that is there."""
    lines = []
    for python, names in PACKAGES.items():
        if not (ROOT / python).exists():
            continue
        done = subprocess.run([ROOT / python, "-c", VERSIONS, *names], capture_output=True, text=True, check=False)
        name = "the toolkit's environment" if python == sys.executable else python.split("/")[0]
        lines.append(f"{name}: {done.stdout.strip() if done.returncode == 0 else 'versions are not to be found'}")
    return lines


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def run(command: Sequence[str]) -> tuple[int, str]:
    """Exit code and output of a command, shown as it comes; what it says of its progress (stderr) is only shown."""
    said: list[str] = []
    at_once = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=at_once, stdout=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            said.append(line)
    return process.returncode, "".join(said)


def section(entry: Entry, output: str, minutes: float, problem: str) -> str:
    parts = [f"## {entry.name}", f"`python {entry.command}`, {minutes:.1f} minutes"]
    parts += [f"**{problem}**"] if problem else []
    parts += [f"```\n{output.strip()}\n```"] if output.strip() else []
    return "\n" + "\n\n".join(parts) + "\n"


def run_all(entries: Sequence[Entry], results: Path) -> list[str]:
    """Run them, append each to the results as it ends; returns what failed and why."""
    failed = []
    for number, entry in enumerate(entries, start=1):
        print(f"\n[{number}/{len(entries)}] {entry.name}: python {entry.command}\n", flush=True)
        began, output, problem = time.monotonic(), "", missing(entry)
        if not problem:
            code, output = run([sys.executable, *shlex.split(entry.command)])
            problem = f"exit code {code}" if code else ""
        if problem:
            print(problem, flush=True)
            failed.append(f"{entry.name}: {problem}")
        with results.open("a") as file:
            file.write(section(entry, output, (time.monotonic() - began) / 60, problem))
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--list", action="store_true", help="names and commands")
    parser.add_argument("--out", type=Path, help="file for the tables; default: a new one in runs/bench")
    options = parser.parse_args()
    entries = chosen(options.only)
    if options.list:
        for entry in entries:
            print(f"{entry.name:<18} {entry.says}\n{'':<18} python {entry.command}")
        return
    now = datetime.datetime.now(datetime.UTC)
    results = options.out or OUT / f"{now:%Y%m%d-%H%M%S}.md"
    results.parent.mkdir(parents=True, exist_ok=True)
    head = [f"# Benchmarks, {now:%Y-%m-%d %H:%M} UTC", "", f"{os.cpu_count()} cores, commit {commit()}", ""]
    results.write_text("\n".join([*head, *(f"- {line}" for line in versions())]) + "\n")
    try:
        failed = run_all(entries, results)
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; what was run is in {results}")
    print(f"\nall tables: {results}")
    if failed:
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
