"""How often `evaluation.stop_when_worse` would have been right: the rule, on the study's runs that were never stopped.

    python samples/study/stopping.py                   # after study.py --only weak
    python samples/study/stopping.py --rules           # other thresholds and patiences, and what each would do

A run is bad where its pass@1 is lower than its base's, by the paired 95 % interval over prompts of the evaluation after
training, and good otherwise. Missed: bad, and not stopped before the last evaluation. Wrongly: good, and stopped.
The rule sees the evaluations during training alone (their prompts are among those of the evaluation after it).
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from questions import QUESTIONS, Condition  # noqa: E402
from study import SCALES, Study  # noqa: E402

from gfttrain import paired, watch  # noqa: E402
from gfttrain.curves import read_history  # noqa: E402
from gfttrain.runs import METRICS  # noqa: E402


@dataclass(frozen=True, slots=True)
class Seen:
    """One run."""

    condition: Condition
    start: float  # pass@1 before training, and the change by it
    change: float
    bad: bool
    evaluations: list[watch.Evaluation]

    def stopped_at(self) -> int | None:
        """The step at which the rule ends it; None: it goes on to its end."""
        for count in range(1, len(self.evaluations)):  # at the last one there is nothing left to stop
            if watch.divergence(self.evaluations[:count]):
                return self.evaluations[count - 1].step
        return None


def read(study: Study, conditions: Sequence[Condition], seeds: Sequence[int], benchmark: str) -> list[Seen]:
    found = []
    for condition in conditions:
        for seed in seeds:
            run = study.run(condition, seed)
            change = paired.compare(run, study.base_results(condition), benchmark).pass_at_1
            assert change is not None and change.difference.high is not None
            evaluations = watch.evaluations(read_history(run / METRICS).series)
            value, bad = change.difference.value, change.difference.high < 0
            found.append(Seen(condition, evaluations[0].pass_at_1, value, bad, evaluations))
    return found


def show(seen: Sequence[Seen]) -> None:
    """A line for each base and method, and the error rates over all."""
    print(f"{'condition':<20} {'start':>6} {'change':>7} {'bad':>5} {'stopped':>8} {'at step':>8}")
    for condition in dict.fromkeys(one.condition.name for one in seen):
        of = [one for one in seen if one.condition.name == condition]
        stops = [step for one in of if (step := one.stopped_at()) is not None]
        at = f"{statistics.median(stops):.0f}" if stops else ""
        print(
            f"{condition:<20} {statistics.mean(one.start for one in of):>6.3f} "
            f"{statistics.mean(one.change for one in of):>+7.3f} {sum(one.bad for one in of):>3}/{len(of)} "
            f"{len(stops):>6}/{len(of)} {at:>8}"
        )
    bad, good = [one for one in seen if one.bad], [one for one in seen if not one.bad]
    missed, wrongly = sum(one.stopped_at() is None for one in bad), sum(one.stopped_at() is not None for one in good)
    print(f"\nmissed {missed} of {len(bad)} bad runs, stopped wrongly {wrongly} of {len(good)} good ones")


def show_rules(seen: Sequence[Seen]) -> None:
    """The same for other constants of the rule."""
    print(f"{'standard errors':>15} {'in a row':>9} {'missed':>8} {'wrongly':>8} {'median step of a stop':>22}")
    kept = watch.DROP, watch.PATIENCE
    for drop in (1.0, 1.5, 2.0, 2.5, 3.0, 4.0):
        for patience in (1, 2, 3):
            watch.DROP, watch.PATIENCE = drop, patience
            bad = [one.stopped_at() for one in seen if one.bad]
            good = [one.stopped_at() for one in seen if not one.bad]
            steps = [step for step in bad if step is not None]
            print(
                f"{drop:>15} {patience:>9} {f'{bad.count(None)}/{len(bad)}':>8} "
                f"{f'{len(good) - good.count(None)}/{len(good)}':>8} "
                f"{f'{statistics.median(steps):.0f}' if steps else '':>22}"
            )
    watch.DROP, watch.PATIENCE = kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rules", action="store_true")
    options = parser.parse_args()
    study = Study(SCALES["toy"], options.out, None)
    (question,) = [q for q in QUESTIONS if q.name == "weak"]
    benchmark = study.evaluation(study.model, study.out).benchmarks[0].name
    seen = read(study, question.conditions, range(options.seeds), benchmark)
    show_rules(seen) if options.rules else show(seen)


if __name__ == "__main__":
    main()
