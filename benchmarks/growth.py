"""How the time a response token grows: group size, prompt length, vocabulary, number of shards, one at a time.

    python benchmarks/growth.py                              # minutes; writes benchmarks/figures/growth.svg
    python benchmarks/growth.py --smoke --figure /tmp/x.svg  # seconds: says nothing of speed

Training. A Llama of 4 layers, 192 wide, random weights, float32 on the CPU, tied embedding; nothing is downloaded. A
step is the trainer's: layout with shared prefixes, collating, forward and backward pass with the fused head, clipping,
AdamW. From the common point (groups of 8, prompts of 256 tokens, a vocabulary of 8,192) one thing is changed. Every
step has 32 responses of 64 tokens, whatever the size of the groups, so that what a step costs by itself is shared by
equally many response tokens everywhere.

Shards. The same 1,024 groups of 8 short responses in 1 to 1,024 files: index, plan, checksums, shuffled reading and
collating of an epoch, without a model, with the files in the page cache.

Every point is measured once a round, in rounds that go through all points forwards and backwards; the first time at
each is not counted. Medians, and quartiles as whiskers. `exponent` is log(last / first time) / log(last / first size):
1 is time that grows as the size does, 0 time that does not; `of the last pair` is the same of the last two points,
where the curve is going.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from gpu import build, examples_of, run_micro_batch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator
from measure import ROOT, Spread, alternating, print_end, print_table, spread
from stream import batches_of, import_trainer, plan_epoch
from synthetic import Lengths, make_table, make_text, write_data
from transformers import LlamaConfig

from gftdata.index import Index
from gftdata.locations import open_data
from gfttrain.config import TrainConfig
from gfttrain.model import training_cost
from gfttrain.plan import lay_out, make_schedule, select
from gfttrain.prepare import make_optimizer
from gfttrain.stream import collate

RESPONSES, RESPONSE_TOKENS = 32, 64  # of a step, of a response
EPOCH_GROUPS = 1024  # that are cut into shards
FIGURE = ROOT / "benchmarks" / "figures" / "growth.svg"


@dataclass(frozen=True, slots=True)
class Point:
    """What a training step is made of."""

    group: int = 8  # responses to a prompt
    prompt: int = 256  # tokens
    vocab: int = 8192


@dataclass(frozen=True, slots=True)
class Panel:
    """What grows in one of the panels."""

    name: str  # of the axis, with its unit
    field: str  # of Point; `shards` is that of files
    sizes: tuple[int, ...]
    unit: str  # of the time a token


PANELS = (
    Panel("group size, responses", "group", (1, 2, 4, 8, 16, 32), "ms"),
    Panel("prompt length, tokens", "prompt", (32, 64, 128, 256, 512, 1024, 2048), "ms"),
    Panel("vocabulary, tokens", "vocab", (1024, 4096, 8192, 16384, 32768, 65536, 131072), "ms"),
    Panel("shards with the same groups, files", "shards", (1, 4, 16, 64, 256, 1024), "us"),
)
SMOKE = {"group": (1, 4), "prompt": (8, 32), "vocab": (256, 512), "shards": (1, 8)}
SCALE = {"ms": 1e3, "us": 1e6}
LABEL = {"ms": "ms", "us": "µs"}


# ---- a training step


def step_of(point: Point, smoke: bool) -> Callable[[], float]:
    """Seconds a response token of one optimizer step, each time it is called."""
    tokens, responses = (8, 4) if smoke else (RESPONSE_TOKENS, RESPONSES)
    width, layers = (32, 1) if smoke else (192, 4)
    torch.manual_seed(0)
    model = LlamaConfig(
        vocab_size=point.vocab,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    num_groups = responses // point.group
    config = TrainConfig(
        model="random weights",
        data=("random tokens",),
        out="nowhere",
        dtype="float32",
        objective={"advantage": "one"},  # every response counts, whatever its reward
        batch={"groups_per_step": num_groups},
    )
    index = index_of(num_groups, point, tokens)
    selection = select(index, config.objective)
    (step,) = make_schedule(index, selection, config.batch, seed=0, epochs=1, max_steps=1, skip_unjudged=False)
    policy = build(model, torch.float32, torch.device("cpu"), config.batch.layout)
    parameters = list(policy.parameters())
    optimizer, cost = make_optimizer(config, parameters), training_cost(policy.model)
    (packs,) = lay_out(index, selection, step, config.batch, cost)
    drawn = [examples_of(pack, index, selection.advantages_R, point.vocab) for pack in packs]  # a reader's work

    def run() -> float:
        began = time.perf_counter()
        lay_out(index, selection, step, config.batch, cost)
        for examples in drawn:
            batch = collate(examples, config.batch.layout)
            run_micro_batch(policy, config, batch, step.num_loss_tokens, fused=True)
        torch.nn.utils.clip_grad_norm_(parameters, config.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return (time.perf_counter() - began) / step.num_loss_tokens

    return run


def index_of(num_groups: int, point: Point, tokens: int) -> Index:
    """Groups of self samples of equal length."""
    num_responses, number = num_groups * point.group, np.arange(num_groups, dtype=np.int32)
    return Index(
        paths=(Path("imaginary.parquet"),),
        path_of_group=np.zeros(num_groups, np.int32),
        row_group_of_group=np.zeros(num_groups, np.int32),
        row_of_group=number,
        offsets=np.arange(num_groups + 1, dtype=np.int64) * point.group,
        num_prompt_tokens=np.full(num_groups, point.prompt, np.int32),
        num_tokens=np.full(num_responses, tokens, np.int32),
        rewards=np.ones(num_responses, np.float32),
        source_names=("self",),
        source_codes=np.zeros(num_responses, np.int32),
    )


# ---- shards


def epoch_of(data: Path) -> Callable[[], float]:
    """Seconds a response token of an epoch's index, plan and reading, each time it is called."""

    def run() -> float:
        began, tokens = time.perf_counter(), 0
        shards = open_data(str(data)).shards
        with batches_of(shards, plan_epoch(shards, advantage="one")) as works:
            for work in works:
                tokens += sum(len(batch.target_ids_N) for batch in work)
        return (time.perf_counter() - began) / tokens

    return run


