"""Progress bars: events of the programs -> what one sees while waiting."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gftcli import show

if TYPE_CHECKING:
    from gftdata.config import GenerateConfig
    from gftdata.events import Event as GenerateEvent
    from gftdata.hub import Event as HubEvent
    from gfttrain.compare import Listeners
    from gfttrain.compare_config import Run
    from gfttrain.config import TrainConfig
    from gfttrain.evaluate import Event as EvalEvent
    from gfttrain.train import Event as TrainEvent

PLAIN_EVERY_S = 30.0  # seconds between lines where the output is a file and has no bar


@contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield progress


class _PlainLines:
    """The same news as plain lines, now and then, for a log file."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._next = time.monotonic() + PLAIN_EVERY_S

    def say(self, line: str) -> None:
        if not self._console.is_terminal and time.monotonic() >= self._next:
            self._next = time.monotonic() + PLAIN_EVERY_S
            self._console.print(line, soft_wrap=True, highlight=False, markup=False)


@contextmanager
def generation(console: Console, config: "GenerateConfig") -> Iterator[Callable[["GenerateEvent"], None]]:
    """Groups, samples, tokens/s, pass rate by source, time left."""
    with _bars(console) as bars:
        plain = _PlainLines(console)
        groups = bars.add_task("groups", total=None, note="")
        samples = bars.add_task("samples", total=None, note="", visible=False)
        judged: Counter[str] = Counter()
        passed: Counter[str] = Counter()
        tokens, began = 0, time.monotonic()

        def listen(event: "GenerateEvent") -> None:
            nonlocal tokens, began
            if event.kind == "groups":
                bars.update(groups, total=event.count, completed=event.done)
                if event.done:
                    console.print(f"continuing: {event.done:,} of {event.count:,} groups are there already")
            elif event.kind == "phase":
                tokens, began = 0, time.monotonic()
                bars.reset(samples, total=event.count, description=f"samples of {event.source}", visible=True)
            elif event.kind == "sample":
                tokens += event.tokens
                bars.update(samples, advance=1, note=f"{tokens / max(1e-9, time.monotonic() - began):,.0f} tokens/s")
            elif event.kind == "judged" and event.reward is not None:
                judged[event.source] += 1
                passed[event.source] += event.reward == 1.0
            elif event.kind == "shard":
                rates = "  ".join(f"{source} {passed[source] / judged[source]:.2f}" for source in judged)
                bars.update(groups, advance=event.count, note=f"pass rate: {rates}")
            done = bars.tasks[groups]
            plain.say(
                f"{done.completed:,.0f} of {done.total or 0:,.0f} groups, "
                f"{tokens / max(1e-9, time.monotonic() - began):,.0f} tokens/s {done.fields['note']}"
            )

        yield listen


@contextmanager
def derivation(console: Console) -> Iterator[Callable[["GenerateEvent"], None]]:
    """Groups, pass rate by source where responses are judged, time left."""
    with _bars(console) as bars:
        plain = _PlainLines(console)
        groups = bars.add_task("groups", total=None, note="")
        judged: Counter[str] = Counter()
        passed: Counter[str] = Counter()

        def listen(event: "GenerateEvent") -> None:
            if event.kind == "groups":
                bars.update(groups, total=event.count, completed=event.done)
                if event.done:
                    console.print(f"continuing: {event.done:,} of {event.count:,} groups are there already")
            elif event.kind == "judged" and event.reward is not None:
                judged[event.source] += 1
                passed[event.source] += event.reward == 1.0
            elif event.kind == "shard":
                rates = "  ".join(f"{source} {passed[source] / judged[source]:.2f}" for source in judged)
                bars.update(groups, advance=event.count, note=f"pass rate: {rates}" if rates else "")
            done = bars.tasks[groups]
            plain.say(f"{done.completed:,.0f} of {done.total or 0:,.0f} groups {done.fields['note']}")

        yield listen


