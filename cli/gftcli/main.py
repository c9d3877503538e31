"""The `gft` command: parse, call, print. What a command does is in gftdata and gfttrain.

Those are imported inside the commands, so that `gft --help` is instant and needs neither torch nor transformers.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gftdata.errors import OtherRankError, UserError, storage_failed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gftdata.derive import Job

app = typer.Typer(
    name="gft",
    help="Group Fine-Tuning: precompute groups of responses, then train on them with rectified coefficients.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML settings; `gft init` writes a starter.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one setting, e.g. --set optim.lr=2e-6. Repeatable."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, do nothing.")]
Out = Annotated[str | None, typer.Option("--out", help="Overrides `out` of the config.")]
Model = Annotated[str | None, typer.Option("--model", help="Overrides `model` of the config.")]
Output = Annotated[str, typer.Argument(metavar="OUT", help="As `out` of the config: a folder or s3://...")]
Data = Annotated[Path, typer.Argument(metavar="DATA", help="Folder of a finished data set; it is only read.")]
New = Annotated[Path, typer.Option("--out", metavar="NEW", help="Folder of the new data set.")]
GroupsPerShard = Annotated[
    int | None, typer.Option("--groups-per-shard", min=1, help="Of the new data set; default: as in DATA's recipe.")
]


@app.command()
def generate(
    config: ConfigFile,
    model: Model = None,
    out: Out = None,
    set_: Set = None,
    dry_run: DryRun = False,
    pilot: Annotated[
        int | None,
        typer.Option(
            "--pilot", metavar="N", min=1, help="With --dry-run: N prompts for real, and what all would take."
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="I/N", help="Task I of N, from 0; default: as the cluster says."),
    ] = None,
) -> None:
    """Turn prompts into response groups with rewards and reference log-probs, as Parquet shards.

    Stopped at any moment, the same command continues. SIGTERM and SIGUSR1 end it with exit code 75. Of several tasks,
    whichever finishes last marks the data set final.
    """
    from gftcli import progress, show
    from gftdata.config import GenerateConfig, load_config

    settings = load_config(GenerateConfig, config, set_ or [], _given(model=model, out=out))
    _quiet_libraries()
    from gftdata import generate as generation
    from gftdata.pilot import run_pilot
    from gftdata.prepare import preview
    from gftdata.tasks import find_task, stop_on_signals

    console, which = show.open_console(), find_task(task)
    if pilot is not None and not dry_run:
        raise UserError("--pilot goes with --dry-run: it measures and keeps nothing")
    if dry_run:
        planned = preview(settings)
        show.generation_plan(console, settings, planned, which)
        if pilot is not None:
            console.print(f"\nRunning {min(pilot, planned.prompts.prompts)} prompts for real\n", highlight=False)
            with progress.generation(console, settings) as listener:
                measured = run_pilot(settings, planned, pilot, listener)
            show.pilot(console, measured)
        return
    if not which.alone:
        console.print(f"{which} ({which.named_by})", highlight=False)
    with stop_on_signals(), progress.generation(console, settings) as listener:
        manifest = generation.generate(settings, listener, which)
    if manifest is None:
        console.print(
            f"{which} is done; other tasks' shards are missing still. The last one marks the data set final; "
            f"`gft status {settings.out}` shows how far they are",
            soft_wrap=True,
            highlight=False,
        )
        return
    show.manifest(console, settings.out, manifest)


@app.command()
def finalize(out: Output) -> None:
    """Check that every prompt is there, and mark the data set final. The last task of a job does it by itself."""
    from gftcli import show
    from gftdata.finalize import finalize as mark_final
    from gftdata.store import open_store

    manifest = mark_final(open_store(out))
    show.manifest(show.open_console(), out, manifest)


@app.command()
def status(
    out: Output, as_json: Annotated[bool, typer.Option("--json", help="For programs: one JSON object.")] = False
) -> None:
    """How far a running, dead or finished `gft generate` is: read from its output alone."""
    import json
    from dataclasses import asdict

    from gftcli import show
    from gftdata.status import read_status
    from gftdata.store import open_store

    found = read_status(open_store(out))
    if as_json:
        print(json.dumps(asdict(found) | {"shards_missing": found.shards_missing}, default=lambda x: x.model_dump()))
    else:
        show.status(show.open_console(), out, found)


@app.command()
def validate(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="A finished data set: folder, hf://datasets/... or s3://...")
    ],
) -> None:
    """Check a data set: schema, checksums, completeness, content. Names every bad file; exit code 1 if there is one."""
    from gftcli import show
    from gftdata.locations import open_data, verify_data

    console = show.open_console()
    manifest = open_data(data).manifest
    problems = verify_data(data)
    for problem in problems:
        console.print(problem, markup=False, soft_wrap=True)
    if problems:
        console.print(f"{data}: {len(problems)} problems", style="bold red", soft_wrap=True)
        raise typer.Exit(1)
    rows = sum(record.rows for record in manifest.shards)
    console.print(f"{data}: whole: {rows:,} groups in {len(manifest.shards)} shards", soft_wrap=True)


@app.command()
def inspect(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="A finished data set: folder, hf://datasets/... or s3://...")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one JSON object.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit code 1 where a problem is found.")] = False,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read texts and token ids of all groups, not of some; fetches remote shards.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="Its tokenizer encodes prompts again; default: the reference model if it is here."
        ),
    ] = None,
    show_: Annotated[
        int | None, typer.Option("--show", metavar="N", min=1, help="Instead: the first N groups that fit, in full.")
    ] = None,
    id_: Annotated[
        str | None, typer.Option("--id", help="With --show: the beginning of a prompt_id, or a source_id.")
    ] = None,
    source: Annotated[
        list[str] | None, typer.Option("--source", help="With --show: a response of this source. Repeatable.")
    ] = None,
    min_reward: Annotated[
        float | None, typer.Option("--min-reward", help="With --show: a response with at least this reward.")
    ] = None,
    max_reward: Annotated[float | None, typer.Option("--max-reward", help="With --show: with at most this.")] = None,
    min_tokens: Annotated[
        int | None, typer.Option("--min-tokens", help="With --show: of at least this length.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="With --show: of at most this length.")] = None,
    signal: Annotated[
        bool | None, typer.Option("--signal/--no-signal", help="With --show: rewards of the group differ, or not.")
    ] = None,
) -> None:
    """See what is in a data set and audit it, or read groups in full (--show N, with filters).

    A group is shown when a response fits all of --source, --*-reward and --*-tokens; those that do are marked.
    """
    import json
    from dataclasses import asdict

    from gftcli import show, show_data
    from gftdata.browse import Filter, show_groups
    from gftdata.inspection import as_json as json_of
    from gftdata.inspection import inspect_data
    from gftdata.locations import open_data

    wanted = Filter(id_, tuple(source or ()), min_reward, max_reward, min_tokens, max_tokens, signal)
    if show_ is not None:
        if strict or deep or model is not None:
            raise UserError("--show only shows groups: leave --strict, --deep and --model out")
        shown = show_groups(open_data(data), wanted, show_)
        if as_json:
            print(json.dumps([asdict(group) for group in shown]))
        else:
            show_data.groups(show.open_console(), shown, is_filtered=wanted.asks_of_responses)
        return
    if wanted != Filter():
        raise UserError("filters choose the groups to show: add --show N")
    found = inspect_data(data, deep=deep, model=model)
    if as_json:
        print(json.dumps(json_of(found)))
    else:
        show_data.inspection(show.open_console(), found)
    if strict and found.has_problems:
        raise typer.Exit(1)


@app.command()
def push(
    data: Data,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The data set's name on the Hub.")],
    license_: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="Licence to share it under, e.g. apache-2.0, cc-by-4.0, other."),
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option("--language", metavar="CODE", help="Of its texts, e.g. en. Repeatable.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="A new repository is only for its owner; one that is there stays.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Share a finished data set on the Hub, with a card. Given again, it uploads only what has changed.

    HF_TOKEN, or `hf auth login`, says who you are.
    """
    from gftcli import progress, show
    from gftdata import push as pushing

    console = show.open_console()
    with progress.transfer(console, "uploaded") as listener:
        plan = pushing.plan_push(data, repo, license=license_, languages=language or (), on_event=listener)
    if dry_run:
        show.push_plan(console, plan)
        return
    with progress.transfer(console, "uploaded") as listener:
        done = pushing.push(plan, private=private, on_event=listener)
    show.pushed(console, plan, done)


