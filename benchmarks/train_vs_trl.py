"""`gft train` against TRL's SFTTrainer on a CPU: the same model, response groups and loss (DFT), in float32.

    python samples/smollm2/prepare.py runs/smollm2                      # SmolLM2-135M-Instruct, see there
    make .venv-trl/installed                                            # TRL has an environment of its own
    python benchmarks/train_vs_trl.py                                   # 512/128, groups of 8, 3 pairs
    python benchmarks/train_vs_trl.py --grid                            # prompt x group size x groups without signal
    python benchmarks/train_vs_trl.py --sweep                           # TRL's settings, one by one
    python benchmarks/train_vs_trl.py --smoke --ours-only               # seconds: the demo's model

The grid is prompts of 64 and 256 tokens, groups of 4, 8 and 16, none or half of the groups without signal; one pair of
two measured steps, TRL with one response at a time: about a quarter of an hour on 2 quiet cores. The default takes half
an hour.

A shape is prompt/response: a group's responses are half to one and a half times the mean length, evenly spread
(copied_groups.py). Each step trains on the same groups; what is counted is response tokens / seconds of whole optimizer
steps (data, forward, backward, update), the first step left out. Every measurement is a process of its own, and its
peak memory is what the kernel counted for it (ru_maxrss): loading, and on our side checkpoint and export, are in it.
`first step` is from the start of the process to the end of its first optimizer step: imports, loading, what each side
looks at or prepares before, and the step. A pair is one run of each, in turn first. Where TRL has several settings to
try (`--candidates`), it runs with each of them in the first pair and goes on with the fastest. Numbers are medians,
with quartiles, over all steps (rates) or runs (first step, memory) of all pairs. Losses and gradient norms of every
step are compared, and a relative difference above 1e-3 ends the run.

Groups without signal (all rewards equal) under GFT: one step of `--zero-groups` groups, `--zero` % of them without; all
of its response tokens count, and it is its process's first step.

The share of the GEMM rate is ours, FLOP a second of a step over that of torch's float32 2048 x 2048 x 2048 product
(the higher of before and after), and in brackets over that of the model's own linears at 2048 tokens. FLOP of a step:

    6 * (weights of the layers' linears) * (tokens computed) + 6 * V * D * (response tokens) + attention,
    attention = 12 * layers * (heads * head size) * (pairs of a token and one that it attends to)

Tokens computed: each prompt once with a shared prefix, once a response without; never a response's last token. Pairs
that a mask hides and what the backward pass computes again are not counted, though they take time.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copied_groups import Shape, write_data
from measure import ROOT, Failed, end, last_json, linears, print_end, print_table, run_process, spread

GRID = ((64, 64), (256, 64))  # prompt and mean response
GRID_RESPONSES = [4, 8, 16]
DFT = {"advantage": "one", "tau": 2.0}
GFT: dict[str, Any] = {}
TOLERANCE = 1e-3
POLL = 0.005  # seconds

# what `--sweep` tries; the winners of the sweep are the candidates of a run
SETTINGS: dict[str, dict[str, Any]] = {
    "batch 1": {"per_device_train_batch_size": 1},
    "batch 2": {"per_device_train_batch_size": 2},
    "batch 4": {"per_device_train_batch_size": 4},
    "batch 8": {"per_device_train_batch_size": 8},
    "batch 1, adamw_torch": {"per_device_train_batch_size": 1, "optim": "adamw_torch"},
    "batch 1, eager attention": {"per_device_train_batch_size": 1, "attn_implementation": "eager"},
    "batch 1, checkpointing": {"per_device_train_batch_size": 1, "gradient_checkpointing": True},
    "batch 1, compiled": {"per_device_train_batch_size": 1, "torch_compile": True},
    "batch 1, 1 data worker": {"per_device_train_batch_size": 1, "dataloader_num_workers": 1},
    "padding-free 2": {"per_device_train_batch_size": 2, "padding_free": True},
    "padding-free 4": {"per_device_train_batch_size": 4, "padding_free": True},
    "packing (bfd)": {"per_device_train_batch_size": 1, "packing": True, "max_length": None},  # of two responses
}
CANDIDATES = ("batch 1", "batch 8", "padding-free 2")


@dataclass(frozen=True, slots=True)
class Run:
    """What one process did."""

    seconds: list[float]  # of each step
    losses: list[float]
    grad_norms: list[float]
    peak: float  # GiB
    first_step: float  # seconds from the start of the process to the end of its first optimizer step
    details: dict[str, Any]  # ours: the batch settings; TRL's: versions and processor time


def step_flop(model: str, shape: Shape, batch: dict[str, Any]) -> float:
    """Floating point operations of a step under these batch settings. See the top of this file."""
    config = json.loads((Path(model) / "config.json").read_text())
    pieces: list[list[int]] = []  # input tokens of the responses that share one computed prompt
    for length in shape.lengths:
        full = not pieces or shape.prompt + sum(pieces[-1]) + length - 1 > batch["micro_batch_tokens"]
        if full or batch["layout"] != "shared_prefix":
            pieces.append([])
        pieces[-1].append(length - 1)
    tokens = pairs = 0.0
    for inputs in pieces:
        tokens += shape.prompt + sum(inputs)
        pairs += shape.prompt * (shape.prompt + 1) / 2 + sum(n * shape.prompt + n * (n + 1) / 2 for n in inputs)
    layers, heads = config["num_hidden_layers"], config["head_dim"] * config["num_attention_heads"]
    body = 6 * layers * sum(i * o for i, o in linears(model)) * tokens
    head = 6 * config["vocab_size"] * config["hidden_size"] * sum(shape.lengths)
    return float(shape.groups * (body + head + 12 * layers * heads * pairs))


def measure_gemm(model: str) -> dict[str, float]:
    """FLOP a second of float32 products: a big square one, and the model's linears in the mix of one forward pass."""
    import torch

    def seconds(rows: int, inputs: int, outputs: int) -> float:
        left, right = torch.randn(rows, inputs), torch.randn(outputs, inputs)
        times = []
        for _ in range(12):
            began = time.perf_counter()
            torch.nn.functional.linear(left, right)
            times.append(time.perf_counter() - began)
        return min(times)  # the rate that can be reached

    size = tokens = 2048
    mix = linears(model)
    taken = sum(seconds(tokens, i, o) for i, o in mix)
    return {
        "square": 2 * size**3 / seconds(size, size, size),
        "linears": 2 * tokens * sum(i * o for i, o in mix) / taken,
    }


