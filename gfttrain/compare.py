"""Train several objectives from the same shards and evaluate each: the paper's comparison at whatever scale one has."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gftdata.config import load_config
from gftdata.errors import UserError
from gfttrain import evaluate as evaluation
from gfttrain import train as training
from gfttrain.config import EvalConfig, ObjectiveConfig, TrainConfig

# The paper's methods and their neighbours, in its table's order; each is the same trainer with another objective.
NAMES = (
    "SFT",
    "SFT (mix)",
    "RFT",
    "DFT",
    "DFT + anchor",
    "PSFT",
    "GRPO (offline)",
    "GFT w/o GAL",
    "GFT w/o DCR",
    "GFT (no mix)",
    "GFT",
)


def objectives_folder() -> Path:
    """`samples/objectives` of a checkout, or the copy that an installed package carries."""
    here = Path(__file__).resolve().parent
    for folder in (here / "objectives", here.parent / "samples" / "objectives"):
        if (folder / "gft.yaml").is_file():
            return folder
    raise UserError("the objectives' configs are not installed; install gft-toolkit anew, or run it from a checkout")


def folder_name(method: str) -> str:
    """`GFT w/o DCR` -> gft-wo-dcr: the method's run folder, and its config in `objectives_folder`."""
    kept = method.lower().replace("w/o", "wo").replace("(", "").replace(")", "").replace("+", "plus")
    return "-".join(kept.split())


def methods() -> dict[str, ObjectiveConfig]:
    """Each method's objective, from its config, which is the one place where it is defined."""
    folder = objectives_folder()
    return {name: load_config(TrainConfig, folder / f"{folder_name(name)}.yaml").objective for name in NAMES}


METHODS = methods()


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