def cut(folder: Path, sizes: Sequence[int], num_groups: int) -> dict[int, Path]:
    """The same groups as so many shards -> the data set of each."""
    rng = np.random.default_rng(0)
    table = make_table(rng, num_groups, make_text(rng), 0, Lengths(prompt=64, shortest=32, longest=96))
    found = {}
    for size in sizes:
        each = num_groups // size
        found[size] = folder / str(size)
        write_data(found[size], (table.slice(n * each, each) for n in range(size)), size)
    return found


# ---- rounds, tables, the figure


def measure(folder: Path, panels: Sequence[Panel], repeats: int, smoke: bool) -> dict[tuple[str, int], Spread]:
    """(field, size) -> seconds a response token."""
    runs: dict[tuple[str, int], Callable[[], float]] = {}
    for panel in panels:
        if panel.field == "shards":
            places = cut(folder, panel.sizes, 8 if smoke else EPOCH_GROUPS)
            runs |= {("shards", size): epoch_of(place) for size, place in places.items()}
        else:
            common = Point(group=2, prompt=16, vocab=256) if smoke else Point()
            for size in panel.sizes:
                runs[panel.field, size] = step_of(replace(common, **{panel.field: size}), smoke)
    times: dict[tuple[str, int], list[float]] = {key: [run()][:0] for key, run in runs.items()}  # not counted
    for key in alternating(list(runs), repeats):
        times[key].append(runs[key]())
    return {key: spread(found) for key, found in times.items()}


def exponent(small: int, large: int, first: float, last: float) -> float:
    return math.log(last / first) / math.log(large / small)


def show(panels: Sequence[Panel], found: dict[tuple[str, int], Spread]) -> None:
    for panel in panels:
        scale = SCALE[panel.unit]
        print()
        rows = []
        for size in panel.sizes:
            one = found[panel.field, size]
            median, low, high = (scale * value for value in (one.median, one.low, one.high))
            rows.append((f"{size:,}", f"{median:.3f}", f"{low:.3f} to {high:.3f}"))
        print_table((panel.name, f"{panel.unit} a response token", "middle half"), rows)
        ends, pair = exponents(panel, found)
        print(f"exponent {ends:.2f} between the ends, {pair:.2f} of the last pair")


def exponents(panel: Panel, found: dict[tuple[str, int], Spread]) -> tuple[float, float]:
    """Between first and last size, and between the last two."""
    medians = [found[panel.field, size].median for size in panel.sizes]
    ends = exponent(panel.sizes[0], panel.sizes[-1], medians[0], medians[-1])
    return ends, exponent(panel.sizes[-2], panel.sizes[-1], medians[-2], medians[-1])


def draw(panels: Sequence[Panel], found: dict[tuple[str, int], Spread], path: Path) -> None:
    """Four panels with logarithmic axes, on white: they are read on dark pages too."""
    figure = Figure(figsize=(9, 6.5), layout="constrained", facecolor="white")
    grid: Any = figure.subplots(2, 2)
    for axes, panel in zip(grid.flat, panels, strict=True):
        scale, spreads = SCALE[panel.unit], [found[panel.field, size] for size in panel.sizes]
        medians = np.array([one.median for one in spreads]) * scale
        below = medians - np.array([one.low for one in spreads]) * scale
        above = np.array([one.high for one in spreads]) * scale - medians
        axes.errorbar(panel.sizes, medians, [below, above], fmt="o-", color="#0b5fad", capsize=3, markersize=4)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_ylim(min(medians) / 2, max(medians) * 2)
        axes.set_xticks(panel.sizes, [f"{size:,}" for size in panel.sizes], rotation=30 if len(panel.sizes) > 6 else 0)
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel(panel.name)
        axes.set_ylabel(f"{LABEL[panel.unit]} a response token")
        axes.set_title(f"exponent {exponents(panel, found)[0]:.2f} between the ends", fontsize=10)
        axes.grid(color="#dddddd", linewidth=0.6)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "growth"}):  # the same numbers, the same bytes
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    parser.add_argument("--smoke", action="store_true", help="two small sizes of each, one round")
    options = parser.parse_args()
    panels = [replace(panel, sizes=SMOKE[panel.field]) for panel in PANELS] if options.smoke else list(PANELS)
    import_trainer()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), panels, 1 if options.smoke else options.repeats, options.smoke)
    show(panels, found)
    draw(panels, found, options.figure)
    print(f"\nmedians of {1 if options.smoke else options.repeats} rounds; drawn in {options.figure}")
    print_end("torch", "transformers", "pyarrow", "matplotlib")


if __name__ == "__main__":
    main()