@contextmanager
def seconds_until(path: Path) -> Iterator[list[float]]:
    """A list that gets, once, the seconds until a file had something in it."""
    found: list[float] = []
    done = threading.Event()
    began = time.perf_counter()

    def watch() -> None:
        while not done.is_set():
            if path.is_file() and path.stat().st_size:
                found.append(time.perf_counter() - began)
                return
            done.wait(POLL)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def run_ours(options: argparse.Namespace, data: Path, objective: dict[str, Any], groups: int, steps: int) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        out, path = Path(folder) / "run", Path(folder) / "train.yaml"
        config = {
            "model": options.model,
            "data": str(data),
            "out": str(out),
            "objective": objective,
            "optim": {"lr": 1e-6},
            "batch": {"groups_per_step": groups},
            "checkpoint": {"every_steps": 1_000_000},
            "epochs": steps,
            "device": "cpu",
        }
        path.write_text(json.dumps(config))
        overrides = [part for value in options.set for part in ("--set", value)]
        with seconds_until(out / "metrics.jsonl") as first:
            ran = run_process([sys.executable, "-m", "gftcli.main", "train", str(path), *overrides])
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        batch = json.loads((out / "run.json").read_text())["config"]["batch"]
    series = ([line[key] for line in lines] for key in ("seconds", "loss", "grad_norm"))
    return Run(*series, ran.peak_gib, first[0], batch)


def run_trl(options: argparse.Namespace, data: Path, settings: dict[str, Any], steps: int) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        mark = Path(folder) / "first-step"
        given = {"model": options.model, "data": str(data), "steps": steps, "settings": settings, "mark": str(mark)}
        with seconds_until(mark) as first:
            ran = run_process([options.trl, str(Path(__file__).with_name("trl_sft.py")), json.dumps(given)])
    found = last_json(ran)
    return Run(found["seconds"], found["losses"], found["grad_norms"], ran.peak_gib, first[0], found)


def check_same(trl: Run, ours: Run) -> str:
    """The first step's losses and gradient norms. Ends the program where the two sides do not do the same."""
    for name, theirs, mine in (("loss", trl.losses, ours.losses), ("norm", trl.grad_norms, ours.grad_norms)):
        for number, (a, b) in enumerate(zip(theirs, mine, strict=True)):
            if abs(a - b) > TOLERANCE * abs(a):
                sys.exit(f"not the same work: step {number + 1}: {name} {a:.8f} with TRL, {b:.8f} with ours")
    return (
        f"first step: loss {trl.losses[0]:.8f} with TRL, {ours.losses[0]:.8f} with ours; "
        f"gradient norm {trl.grad_norms[0]:.6f}, {ours.grad_norms[0]:.6f}"
    )


