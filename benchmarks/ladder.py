"""What each part of the trainer is worth, on a CPU: from a plain trainer up to `gft train`, one part added at a time.

    python samples/smollm2/prepare.py runs/smollm2      # SmolLM2-135M-Instruct, see there
    python benchmarks/ladder.py                         # about 8 minutes on 2 quiet cores
    python benchmarks/ladder.py --smoke                 # the demo's model: says nothing of speed

Rungs, each with what those before it have:

    plain            one response a forward pass, log_softmax over transformers' own logits of all positions; groups
                     whose rewards are all equal are computed too; a batch is read when it is wanted
    micro-batches    a padded row for each response, as many as `--micro-batch-tokens` hold (batch.micro_batch_tokens)
    packing          responses one after the other with their prompts (batch.layout=packed)
    fused head       logits of the responses only, of one chunk at a time
    shared prefix    each prompt once for the responses of its group (batch.layout=shared_prefix)
    zero-signal      groups without signal counted and not computed
    read-ahead       batches made by a thread while the model computes
    gft train        the command itself, which has all of it, and metrics, checks, a checkpoint and the export besides

What is a setting of `gft train` is switched by it, the rest here: the product has no switch for being slow. Every rung
is a process of its own, in turn first and last; its first micro-batch is computed once before the clock runs. All train
on the same groups (copied_groups.py), GFT in float32, and do the same update: losses and gradient norms of all steps
must agree to 1e-4, losses of the mean size of a token's (advantages cancel in the sum). `tok/s` is response tokens of a
step, those without signal too, over its seconds: data, forward, backward, update; median and quartiles over all steps.
The peak is what the kernel counted for the process. `data wait` is the share of a step in which the model waited for a
batch.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from copied_groups import Shape, write_data
from measure import ROOT, Failed, alternating, end, last_json, print_end, print_table, run_process, spread

TOLERANCE = 1e-4
LR = 1e-6


@dataclass(frozen=True, slots=True)
class Rung:
    """What a trainer has."""

    name: str
    layout: str
    several: bool = True  # responses in a micro-batch
    fused: bool = False
    skips: bool = False  # groups without signal
    ahead: bool = False


RUNGS = (
    Rung("plain", "padded", several=False),
    Rung("micro-batches", "padded"),
    Rung("packing", "packed"),
    Rung("fused head", "packed", fused=True),
    Rung("shared prefix", "shared_prefix", fused=True),
    Rung("zero-signal", "shared_prefix", fused=True, skips=True),
    Rung("read-ahead", "shared_prefix", fused=True, skips=True, ahead=True),
)
BY_NAME = {rung.name: rung for rung in RUNGS}
PRODUCT = "gft train"
NAMES = (*BY_NAME, PRODUCT)


def settings(options: argparse.Namespace, data: str, out: str, rung: Rung) -> dict[str, Any]:
    """A config of `gft train`: an epoch is a step."""
    tokens = options.micro_batch_tokens if rung.several else 1
    return {
        "model": options.model,
        "data": data,
        "out": out,
        "optim": {"lr": LR},
        "batch": {"groups_per_step": options.groups, "micro_batch_tokens": tokens, "layout": rung.layout},
        "checkpoint": {"every_steps": 1_000_000},
        "epochs": options.steps,
        "device": "cpu",
    }


def climb(options: argparse.Namespace, data: str, rung: Rung) -> dict[str, Any]:
    """Train in this process as a rung does; seconds, waits, losses, their sizes and gradient norms of each step."""
    import torch

    from gftdata.config import validate_config
    from gftdata.locations import checked_shards, open_data, read_index
    from gfttrain.config import TrainConfig
    from gfttrain.distributed import alone
    from gfttrain.model import load_for_training, outline, training_cost
    from gfttrain.objective import token_losses
    from gfttrain.plan import lay_out, make_schedule, select
    from gfttrain.prepare import make_optimizer
    from gfttrain.stream import Batch, ShardReader, collate, read_ahead

    config = validate_config(TrainConfig, settings(options, data, "unused", rung), "ladder.py")
    shards = open_data(data).shards
    index = read_index(shards)
    selection = select(index, config.objective)
    if not rung.skips:
        selection = replace(selection, trained_R=selection.used_R)
    steps = make_schedule(
        index, selection, config.batch, seed=0, epochs=options.steps, max_steps=None, skip_unjudged=False
    )
    cost = training_cost(outline(config.model))
    reader = ShardReader(index, selection, config.batch.shuffle_row_groups, checked_shards(shards))
    policy = load_for_training(config, alone(torch.device("cpu")))
    parameters = list(policy.parameters())
    optimizer = make_optimizer(config, parameters)

    def made(step: Any) -> Iterator[Batch]:
        for pack in lay_out(index, selection, step, config.batch, cost)[0]:
            yield collate(reader.examples(pack), config.batch.layout)

    def backward(batch: Batch, num_loss_tokens: int) -> tuple[float, float]:
        def losses(logprobs_C: torch.Tensor, chunk: slice) -> torch.Tensor:
            ref_C = batch.ref_logprobs_N[chunk]
            return token_losses(config.objective, logprobs_C, batch.advantages_N[chunk], ref_C, ref_C)

        if rung.fused:
            total, losses_N = policy(batch, losses)[:2]
        else:
            arguments: dict[str, Any] = {"attention_mask": batch.attention_mask_BL}
            if batch.segments is not None:  # as Policy.forward says which attention sees what
                seen = torch.ones(1, 1, 1, 1, dtype=torch.bool)
                arguments = {"attention_mask": seen, "segments": batch.segments}
            logits_BLV = policy.model(
                input_ids=batch.input_ids_BL, position_ids=batch.position_ids_BL, use_cache=False, **arguments
            ).logits
            logp_PV = torch.log_softmax(logits_BLV.flatten(0, 1), -1)  # P: positions of all rows
            losses_N = losses(logp_PV[batch.predicts_N, batch.target_ids_N], slice(None))
            total = losses_N.sum()
        loss = total / num_loss_tokens
        loss.backward()
        return loss.item(), losses_N.detach().abs().sum().item() / num_loss_tokens

    backward(next(made(steps[0])), steps[0].num_loss_tokens)
    optimizer.zero_grad(set_to_none=True)
    batches = (list(made(step)) for step in steps) if rung.ahead else (made(step) for step in steps)
    found: dict[str, Any] = {"seconds": [], "waited": [], "loss": [], "size": [], "grad_norm": []}
    with read_ahead(batches) if rung.ahead else nullcontext(batches) as works:
        for step in steps:
            began, sums = time.perf_counter(), (0.0, 0.0)
            work = iter(next(works))
            waited = time.perf_counter() - began
            while True:
                asked = time.perf_counter()
                batch = next(work, None)
                waited += time.perf_counter() - asked
                if batch is None:
                    break
                loss, size = backward(batch, step.num_loss_tokens)
                sums = sums[0] + loss, sums[1] + size
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.optim.max_grad_norm))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds = time.perf_counter() - began
            for key, value in zip(found, (seconds, waited, *sums, norm), strict=True):
                found[key].append(value)
    return found


@dataclass(frozen=True, slots=True)
class Run:
    """What one process did, a number for each step but the peak."""

    seconds: list[float]
    waited: list[float]  # seconds
    losses: list[float]
    sizes: list[float]  # of the losses of tokens, their mean
    grad_norms: list[float]
    peak: float  # GiB


def run_rung(options: argparse.Namespace, data: str, rung: Rung) -> Run:
    given = ["--model", options.model, "--groups", options.groups, "--steps", options.steps]
    given += ["--micro-batch-tokens", options.micro_batch_tokens, "--climb", data, rung.name]
    ran = run_process([sys.executable, __file__, *map(str, given)])
    found = last_json(ran)
    return Run(*found.values(), ran.peak_gib)


def run_product(options: argparse.Namespace, data: str) -> Run:
    """`gft train`. Its first step is a measured one too: what a rung computes before, it does in its checks."""
    with tempfile.TemporaryDirectory() as folder:
        out, path = Path(folder) / "run", Path(folder) / "train.yaml"
        path.write_text(json.dumps(settings(options, data, str(out), RUNGS[-1])))
        ran = run_process([sys.executable, "-m", "gftcli.main", "train", str(path)])
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    waited = [line["data_wait_fraction"] * line["seconds"] for line in lines]
    seconds, losses, norms = ([line[key] for line in lines] for key in ("seconds", "loss", "grad_norm"))
    return Run(seconds, waited, losses, [abs(loss) for loss in losses], norms, ran.peak_gib)


def check_same(name: str, run: Run, lowest: str, first: Run) -> None:
    """Ends the program where a rung does not do what the lowest does."""
    for what, found, expected, sizes in (
        ("loss", run.losses, first.losses, first.sizes),
        ("gradient norm", run.grad_norms, first.grad_norms, first.grad_norms),
    ):
        for number, (a, b, size) in enumerate(zip(found, expected, sizes, strict=True), 1):
            if not abs(a - b) <= TOLERANCE * size:
                sys.exit(f"not the same work: step {number}: {what} {a:.8g} of {name}, {b:.8g} of {lowest}")


def print_ladder(runs: dict[str, list[Run]], tokens: int) -> None:
    lines, rates = [], []
    for name, done in runs.items():
        found = [tokens / seconds for one in done for seconds in one.seconds]
        rates.append(statistics.median(found))
        peak = statistics.median(one.peak for one in done)
        wait = sum(sum(one.waited) for one in done) / sum(sum(one.seconds) for one in done)
        before = "" if len(rates) == 1 else f"{rates[-1] / rates[-2]:.2f}"
        lines.append([name, spread(found).text(), f"{peak:.2f}", before, f"{rates[-1] / rates[0]:.2f}", f"{wait:.1%}"])
    print_table(("", "tok/s", "peak, GiB", "over the one before", "over the first", "data wait"), lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/smollm2", help="a folder of a Llama-shaped model")
    parser.add_argument(
        "--shape", default="96/32", help="PROMPT/RESPONSE, tokens; responses are half to 1.5 times that"
    )
    parser.add_argument("--responses", type=int, default=8, help="of a group")
    parser.add_argument("--groups", type=int, default=2, help="of a step")
    parser.add_argument("--zero", type=int, default=50, help="%% of groups without signal")
    parser.add_argument("--micro-batch-tokens", type=int, default=2048, help="positions of a forward pass, padding too")
    parser.add_argument("--steps", type=int, default=1, help="of each process")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each rung")
    parser.add_argument("--rungs", nargs="+", choices=NAMES, default=NAMES, metavar="RUNG", help="only these")
    parser.add_argument("--smoke", action="store_true", help="the demo's model and tiny groups, once")
    parser.add_argument("--write", help=argparse.SUPPRESS)
    parser.add_argument("--climb", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.smoke:
        options.model, options.shape, options.responses = "samples/demo/model", "24/8", 4
        options.micro_batch_tokens, options.repeats = 128, 1
    if not 0 <= options.zero * options.groups // 100 < options.groups:
        parser.error(f"--zero {options.zero}: some of the {options.groups} groups need a signal")
    options.model = str((ROOT / options.model).absolute())
    if not (Path(options.model) / "config.json").is_file():
        parser.error(f"no model in {options.model}: run samples/smollm2/prepare.py, or name one with --model")
    return options


def main() -> None:
    options = parse()
    if options.climb:
        data, name = options.climb
        print(json.dumps(climb(options, data, BY_NAME[name])))
        return
    prompt, response = (int(part) for part in options.shape.split("/"))
    shape = Shape(prompt, response, options.responses, options.groups)
    if options.write:
        write_data(Path(options.write), options.model, shape, [options.zero], options.groups)
        return
    runs: dict[str, list[Run]] = {name: [] for name in NAMES if name in options.rungs}
    with tempfile.TemporaryDirectory() as folder:
        run_process([sys.executable, __file__, *sys.argv[1:], "--write", folder])
        data = str(Path(folder) / f"zero-{options.zero}")
        for name in alternating(list(runs), options.repeats):
            rung = BY_NAME.get(name)
            runs[name].append(run_product(options, data) if rung is None else run_rung(options, data, rung))
            lowest, first = next((name, done[0]) for name, done in runs.items())  # the first repeat begins with it
            check_same(name, runs[name][-1], lowest, first)
            print(f"{name}: {shape.tokens / statistics.median(runs[name][-1].seconds):,.1f} tok/s", file=sys.stderr)
    print(
        f"{Path(options.model).name}, {options.groups} groups of {options.responses} responses, prompt/response "
        f"{options.shape}, {options.zero} % of the groups without signal: {shape.tokens:,} response tokens a step\n"
        f"first step: loss {first.losses[0]:.8f}, gradient norm {first.grad_norms[0]:.6f}; equal to {TOLERANCE:g}\n"
    )
    print_ladder(runs, shape.tokens)
    print_end("torch", "transformers")


if __name__ == "__main__":
    try:
        main()
    except Failed as failed:
        end(failed)
