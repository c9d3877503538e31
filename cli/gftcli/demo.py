"""`gft demo`: the commands' own functions on a tiny model, one after the other, and what they find.

It prints what it measures, whichever method wins.
"""

import time
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console
from rich.text import Text

from gftcli import progress, show, show_comparison
from gftdata.config import GenerateConfig, load_config
from gftdata.errors import UserError
from gftdata.generate import generate
from gftdata.manifest import read_manifest
from gftdata.schema import table_to_groups
from gftdata.shards import shard_paths
from gftdata.types import Group
from gfttrain.advantage import group_advantages
from gfttrain.compare import compare, write_report
from gfttrain.compare_config import CompareConfig, load_compare, runs
from gfttrain.comparison import tabulate, write_comparison
from gfttrain.samples import GreedyAnswer, greedy_answers


def sample_folder() -> Path:
    """`samples/demo` of a checkout, or the copy that an installed package carries."""
    here = Path(__file__).resolve().parent
    for folder in (here / "demo_sample", here.parents[1] / "samples" / "demo"):
        if (folder / "generate.yaml").is_file():
            return folder
    raise UserError("the demo's files are not installed; run it from a checkout of the repository")


def run(console: Console, out: Path) -> None:
    """Generate, show a group, train and compare, say what to do next."""
    began = time.monotonic()
    sample, data = sample_folder(), out / "data"
    model = str(sample / "model")
    title(console, "1. Generate: 512 sums, for each 1 expert solution and 7 of the model's own")
    paths = {"model": model, "out": str(data), "prompts.path": str(sample / "train.jsonl")}
    settings = load_config(GenerateConfig, sample / "generate.yaml", values=paths)
    with progress.generation(console, settings) as listener:
        manifest = generate(settings, listener)
    assert manifest is not None
    show.manifest(console, str(data), manifest)
    config = comparison_config(sample, data, out)

    title(console, "2. One group: rewards are standardised within it (Group Advantage Learning)")
    show_group(console, first_mixed_group(data))

    title(console, f"3. Train {len(config.methods)} ways from the same shards, and compare")
    with progress.comparison(console) as listeners:
        for number, done in enumerate(compare(config, listeners), 1):
            show_comparison.outcome(console, number, done)
    rows = tabulate(config)
    show_comparison.comparison(console, config, rows)
    write_comparison(config, rows)
    with console.status("report", spinner="line"):
        written = write_report(config)

    title(console, "4. The first sum that not all of them get right, answered by each (greedy)")
    shown = show.table("method", "answer", "right")
    answers = {run.method: greedy_answers(run.folder, "sums") for run in runs(config)}
    number = first_difference(list(answers.values()))
    for method, of_method in answers.items():
        answer = of_method[number]
        shown.add_row(method, answer.question + answer.text, "yes" if answer.reward == 1.0 else "no")
    shown.columns[1].justify = "left"
    console.print(shown)
    closing(console, out, written.path, time.monotonic() - began)


def comparison_config(sample: Path, data: Path, out: Path) -> CompareConfig:
    """samples/demo/compare.yaml, wherever the sample is."""
    model = str(sample / "model")
    prompts = {"sums": "eval", "subtraction": "subtraction", "reversal": "reversal"}
    places = {f"eval.benchmarks.{name}.prompts.path": str(sample / f"{file}.jsonl") for name, file in prompts.items()}
    places |= {"model": model, "data": str(data), "out": str(out), "eval.benchmarks.sums.reference": model}
    return load_compare(sample / "compare.yaml", values=places)


def first_mixed_group(data: Path) -> Group:
    """The first group with right and wrong answers."""
    for path in shard_paths(data, read_manifest(data)):
        for group in table_to_groups(pq.read_table(path)):
            if len({response.verdict.reward for response in group.responses}) > 1:
                return group
    raise UserError(f"{data}: no group has both right and wrong answers")


def first_difference(answers: list[list[GreedyAnswer]]) -> int:
    """The first prompt whose answers have not the same reward for all; the first of all where there is none."""
    by_prompt = zip(*answers, strict=True)
    return next((i for i, of_prompt in enumerate(by_prompt) if len({a.reward for a in of_prompt}) > 1), 0)


def show_group(console: Console, group: Group) -> None:
    """A group as a table: source, response, reward, advantage, reference log-prob."""
    advantages = group_advantages([response.verdict.reward for response in group.responses])
    console.print(
        f"prompt {group.prompt.messages[-1].content}   ground truth {group.prompt.ground_truth}\n", highlight=False
    )
    rows = show.table("source", "response", "reward", "advantage", "log-prob/token")
    rows.columns[1].justify = "left"
    for response, advantage in zip(group.responses, advantages, strict=True):
        style = "green" if advantage > 0 else "red"
        rows.add_row(
            response.completion.source,
            response.completion.text,
            show.decimal(response.verdict.reward, 1),
            Text(f"{advantage:+.2f}", style=style),
            show.decimal(float(response.ref_logprobs.mean())),
        )
    console.print(rows)


def closing(console: Console, out: Path, page: Path, seconds: float) -> None:
    """Which files to open, and how to do the same with one's own model."""
    title(console, f"Done in {seconds:.0f} seconds. Look at")
    here = show.relative(out)
    show.facts(
        console,
        {
            show.relative(page): "curves, tables, and the groups token by token: open it in a browser",
            f"{here}/data/data/*.parquet": "the response groups: one row a prompt",
            f"{here}/data/manifest.json": "how they were made, with checksums",
            f"{here}/gft/metrics.jsonl": "every step of training",
            f"{here}/gft/evals/sums/samples.parquet": "every answer with its verdict",
            f"{here}/gft/final/": "the trained model, for AutoModelForCausalLM.from_pretrained",
        },
    )
    console.print(
        "\nThe same with your own model and data:\n\n"
        "  gft init my-run --model PATH-OR-HUB-ID --prompts prompts.jsonl\n"
        "  gft generate my-run/generate.yaml\n"
        "  gft train my-run/train.yaml\n"
        "  gft compare my-run/compare.yaml",
        highlight=False,
        soft_wrap=True,
    )


def title(console: Console, text: str) -> None:
    console.print(f"\n{text}\n", style="bold", highlight=False, soft_wrap=True)