def sweep(options: argparse.Namespace, data: Path, shape: Shape) -> None:
    """Each of TRL's settings once."""
    print(f"{'TRL, ' + str(shape):<26} {'tok/s':>8} {'/CPU s':>8} {'GiB':>6}   first loss and gradient norm")
    for name, settings in SETTINGS.items():
        if options.only and name not in options.only:
            continue
        chosen = dict(settings)
        if chosen.get("packing"):
            chosen["max_length"] = 2 * (shape.prompt + max(shape.lengths))
        try:
            result = run_trl(options, data, chosen, options.steps + 1)
        except Failed as failed:
            code, said, _ = failed.args
            print(f"{name:<26} does not run here: exit code {code}: {said.strip().splitlines()[-1][:120]}", flush=True)
            continue
        rate = shape.tokens / statistics.median(result.seconds[1:])
        busy = shape.tokens / statistics.median(result.details["processor_seconds"][1:])
        first = f"{result.losses[0]:.8f} {result.grad_norms[0]:.6f}"
        print(f"{name:<26} {rate:>8.1f} {busy:>8.1f} {result.peak:>6.2f}   {first}", flush=True)


@dataclass(frozen=True, slots=True)
class Row:
    """What was found for one shape."""

    shape: Shape
    setting: str | None  # TRL's
    theirs: list[Run]
    ours: list[Run]
    flop: float  # of a step of ours
    zero_groups: int
    without: dict[int, list[Run]]  # GFT, by the share of groups without signal


def rates(shape: Shape, runs: Sequence[Run]) -> list[float]:
    """Response tokens a second of every step but each process's first."""
    return [shape.tokens / seconds for one in runs for seconds in one.seconds[1:]]


def compare(options: argparse.Namespace, shape: Shape, data: Path) -> Row:
    """All pairs of one shape, then the groups without signal."""
    theirs: dict[str, list[Run]] = {} if options.ours_only else {name: [] for name in options.candidates}
    mine: list[Run] = []
    steps = options.steps + 1

    def rate(runs: list[Run]) -> float:
        return statistics.median(rates(shape, runs))

    def fastest() -> str | None:
        return max(theirs, key=lambda name: rate(theirs[name]), default=None)

    for pair in range(options.pairs):
        if pair == 1 and (best := fastest()):
            theirs = {best: theirs[best]}
        for name in [*theirs, None] if pair % 2 == 0 else [None, *theirs]:
            if name is None:
                mine.append(run_ours(options, data / "signal", DFT, shape.groups, steps))
            else:
                theirs[name].append(run_trl(options, data / "signal", SETTINGS[name], steps))
        parts = [f"TRL ({name}) {rate(runs[-1:]):.1f} tok/s {runs[-1].peak:.2f} GiB" for name, runs in theirs.items()]
        parts.append(f"gft train {rate(mine[-1:]):.1f} tok/s {mine[-1].peak:.2f} GiB")
        print(f"{shape} pair {pair + 1}: {'; '.join(parts)}", flush=True)
        for name, runs in theirs.items():
            said = check_same(runs[-1], mine[-1])
            if pair == 0:
                print(f"  {name}: {said}", flush=True)
    without: dict[int, list[Run]] = {share: [] for share in options.zero}
    for _ in range(options.zero_repeats):
        for share, runs in without.items():
            runs.append(run_ours(options, data / f"zero-{share}", GFT, options.zero_groups, 1))
    best = fastest()
    return Row(
        shape=shape,
        setting=best,
        theirs=theirs[best] if best else [],
        ours=mine,
        flop=step_flop(options.model, shape, mine[0].details),
        zero_groups=options.zero_groups,
        without=without,
    )


def median(values: Sequence[float], spec: str) -> str:
    """With quartiles where there are several."""
    return spread(values).text(spec) if len(values) > 1 else f"{values[0]:{spec}}"


def memory_and_start(runs: Sequence[Run]) -> list[str]:
    return [median([one.peak for one in runs], ".2f"), median([one.first_step for one in runs], ".1f")]


def side(shape: Shape, runs: Sequence[Run]) -> list[str]:
    return [median(rates(shape, runs), ".1f"), *memory_and_start(runs)]


