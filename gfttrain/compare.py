"""Train several objectives from the same shards and evaluate each: the paper's comparison at whatever scale one has."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gfttrain import evaluate as evaluation
from gfttrain import train as training
from gfttrain.config import EvalConfig, ObjectiveConfig, TrainConfig
from gfttrain.presets import folder_name


@dataclass(frozen=True, slots=True)
class Outcome:
    """One model of a comparison, with the result of each evaluation."""

    method: str  # `base` for the untrained one
    model: Path
    results: dict[str, evaluation.EvalResult]


@dataclass(frozen=True, slots=True)
class Listeners:
    """Who shows the progress of the parts."""

    on_begin: Callable[[str, str], None] = lambda method, what: None
    on_train: training.Listener = lambda event: None
    on_eval: evaluation.Listener = lambda event: None


def compare(
    config: TrainConfig,
    methods: Mapping[str, ObjectiveConfig],
    evals: Mapping[str, EvalConfig],
    listeners: Listeners | None = None,
) -> Iterator[Outcome]:
    """Yield the base model's outcome, then each method's, trained into `config.out/<method>`.

    Only the objective differs between runs: data, seed, order of prompts and optimizer are the same.
    """
    listeners = listeners or Listeners()
    for name in ("base", *methods):
        model = Path(config.model)
        if name != "base":
            listeners.on_begin(name, "train")
            run = config.model_copy(
                update={"objective": methods[name], "out": str(Path(config.out) / folder_name(name))}
            )
            model = training.train(run, listeners.on_train)
        results = {}
        for title, settings in evals.items():
            listeners.on_begin(name, title)
            own = settings.model_copy(update={"model": str(model)})
            results[title] = evaluation.evaluate(own, listeners.on_eval)
        yield Outcome(name, model, results)