@app.command()
def pull(
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The data set's name on the Hub.")],
    data: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for it: new, or of an earlier pull of it.")],
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit; default: main.")] = None,
) -> None:
    """Bring a data set from the Hub and check every byte of it. Stopped, the same command continues."""
    from gftcli import progress, show
    from gftdata import pull as pulling

    console = show.open_console()
    with progress.transfer(console, "downloaded") as listener:
        done = pulling.pull(repo, data, revision=revision, on_event=listener)
    show.pulled(console, data, done)


@app.command()
def rejudge(
    data: Data,
    out: New,
    reward: Annotated[str, typer.Option("--reward", metavar="NAME", help="As `reward.name` of `gft generate`.")],
    set_: Set = None,
    dry_run: DryRun = False,
) -> None:
    """Write a data set anew with the rewards of another function. Stopped, the same command continues."""
    from gftdata.config import load_settings
    from gftdata.derive import RejudgeConfig, plan_rejudge

    settings = load_settings(RejudgeConfig, {}, "gft rejudge", set_ or [], {"reward.name": reward})
    _derive([plan_rejudge(data, out, settings)], dry_run)


@app.command()
def rescore(
    data: Data,
    out: New,
    model: Annotated[str, typer.Option("--model", help="The new reference model: folder or Hub id.")],
    set_: Set = None,
    dry_run: DryRun = False,
) -> None:
    """Write a data set anew with the reference log-probs of another model. Stopped, the same command continues."""
    from gftdata.config import load_settings
    from gftdata.derive import RescoreConfig, plan_rescore

    settings = load_settings(RescoreConfig, {}, "gft rescore", set_ or [], {"model": model})
    _quiet_libraries()
    _derive([plan_rescore(data, out, settings)], dry_run)


