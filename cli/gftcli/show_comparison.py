"""Tables of `gft compare`: what it would do, a line for each model as it is done, and what the models say together."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from gftcli import show

if TYPE_CHECKING:
    from gfttrain.compare import Outcome, PlannedRun
    from gfttrain.compare_config import CompareConfig, Run
    from gfttrain.comparison import Cell, Row


def name_of(run: "Run") -> str:
    """A run in a few words."""
    return f"{run.method}, seed {run.seed}" if run.seed else run.method


def planned(console: Console, config: "CompareConfig", found: "Sequence[PlannedRun]") -> None:
    """What the comparison would train and evaluate, and about what that takes."""
    rows = show.table("run", "steps", "done", "loss tokens", "positions", "memory", "training", "output")
    for one in found:
        if one.prepared is None:
            continue
        expected, steps = one.forecast, one.prepared.steps
        rows.add_row(
            name_of(one.run),
            f"{len(steps):,}",
            "all" if one.prepared.finished else f"{one.prepared.first_step:,}",
            f"{sum(step.num_loss_tokens for step in steps):,}",
            "-" if expected is None else f"{expected.layout.computed_positions:,}",
            "-" if expected is None else f"{expected.needed_bytes / 2**30:.1f} GiB",
            "-" if expected is None else show.duration(expected.seconds),
            Text(show.plain(one.run.folder)),
        )
        rows.columns[-1].justify = "left"
    console.print(rows)
    console.print()
    benchmarks = show.table("benchmark", "prompts", "samples a model", "models", "tokens at most")
    base = found[0].evaluation
    assert base is not None
    done = {one.run.folder: {b.name for b in one.evaluation.benchmarks if b.result} for one in found if one.evaluation}
    for benchmark in base.benchmarks:
        missing = sum(benchmark.name not in done.get(one.run.folder, set()) for one in found)
        benchmarks.add_row(
            benchmark.name,
            f"{len(benchmark.questions.prompts):,}",
            f"{benchmark.num_samples:,}",
            f"{missing:,} of {len(found):,}",
            f"{missing * benchmark.num_samples * benchmark.settings.max_tokens:,}",
        )
    console.print(benchmarks)
    console.print()
    parameters = next((one.prepared.num_parameters for one in found if one.prepared), 0)
    left = sum(one.forecast is not None for one in found)
    seconds = sum(one.forecast.seconds for one in found if one.forecast)
    # weights of float32, each run's final model, and checkpoints with Adam's two moments
    on_disk = (len(found) - 1) * parameters * 4 * (1 + 3 * config.train.checkpoint.keep)
    notices = dict.fromkeys(notice for one in found if one.prepared for notice in one.prepared.notices)
    notices |= dict.fromkeys(one.forecast.memory_notice for one in found if one.forecast and one.forecast.memory_notice)
    show.facts(
        console,
        {
            "model": f"{config.model} ({parameters / 1e6:,.1f}M parameters)",
            "data": ", ".join(config.data),
            "training": f"{left:,} runs, about {show.duration(seconds)} in all",
            "disk": f"up to {on_disk / 1e9:,.1f} GB of checkpoints and models",
            "output": f"{config.out} (nothing was written)",
        },
    )
    for one in found:
        for benchmark in one.evaluation.benchmarks if one.evaluation else ():
            if benchmark.replaces:
                show.begins_anew(console, f"{name_of(one.run)}: {benchmark.name}", benchmark.replaces)
    for notice in notices:
        console.print(f"note: {notice}", soft_wrap=True, highlight=False, markup=False)


def outcome(console: Console, number: int, done: "Outcome") -> None:
    """One line for a model that is done."""
    found = "  ".join(f"{name} {show.value(result.pass_at[1])}" for name, result in done.results.items())
    if done.diverged:
        found = f"diverged: {done.diverged}"
    line = f"  {number}/{done.of}  {name_of(done.run):<14} {found}"
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def comparison(console: Console, config: "CompareConfig", rows: "Sequence[Row]") -> None:
    """A table for each benchmark, one for what was not trained, and what the numbers are."""
    trained = [b.name for b in config.eval.benchmarks if b.name not in config.untrained]
    for name in trained:
        console.print(f"\n{name}", style="bold", highlight=False, markup=False)
        console.print(benchmark_table(rows, name))
    if config.untrained:
        console.print("\nnot trained: what falls is forgotten", style="bold", highlight=False)
        console.print(untrained_table(rows, config.untrained))
    console.print()
    for row in rows:
        lacking = [b.name for b in config.eval.benchmarks if b.name not in {cell.benchmark for cell in row.cells}]
        if lacking:
            note = f"note: {row.method} is left out on {', '.join(lacking)}: a run of it diverged"
            console.print(note, soft_wrap=True, highlight=False, markup=False)
    console.print(_legend(config), soft_wrap=True, highlight=False)
    for name in trained:
        cells = [(row.method, cell) for row in rows for cell in row.cells if cell.benchmark == name]
        best = max(cells, key=lambda item: item[1].pass_at[1].value)
        console.print(f"Highest pass@1 on {name}: {best[0]}.", soft_wrap=True, highlight=False, markup=False)


def benchmark_table(rows: "Sequence[Row]", name: str) -> object:
    """The methods on one benchmark."""
    cells = {row.method: cell for row in rows for cell in row.cells if cell.benchmark == name}
    most = max(k for cell in cells.values() for k in cell.pass_at)  # the others are in the report
    ks = [most] if most > 1 else []
    shown = show.table(
        "method", "pass@1", "95 %", *(f"pass@{k}" for k in ks), "greedy", "entropy", "KL", "change", "95 %", "p"
    )
    for method, cell in cells.items():
        shown.add_row(
            method,
            show.value(cell.pass_at[1]),
            show.interval(cell.pass_at[1]),
            *(show.value(cell.pass_at.get(k)) for k in ks),
            show.decimal(cell.greedy),
            show.decimal(cell.entropy),
            show.decimal(cell.kl),
            *_change(cell),
        )
    return shown


def untrained_table(rows: "Sequence[Row]", names: Sequence[str]) -> object:
    """The methods on what was not trained."""
    shown = show.table("method", *(heading for name in names for heading in (name, "change", "95 %", "p")))
    for row in rows:
        cells = {cell.benchmark: cell for cell in row.cells}
        if all(name in cells for name in names):
            values = (part for name in names for part in (show.value(cells[name].pass_at[1]), *_change(cells[name])))
            shown.add_row(row.method, *values)
    return shown


def _change(cell: "Cell") -> tuple[str, str, str]:
    if cell.change is None:
        return "", "", ""
    p = "-" if cell.p is None else "<.001" if cell.p < 0.001 else f"{cell.p:.3f}"
    return f"{cell.change.value:+.3f}", show.interval(cell.change), p


def _legend(config: "CompareConfig") -> str:
    if len(config.seeds) == 1:
        spread = (
            "One training seed. 95 % is a bootstrap interval over prompts, p a paired permutation test of pass@1 "
            "against the untrained model; neither says what another seed would give (seeds: [0, 1, 2] does)."
        )
    else:
        spread = (
            f"Means over {len(config.seeds)} training seeds. 95 % is Student's interval over them (of the untrained "
            "model, over prompts), p a t-test of the change against it; neither says what other prompts would give. "
            "Of two or three seeds the interval is wide, and may leave 0 to 1."
        )
    return f"{spread}\nEntropy, and KL to the reference, in nats a token."
