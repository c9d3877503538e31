"""Results -> plain tables on the terminal."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gftdata.tasks import owned
from gftdata.types import EXPERT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gftdata.config import GenerateConfig
    from gftdata.exports import Exported
    from gftdata.fetch import Sized
    from gftdata.imports import Imported
    from gftdata.manifest import Manifest, PromptCounts, SourceSummary
    from gftdata.pilot import Pilot
    from gftdata.prepare import Preview
    from gftdata.pull import Pulled
    from gftdata.push import Plan, Pushed
    from gftdata.status import Status
    from gftdata.tasks import Task
    from gfttrain.benchmarks import Plan as EvalPlan
    from gfttrain.config import TrainConfig
    from gfttrain.forecast import Forecast
    from gfttrain.paired import Difference, Paired
    from gfttrain.prepare import Prepared
    from gfttrain.report import Written
    from gfttrain.results import Estimate, Result


def open_console() -> Console:
    """The terminal, or, where the output is a file, something wide enough that no table is cut."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def silent_console() -> Console:
    """For a rank that leaves the talking to the first."""
    return Console(quiet=True)


def table(*columns: str) -> Table:
    """A plain table: first column left, numbers right."""
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left", no_wrap=True)
    return made


def facts(console: Console, rows: dict[str, Any]) -> None:
    """Name and value, a line each."""
    width = max(len(name) for name in rows)
    for name, value in rows.items():
        console.print(f"{name:<{width}}  {value}", soft_wrap=True, highlight=False, markup=False)