@app.command()
def merge(
    data: Annotated[list[Path], typer.Argument(metavar="DATA...", help="Folders of finished data sets of one kind.")],
    out: New,
    duplicates: Annotated[
        Literal["error", "first"],
        typer.Option("--duplicates", help="A prompt that is in two of them: stop, or keep the first one's group."),
    ] = "error",
    groups_per_shard: GroupsPerShard = None,
    dry_run: DryRun = False,
) -> None:
    """Put data sets of the same tokenizer and reference model together."""
    from gftdata.regroup import plan_merge

    _derive([plan_merge(data, out, duplicates=duplicates, groups_per_shard=groups_per_shard)], dry_run)


@app.command("filter")
def filter_(
    data: Data,
    out: New,
    min_pass: Annotated[float, typer.Option("--min-pass", help="Lowest pass rate of a group that is kept.")] = 0.0,
    max_pass: Annotated[float, typer.Option("--max-pass", help="Highest pass rate of a group that is kept.")] = 1.0,
    source: Annotated[
        list[str] | None,
        typer.Option("--source", help="Whose responses the pass rate is of, e.g. self. Repeatable; default: all."),
    ] = None,
    with_signal: Annotated[
        bool, typer.Option("--with-signal", help="Keep only groups whose rewards are not all equal.")
    ] = False,
    groups_per_shard: GroupsPerShard = None,
    dry_run: DryRun = False,
) -> None:
    """Keep the groups whose pass rate is in a range, bounds included."""
    from gftdata.regroup import plan_filter

    job = plan_filter(
        data,
        out,
        min_pass=min_pass,
        max_pass=max_pass,
        names=source or (),
        with_signal=with_signal,
        groups_per_shard=groups_per_shard,
    )
    _derive([job], dry_run)


@app.command()
def split(
    data: Data,
    out_a: Annotated[Path, typer.Option("--out-a", metavar="A", help="Folder of the data set that gets the share.")],
    out_b: Annotated[Path, typer.Option("--out-b", metavar="B", help="Folder of the data set that gets the rest.")],
    share: Annotated[float, typer.Option("--share", help="Share of the prompts that goes to A, e.g. 0.1.")],
    seed: Annotated[int, typer.Option("--seed", help="Another seed is another split.")] = 0,
    groups_per_shard: GroupsPerShard = None,
    dry_run: DryRun = False,
) -> None:
    """Split a data set in two, by prompt: the same prompt is on the same side in every data set."""
    from gftdata.regroup import plan_split

    jobs = plan_split(data, out_a, out_b, share=share, seed=seed, groups_per_shard=groups_per_shard)
    _derive(jobs, dry_run)


