"""What a run of `gft generate` decides once: may it write here, which prompts, in which shards, drawn by whom.

All of it is written to `.work/` when the output is created, so that a run started again only reads it back.
"""

import fcntl
import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from gftdata import groups as grouping
from gftdata.config import EngineConfig, GenerateConfig, SamplingConfig, SglangConfig, recipe_differences
from gftdata.errors import UserError
from gftdata.models import context_length, model_revision
from gftdata.prompts import prompt_from_json, prompt_to_json, read_prompts
from gftdata.rewards import NEEDS_GROUND_TRUTH, resolve
from gftdata.shards import (
    DATA,
    RECORD,
    WORK,
    ModelRecord,
    PromptCounts,
    TokenizerRecord,
    check_writable,
    sha256_file,
    shard_name,
    write_atomic,
)
from gftdata.tokens import Tokenizer, encode_prompt, load_tokenizer
from gftdata.types import SELF, Prompt, Sampling, Seed, TokenIds

SGLANG_MARGIN = 7  # tokens of its context that SGLang does not give to prompt and response


@dataclass(frozen=True, slots=True)
class Phase:
    """One source whose responses are drawn rather than given."""

    source: str
    model: str
    count: int
    sampling: Sampling
    engine: EngineConfig


class Plan(BaseModel):
    """What a data set will hold; fixed when its output is created, kept in `.work/plan.json`."""

    model_config = RECORD

    recipe: dict[str, Any]
    models: tuple[ModelRecord, ...]
    tokenizer: TokenizerRecord
    source_sha256: str | None  # of the prompt file, where there is one
    prompts: PromptCounts
    num_shards: int


@dataclass(frozen=True, slots=True)
class ShardPrompt:
    """A prompt with its ids in the starting model's vocabulary, made once when the output is created."""

    prompt: Prompt
    prompt_ids: TokenIds


@dataclass(frozen=True, slots=True)
class Preview:
    """What a run would do, found without doing it."""

    prompts: PromptCounts
    num_shards: int
    shards_published: int
    prompt_tokens: int  # of all prompts together
    given_tokens: int  # of expert demonstrations and given teacher responses
    sampled_responses: int
    max_sampled_tokens: int  # if every sample ran to responses.max_tokens


def preview(config: GenerateConfig) -> Preview:
    """Read and check everything that `generate` would, load no model, write nothing. Raises UserError."""
    out, tokenizer = Path(config.out), preflight(config)
    survey = Survey(config, tokenizer)
    num_prompts = sum(1 for _ in survey.prompts())
    num_shards = math.ceil(num_prompts / config.shards.groups_per_shard)
    sampled = num_prompts * sum(phase.count for phase in phases(config))
    return Preview(
        prompts=survey.counts(),
        num_shards=num_shards,
        shards_published=sum((out / DATA / shard_name(i, num_shards)).is_file() for i in range(num_shards)),
        prompt_tokens=survey.prompt_tokens,
        given_tokens=survey.given_tokens,
        sampled_responses=sampled,
        max_sampled_tokens=sampled * config.responses.max_tokens,
    )


def preflight(config: GenerateConfig) -> Tokenizer:
    """Find mistakes in reward, engines, model and output before anything is read or written."""
    resolve(config.reward.name)
    for phase in phases(config):
        check_engine(phase.engine)
    tokenizer = load_tokenizer(config.model)
    check_output(config, Path(config.out), tokenizer)
    return tokenizer


def phases(config: GenerateConfig) -> list[Phase]:
    """The sources that are drawn: teachers first, the starting model last, since its engine goes on to score."""
    responses = config.responses

    def limit(sampling: SamplingConfig) -> Sampling:
        return sampling.with_limit(responses.max_tokens)

    teachers = [
        Phase(t.source, t.model, t.count, limit(t.sampling), t.engine or config.engine)
        for t in responses.teachers
        if t.model
    ]
    return [*teachers, Phase(SELF, config.model, responses.own.count, limit(responses.own.sampling), config.engine)]