def plain(text: object) -> str:
    """Text in one line that cannot steer a terminal: what is not printable is written as its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def decimal(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def value(found: "Estimate | None") -> str:
    return decimal(None if found is None else found.value)


def interval(found: "Estimate | None") -> str:
    return "-" if found is None or found.low is None else f"{decimal(found.low)} to {decimal(found.high)}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    for unit, size in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} seconds"


def generation_plan(console: Console, config: "GenerateConfig", preview: "Preview", task: "Task") -> None:
    """What `gft generate` would do."""
    counts, responses = preview.prompts, config.responses
    extension = {}
    if config.extend is not None:
        behind = f"{preview.groups_left_behind:,} of its groups are of other prompts and stay behind"
        extension = {"extends": f"{preview.carried_groups:,} groups of {config.extend}; {behind}"}
    sources = [f"{responses.expert.count} expert"] if responses.expert.count else []
    origins = [t.model or (f"column {t.column}" if t.column else f"reused {t.reused}") for t in responses.teachers]
    sources += [f"{t.count} {t.source} ({origin})" for t, origin in zip(responses.teachers, origins, strict=True)]
    sources += [f"{responses.own.count} self"] if responses.own.count else []
    facts(
        console,
        {
            "prompts": f"{counts.prompts:,} of {counts.rows_read:,} rows; {counts.prompts_too_long:,} are too long",
            "duplicates": _duplicates(counts),
            "evaluation sets": f"{counts.contaminated:,} prompts share 8 words in a row with one, left out"
            if config.decontaminate
            else "none to keep prompts apart from (decontaminate)",
            "group": f"{responses.size} responses: {' + '.join(sources)}",
            "given texts": f"{counts.given_missing:,} missing, "
            f"{counts.given_left_out:,} left out (too long, or only thinking)",
            "tokens": f"{preview.prompt_tokens:,} of prompts, {preview.given_tokens:,} of given responses, "
            f"at most {preview.max_sampled_tokens:,} to sample in {preview.sampled_responses:,} responses"
            + (f"; {preview.carried_samples:,} more are in {config.extend} already" if config.extend else ""),
            "starting model": config.model,
            "reward": config.reward.name,
            "engine": config.engine.name,
            "shards": f"{preview.num_shards}, {preview.shards_published} of them published already"
            + ("" if task.alone else f"; {len(owned(task, range(preview.num_shards)))} are for {task}"),
            "output": f"{config.out} (nothing was written)",
            **extension,
        },
    )


def status(console: Console, out: str, found: "Status") -> None:
    """How far an output is, and what its tasks are doing."""
    if found.final:
        told = "finished"
    elif found.shards_done == found.shards:
        told = f"every shard is there; `gft finalize {out}` marks it final"
    elif found.shards_running:
        left = "unknown yet" if found.seconds_left is None else f"about {duration(found.seconds_left)}"
        told = f"running; time left: {left}"
    else:
        told = "nobody is at work; the command that makes it, given again, continues"
    running = "" if found.final else f", {found.shards_running:,} in work, {found.shards_missing:,} missing"
    left_out = f"; {found.prompts_quarantined:,} given up by the engine" if found.prompts_quarantined else ""
    rate = f"; {found.samples_per_s:,.1f} samples/s, {found.tokens_per_s:,.0f} tokens/s" if found.shards_running else ""
    facts(
        console,
        {
            "output": out,
            "state": told,
            "shards": f"{found.shards_done:,} of {found.shards:,} done{running}",
            "prompts": f"{found.prompts_done:,} of {found.prompts:,} in them{left_out}",
            "samples": f"{found.samples_drawn:,} of {found.samples:,} drawn{rate}",
        },
    )
    if not found.latest:
        return
    console.print()
    rows = table("task", "state", "last sign", "shards left", "samples", "tokens/s", "now at", "where")
    for one in found.latest:
        attempt = one.attempt
        rows.add_row(
            f"{attempt.task}/{attempt.tasks}",
            one.state,
            f"{duration(one.seconds_since)} ago",
            f"{one.shards_left:,}",
            f"{attempt.samples:,}",
            f"{attempt.tokens_per_s:,.0f}" if one.state == "running" else "-",
            attempt.phase or "-",
            " ".join(part for part in (attempt.host, attempt.job and f"job {attempt.job}") if part),
        )
    console.print(rows)
    for one in found.latest:
        if one.state in ("failed", "stopped", "silent"):
            said = one.attempt.reason or f"no sign for {duration(one.seconds_since)}: killed?"
            line = f"{one.attempt.task}/{one.attempt.tasks} {one.state}: {said}"
            console.print(line, soft_wrap=True, highlight=False, markup=False)
    if found.earlier:
        console.print(f"{found.earlier:,} earlier attempts of these tasks", highlight=False)


def push_plan(console: Console, plan: "Plan") -> None:
    """What `gft push` would upload, and the card."""
    for file in plan.files:
        console.print(f"{file.bytes:>14,}  {file.name}", soft_wrap=True, highlight=False, markup=False)
    console.print("\nThe card, README.md:\n", highlight=False)
    console.print(plan.card, soft_wrap=True, highlight=False, markup=False)
    facts(
        console,
        {
            "would be on the Hub": f"{len(plan.files):,} files, {plan.bytes / 1e6:,.1f} MB, as {plan.repo}",
            "uploaded": "nothing",
        },
    )


def pushed(console: Console, plan: "Plan", done: "Pushed") -> None:
    """What `gft push` has done, and how to use it."""
    if not done.commits:
        console.print(f"{done.url}: nothing has changed: no commit", soft_wrap=True, highlight=False, markup=False)
        return
    old = f", {done.deleted:,} of an earlier version deleted" if done.deleted else ""
    facts(
        console,
        {
            "data set": done.url,
            "uploaded": f"{done.files:,} files, {done.bytes / 1e6:,.1f} MB{old}",
            "commits": done.commits,
            "train on it": f"data: hf://datasets/{plan.repo}",
            "bring it": f"gft pull {plan.repo} DIR",
        },
    )


def pulled(console: Console, folder: Path, done: "Pulled") -> None:
    """What `gft pull` has brought."""
    shards = done.manifest.shards
    there = f", {len(shards) - done.downloaded:,} were there" if done.downloaded < len(shards) else ""
    facts(
        console,
        {
            "data set": f"{folder}: whole: {done.manifest.summary.groups:,} groups in {len(shards):,} shards",
            "downloaded": f"{done.downloaded:,} shards, {done.bytes / 1e6:,.1f} MB{there}",
            "revision": done.commit,
        },
    )


def pilot(console: Console, measured: "Pilot") -> None:
    """What a pilot measured, and what to expect of the whole."""
    sources(console, measured.summary.sources)
    summary = measured.summary
    console.print()
    facts(
        console,
        {
            "measured": f"{summary.groups:,} groups, {summary.response_tokens:,} response tokens "
            f"in {measured.seconds:.1f} s ({summary.response_tokens / max(1e-9, measured.seconds):,.0f} tokens/s)",
            "with signal": f"{measured.share_with_signal:.0%} of the groups",
            "expected": f"{measured.expected_response_tokens:,} response tokens, "
            f"{measured.expected_bytes / 1e6:,.1f} MB, {duration(measured.expected_seconds)} at this rate",
            "kept": "nothing",
        },
    )


def manifest(console: Console, out: str, found: "Manifest") -> None:
    """What is in a finished data set."""
    from gftdata.summary import mostly_identical, num_failing

    sources(console, found.summary.sources)
    summary, counts = found.summary, found.prompts
    console.print()
    left_out = {
        "prompts too long": counts.prompts_too_long,
        "duplicates": counts.duplicates_removed,
        "prompts that share 8 words in a row with an evaluation set": counts.contaminated,
        "prompts that the engine gave up (quarantine.jsonl)": found.prompts_quarantined,
        "given texts missing": counts.given_missing,
        "given texts too long or empty": counts.given_left_out,
        "teacher samples empty or too long": found.teacher_samples_left_out,
        "groups that could not be judged": summary.groups_unjudged,
    }
    facts(
        console,
        {
            "groups": f"{summary.groups:,}",
            "without signal": f"{summary.groups_without_signal:,} (all rewards of the group are equal)",
            "duplicates": _duplicates(counts),
            "left out": ", ".join(f"{count:,} {name}" for name, count in left_out.items() if count) or "nothing",
            "response tokens": f"{summary.response_tokens:,}",
            "data set": f"{out} ({len(found.shards)} shards, {sum(s.bytes for s in found.shards) / 1e6:.1f} MB)",
        },
    )
    for source in summary.sources:
        failed = num_failing(source)
        if source.source == EXPERT and failed:
            console.print(
                f"note: {failed:,} of {source.judged:,} judged expert responses do not get the full reward. Among "
                "right answers they get a negative advantage: check that the reward reads them correctly",
                soft_wrap=True,
                highlight=False,
            )
        if mostly_identical(source, summary.groups):
            console.print(
                f"note: in {source.groups_all_identical:,} of {summary.groups:,} groups all responses of "
                f"{source.source} are the same text: a mistake in seeds or temperature is likely",
                soft_wrap=True,
                highlight=False,
            )


def _duplicates(counts: "PromptCounts") -> str:
    if counts.duplicates is None:
        return "not counted for a part of a data set"
    near = "almost: not looked for" if counts.near_duplicates is None else f"{counts.near_duplicates:,} almost"
    return f"{counts.duplicates:,} rows came before word for word, {near}; {counts.duplicates_removed:,} left out"


def sources(console: Console, found: "tuple[SourceSummary, ...]") -> None:
    """One line for each source of responses."""
    rows = table(
        "source",
        "responses",
        "pass rate",
        "reward",
        "unjudged",
        "tokens",
        "median",
        "p95",
        "truncated",
        "identical",
        "log-prob",
    )
    for source in found:
        rows.add_row(
            Text(plain(source.source)),
            f"{source.responses:,}",
            decimal(source.pass_rate),
            decimal(source.mean_reward),
            f"{source.responses - source.judged:,}",
            decimal(source.mean_tokens, 1),
            f"{source.median_tokens:,}",
            f"{source.p95_tokens:,}",
            f"{source.truncated:,}",
            f"{source.identical:,}",
            decimal(source.mean_ref_logprob),
        )
    console.print(rows)


def imported(console: Console, made: "Imported") -> None:
    """What an import made, what it left out, and what comes next."""
    facts(
        console,
        {
            "prompts": f"{made.prompts}: {made.rows:,} of {made.rows_read:,} rows",
            "left out": _listed(made.left_out),
            "responses": f"{made.with_expert:,} rows with an expert's, {made.teacher_texts:,} of a teacher",
            "instruction": f"{made.instructed:,} prompts end with the paper's; they are taken as they stand, without a "
            "template",
            "config": f"{made.config}",
        },
    )
    if made.without_ground_truth:
        console.print(
            f"note: {made.without_ground_truth:,} prompts have no ground truth: gft generate stops there, or with "
            "prompts.on_missing_ground_truth=keep leaves their responses unjudged",
            soft_wrap=True,
            highlight=False,
        )
    console.print(
        "\nThis is no data set of groups yet: nothing in it has log-probs. Look at model, reward and counts in "
        f"{made.config}, then:\n  gft generate {made.config} --dry-run\n  gft generate {made.config}",
        soft_wrap=True,
        highlight=False,
    )


def exported(console: Console, kind: str, made: "Exported") -> None:
    """What an export made, what it left out, and what the format cannot hold."""
    facts(
        console,
        {
            "written": f"{made.path}: {made.rows:,} rows for {kind}",
            "read": f"{made.groups:,} groups",
            "left out": _listed(made.left_out),
            "not exported": "; ".join(made.no_place),
        },
    )
    for note in made.notes:
        console.print(f"note: {note}", soft_wrap=True, highlight=False, markup=False)


def _listed(counts: "Mapping[str, int]") -> str:
    return "; ".join(f"{count:,} {what}" for what, count in counts.items()) or "nothing"


def training_plan(console: Console, config: "TrainConfig", prepared: "Prepared", expected: "Forecast") -> None:
    """What `gft train` would do, and about what it would take."""
    index, selection = prepared.index, prepared.selection
    groups = {int(group) for step in prepared.steps for group in step.groups}
    zero = sum(not selection.advantages_R[index.offsets[g] : index.offsets[g + 1]].any() for g in groups)
    filtered = int((~selection.kept_G).sum())
    epochs, batch = config.epochs, config.batch.groups_per_step
    state = "finished already" if prepared.finished else f"{prepared.first_step} done" if prepared.first_step else "new"
    used, trained = int(selection.used_R.sum()), int(selection.trained_R.sum())
    layout = expected.layout
    left = len(prepared.steps) - prepared.first_step
    sampled = f" (of {expected.steps_laid_out:,} of {left:,} steps)" if expected.steps_laid_out < left else ""
    facts(
        console,
        {
            "steps": f"{len(prepared.steps):,} of {batch} groups, {epochs} epochs ({state})",
            "groups": f"{len(groups):,}, {zero:,} of them without signal ({zero / max(1, len(groups)):.1%}): counted, "
            "not computed" + (f"; {filtered:,} left out by filter" if filtered else ""),
            "responses": f"{used:,} of {len(index.rewards):,} used, {trained:,} of them computed",
            "tokens": f"{sum(step.num_loss_tokens for step in prepared.steps):,} response tokens in the loss",
            "positions": f"{layout.computed_positions:,} computed in {layout.micro_batches:,} micro-batches{sampled}",
            "packing": f"{layout.packing_efficiency:.1%} of them are no padding; shared prompts save "
            f"{layout.prefix_saving:.1%}; the largest micro-batch has {layout.largest_micro_batch:,}",
            "objective": config.objective.model_dump_json(exclude_defaults=True) + " (beside the defaults: GFT)",
            "model": f"{config.model} ({prepared.num_parameters / 1e6:,.1f}M parameters)",
            "memory": _memory(expected),
            "time": f"about {duration(expected.seconds)}: {expected.flops:.2e} FLOPs at half the "
            f"{expected.gemm_flops_per_second / 1e12:,.2f} TFLOP/s that matrix products reach on this device now",
            "output": f"{config.out} (nothing was written)",
        },
    )
    for notice in (*prepared.notices, *([expected.memory_notice] if expected.memory_notice else [])):
        console.print(f"note: {notice}", soft_wrap=True, highlight=False, markup=False)


def _memory(expected: "Forecast") -> str:
    def gib(count: int) -> str:
        return f"{count / 2**30:.1f}"

    parts = [f"{gib(expected.weight_bytes)} weights, gradients and optimizer"]
    parts += [f"{gib(expected.activation_bytes)} activations"]
    if expected.process_bytes:
        parts.append(f"{gib(expected.process_bytes)} Python and libraries")
    there = "" if expected.device_bytes is None else f" of its {gib(expected.device_bytes)}"
    return f"about {gib(expected.needed_bytes)} GiB a device{there}: {', '.join(parts)}"


def evaluation_plan(console: Console, found: "EvalPlan") -> None:
    """What `gft eval` would do."""
    rows = table("benchmark", "prompts", "too long", "samples", "tokens at most", "reward", "there already")
    for one in found.benchmarks:
        left = one.num_samples - one.num_drawn
        there = "finished" if one.result is not None else f"{one.num_drawn:,} samples"
        rows.add_row(
            one.name,
            f"{len(one.questions.prompts):,}",
            f"{one.questions.too_long:,}",
            f"{one.num_samples:,}",
            f"{left * one.settings.max_tokens:,}",
            one.settings.reward.name,
            there,
        )
    console.print(rows)
    console.print()
    references = dict.fromkeys(one.settings.reference for one in found.benchmarks if one.settings.reference)
    facts(
        console,
        {
            "model": found.config.model,
            "engine": found.config.engine.name,
            "reference": ", ".join(references) or "none",
            "output": f"{found.out} (nothing was written)",
        },
    )
    for one in found.benchmarks:
        if one.replaces:
            begins_anew(console, one.name, one.replaces)


def begins_anew(console: Console, benchmark: str, otherwise: str) -> None:
    """That samples go which are of other settings, in a plan and when it is done."""
    line = f"note: {benchmark} begins anew, and the samples there go: {plain(otherwise)}"
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def evaluations(console: Console, results: "Mapping[str, Result]") -> None:
    """One line for each benchmark."""
    ks = sorted({k for result in results.values() for k in result.pass_at if k != 1})
    rows = table(
        "benchmark",
        "prompts",
        "pass@1",
        "95 %",
        *(f"pass@{k}" for k in ks),
        "greedy",
        "reward",
        "entropy",
        "KL",
        "tokens",
        "truncated",
        "unjudged",
    )
    for result in results.values():
        rows.add_row(
            result.benchmark,
            f"{result.prompts:,} x {result.samples_per_prompt}",
            value(result.pass_at[1]),
            interval(result.pass_at[1]),
            *(value(result.pass_at.get(k)) for k in ks),
            value(result.greedy),
            value(result.mean_reward),
            decimal(result.entropy),
            decimal(result.kl),
            decimal(result.mean_tokens, 1),
            f"{result.truncated_samples:,}",
            f"{result.unjudged_samples:,}",
        )
    console.print(rows)
    for result in results.values():
        if result.prompts_too_long:
            console.print(
                f"note: {result.benchmark}: {result.prompts_too_long:,} prompts are too long and were left out",
                soft_wrap=True,
                highlight=False,
            )
    console.print(
        "pass@1 is the average over samples, 95 % its bootstrap interval over prompts; entropy and KL in nats a token",
        soft_wrap=True,
        highlight=False,
    )


def paired(console: Console, a: str, b: str, found: "Sequence[Paired]") -> None:
    """The differences between two models, with how likely chance alone makes such ones."""
    facts(console, {"a": a, "b": b})
    rows = table("benchmark", "", "a", "b", "a - b", "95 %", "p", "prompts")
    for one in found:
        for name, difference in (("pass@1", one.pass_at_1), ("greedy", one.greedy)):
            if difference is not None:
                rows.add_row(one.benchmark, name, *_difference(difference))
    console.print(rows)
    for one in found:
        if one.only_a or one.only_b:
            console.print(
                f"note: {one.benchmark}: {one.common:,} prompts are common; {one.only_a:,} only of a and "
                f"{one.only_b:,} only of b were not looked at",
                soft_wrap=True,
                highlight=False,
            )
        if one.measured_otherwise:
            console.print(
                f"note: {one.benchmark}: measured otherwise (b, then a): {one.measured_otherwise}",
                soft_wrap=True,
                highlight=False,
                markup=False,
            )
    console.print(
        "p: of pass@1 by a sign-flip permutation test over prompts, of greedy by McNemar's exact test; two-sided. It "
        "says nothing of other training seeds",
        soft_wrap=True,
        highlight=False,
    )


def _difference(found: "Difference") -> tuple[str, ...]:
    return (
        decimal(found.a),
        decimal(found.b),
        f"{found.difference.value:+.3f}",
        interval(found.difference),
        f"{found.p:.4f}",
        f"{found.prompts:,}",
    )


def to_fetch(console: Console, sized: "Sequence[Sized]") -> None:
    """What has to be downloaded, and how much of it."""
    if not sized:
        console.print("nothing to fetch: these configs name only what is on this machine")
        return
    listing = table("name", "what", "GB", "to download")
    for each in sized:
        wanted = each.wanted
        part = "/".join(filter(None, [wanted.subset, wanted.split]))
        name = f"{wanted.name} ({part})" if part else wanted.name
        listing.add_row(name, wanted.kind, f"{each.bytes / 1e9:,.3f}", f"{each.missing_bytes / 1e9:,.3f}")
    total, missing = sum(each.bytes for each in sized), sum(each.missing_bytes for each in sized)
    listing.add_row("all", "", f"{total / 1e9:,.3f}", f"{missing / 1e9:,.3f}")
    console.print(listing)


def relative(path: Path) -> str:
    """A path as the reader would type it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def reported(console: Console, written: "Written") -> None:
    """The page that `gft report` has written."""
    of = "every step of every curve" if not written.points else f"at most {written.points:,} points of a curve"
    facts(
        console,
        {
            "page": f"{written.path} ({written.num_bytes / 1e6:.1f} MB)",
            "runs": f"{written.runs:,}, with {of}",
            "groups": f"{written.groups:,}",
            **({"without": written.missing[0]} if written.missing else {}),
        },
    )
    for reason in written.missing[1:]:
        console.print(f"         {reason}", soft_wrap=True, highlight=False, markup=False)
