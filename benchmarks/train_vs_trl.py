"""`gft train` against TRL's SFTTrainer on a CPU: the same model, response groups and loss (DFT), in float32.

    python samples/smollm2/prepare.py runs/smollm2                      # SmolLM2-135M-Instruct, see there
    python3 -m venv .venv-trl                                           # TRL has an environment of its own
    .venv-trl/bin/pip install -c constraints.txt torch==2.13.0 transformers==5.23.0 trl==1.16.0
    python benchmarks/train_vs_trl.py                                   # 512/128, 3 pairs
    python benchmarks/train_vs_trl.py --grid --pairs 1                  # every shape
    python benchmarks/train_vs_trl.py --sweep                           # TRL's settings, one by one
    python benchmarks/train_vs_trl.py --smoke --ours-only               # seconds: the demo's model

A shape is prompt/response: 8 responses of half to one and a half times the mean length, evenly spread. Prompts are
random tokens; a response copies a piece of its prompt, so that its probability depends on seeing it, and the losses of
both sides would differ if one of them did not show it. Each step trains on the same groups; what is counted is
response tokens / seconds of whole optimizer steps (data, forward, backward, update), the first step left out. Every
measurement is a process of its own, and its peak memory is what the kernel counted for it (ru_maxrss): loading, and on
our side checkpoint and export, are in it. A pair is one run of each, in turn first. In the first pair TRL runs with
each of its settings in `CANDIDATES`, and goes on with the faster one; rates are medians over all steps of all pairs.
Losses and gradient norms of every step are compared, and a relative difference above 1e-3 ends the run.

Groups without signal (all rewards equal): 10 groups under GFT, 0, 3 or 6 of them without; one step, all of its response
tokens count.

The share of the GEMM rate is ours, FLOP a second of a step over that of torch's float32 2048 x 2048 x 2048 product
(the higher of before and after), and in brackets over that of the model's own linears at 2048 tokens. FLOP of a step:

    6 * (weights of the layers' linears) * (tokens computed) + 6 * V * D * (response tokens) + attention,
    attention = 12 * layers * (heads * head size) * (pairs of a token and one that it attends to)

Tokens computed: each prompt once with a shared prefix, once a response without; never a response's last token. Pairs
that a mask hides and what the backward pass computes again are not counted, though they take time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GRID = ((64, 128), (150, 700), (512, 128), (2048, 256))
DFT = {"advantage": "one", "tau": 2.0}
GFT: dict[str, Any] = {}
GFT_GROUPS = 10  # of the step that shows what groups without signal save
TOLERANCE = 1e-3

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
class Shape:
    """The groups of a measurement."""

    prompt: int  # tokens
    response: int  # tokens, mean
    responses: int  # of a group
    groups: int  # of a step

    @property
    def lengths(self) -> list[int]:
        """Tokens of each response of a group: from half to one and a half times the mean."""
        steps = max(1, self.responses - 1)
        return [round(self.response * (0.5 + k / steps)) for k in range(self.responses)]

    @property
    def tokens(self) -> int:
        """Response tokens of a step."""
        return self.groups * sum(self.lengths)

    def __str__(self) -> str:
        return f"{self.prompt}/{self.response}"


@dataclass(frozen=True, slots=True)
class Run:
    """What one process did."""

    seconds: list[float]  # of each step
    losses: list[float]
    grad_norms: list[float]
    peak: float  # GiB
    details: dict[str, Any]  # ours: the batch settings; TRL's: versions and processor time


class Failed(Exception):
    """A process that did not end well: exit code (negative: a signal), what it said, its command."""


def write_data(out: Path, model: str, shape: Shape, zero: list[int]) -> None:
    """The data sets of one shape: `dft`, and a `gft-<n>` with n % of groups without signal for each n of `zero`."""
    import numpy as np
    import torch

    from gftdata.engines.hf import HfEngine, load_model
    from gftdata.tokens import load_tokenizer
    from gftdata.types import Completion, Group, Message, Prompt, Response, ScoreRequest, Verdict

    rng = np.random.default_rng(0)
    tokenizer = load_tokenizer(model)
    allowed = np.setdiff1d(np.arange(len(tokenizer.backend)), tokenizer.backend.all_special_ids).astype(np.int32)
    drawn = []
    for _ in range(shape.groups):
        prompt = rng.choice(allowed, shape.prompt)
        starts = rng.integers(0, shape.prompt, shape.responses)
        pieces = [np.resize(np.roll(prompt, -s), n) for s, n in zip(starts, shape.lengths, strict=True)]
        drawn.append((prompt, pieces))
    loaded = load_model(model, torch.float32, torch.device("cpu"))
    engine = HfEngine(loaded, tokenizer, batch_size=shape.responses, batch_tokens=8192)
    scores = engine.score([ScoreRequest(prompt, piece) for prompt, pieces in drawn for piece in pieces])

    def group(number: int, has_signal: bool) -> Group:
        place = number % shape.groups
        prompt, pieces = drawn[place]
        name = f"{number:016x}"
        messages = (Message("user", name),)
        return Group(
            Prompt(name, name, messages, "", "random", (), "{}", name),
            prompt,
            tuple(
                Response(
                    Completion("self" if k else "expert", f"{name} {k}", piece, "stop", "random", None, None),
                    Verdict(float(k % 2 == 0) if has_signal else 1.0, "ok"),
                    scores[place * shape.responses + k],
                )
                for k, piece in enumerate(pieces)
            ),
        )

    write_shard(out / "dft", model, tokenizer, [group(n, True) for n in range(shape.groups)])
    for share in zero:
        without = GFT_GROUPS * share // 100
        groups = [group(n, n >= without) for n in range(GFT_GROUPS)]
        write_shard(out / f"gft-{share}", model, tokenizer, groups)


def write_shard(out: Path, model: str, tokenizer: Any, groups: list[Any]) -> None:
    """One shard and a manifest, as `gft generate` would leave them."""
    from gftdata.manifest import DATA, FORMAT, Manifest, ModelRecord, PromptCounts, TokenizerRecord, write_manifest
    from gftdata.models import model_revision
    from gftdata.schema import SCHEMA_VERSION, groups_to_table
    from gftdata.shards import all_records, package_versions, publish_shard, toolkit_version, verify
    from gftdata.store import FolderStore
    from gftdata.summary import summarise

    publish_shard(FolderStore(out), 0, 1, groups_to_table(groups), len(groups), "float32")
    nothing = dict.fromkeys(PromptCounts.model_fields)
    hashes = {name: getattr(tokenizer, name) for name in TokenizerRecord.model_fields}
    manifest = Manifest(
        format=FORMAT,
        schema_version=SCHEMA_VERSION,
        toolkit_version=toolkit_version(),
        recipe={},
        models=(ModelRecord(role="reference", name=Path(model).name, revision=model_revision(model)),),
        tokenizer=TokenizerRecord(**hashes),
        engine="none",
        packages=package_versions(),
        prompts=PromptCounts(**{**nothing, "rows_read": len(groups), "prompts": len(groups)}),
        prompts_quarantined=0,
        teacher_samples_left_out=None,
        summary=summarise(sorted((out / DATA).glob("*.parquet"))),
        shards=all_records(FolderStore(out), 1),
    )
    write_manifest(FolderStore(out), manifest)
    if problems := verify(out):
        sys.exit("\n".join(problems))


def linears(model: str) -> list[tuple[int, int]]:
    """Inputs and outputs of the linears of one layer of a Llama-shaped model."""
    config = json.loads((Path(model) / "config.json").read_text())
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv = (config["head_dim"] * config[key] for key in ("num_attention_heads", "num_key_value_heads"))
    return [(width, heads), (width, kv), (width, kv), (heads, width), (width, inner), (width, inner), (inner, width)]


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


def run(command: list[str]) -> tuple[str, float]:
    """Output and peak memory (GiB) of a process."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        text, said = out.read().decode(), errors.read().decode()
    if process.returncode:
        raise Failed(process.returncode, f"{text[-500:]}{said[-3000:]}", command)
    return text, usage.ru_maxrss / 2**20


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
        _, peak = run([sys.executable, "-m", "gftcli.main", "train", str(path), *overrides])
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        batch = json.loads((out / "run.json").read_text())["config"]["batch"]
    return Run(*([line[key] for line in lines] for key in ("seconds", "loss", "grad_norm")), peak, batch)