def check_output(config: GenerateConfig, out: Path, tokenizer: Tokenizer) -> None:
    """Refuse an output that cannot be written, that holds something else, or a data set of another recipe."""
    check_writable(out)
    if not out.is_dir() or not any(out.iterdir()):
        return
    plan = read_plan(out)
    if plan is None:
        only_work = {path.name for path in out.iterdir()} == {WORK}
        if not only_work:
            raise UserError(f"{out}: not empty and not a data set of gft generate; name another folder (out)")
        return
    if differing := recipe_differences(plan.recipe, config.recipe()):
        raise UserError(
            f"{out}: was begun with another config: {differing}; use the earlier value to continue it, or name another "
            "folder (out)"
        )
    for record in plan.models:
        if (found := model_revision(record.name)) != record.revision:
            raise UserError(
                f"{out}: was begun with {record.name} at revision {record.revision[:12]}, which is now {found[:12]}; "
                "restore that model, or name another folder (out)"
            )
    if tokenizer_record(tokenizer) != plan.tokenizer:
        raise UserError(
            f"{out}: was begun with another tokenizer, chat template or end token of {config.model}; restore them, or "
            "name another folder (out)"
        )
    source = source_sha256(config)
    if source is not None and source != plan.source_sha256:
        raise UserError(
            f"{out}: was begun with another content of {config.prompts.path}; restore that file, or name another "
            "folder (out)"
        )


def read_plan(out: Path) -> Plan | None:
    """The plan of an output that was created before."""
    path = out / WORK / "plan.json"
    return Plan.model_validate_json(path.read_bytes()) if path.is_file() else None


def source_sha256(config: GenerateConfig) -> str | None:
    """Of the prompt file, where prompts come from a file that is there."""
    path = config.prompts.path
    return sha256_file(Path(path)) if path is not None and Path(path).is_file() else None


def tokenizer_record(tokenizer: Tokenizer) -> TokenizerRecord:
    return TokenizerRecord(
        hash=tokenizer.hash,
        template_hash=tokenizer.template_hash,
        end_id=tokenizer.end_id,
        stop_ids=tokenizer.stop_ids,
    )


