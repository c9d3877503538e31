"""The settings of `gft compare`, and which runs they ask for. No torch here."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, model_validator

from gftdata.config import STRICT, ServerConfig, load_settings, read_settings
from gfttrain.config import Data, EvalConfig, EvalSettings, ObjectiveConfig, TrainConfig, TrainSettings
from gfttrain.presets import METHODS, NAMES, folder_name

BASE = "base"  # the untrained model


def _known(methods: tuple[str, ...]) -> tuple[str, ...]:
    wrong = [name for name in methods if name not in NAMES]
    if wrong:
        raise ValueError(f"expected some of {', '.join(NAMES)}, found {', '.join(wrong)}")
    return methods


class CompareConfig(BaseModel):
    """All of `gft compare`: one model, trained several ways on the same data and seeds, evaluated before and after.

    `train` and `eval` may name the YAML files of `gft train` and `gft eval`; see `load_compare`.
    """

    model_config = STRICT

    model: str
    data: Data
    out: str  # gets a run folder for each method and seed, comparison.json and report.html
    methods: Annotated[tuple[str, ...], AfterValidator(_known)] = NAMES  # of samples/objectives
    objectives: dict[str, ObjectiveConfig] = {}  # further ones by name: another tau, another set of sources
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)  # each method is trained once with each
    train: TrainSettings = TrainSettings()
    eval: EvalSettings
    untrained: tuple[str, ...] = ()  # benchmarks of skills that the data does not train: what falls there is forgotten

    @model_validator(mode="after")
    def consistent(self) -> "CompareConfig":
        places = [
            folder_name(BASE),
            *(_place(m, n) for m in (*self.methods, *self.objectives) for n in set(self.seeds)),
        ]
        twice = sorted({place for place in places if places.count(place) > 1})
        if twice:
            raise ValueError(f"two methods would share a folder: {', '.join(twice)}; give one another name")
        odd = [name for name in self.objectives if not folder_name(name).replace("-", "").replace(".", "").isalnum()]
        if odd:
            raise ValueError(f"objectives: a name has letters, digits, blanks and .-+(), found {', '.join(odd)}")
        if not self.methods and not self.objectives:
            raise ValueError("nothing to train: name some methods or objectives")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: the same seed twice is the same run twice")
        named = [benchmark.name for benchmark in self.eval.benchmarks]
        missing = [name for name in self.untrained if name not in named]
        if missing:
            raise ValueError(f"untrained: no benchmark is named {', '.join(missing)}; there are: {', '.join(named)}")
        if isinstance(self.eval.engine, ServerConfig):
            raise ValueError("eval.engine: a server serves one model, and here each one is evaluated: use hf or sglang")
        return self


@dataclass(frozen=True, slots=True)
class Run:
    """One model of a comparison."""

    method: str  # BASE: the untrained one
    seed: int | None  # None: the untrained one
    training: TrainConfig | None
    evaluation: EvalConfig

    @property
    def folder(self) -> Path:
        """Of the run, or of the untrained model's results."""
        assert self.evaluation.out is not None
        return Path(self.evaluation.out)


def runs(config: CompareConfig) -> list[Run]:
    """The untrained model, then each method with each seed.

    Seed 0 of a method is in OUT/<method>, seed N in OUT/<method>-seed-N, so that seeds can be added later.
    """
    objectives = {name: METHODS[name] for name in config.methods} | config.objectives
    how_to_train, how_to_evaluate = _settings(config.train), _settings(config.eval)
    found = [
        Run(BASE, None, None, EvalConfig(model=config.model, out=str(Path(config.out) / BASE), **how_to_evaluate)),
    ]
    for method, objective in objectives.items():
        for seed in config.seeds:
            out = str(Path(config.out) / _place(method, seed))
            training = TrainConfig(
                model=config.model, data=config.data, out=out, objective=objective, seed=seed, **how_to_train
            )
            found.append(Run(method, seed, training, EvalConfig(model=out, out=out, **how_to_evaluate)))
    return found


def _place(method: str, seed: int) -> str:
    return folder_name(method) + (f"-seed-{seed}" if seed else "")


def _settings(block: BaseModel) -> dict[str, Any]:
    return {name: getattr(block, name) for name in type(block).model_fields}


def load_compare(path: Path, overrides: Iterable[str] = (), values: Mapping[str, Any] | None = None) -> CompareConfig:
    """Read the YAML of a comparison.

    Where `train` or `eval` is the name of a file, relative to this one, the block is what that file says, but for what
    differs from run to run (`objective`, `seed`, `out`); `model` and `data` are the train file's unless the comparison
    names its own. Raises UserError.
    """
    data = read_settings(path)
    if isinstance(data.get("train"), str):
        block = read_settings(path.parent / data["train"])
        data = {key: block[key] for key in ("model", "data") if key in block} | data
        data["train"] = {key: block[key] for key in block if key not in TrainConfig.model_fields.keys() - _TRAIN}
    if isinstance(data.get("eval"), str):
        block = read_settings(path.parent / data["eval"])
        data["eval"] = {key: block[key] for key in block if key not in EvalConfig.model_fields.keys() - _EVAL}
    return load_settings(CompareConfig, data, str(path), overrides, values)


_TRAIN, _EVAL = TrainSettings.model_fields.keys(), EvalSettings.model_fields.keys()
