"""`gft demo`: the commands' own functions on a tiny model, one after the other, and what they find.

It prints what it measures, whichever method wins.
"""

import time
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console
from rich.text import Text

from gftcli import progress, show
from gftdata.config import GenerateConfig, load_config
from gftdata.errors import UserError
from gftdata.generate import generate
from gftdata.schema import table_to_groups
from gftdata.shards import read_manifest, shard_paths
from gftdata.types import Group
from gfttrain.advantage import group_advantages
from gfttrain.compare import Listeners, Outcome, compare
from gfttrain.config import EvalConfig, TrainConfig
from gfttrain.presets import METHODS
from gfttrain.samples import GreedyAnswer, greedy_answers

SHOWN = ("SFT", "DFT", "RFT", "GFT", "GFT w/o GAL", "GFT w/o DCR")
PROBES = ("subtraction", "reversal")


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

    title(console, "2. One group: rewards are standardised within it (Group Advantage Learning)")
    show_group(console, first_mixed_group(data))

    title(console, f"3. Train {len(SHOWN)} ways from the same shards, and compare")
    places = {"model": model, "data": str(data), "out": str(out)}
    config = load_config(TrainConfig, sample / "train.yaml", values=places)
    outcomes = compare_with_progress(console, config, eval_config(sample))
    show_outcomes(console, outcomes)

    title(console, "4. The first sum that not all of them get right, answered by each (greedy)")
    rows = show.table("method", "answer", "right")
    answers = {outcome.method: greedy_answers(outcome.folder, "sums") for outcome in outcomes}
    number = first_difference(list(answers.values()))
    for method, of_method in answers.items():
        answer = of_method[number]
        rows.add_row(method, answer.question + answer.text, "yes" if answer.reward == 1.0 else "no")
    rows.columns[1].justify = "left"
    console.print(rows)
    closing(console, out, time.monotonic() - began)


def eval_config(sample: Path) -> EvalConfig:
    """The sums, and the two skills that fine-tuning never touches."""
    places = {f"benchmarks.{probe}.prompts.path": str(sample / f"{probe}.jsonl") for probe in PROBES}
    places |= {"benchmarks.sums.prompts.path": str(sample / "eval.jsonl")}
    return load_config(
        EvalConfig, sample / "eval.yaml", values={**places, "benchmarks.sums.reference": str(sample / "model")}
    )


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


def compare_with_progress(console: Console, config: TrainConfig, evals: EvalConfig) -> list[Outcome]:
    """Run the comparison, a line for each model as it is done."""
    outcomes: list[Outcome] = []
    total = len(SHOWN) + 1
    with console.status("", spinner="line") as status:

        def on_begin(method: str, what: str) -> None:
            status.update(f"{method}: {what}")
            state["method"] = method

        state = {"method": ""}
        listeners = Listeners(
            on_begin=on_begin,
            on_train=lambda event: status.update(
                f"{state['method']}: step {event.step} of {event.num_steps}  "
                + (progress.step_note(event.metrics) if event.metrics else "")
            ),
        )
        for outcome in compare(config, {name: METHODS[name] for name in SHOWN}, evals, listeners):
            outcomes.append(outcome)
            accuracy = outcome.results["sums"].pass_at[1].value
            console.print(f"  {len(outcomes)}/{total}  {outcome.method:<12} pass@1 {accuracy:.3f}", highlight=False)
    return outcomes


def show_outcomes(console: Console, outcomes: list[Outcome]) -> None:
    """The comparison as one table."""
    rows = show.table("method", "pass@1", "95 %", "pass@16", "greedy", "entropy", "KL", "subtract", "reverse")
    for outcome in outcomes:
        sums = outcome.results["sums"]
        rows.add_row(
            outcome.method,
            show.value(sums.pass_at[1]),
            show.interval(sums.pass_at[1]),
            show.value(sums.pass_at.get(16)),
            show.value(sums.greedy),
            show.decimal(sums.entropy),
            show.decimal(sums.kl),
            *(show.value(outcome.results[probe].pass_at[1]) for probe in PROBES),
        )
    console.print()
    console.print(rows)
    best = max(outcomes, key=lambda outcome: outcome.results["sums"].pass_at[1].value)
    console.print(
        f"\nHighest pass@1 here: {best.method}. That is one training seed; 95 % is the interval over prompts.\n"
        "entropy, and KL to the base model, in nats per token. subtract and reverse are pass@1 on two\n"
        "skills that training never touched: what falls there is forgotten.",
        highlight=False,
    )


def closing(console: Console, out: Path, seconds: float) -> None:
    """Which files to open, and how to do the same with one's own model."""
    title(console, f"Done in {seconds:.0f} seconds. Look at")
    here = show.relative(out)
    show.facts(
        console,
        {
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
        "  gft train my-run/train.yaml",
        highlight=False,
        soft_wrap=True,
    )


def title(console: Console, text: str) -> None:
    console.print(f"\n{text}\n", style="bold", highlight=False, soft_wrap=True)
