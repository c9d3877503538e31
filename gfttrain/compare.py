"""Train several objectives from the same shards and evaluate each: the paper's comparison at whatever scale one has."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gfttrain import evaluate as evaluation
from gfttrain import train as training
from gfttrain.config import EvalConfig, ObjectiveConfig, TrainConfig
from gfttrain.presets import folder_name
from gfttrain.results import Result


@dataclass(frozen=True, slots=True)
class Outcome:
    """One model of a comparison, with the result of each benchmark."""

    method: str  # `base` for the untrained one
    model: Path
    folder: Path  # of its results: its run, or `base` beside the runs
    results: dict[str, Result]


@dataclass(frozen=True, slots=True)
class Listeners:
    """Who shows the progress of the parts."""

    on_begin: Callable[[str, str], None] = lambda method, what: None
    on_train: training.Listener = lambda event: None
    on_eval: evaluation.Listener = lambda event: None


def compare(
    config: TrainConfig,
    methods: Mapping[str, ObjectiveConfig],
    evals: EvalConfig,
    listeners: Listeners | None = None,
) -> Iterator[Outcome]:
    """Yield the base model's outcome, then each method's, trained into `config.out/<method>`, evaluated there too.

    Only the objective differs between runs: data, seed, order of prompts and optimizer are the same.
    """
    listeners = listeners or Listeners()
    for name in ("base", *methods):
        model, folder = Path(config.model), Path(config.out) / folder_name(name)
        if name != "base":
            listeners.on_begin(name, "train")
            run = config.model_copy(update={"objective": methods[name], "out": str(folder)})
            model = training.train(run, listeners.on_train)
        listeners.on_begin(name, "evaluation")
        own = evals.model_copy(update={"model": str(model), "out": str(folder)})
        yield Outcome(name, model, folder, evaluation.evaluate(own, listeners.on_eval))