@app.command("import")
def import_(
    layout: Annotated[str, typer.Argument(metavar="FORMAT", help="authors (the paper's published data) or verl.")],
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=".parquet or .jsonl file, folder, or Hub data set.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Gets prompts.jsonl and generate.yaml.")],
    expert: Annotated[
        str | None, typer.Option("--expert", metavar="COLUMN", help="Demonstrations; authors: extra_info.answer.")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", metavar="COLUMN", help="A stronger model's; authors: extra_info.model_answer."),
    ] = None,
    subset: Annotated[str | None, typer.Option("--subset", help="Of a Hub data set: its configuration.")] = None,
    split: Annotated[str, typer.Option("--split", help="Of a folder or Hub data set.")] = "train",
    model: Annotated[str, typer.Option("--model", help="The model to fine-tune: folder or Hub id.")] = "PATH-OR-HUB-ID",
) -> None:
    """Make prompts, and the config for `gft generate`, of the data of another program."""
    from gftcli import show
    from gftdata.imports import import_prompts

    made = import_prompts(layout, source, out, expert=expert, teacher=teacher, subset=subset, split=split, model=model)
    show.imported(show.open_console(), made)


@app.command("export")
def export_(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="A finished data set: folder, hf://datasets/... or s3://...")
    ],
    kind: Annotated[
        str, typer.Option("--format", metavar="F", help="verl, trl-sft, trl-dpo, trl-kto (unpaired) or trl-grpo.")
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="A .parquet file, or a folder: train.parquet in it.")
    ],
    source: Annotated[
        list[str] | None,
        typer.Option("--source", help="Whose responses; repeatable. SFT: expert; DPO, KTO: all. `teacher` is any."),
    ] = None,
    min_reward: Annotated[
        float | None,
        typer.Option(
            "--min-reward", help="SFT: leave out lower ones; DPO: of the chosen; KTO: label true from here (1)."
        ),
    ] = None,
    pairs: Annotated[
        Literal["one", "all"],
        typer.Option("--pairs", help="DPO: best against worst of a group, or any two that differ."),
    ] = "one",
    tokens: Annotated[bool, typer.Option("--tokens", help="SFT, DPO: token ids as stored, in place of texts.")] = False,
    truncated: Annotated[
        bool, typer.Option("--truncated", help="Also responses that the length limit cut; TRL ends them.")
    ] = False,
) -> None:
    """Write a data set as Parquet for TRL or verl, and say what that format cannot hold."""
    from gftcli import show
    from gftdata.exports import export
    from gftdata.layouts import ExportOptions

    options = ExportOptions(tuple(source or ()), min_reward, pairs, tokens, truncated)
    show.exported(show.open_console(), kind, export(data, kind, out, options))


@app.command()
def train(
    config: ConfigFile,
    model: Model = None,
    data: Annotated[str | None, typer.Option("--data", help="Overrides `data` of the config.")] = None,
    out: Out = None,
    set_: Set = None,
    nproc: Annotated[
        int,
        typer.Option(
            "--nproc", metavar="N", min=1, help="Processes (GPUs) of this machine; under srun or torchrun: 1."
        ),
    ] = 1,
    dry_run: DryRun = False,
) -> None:
    """Train on response groups. Stopped at any moment, the same command resumes from the last checkpoint.

    SIGTERM and SIGUSR1 save and end with exit code 75. Under srun or torchrun, each process joins the others.
    """
    from gftcli import progress, show
    from gftdata.config import load_config
    from gfttrain.config import TrainConfig

    settings = load_config(TrainConfig, config, set_ or [], _given(model=model, data=data, out=out))
    _quiet_libraries()
    from gfttrain import train as training
    from gfttrain.distributed import is_first, launch
    from gfttrain.runs import METRICS

    if nproc > 1 and not dry_run:
        words = [word for word in sys.argv[1:] if not word.startswith("--nproc=")]
        if "--nproc" in words:
            place = words.index("--nproc")
            del words[place : place + 2]
        raise typer.Exit(launch(nproc, [sys.executable, "-m", "gftcli.main", *words]))
    console = show.open_console() if is_first() else show.silent_console()
    if dry_run:
        from gftdata.engines.hf import pick_device
        from gfttrain.fit import with_micro_batches
        from gfttrain.forecast import forecast
        from gfttrain.prepare import prepare

        prepared, device = prepare(settings), pick_device(settings.device)
        settings = with_micro_batches(settings, prepared, device, nproc)
        show.training_plan(console, settings, prepared, forecast(settings, prepared, device, nproc))
        return
    try:
        with progress.training(console, settings) as listener:
            final = training.train(settings, listener)
    except training.Stopped as stopped:
        console.print(str(stopped), soft_wrap=True, highlight=False)
        raise typer.Exit(75) from None
    console.print(f"\nTrained model: {final}", soft_wrap=True, highlight=False)
    console.print(f"Metrics:       {Path(settings.out) / METRICS}", soft_wrap=True, highlight=False)


