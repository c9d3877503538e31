"""How long commands take to start: gft's, against bare Python, `import torch` and `trl sft --help`.

    python benchmarks/startup.py                # 7 rounds; a minute or two
    python benchmarks/startup.py --repeats 3 --trl ""

Each is a process of its own, run in rounds that go through all of them in turn, forwards and backwards; files are in
the page cache. A round before the first is not counted: it lists the `modules` that the process imports (python -X
importtime) and whether `torch` is among them. `--dry-run` and `inspect` read a data set of 32 groups
that the demo's model made, so they do real work, tokenizer and all, on next to no data; `status` looks at a finished
generation. TRL runs where an interpreter that has it is found (--trl).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from measure import ROOT, Failed, Spread, alternating, end, print_end, print_table, run_process, spread

SAMPLE = ROOT / "samples" / "demo"
GFT = ["-m", "gftcli.main"]


@dataclass(frozen=True, slots=True)
class Command:
    """A command, as its interpreter and what comes after it."""

    name: str
    python: str
    arguments: list[str]


@dataclass(frozen=True, slots=True)
class Row:
    """What was found for a command."""

    seconds: Spread
    peak_mb: float
    modules: int
    torch: bool


def write_settings(folder: Path) -> None:
    """Settings for a generation of 32 groups and for training on them; JSON is YAML."""
    generate = {
        "model": str(SAMPLE / "model"),
        "out": str(folder / "data"),
        "prompts": {
            "path": str(SAMPLE / "train.jsonl"),
            "columns": {"ground_truth": "answer", "expert": "expert"},
            "limit": 32,
        },
        "reward": {"name": "numeric", "workers": 1},
        "responses": {"self": {"count": 7}, "max_tokens": 48},
        "engine": {"device": "cpu", "batch_size": 512},
    }
    train = {"model": generate["model"], "data": generate["out"], "out": str(folder / "run"), "device": "cpu"}
    (folder / "generate.yaml").write_text(json.dumps(generate))
    # a dry run of an output that exists looks at what is there; this one is to be made
    (folder / "new.yaml").write_text(json.dumps(generate | {"out": str(folder / "new")}))
    (folder / "train.yaml").write_text(json.dumps(train))


def commands(folder: Path, trl: str) -> list[Command]:
    data, python = str(folder / "data"), sys.executable
    found = [
        Command("python -c pass", python, ["-c", "pass"]),
        Command("gft --help", python, [*GFT, "--help"]),
        Command("gft train --help", python, [*GFT, "train", "--help"]),
        Command("gft status OUT", python, [*GFT, "status", data]),
        Command("gft inspect DATA", python, [*GFT, "inspect", data]),
        Command("gft generate X --dry-run", python, [*GFT, "generate", str(folder / "new.yaml"), "--dry-run"]),
        Command("gft train X --dry-run", python, [*GFT, "train", str(folder / "train.yaml"), "--dry-run"]),
        Command('python -c "import torch"', python, ["-c", "import torch"]),
    ]
    if trl:
        program = Path(trl).absolute().with_name("trl")
        found.append(Command("trl sft --help", str(Path(trl).absolute()), [str(program), "sft", "--help"]))
    return found


def modules_of(command: Command) -> list[str]:
    """All that the process imports, those of the interpreter itself included."""
    done = subprocess.run(
        [command.python, "-X", "importtime", *command.arguments],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return [line.rpartition("|")[2].strip() for line in lines[1:]]  # the first is a head


def measure(all_commands: list[Command], repeats: int) -> dict[str, Row]:
    modules = {command.name: modules_of(command) for command in all_commands}  # the round that is not counted
    seconds: dict[str, list[float]] = {command.name: [] for command in all_commands}
    peaks = dict.fromkeys(seconds, 0.0)
    for command in alternating(all_commands, repeats):
        ran = run_process([command.python, *command.arguments])
        seconds[command.name].append(ran.seconds)
        peaks[command.name] = max(peaks[command.name], 1024 * ran.peak_gib)
    return {
        name: Row(spread(seconds[name]), peaks[name], len(modules[name]), "torch" in modules[name]) for name in seconds
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", nargs="+", metavar="COMMAND", help="some of them, as the table names them")
    parser.add_argument("--trl", default=".venv-trl/bin/python", help="interpreter that has TRL; empty: without")
    options = parser.parse_args()
    trl = str(ROOT / options.trl) if options.trl and (ROOT / options.trl).is_file() else ""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_settings(folder)
        chosen = [one for one in commands(folder, trl) if options.only is None or one.name in options.only]
        if any(str(folder) in argument for one in chosen for argument in one.arguments):
            run_process([sys.executable, *GFT, "generate", str(folder / "generate.yaml")])
        rows = measure(chosen, options.repeats)
    header = ("command", "seconds: median", "middle half", "peak", "modules", "torch")
    print_table(
        header,
        [
            (
                name,
                f"{row.seconds.median:.3f}",
                f"{row.seconds.low:.3f} to {row.seconds.high:.3f}",
                f"{row.peak_mb:,.0f} MB",
                f"{row.modules:,}",
                "yes" if row.torch else "no",
            )
            for name, row in rows.items()
        ],
    )
    print(f"\nmedians of {options.repeats} rounds" + ("" if trl else f"; TRL was not run: no {options.trl or '--trl'}"))
    print_end("torch", "transformers", "typer")


if __name__ == "__main__":
    try:
        main()
    except Failed as failed:
        end(failed)
