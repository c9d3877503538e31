"""`gft compare`: train and evaluate run after run; what is finished is not done again.

Which runs there are is compare_config.py's, what their results say together comparison.py's.
"""

import fcntl
import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from gftdata.engines.hf import pick_device
from gftdata.errors import UserError
from gftdata.shards import check_writable, write_atomic
from gftdata.store import hold
from gfttrain import benchmarks, fit, forecast, prepare, report
from gfttrain import evaluate as evaluation
from gfttrain import train as training
from gfttrain.compare_config import CompareConfig, Run, runs
from gfttrain.config import TrainConfig
from gfttrain.distributed import launch
from gfttrain.results import EVALS, Result
from gfttrain.runs import FINAL, METRICS

REPORT, LOCK = "report.html", ".lock"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One model of a comparison, with the result of each benchmark."""

    run: Run
    of: int  # so many models
    diverged: str  # why there are no results; empty where there are
    results: dict[str, Result]


@dataclass(frozen=True, slots=True)
class Listeners:
    """Who shows the progress of the parts."""

    on_begin: Callable[[Run, str], None] = lambda run, what: None
    on_train: training.Listener = lambda event: None
    on_eval: evaluation.Listener = lambda event: None


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """What a run will take, before it takes it."""

    run: Run
    prepared: prepare.Prepared | None  # None: the untrained model
    forecast: forecast.Forecast | None  # None: nothing is left to train
    evaluation: benchmarks.Plan | None  # None: its model is not there yet, and its benchmarks are the untrained one's


def plan(config: CompareConfig, nproc: int = 1, *, estimate: bool = True) -> list[PlannedRun]:
    """Check every run before the first one begins. Raises UserError, and writes nothing.

    With `estimate`, also lay out their steps: memory and time of each.
    """
    device = pick_device(config.train.device)
    rate: float | None = None
    found: list[PlannedRun] = []
    for run in runs(config):
        if run.training is None:
            found.append(PlannedRun(run, None, None, benchmarks.plan(run.evaluation)))
            continue
        prepared = prepare.prepare(run.training)
        expected = None
        if estimate and not prepared.finished:
            fitted = fit.with_micro_batches(run.training, prepared, device, nproc)
            expected = forecast.forecast(fitted, prepared, device, nproc, rate)
            rate = expected.gemm_flops_per_second
        found.append(
            PlannedRun(run, prepared, expected, benchmarks.plan(run.evaluation) if prepared.finished else None)
        )
    return found


def compare(config: CompareConfig, listeners: Listeners | None = None, nproc: int = 1) -> Iterator[Outcome]:
    """Yield the untrained model's outcome, then that of each method and seed, as they are done.

    Only objective and seed differ between runs: data, order of prompts, optimizer and evaluation are the same. A method
    that diverges has no results, and the others go on. Stopped at any moment and called again it continues. Raises
    UserError, and what `train` raises on signals.
    """
    listeners = listeners or Listeners()
    out = Path(config.out)
    check_writable(out)
    plan(config, estimate=False)
    out.mkdir(parents=True, exist_ok=True)
    every = runs(config)
    with (out / LOCK).open("w") as lock:
        hold(lock, fcntl.LOCK_EX, f"{out}: another gft compare is writing there; wait, or name another folder (out)")
        for run in every:
            if run.training is not None:
                listeners.on_begin(run, "training")
                try:
                    _train(run.training, nproc, listeners)
                except training.Diverged as error:  # says something of the method, and the others are still to come
                    yield Outcome(run, len(every), str(error), {})
                    continue
            listeners.on_begin(run, "evaluation")
            yield Outcome(run, len(every), "", evaluation.evaluate(run.evaluation, listeners.on_eval))
            _release()


def write_report(config: CompareConfig) -> report.Written:
    """OUT/report.html of all runs that got as far as a step, their models' own probabilities included.

    Raises UserError.
    """
    begun = [run.folder / METRICS for run in runs(config)]
    folders = [file.parent for file in begun if file.is_file() or (file.parent / EVALS).is_file()]
    return report.write_report(folders, Path(config.out) / REPORT, report.Options(score=True))


def _train(config: TrainConfig, nproc: int, listeners: Listeners) -> None:
    """In this process; of several, each is `gft train` by itself, so that this one holds no device."""
    out = Path(config.out)
    if (out / FINAL).is_dir():
        return  # with these settings: `plan` has looked
    if nproc == 1:
        training.train(config, listeners.on_train)
        _release()
        return
    file = out.with_name(f"{out.name}.yaml")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    code = launch(nproc, [sys.executable, "-m", "gftcli.main", "train", str(file)])
    if code == 75:
        raise training.Stopped(f"{out}: the training was stopped and is saved; the same command continues")
    if code:
        raise UserError(f"{out}: its training ended with exit code {code}; what it said stands above")


def _release() -> None:
    """Give the device's memory back: the next engine or model wants all of it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