@app.command("eval")
def evaluate(
    config: ConfigFile,
    model: Model = None,
    out: Out = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="DIR", help="Compare with the results in this folder, prompt by prompt."),
    ] = None,
    set_: Set = None,
    dry_run: DryRun = False,
) -> None:
    """Measure pass@1 over samples, pass@k, greedy, entropy and KL to a reference on one or more benchmarks.

    Results go to `out`, or the run folder of the model. Stopped at any moment, the same command continues; SIGTERM and
    SIGUSR1 end it with exit code 75.
    """
    from gftcli import progress, show
    from gftdata.config import load_config
    from gfttrain.config import EvalConfig

    settings = load_config(EvalConfig, config, set_ or [], _given(model=model, out=out))
    _quiet_libraries()
    from gftdata.tasks import stop_on_signals
    from gfttrain import benchmarks, paired
    from gfttrain import evaluate as evaluation
    from gfttrain.results import EVALS, EVALS_FOLDER

    console, folder = show.open_console(), benchmarks.results_folder(settings)
    if against is not None:
        paired.check_results(against)
    if dry_run:
        show.evaluation_plan(console, benchmarks.plan(settings))
        return
    with stop_on_signals(), progress.evaluation(console) as listener:
        results = evaluation.evaluate(settings, listener)
    show.evaluations(console, results)
    here = show.relative(folder)
    console.print(f"\nResults: {here}/{EVALS}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"Samples: {here}/{EVALS_FOLDER}/*/samples.parquet", soft_wrap=True, highlight=False, markup=False)
    if against is not None:
        console.print()
        show.paired(console, here, show.relative(against), paired.compare_all(folder, against, tuple(results)))


@app.command()
def compare(
    config: ConfigFile,
    model: Model = None,
    data: Annotated[str | None, typer.Option("--data", help="Overrides `data` of the config.")] = None,
    out: Out = None,
    set_: Set = None,
    nproc: Annotated[int, typer.Option("--nproc", metavar="N", min=1, help="Processes (GPUs) of each training.")] = 1,
    dry_run: DryRun = False,
) -> None:
    """Train one model several ways on the same groups, evaluate each and the untrained one, print the tables.

    Stopped at any moment, the same command continues: what is finished is not done again.
    """
    from gftcli import progress, show, show_comparison
    from gfttrain.compare_config import load_compare

    settings = load_compare(config, set_ or [], _given(model=model, data=data, out=out))
    _quiet_libraries()
    from gftdata.tasks import stop_on_signals
    from gfttrain import compare as comparing
    from gfttrain import comparison
    from gfttrain import train as training

    console = show.open_console()
    if dry_run:
        show_comparison.planned(console, settings, comparing.plan(settings, nproc))
        return
    try:
        with stop_on_signals(), progress.comparison(console) as listeners:
            for number, done in enumerate(comparing.compare(settings, listeners, nproc), 1):
                show_comparison.outcome(console, number, done)
    except training.Stopped as stopped:
        console.print(str(stopped), soft_wrap=True, highlight=False, markup=False)
        raise typer.Exit(75) from None
    rows = comparison.tabulate(settings)
    show_comparison.comparison(console, settings, rows)
    as_json = comparison.write_comparison(settings, rows)
    console.print(f"\nAs JSON: {as_json}", soft_wrap=True, highlight=False, markup=False)
    with console.status("report", spinner="line"):
        written = comparing.write_report(settings)
    show.reported(console, written)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of gft train, or with results of gft eval.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The page to write.")] = Path("report.html"),
    groups: Annotated[int, typer.Option("--groups", min=0, help="Groups to show of each data set.")] = 12,
    score: Annotated[
        bool, typer.Option("--score", help="Run each trained model over these groups, for its own coefficients.")
    ] = False,
    data: Annotated[
        str | None, typer.Option("--data", metavar="DIR", help="Where the data is now; default: as in the runs.")
    ] = None,
) -> None:
    """Compare runs on one page: curves, results, weights and the groups, token by token. Opens without a network."""
    from gftcli import show
    from gfttrain.report import Options, write_report

    if score:
        _quiet_libraries()
    show.reported(show.open_console(), write_report(runs, out, Options(groups, score, data)))


@app.command()
def fetch(
    configs: Annotated[list[Path], typer.Argument(metavar="CONFIG...", help="Of `gft generate`, `train` or `eval`.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what and how much, download nothing.")] = False,
) -> None:
    """Download what configs name (models, tokenizers, prompts, data sets) for compute nodes without internet."""
    from gftcli import show
    from gftdata.fetch import fetch as fetch_one
    from gftdata.fetch import size
    from gfttrain.fetch import wanted_by

    console = show.open_console()
    sized = [size(wanted) for wanted in wanted_by(configs)]
    show.to_fetch(console, sized)
    if dry_run or not sized:
        return
    for each in sized:
        if each.missing_bytes or each.wanted.kind == "prompts":
            console.print(f"fetching {each.wanted.name}", soft_wrap=True, highlight=False)
            fetch_one(each.wanted)
    console.print("\nAll is here. On the compute nodes: export HF_HUB_OFFLINE=1", highlight=False)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to write the four files.")] = Path(),
    model: Annotated[str, typer.Option("--model", help="The model to fine-tune: folder or Hub id.")] = "PATH-OR-HUB-ID",
    prompts: Annotated[str, typer.Option("--prompts", help="Your prompts: .jsonl or .parquet.")] = "prompts.jsonl",
) -> None:
    """Write commented starter configs for your own model and data: generate.yaml, train.yaml, eval, compare."""
    from gftcli import show
    from gftcli.starter import write_starter

    console = show.open_console()
    for path in write_starter(folder, model=model, prompts=prompts):
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    console.print(
        f"\nLook at the column names in {folder / 'generate.yaml'}, then:\n"
        f"  gft generate {folder / 'generate.yaml'} --dry-run\n"
        f"  gft generate {folder / 'generate.yaml'}\n"
        f"  gft train {folder / 'train.yaml'}\n"
        f"  gft eval {folder / 'eval.yaml'}\n"
        f"  gft compare {folder / 'compare.yaml'}     # or several objectives at once",
        soft_wrap=True,
        highlight=False,
    )


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for everything the demo writes.")] = Path("runs/demo"),
) -> None:
    """See the method at work in minutes on a laptop: generate, train six ways, compare."""
    from gftcli import demo as demonstration
    from gftcli import show

    _quiet_libraries()
    demonstration.run(show.open_console(), out)


def _derive(jobs: "Sequence[Job]", dry_run: bool) -> None:
    """Show what the jobs read and keep, and, unless that was asked for alone, do them."""
    from gftcli import progress, show
    from gftdata.derive import derive

    console = show.open_console()
    for job in jobs:
        groups, read = job.num_groups, job.index.num_groups
        left_out = [f"{count:,} {reason}" for reason, count in job.left_out.items() if count]
        rows = {
            "read": f"{read:,} groups of {', '.join(str(source.folder) for source in job.sources)}",
            "kept": f"{groups:,} groups ({groups / read:.1%}), {job.num_responses:,} responses",
            "left out": ", ".join(left_out) or "nothing",
            "shards": f"{len(job.shards):,}, {job.shards_published:,} of them published already",
            "output": f"{job.out}" + (" (nothing was written)" if dry_run else ""),
        }
        show.facts(console, rows)
        console.print()
        if not dry_run:
            with progress.derivation(console) as listener:
                manifest = derive(job, listener)
            show.manifest(console, str(job.out), manifest)
            console.print()


def _given(**options: str | None) -> dict[str, str]:
    return {key: value for key, value in options.items() if value is not None}


def _quiet_libraries() -> None:
    """Leave the terminal to our own progress bars; warnings of the libraries stay."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def main() -> None:
    """Entry point. A mistake that the user can mend ends in one line and exit code 2."""
    # read when torch is loaded: threads that spin while they wait take the cores from whoever shares them, as judges do
    # and other programs, and make tiny models many times slower; alone on its cores, training is a quarter faster so
    if sys.argv[1:2] != ["train"]:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    code = _run()
    if "gfttrain.distributed" in sys.modules:
        from gfttrain.distributed import end_rank

        end_rank(code)
    sys.exit(code)


def _run() -> int:
    """The command's exit code."""
    from gftdata.tasks import Stopped

    try:
        app()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except OtherRankError:
        return 2
    except UserError as error:
        print(f"error: {_printable(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:  # a disk that is full or fails, a folder that may not be written
        print(f"error: {_printable(storage_failed(error))}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"\nstopped by {stopped}; given again, the same command continues", file=sys.stderr)
        return 75
    except KeyboardInterrupt:
        print("\nstopped; given again, the command continues where that saves anything", file=sys.stderr)
        return 130
    return 0


def _printable(text: str) -> str:
    """One line; what is quoted in it may come from elsewhere, and nothing of that steers the terminal."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


if __name__ == "__main__":
    main()