def run_trl(options: argparse.Namespace, data: Path, settings: dict[str, Any], steps: int) -> Run:
    given = {"model": options.model, "data": str(data), "steps": steps, "settings": settings}
    text, peak = run([options.trl, str(Path(__file__).with_name("trl_sft.py")), json.dumps(given)])
    found = json.loads(text.splitlines()[-1])
    return Run(found["seconds"], found["losses"], found["grad_norms"], peak, found)


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
    """What was found for one shape: response tokens a second, GiB, FLOP a second."""

    shape: Shape
    setting: str | None  # TRL's
    trl: float
    trl_peak: float
    ours: float
    peak: float
    flop: float
    gft: tuple[float, ...]  # at each share of groups without signal

    def cells(self, gemm: dict[str, float]) -> str:
        cells = [str(self.shape), f"{self.ours:.1f}", f"{self.peak:.2f}"]
        if self.setting is not None:
            cells = [
                str(self.shape),
                f"{self.trl:.1f} ({self.setting})",
                f"{self.ours:.1f}",
                f"{self.ours / self.trl:.2f}",
                f"{self.trl_peak:.2f}",
                f"{self.peak:.2f}",
                f"{self.peak / self.trl_peak:.2f}",
            ]
        cells.append(f"{self.flop / gemm['square']:.0%} ({self.flop / gemm['linears']:.0%})")
        cells += [f"{self.gft[0]:.1f}", *(f"{rate:.1f} = {rate / self.gft[0]:.2f} times" for rate in self.gft[1:])]
        return f"| {' | '.join(cells)} |"


