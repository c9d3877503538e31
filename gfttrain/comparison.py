"""What the runs of a comparison say together: the paper's tables. No torch here.

Of one seed, an interval is over prompts (bootstrap) and p a paired permutation test against the untrained model: they
say nothing of other seeds. Of several seeds, an interval is Student's over seeds and p a t-test of the change over
seeds: they say what another training would give, on these prompts and against this one sampling of the untrained model
(whose own interval stays one over prompts), and need a few seeds to say anything.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from gftdata.errors import UserError
from gftdata.shards import write_atomic
from gfttrain import paired
from gfttrain.compare_config import BASE, CompareConfig, runs
from gfttrain.results import EVALS, EVALS_FOLDER, Estimate, Result, read_results
from gfttrain.samples import SAMPLES

COMPARISON = "comparison.json"


@dataclass(frozen=True, slots=True)
class Cell:
    """One method on one benchmark: means over seeds."""

    benchmark: str
    pass_at: dict[int, Estimate]
    greedy: float | None
    entropy: float | None  # nats per token
    kl: float | None  # nats per token
    change: Estimate | None  # of pass@1 against the untrained model
    p: float | None  # of no change, two-sided; None also where seeds that agree leave nothing to judge by
    forgets: bool  # the benchmark is of a skill that was not trained


@dataclass(frozen=True, slots=True)
class Row:
    """One method on every benchmark."""

    method: str
    folders: tuple[str, ...]  # of each seed
    cells: tuple[Cell, ...]


def tabulate(config: CompareConfig) -> list[Row]:
    """A row for each method, the untrained model first, from what the runs' folders hold.

    A benchmark that one of a method's runs lacks is left out of its row. Raises UserError for results that cannot be
    read.
    """
    folders: dict[str, list[Path]] = {}
    for run in runs(config):
        folders.setdefault(run.method, []).append(run.folder)
    (base,) = folders[BASE]
    names = [benchmark.name for benchmark in config.eval.benchmarks]
    return [
        make_row(method, places, None if method == BASE else base, names, config.untrained)
        for method, places in folders.items()
    ]


def make_row(
    method: str, places: Sequence[Path], base: Path | None, names: Sequence[str], untrained: Sequence[str]
) -> Row:
    """The row of one method, from the folders of its runs, a seed each; `base` has the untrained model's results.

    A benchmark of `names` that one of the runs lacks is left out. Raises UserError for results that cannot be read.
    """
    results = [_results(place) for place in places]
    there = [name for name in names if all(name in of_seed for of_seed in results)]
    cells = tuple(
        _cell(name, [of_seed[name] for of_seed in results], places, base, forgets=name in untrained) for name in there
    )
    return Row(method, tuple(map(str, places)), cells)


def _results(run: Path) -> dict[str, Result]:
    """Of a run that was evaluated: a file system may hide the file for a moment, and a table without it would lie."""
    found = read_results(run)
    if not found and any((run / EVALS_FOLDER).glob(f"*/{SAMPLES}")):
        raise UserError(
            f"{run / EVALS}: is not there, and evaluations are: is something taking its files away, or the file system "
            "failing? The same command tries again; gft eval counts anew what was drawn"
        )
    return found


def _cell(name: str, results: Sequence[Result], places: Sequence[Path], base: Path | None, *, forgets: bool) -> Cell:
    change, p = None, None
    if base is not None:
        found = [paired.compare(place, base, name).pass_at_1 for place in places]
        differences = [one for one in found if one is not None]
        if len(differences) == len(places):
            change = over_seeds([one.difference for one in differences])
            p = differences[0].p if len(places) == 1 else t_test([one.difference.value for one in differences])
    ks = [k for k in results[0].pass_at if all(k in result.pass_at for result in results)]
    return Cell(
        benchmark=name,
        pass_at={k: over_seeds([result.pass_at[k] for result in results]) for k in ks},
        greedy=_mean([None if result.greedy is None else result.greedy.value for result in results]),
        entropy=_mean([result.entropy for result in results]),
        kl=_mean([result.kl for result in results]),
        change=change,
        p=p,
        forgets=forgets,
    )


def over_seeds(estimates: Sequence[Estimate]) -> Estimate:
    """One seed: its own estimate. Several: their mean with Student's 95 % interval over seeds."""
    if len(estimates) == 1:
        return estimates[0]
    from scipy.stats import t

    values = np.array([estimate.value for estimate in estimates])
    half = float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    mean = float(values.mean())
    return Estimate(mean, mean - half, mean + half)


def t_test(changes: Sequence[float]) -> float | None:
    """Two-sided p of a mean of zero over seeds; 1 where nothing changed.

    None where all seeds changed by the same: few seeds on few prompts often do, and have no spread to judge by.
    """
    from scipy.stats import ttest_1samp

    if len(set(changes)) == 1:
        return 1.0 if changes[0] == 0.0 else None
    return float(ttest_1samp(changes, 0.0).pvalue)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def write_comparison(config: CompareConfig, rows: Sequence[Row]) -> Path:
    """OUT/comparison.json: the settings and the table, for programs."""
    path = Path(config.out) / COMPARISON
    data = {"config": config.model_dump(mode="json", by_alias=True), "rows": [asdict(row) for row in rows]}
    write_atomic(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return path
