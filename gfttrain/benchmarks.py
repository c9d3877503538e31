"""What `gft eval` finds out before it loads a model: prompts, recipes, where results go, what is there of them.

Nothing here writes. What is drawn and counted is evaluate.py's.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gftdata.config import COMPUTED, EngineConfig, HfConfig, PromptsConfig, RewardConfig, recipe_differences
from gftdata.errors import UserError
from gftdata.models import context_length, model_revision
from gftdata.prepare import SGLANG_MARGIN, check_engine
from gftdata.prompts import prompt_to_json, read_prompts
from gftdata.rewards import NEEDS_GROUND_TRUTH, resolve
from gftdata.shards import check_writable
from gftdata.tokens import Tokenizer, check_model_path, encode_prompt, load_tokenizer
from gftdata.types import Prompt, TokenIds
from gfttrain.config import BenchmarkConfig, EvalConfig
from gfttrain.results import Result, read_results
from gfttrain.runs import finished_model, run_of
from gfttrain.samples import benchmark_folder, check_folder, is_complete, num_drawn, read_recipe

DRAWN = {"reward", "num_samples", "sampling", "max_tokens", "greedy"}  # settings that samples depend on


@dataclass(frozen=True, slots=True)
class Questions:
    """The prompts of a benchmark that fit, and how many did not."""

    prompts: tuple[Prompt, ...]
    ids: tuple[TokenIds, ...]  # of each prompt, in the model's vocabulary
    too_long: int


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark, and what is there of it already."""

    settings: BenchmarkConfig
    questions: Questions
    recipe: dict[str, Any]  # what its samples depend on
    folder: Path
    num_drawn: int  # samples of this recipe that are there
    result: Result | None  # where it is finished with these settings
    replaces: str = ""  # how the samples there were drawn otherwise: they go

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def num_samples(self) -> int:
        """Of all prompts together, greedy ones included."""
        return len(self.questions.prompts) * (self.settings.num_samples + self.settings.greedy)


@dataclass(frozen=True, slots=True)
class Plan:
    """An evaluation that has been found sound."""

    config: EvalConfig  # its model is a model, no run
    revision: str
    tokenizer: Tokenizer
    out: Path
    benchmarks: tuple[Benchmark, ...]


def plan(config: EvalConfig) -> Plan:
    """Check everything that can be checked without a model, and read the prompts. Raises UserError."""
    config = config.model_copy(update={"model": finished_model(config.model)})
    check_engine(config.engine)
    out = results_folder(config)
    tokenizer = load_tokenizer(config.model)
    for reference in _references(config):
        check_engine(reference_engine(config))
        if load_tokenizer(reference).hash != tokenizer.hash:
            raise UserError(f"reference {reference}: has another tokenizer than {config.model}")
    revision = model_revision(config.model)
    earlier = read_results(out)
    benchmarks = tuple(_benchmark(config, one, revision, tokenizer, out, earlier) for one in config.benchmarks)
    return Plan(config, revision, tokenizer, out, benchmarks)


def results_folder(config: EvalConfig) -> Path:
    """Where the results go: `out`, or the run that the model is of. Raises UserError where neither says."""
    if config.out is not None and "://" in config.out:
        raise UserError(f"{config.out}: results go to a folder of this machine or a shared one (out)")
    out = run_of(config.model) if config.out is None else Path(config.out)
    if out is None:
        check_model_path(config.model)  # a run that is not there, or whose name is mistyped
        raise UserError(
            f"{config.model} is no run of gft train, so results need a folder: name one (out), e.g. --out runs/base"
        )
    check_writable(out)
    return out


def reference_engine(config: EvalConfig) -> EngineConfig:
    """What scores with the reference."""
    return config.engine if config.reference_engine is None else config.reference_engine


def read_questions(config: PromptsConfig, reward: RewardConfig, tokenizer: Tokenizer) -> Questions:
    """The prompts to evaluate on. Raises UserError for what is wrong with them or the reward's name."""
    resolve(reward.name)
    prompts, ids, too_long = [], [], 0
    for prompt in read_prompts(config, {}, needs_ground_truth=reward.name in NEEDS_GROUND_TRUTH):
        encoded = encode_prompt(tokenizer, prompt.messages)
        if len(encoded) > config.max_prompt_tokens:
            too_long += 1
            continue
        prompts.append(prompt)
        ids.append(encoded)
    if too_long and (config.on_too_long == "error" or not prompts):
        raise UserError(
            f"{too_long} of {too_long + len(prompts)} prompts are longer than "
            f"prompts.max_prompt_tokens={config.max_prompt_tokens}"
        )
    return Questions(tuple(prompts), tuple(ids), too_long)


def settings_of(benchmark: Benchmark) -> dict[str, Any]:
    """The settings as the result records them: the recipe, where things came from, and what is counted."""
    shown = benchmark.settings.model_dump(mode="json", include={"prompts", "reference"})
    return {**shown, "k": list(benchmark.settings.ks), **benchmark.recipe}


def _references(config: EvalConfig) -> list[str]:
    """Each reference model once."""
    return list(dict.fromkeys(one.reference for one in config.benchmarks if one.reference is not None))


def _benchmark(
    config: EvalConfig,
    settings: BenchmarkConfig,
    revision: str,
    tokenizer: Tokenizer,
    out: Path,
    earlier: dict[str, Result],
) -> Benchmark:
    try:
        questions = read_questions(settings.prompts, settings.reward, tokenizer)
        _check_context(config, settings, questions)
    except UserError as error:
        raise UserError(f"benchmark {settings.name}: {error}") from None
    folder = benchmark_folder(out, settings.name)
    check_folder(folder)
    digest = hashlib.sha256()
    for prompt in questions.prompts:
        digest.update(prompt_to_json(prompt).encode() + b"\n")
    recipe = {
        "revision": revision,
        "tokenizer": tokenizer.hash,
        "chat_template": tokenizer.template_hash,
        "prompts_sha256": digest.hexdigest(),
        **settings.model_dump(mode="json", include=DRAWN, exclude={"reward": {"workers"}}),
        "engine": config.engine.model_dump(mode="json", exclude=COMPUTED),
        "seed": config.seed,
    }
    if settings.reference is not None:
        recipe |= {
            "reference_revision": model_revision(settings.reference),
            "reference_engine": reference_engine(config).model_dump(mode="json", exclude=COMPUTED),
        }
    there = read_recipe(folder)
    begun = there == recipe
    complete = begun and is_complete(folder)
    num_there = num_drawn(folder) if begun and not complete else 0
    replaces = "" if there is None else recipe_differences(there, recipe)
    found = Benchmark(settings, questions, recipe, folder, num_there, None, replaces)
    if not complete:
        return found
    last = earlier.get(settings.name)
    counted = {**recipe, "k": list(settings.ks)}
    same = last is not None and {key: last.settings.get(key) for key in counted} == counted
    return Benchmark(settings, questions, recipe, folder, found.num_samples, last if same else None)


def _check_context(config: EvalConfig, settings: BenchmarkConfig, questions: Questions) -> None:
    context = context_length(config.model)
    margin = 0 if isinstance(config.engine, HfConfig) else SGLANG_MARGIN
    longest = max(len(ids) for ids in questions.ids)
    if context is not None and longest + settings.max_tokens + margin > context:
        raise UserError(
            f"{config.model} holds {context} tokens, but the longest prompt has {longest} and max_tokens is "
            f"{settings.max_tokens}"
            + (f", and SGLang keeps {margin} for itself" if margin else "")
            + "; lower that, or prompts.max_prompt_tokens"
        )