@contextmanager
def transfer(console: Console, done: str) -> Iterator[Callable[["HubEvent"], None]]:
    """Shards checked; bytes that are `done` (uploaded, downloaded) of those that have to be."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bars:
        plain = _PlainLines(console)
        moved = bars.add_task(done, total=None, note="", visible=False)
        checked = bars.add_task("checked", total=None, note="", visible=False)

        def listen(event: "HubEvent") -> None:
            if event.kind == "verify":
                bars.update(checked, total=event.count, advance=1, visible=True)
                note = f"{bars.tasks[checked].completed:,.0f} of {event.count:,} shards"
                bars.update(checked, note=note)
                plain.say(f"checked {note}")
            elif event.kind == "start" and event.count:
                bars.update(moved, total=event.bytes, visible=True)
                size = f"{event.count:,} files, {event.bytes / 1e6:,.1f} MB"
                console.print(f"{size}, to be {done}", soft_wrap=True, highlight=False)
            elif event.kind == "file":
                bars.update(moved, advance=event.bytes)
                note = f"{bars.tasks[moved].completed / 1e6:,.1f} of {(bars.tasks[moved].total or 0) / 1e6:,.1f} MB"
                bars.update(moved, note=note)
                plain.say(f"{note} {done}")

        yield listen


@contextmanager
def training(console: Console, config: "TrainConfig") -> Iterator[Callable[["TrainEvent"], None]]:
    """Steps, loss, gradient norm, rectified share, tokens/s, time left."""
    with _bars(console) as bars:
        plain = _PlainLines(console)
        steps = bars.add_task("training", total=None, note="")

        def listen(event: "TrainEvent") -> None:
            bars.update(steps, total=event.num_steps, completed=event.step)
            for notice in event.notices:
                console.print(f"note: {notice}", soft_wrap=True, highlight=False, markup=False)
            if event.kind == "start" and event.step:
                console.print(f"resuming after step {event.step} of {event.num_steps}")
            if event.kind == "step":
                note = step_note(event.metrics)
                bars.update(steps, note=note)
                plain.say(f"step {event.step} of {event.num_steps}  {note}")

        yield listen


def step_note(metrics: "dict[str, Any]") -> str:
    """The few numbers of a step that fit on a line."""
    parts = [f"loss {metrics['loss']:+.4f}", f"grad {metrics['grad_norm']:.3f}"]
    if metrics.get("rectified_fraction") is not None:
        parts.append(f"rectified {metrics['rectified_fraction']:.2f}")
    return "  ".join([*parts, f"{metrics['tokens_per_second']:,.0f} tokens/s"])


@contextmanager
def evaluation(console: Console) -> Iterator[Callable[["EvalEvent"], None]]:
    """Samples of the benchmark in work, tokens/s, time left."""
    with _bars(console) as bars:
        plain = _PlainLines(console)
        samples = bars.add_task("samples", total=None, note="", visible=False)
        tokens, began = 0, time.monotonic()

        def listen(event: "EvalEvent") -> None:
            nonlocal tokens, began
            if event.kind == "anew":
                show.begins_anew(console, event.benchmark, event.note)
            elif event.kind == "there":
                console.print(f"{event.benchmark}: already there", highlight=False)
            elif event.kind == "benchmark":
                tokens, began = 0, time.monotonic()
                bars.reset(samples, total=event.count, completed=event.done, description=event.benchmark, visible=True)
                bars.update(samples, note="")
                if event.done:
                    console.print(
                        f"continuing {event.benchmark}: {event.done:,} of {event.count:,} samples are there already",
                        highlight=False,
                    )
            elif event.kind == "reference":
                bars.update(samples, note=f"scoring {event.count:,} of {event.benchmark} with the reference")
            else:
                tokens += event.tokens
                note = f"{tokens / max(1e-9, time.monotonic() - began):,.0f} tokens/s"
                bars.update(samples, advance=1, note=note)
                done = bars.tasks[samples]
                plain.say(f"{event.benchmark}: {done.completed:,.0f} of {done.total or 0:,.0f} samples, {note}")

        yield listen


@contextmanager
def comparison(console: Console) -> Iterator["Listeners"]:
    """What is going on now, on one line: the run, its step or the samples drawn."""
    from gftcli.show_comparison import name_of
    from gfttrain.compare import Listeners

    now = {"run": ""}
    drawn = {"samples": 0, "of": 0}
    plain = _PlainLines(console)
    with console.status("", spinner="line") as status:

        def say(what: str) -> None:
            status.update(f"{now['run']}: {what}")
            plain.say(f"{now['run']}: {what}")

        def on_begin(run: "Run", what: str) -> None:
            now["run"] = name_of(run)
            say(what)

        def on_train(event: "TrainEvent") -> None:
            note = step_note(event.metrics) if event.metrics else ""
            say(f"step {event.step} of {event.num_steps}  {note}")

        def on_eval(event: "EvalEvent") -> None:
            if event.kind == "anew":
                show.begins_anew(console, event.benchmark, event.note)
                return
            if event.kind == "benchmark":
                drawn.update(samples=event.done, of=event.count)
            elif event.kind == "sample":
                drawn["samples"] += 1
            say(f"{event.benchmark}: {_in_words(event, **drawn)}")

        yield Listeners(on_begin=on_begin, on_train=on_train, on_eval=on_eval)


def _in_words(event: "EvalEvent", samples: int, of: int) -> str:
    if event.kind == "there":
        return "already there"
    if event.kind == "reference":
        return f"scoring {event.count:,} samples with the reference"
    return f"{samples:,} of {of:,} samples"