@contextmanager
def sole_writer(out: Path) -> Iterator[None]:
    """Hold an output for this process. Raises UserError where another one has it.

    Whatever ends the block before the first sample or shard is there takes back what it has written.
    """
    created = [folder for folder in (out / WORK, out, *out.parents) if not folder.exists()]  # innermost first
    (out / WORK).mkdir(parents=True, exist_ok=True)
    with (out / WORK / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{out}: another gft generate is writing to it; wait, or name another folder") from None
        try:
            yield
        except BaseException:
            worth_keeping = any((out / WORK / "journal").rglob("*.jsonl")) or any((out / DATA).glob("*"))
            if created and not worth_keeping:
                shutil.rmtree(out / WORK, ignore_errors=True)
                with suppress(OSError):  # a folder above may hold another run's output by now: only empty ones go
                    for folder in created[1:]:
                        folder.rmdir()
            raise


def create_output(config: GenerateConfig, out: Path, tokenizer: Tokenizer) -> Plan:
    """Fix the prompts and their shards. The plan is written last: an output without one is created anew."""
    models = tuple(
        ModelRecord(role=role, name=name, revision=model_revision(name))
        for role, name in [("reference", config.model), *((phase.source, phase.model) for phase in phases(config))]
    )
    folder = out / WORK / "prompts"
    survey = Survey(config, tokenizer)
    num_shards = 0
    prompts = survey.prompts()
    while batch := list(islice(prompts, config.shards.groups_per_shard)):
        text = "".join(f"{item.prompt_ids.tolist()}\t{prompt_to_json(item.prompt)}\n" for item in batch)
        write_atomic(folder / f"{num_shards:05d}.jsonl", text)
        num_shards += 1
    plan = Plan(
        recipe=config.recipe(),
        models=models,
        tokenizer=tokenizer_record(tokenizer),
        source_sha256=source_sha256(config),
        prompts=survey.counts(),
        num_shards=num_shards,
    )
    write_atomic(out / WORK / "plan.json", plan.model_dump_json(indent=2))
    return plan


class Survey:
    """One pass over the prompt source: yields the prompts that fit and counts what does not."""

    def __init__(self, config: GenerateConfig, tokenizer: Tokenizer) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._readers = {config.model: tokenizer}  # every model that the prompts are put to
        for phase in phases(config):
            if phase.model not in self._readers:
                self._readers[phase.model] = load_tokenizer(phase.model)
        self._sglang = any(isinstance(phase.engine, SglangConfig) for phase in phases(config))
        self._longest = dict.fromkeys(self._readers, 0)
        self._read = self._too_long = self._given_missing = self._given_too_long = 0
        self.prompt_tokens = self.given_tokens = 0

    def prompts(self) -> Iterator[ShardPrompt]:
        """Raises UserError as `read_prompts` does, where nothing fits, and where a group would not fit the model."""
        config, limit = self._config, self._config.prompts.max_prompt_tokens
        needs_truth = config.reward.name in NEEDS_GROUND_TRUTH
        wanted = sum(config.responses.given_counts.values())
        for prompt in read_prompts(config.prompts, grouping.given_columns(config), needs_ground_truth=needs_truth):
            self._read += 1
            ids = {model: self._encode(model, prompt) for model in self._readers}
            length = len(ids[config.model])
            if length > limit:
                if config.prompts.on_too_long == "error":
                    raise UserError(
                        f"prompt {self._read} has {length} tokens, over prompts.max_prompt_tokens={limit}; raise it, "
                        "or set prompts.on_too_long=skip to leave such prompts out"
                    )
                self._too_long += 1
                continue
            completions = grouping.given_completions(config.responses, prompt, self._tokenizer)
            self._given_missing += wanted - len(prompt.given)
            self._given_too_long += len(prompt.given) - len(completions)
            self.given_tokens += sum(len(completion.response_ids) for completion in completions)
            self.prompt_tokens += length
            self._longest = {model: max(longest, len(ids[model])) for model, longest in self._longest.items()}
            yield ShardPrompt(prompt, ids[config.model])
        if self._read == self._too_long:
            raise UserError(f"all {self._read} prompts are longer than prompts.max_prompt_tokens={limit}")
        for model, longest in self._longest.items():
            context = context_length(model)
            needed = longest + config.responses.max_tokens + (SGLANG_MARGIN if self._sglang else 0)
            if context is not None and needed > context:
                raise UserError(
                    f"{model} holds {context} tokens, but the longest prompt has {longest} and "
                    f"responses.max_tokens is {config.responses.max_tokens}"
                    + (f", and SGLang keeps {SGLANG_MARGIN} for itself" if self._sglang else "")
                    + "; lower that, or prompts.max_prompt_tokens"
                )

    def _encode(self, model: str, prompt: Prompt) -> TokenIds:
        try:
            return encode_prompt(self._readers[model], prompt.messages)
        except UserError as error:
            raise UserError(f"prompt {self._read}: {model}: {error}") from None

    def counts(self) -> PromptCounts:
        """What became of the rows; complete when `prompts` has been exhausted."""
        return PromptCounts(
            rows_read=self._read,
            prompts=self._read - self._too_long,
            prompts_too_long=self._too_long,
            given_missing=self._given_missing,
            given_too_long=self._given_too_long,
        )


def shard_prompts(out: Path, shard: int) -> list[ShardPrompt]:
    """The prompts of a shard, as they were when the output was created."""
    with (out / WORK / "prompts" / f"{shard:05d}.jsonl").open(encoding="utf-8") as lines:
        parts = (line.partition("\t") for line in lines)
        return [
            ShardPrompt(prompt_from_json(prompt), np.asarray(json.loads(ids), dtype=np.int32))
            for ids, _, prompt in parts
        ]


def rows_of_shard(config: GenerateConfig, plan: Plan, shard: int) -> int:
    size = config.shards.groups_per_shard
    return min(size, plan.prompts.prompts - shard * size)


def sample_seed(run_seed: int, prompt_id: str, source: str, index: int) -> Seed:
    """The seed of one sample: 63 bits of sha256 over what identifies it, so that it is the same in every run."""
    digest = hashlib.sha256(f"{run_seed}\n{prompt_id}\n{source}\n{index}".encode()).digest()
    return Seed(int.from_bytes(digest[:8], "big") >> 1)


def check_engine(config: EngineConfig) -> None:
    """Find a mistake in the engine's settings before anything is written."""
    if isinstance(config, SglangConfig):
        from gftdata.engines.sglang import check_python

        check_python(config)
    else:
        from gftdata.engines.hf import pick_device

        pick_device(config.device)
