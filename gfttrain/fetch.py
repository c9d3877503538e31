"""What train, eval and compare read from elsewhere, and of which command a file is. The rest: gftdata/fetch.py."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from pydantic import BaseModel

from gftdata.config import GenerateConfig, load_config
from gftdata.fetch import Wanted, wanted_groups, wanted_model, wanted_prompts, wanted_to_generate
from gftdata.locations import is_remote
from gfttrain.compare_config import CompareConfig, load_compare, runs
from gfttrain.config import EvalConfig, TrainConfig

Settings = GenerateConfig | TrainConfig | EvalConfig | CompareConfig


def wanted_by(paths: Sequence[Path]) -> list[Wanted]:
    """What the settings files name that is not on this machine by itself, each once, in their order.

    What lies in the output folder of one of them will be made, and is left out. Raises UserError.
    """
    configs = [_load(path) for path in paths]
    made = [out for config in configs if (out := getattr(config, "out", None)) is not None]
    wanted = dict.fromkeys(each for config in configs for each in _wanted(config))
    return [each for each in wanted if not any(Path(each.name).is_relative_to(out) for out in made)]


def _load(path: Path) -> Settings:
    """Settings of the command that knows most of the keys; `load_config` says what is wrong with the others."""
    kinds: tuple[type[BaseModel], ...] = (EvalConfig, GenerateConfig, TrainConfig, CompareConfig)
    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        keys = {}
    known = [sum(key in kind.model_fields for key in keys) if isinstance(keys, dict) else 0 for kind in kinds]
    kind = kinds[known.index(max(known))]
    config = load_compare(path) if kind is CompareConfig else load_config(kind, path)
    assert isinstance(config, Settings)
    return config


def _wanted(config: Settings) -> Iterator[Wanted]:
    if isinstance(config, GenerateConfig):
        yield from wanted_to_generate(config)
        return
    if isinstance(config, CompareConfig):
        base, *trained = runs(config)
        yield from _wanted(base.evaluation)
        for run in trained:
            assert run.training is not None
            yield from _wanted(run.training)
        return
    yield from wanted_model(config.model, config.engine if isinstance(config, EvalConfig) else None)
    if isinstance(config, TrainConfig):
        for data in config.data:
            if is_remote(data):
                yield from wanted_groups(data)
        if config.evaluation is not None:
            yield from wanted_prompts(config.evaluation.prompts)
        return
    for benchmark in config.benchmarks:
        if benchmark.reference is not None:
            yield from wanted_model(benchmark.reference, config.reference_engine or config.engine)
        yield from wanted_prompts(benchmark.prompts)