def print_rows(rows: Sequence[Row], gemm: dict[str, float]) -> None:
    """A line for each side of each shape, then the groups without signal."""
    lines, shares = [], []
    for row in rows:
        name, ours = str(row.shape), statistics.median(rates(row.shape, row.ours))
        ratios = ["", ""]
        if row.theirs:
            lines.append([f"{name}  TRL, {row.setting}", *side(row.shape, row.theirs), "", "", ""])
            theirs = statistics.median(rates(row.shape, row.theirs))
            held = [statistics.median(one.peak for one in runs) for runs in (row.ours, row.theirs)]
            ratios = [f"{ours / theirs:.2f}", f"{held[0] / held[1]:.2f}"]
        flop = row.flop * ours / row.shape.tokens
        share = f"{flop / gemm['square']:.0%} ({flop / gemm['linears']:.0%})"
        lines.append([f"{name}  gft train", *side(row.shape, row.ours), *ratios, share])
        base: float | None = None
        for zero, runs in row.without.items():
            found = [row.zero_groups * sum(row.shape.lengths) / one.seconds[0] for one in runs]
            base = base or statistics.median(found)
            factor = f"{statistics.median(found) / base:.2f}"
            shares.append([name, f"{zero} %", median(found, ".1f"), *memory_and_start(runs), factor])
    print()
    head = ("prompt/response x group size", "tok/s", "GiB", "first step, s", "speed", "memory", "of GEMM rate")
    print_table(head, lines)
    if shares:
        print("\nGFT, groups without signal")
        print_table(("prompt/response x group size", "without", "tok/s", "GiB", "first step, s", "speed"), shares)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/smollm2", help="a folder of a Llama-shaped model")
    parser.add_argument("--trl", default=".venv-trl/bin/python", help="interpreter that has TRL")
    parser.add_argument("--grid", action="store_true", help="see above; what else is given stands")
    parser.add_argument("--shape", action="append", help="PROMPT/RESPONSE, instead of 512/128")
    parser.add_argument("--pairs", type=int, help="default: 3, in the grid 1")
    parser.add_argument("--groups", type=int, help="of a step; default: 2, in the grid 1")
    parser.add_argument("--responses", type=int, nargs="+", help="of a group; default: 8, in the grid 4, 8 and 16")
    parser.add_argument("--steps", type=int, default=2, help="measured, after one that is not")
    parser.add_argument(
        "--candidates", nargs="+", choices=SETTINGS, metavar="SETTING", help="TRL's, of those of --sweep"
    )
    parser.add_argument("--zero", type=int, nargs="*", help="%% of groups without signal; default: 0 30 60, grid: 0 50")
    parser.add_argument("--zero-groups", type=int, help="of that step; default: 10, in the grid 2")
    parser.add_argument("--zero-repeats", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of gft train")
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--sweep", action="store_true", help="TRL's settings, one by one")
    parser.add_argument("--only", action="append", help="with --sweep: this setting")
    parser.add_argument("--smoke", action="store_true", help="the demo's model and a tiny shape")
    parser.add_argument("--write", help=argparse.SUPPRESS)
    parser.add_argument("--gemm", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.smoke:
        options.model, options.shape, options.pairs = "samples/demo/model", ["16/8"], 1
    defaults: dict[str, tuple[Any, Any]] = {  # without and with --grid
        "shape": (["512/128"], [f"{prompt}/{response}" for prompt, response in GRID]),
        "pairs": (3, 1),
        "groups": (2, 1),
        "responses": ([8], GRID_RESPONSES),
        "candidates": (CANDIDATES, CANDIDATES[:1]),
        "zero": ([0, 30, 60], [0, 50]),
        "zero_groups": (10, 2),
    }
    for name, (usual, grid) in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, grid if options.grid else usual)
    options.model, options.trl = (str((ROOT / path).absolute()) for path in (options.model, options.trl))
    if not (Path(options.model) / "config.json").is_file():
        parser.error(f"no model in {options.model}: run samples/smollm2/prepare.py, or name one with --model")
    if not options.ours_only and not Path(options.trl).is_file():
        parser.error(f"no {options.trl}: install TRL as the top of this file says, or give --ours-only")
    return options


def main() -> None:
    options = parse()
    sizes = [tuple(int(part) for part in name.split("/")) for name in options.shape]
    shapes = [Shape(p, r, responses, options.groups) for p, r in sizes for responses in options.responses]
    if options.write:
        write_data(Path(options.write), options.model, shapes[0], options.zero, options.zero_groups)
        return
    if options.gemm:
        print(json.dumps(measure_gemm(options.model)))
        return

    this = [sys.executable, __file__, "--ours-only", "--model", options.model]

    def gemm() -> dict[str, float]:
        return last_json(run_process([*this, "--gemm"]))

    with tempfile.TemporaryDirectory() as folder:
        data = {}
        for number, shape in enumerate(shapes):
            data[shape] = Path(folder) / str(number)
            given = {"--shape": f"{shape.prompt}/{shape.response}", "--groups": shape.groups}
            given |= {"--responses": shape.responses, "--zero-groups": options.zero_groups}
            parts = [str(part) for pair in given.items() for part in pair]
            run_process([*this, *parts, "--zero", *map(str, options.zero), "--write", str(data[shape])])
        if options.sweep:
            for shape in shapes:
                sweep(options, data[shape] / "signal", shape)
            return
        before = gemm()
        measured = [compare(options, shape, data[shape]) for shape in shapes]
        after = gemm()
    print_rows(measured, {name: max(before[name], after[name]) for name in before})
    print()
    for name in before:
        print(f"GEMM {name}: {before[name] / 1e9:.0f} GFLOP/s before, {after[name] / 1e9:.0f} after")
    print_end("torch", "transformers")


if __name__ == "__main__":
    try:
        main()
    except Failed as failed:
        end(failed)