def header(options: argparse.Namespace) -> str:
    zero = [f"GFT, {share} % without signal" for share in options.zero]
    both = ["TRL tok/s", "gft train tok/s", "ratio", "TRL GiB", "gft train GiB", "ratio"]
    names = ["prompt/response", *(both[1::3] if options.ours_only else both), "share of GEMM rate", *zero]
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def compare(options: argparse.Namespace, shape: Shape, data: Path) -> Row:
    """All pairs of one shape, then the groups without signal."""
    theirs: dict[str, list[Run]] = {} if options.ours_only else {name: [] for name in CANDIDATES}
    mine: list[Run] = []
    steps = options.steps + 1

    def rate(runs: list[Run]) -> float:
        return shape.tokens / statistics.median(s for one in runs for s in one.seconds[1:])

    def fastest() -> str | None:
        return max(theirs, key=lambda name: rate(theirs[name]), default=None)

    for pair in range(options.pairs):
        if pair == 1 and (best := fastest()):
            theirs = {best: theirs[best]}
        for name in [*theirs, None] if pair % 2 == 0 else [None, *theirs]:
            if name is None:
                mine.append(run_ours(options, data / "dft", DFT, shape.groups, steps))
            else:
                theirs[name].append(run_trl(options, data / "dft", SETTINGS[name], steps))
        parts = [f"TRL ({name}) {rate(runs[-1:]):.1f} tok/s {runs[-1].peak:.2f} GiB" for name, runs in theirs.items()]
        parts.append(f"gft train {rate(mine[-1:]):.1f} tok/s {mine[-1].peak:.2f} GiB")
        print(f"{shape} pair {pair + 1}: {'; '.join(parts)}", flush=True)
        for name, runs in theirs.items():
            said = check_same(runs[-1], mine[-1])
            if pair == 0:
                print(f"  {name}: {said}", flush=True)
    best = fastest()
    ours = rate(mine)
    flop = step_flop(options.model, shape, mine[0].details)
    gft = []
    for share in options.zero:
        one = run_ours(options, data / f"gft-{share}", GFT, GFT_GROUPS, 1)
        gft.append(GFT_GROUPS * sum(shape.lengths) / one.seconds[0])
        print(f"{shape} GFT, {share} % of groups without signal: {gft[-1]:.1f} tok/s", flush=True)
    return Row(
        shape=shape,
        setting=best,
        trl=rate(theirs[best]) if best else 0.0,
        trl_peak=min(one.peak for one in theirs[best]) if best else 0.0,
        ours=ours,
        peak=max(one.peak for one in mine),
        flop=flop * ours / shape.tokens,
        gft=tuple(gft),
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/smollm2", help="a folder of a Llama-shaped model")
    parser.add_argument("--trl", default=".venv-trl/bin/python", help="interpreter that has TRL")
    parser.add_argument("--grid", action="store_true", help="every shape: hours with 3 pairs")
    parser.add_argument("--shape", action="append", help="PROMPT/RESPONSE, instead of 512/128")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--groups", type=int, default=2, help="of a step")
    parser.add_argument("--responses", type=int, default=8, help="of a group")
    parser.add_argument("--steps", type=int, default=2, help="measured, after one that is not")
    parser.add_argument("--zero", type=int, nargs="+", default=[0, 30, 60], help="%% of groups without signal")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of gft train")
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--sweep", action="store_true", help="TRL's settings, one by one")
    parser.add_argument("--only", action="append", help="with --sweep: this setting")
    parser.add_argument("--smoke", action="store_true", help="the demo's model and a tiny shape")
    parser.add_argument("--write", help=argparse.SUPPRESS)
    parser.add_argument("--gemm", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.smoke:
        options.model, options.shape, options.responses = "samples/demo/model", ["16/8"], 4
        options.pairs, options.zero = 1, [0, 60]
    options.model, options.trl = (str((ROOT / path).absolute()) for path in (options.model, options.trl))
    if not (Path(options.model) / "config.json").is_file():
        parser.error(f"no model in {options.model}: run samples/smollm2/prepare.py, or name one with --model")
    if not options.ours_only and not Path(options.trl).is_file():
        parser.error(f"no {options.trl}: install TRL as the top of this file says, or give --ours-only")
    return options


def main() -> None:
    options = parse()
    names = options.shape or [f"{p}/{r}" for p, r in (GRID if options.grid else ((512, 128),))]
    sizes = [tuple(int(part) for part in name.split("/")) for name in names]
    shapes = [Shape(prompt, response, options.responses, options.groups) for prompt, response in sizes]
    if options.write:
        write_data(Path(options.write), options.model, shapes[0], options.zero)
        return
    if options.gemm:
        print(json.dumps(measure_gemm(options.model)))
        return

    this = [sys.executable, __file__, "--ours-only", "--model", options.model]

    def gemm() -> dict[str, float]:
        found: dict[str, float] = json.loads(run([*this, "--gemm"])[0])
        return found

    with tempfile.TemporaryDirectory() as folder:
        data = {}
        for shape in shapes:
            data[shape] = Path(folder) / str(shape).replace("/", "-")
            given = ["--shape", str(shape), "--groups", str(shape.groups), "--responses", str(shape.responses)]
            given += ["--zero", *(str(share) for share in options.zero)]
            run([*this, *given, "--write", str(data[shape])])
        if options.sweep:
            for shape in shapes:
                sweep(options, data[shape] / "dft", shape)
            return
        before = gemm()
        measured = [compare(options, shape, data[shape]) for shape in shapes]
        after = gemm()
    rates = {name: max(before[name], after[name]) for name in before}
    print()
    for name in before:
        print(f"GEMM {name}: {before[name] / 1e9:.0f} GFLOP/s before, {after[name] / 1e9:.0f} after")
    print(f"{os.cpu_count()} cores\n\n{header(options)}")
    for row in measured:
        print(row.cells(rates))


if __name__ == "__main__":
    try:
        main()
    except Failed as failed:
        code, said, command = failed.args
        sys.exit(f"{said}\nexit code {code} of: {' '.join(command)[:300]}")
