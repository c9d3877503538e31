"""`gft generate`: prompts -> expert + teacher + self responses -> rewards -> reference log-probs -> shards.

Read it downward: `generate` is the pipeline, what follows are its steps in order. Everything that a run decides once
(the recipe, the prompts, which shard they belong to) is written to `.work/` when the output is created, so that a run
started again only reads it back.
"""

import hashlib
import importlib.metadata
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from gftdata import groups as grouping
from gftdata.config import EngineConfig, GenerateConfig, SamplingConfig, recipe_differences
from gftdata.errors import UserError
from gftdata.journal import Journal, entry_of, read_journal, shard_folder
from gftdata.judging import judge_pool
from gftdata.models import context_length, model_revision, shown_name
from gftdata.prompts import prompt_from_json, prompt_to_json, read_prompts
from gftdata.rewards import NEEDS_GROUND_TRUTH, resolve
from gftdata.schema import SCHEMA_VERSION, groups_to_table
from gftdata.shards import (
    DATA,
    FORMAT,
    MANIFEST,
    RECORD,
    WORK,
    Manifest,
    ModelRecord,
    PromptCounts,
    TokenizerRecord,
    publish_shard,
    read_manifest,
    shard_name,
    shard_record,
    write_atomic,
    write_manifest,
)
from gftdata.summary import summarise
from gftdata.tokens import Tokenizer, encode_prompt, load_tokenizer
from gftdata.types import (
    SELF,
    Completion,
    Group,
    Prompt,
    Response,
    SampleRequest,
    Sampling,
    ScoreRequest,
    Seed,
    TokenIds,
    Verdict,
)

if TYPE_CHECKING:
    from gftdata.engines.hf import HfEngine
    from gftdata.engines.protocol import Sampler, Scorer

PACKAGES = ("gft-toolkit", "torch", "transformers", "datasets", "pyarrow", "math-verify", "reasoning-gym")


@dataclass(frozen=True, slots=True)
class Phase:
    """One source whose responses are drawn rather than given."""

    source: str
    model: str
    count: int
    sampling: Sampling


class Plan(BaseModel):
    """What a data set will hold; fixed when its output is created, kept in `.work/plan.json`."""

    model_config = RECORD

    recipe: dict[str, Any]
    models: tuple[ModelRecord, ...]
    prompts: PromptCounts
    num_shards: int


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, for whoever shows progress."""

    kind: Literal["groups", "phase", "sample", "judged", "shard"]
    source: str = ""
    count: int = 0  # groups: in the data set; phase: samples still to draw; shard: groups in it
    done: int = 0  # groups: published before
    tokens: int = 0
    reward: float | None = None


Listener = Callable[[Event], None]


def generate(config: GenerateConfig, on_event: Listener = lambda event: None) -> Manifest:
    """Run or continue the generation of a data set; returns the manifest of the finished one.

    Raises UserError for what the user can mend. Killed at any moment and called again with the same config, it
    continues, and the finished data set holds every prompt exactly once.
    """
    out = Path(config.out)
    resolve(config.reward.name)
    check_output(config, out)
    if (out / MANIFEST).is_file():
        return read_manifest(out)
    tokenizer = load_tokenizer(config.model)
    plan = read_plan(out) or create_output(config, out, tokenizer)
    unfinished = [shard for shard in range(plan.num_shards) if shard_record(out, shard, plan.num_shards) is None]
    remaining = sum(rows_of_shard(config, plan, shard) for shard in unfinished)
    on_event(Event("groups", count=plan.prompts.prompts, done=plan.prompts.prompts - remaining))
    *teachers, own = phases(config)
    with closing(Journal(out / WORK / "journal")) as journal:
        for phase in teachers:
            draw_teacher(config, plan, unfinished, phase, journal, on_event)
        if unfinished:
            finish_shards(config, plan, unfinished, own, tokenizer, journal, on_event)
    return finalize(config, out, plan, tokenizer)


def draw_teacher(
    config: GenerateConfig, plan: Plan, shards: Sequence[int], phase: Phase, journal: Journal, on_event: Listener
) -> None:
    """One teacher's phase over all shards: its model is up only meanwhile."""
    out = Path(config.out)
    missing = count_missing(config, plan, shards, phase)
    if missing == 0:
        return
    tokenizer = load_tokenizer(phase.model)
    engine = open_engine(phase.model, config.engine, tokenizer)
    on_event(Event("phase", phase.source, missing))
    draw(
        engine,
        phase_requests(config, out, shards, phase, tokenizer),
        phase,
        journal,
        _written_by(plan, phase),
        on_event,
    )


def finish_shards(
    config: GenerateConfig,
    plan: Plan,
    shards: Sequence[int],
    own: Phase,
    tokenizer: Tokenizer,
    journal: Journal,
    on_event: Listener,
) -> None:
    """The last phase: the starting model draws its samples, all responses are judged and scored, shards published."""
    out, reward, layout = Path(config.out), config.reward, config.shards
    engine = open_engine(config.model, config.engine, tokenizer)
    on_event(Event("phase", own.source, count_missing(config, plan, shards, own)))
    with judge_pool(
        reward.name, timeout_s=reward.timeout_s, workers=reward.workers, memory_gb=reward.memory_gb
    ) as submit:
        for shard in shards:
            requests = phase_requests(config, out, [shard], own, tokenizer)
            draw(engine, requests, own, journal, _written_by(plan, own), on_event)
            journal.close_shard(shard)
            groups = finish(assemble(config, shard, tokenizer), tokenizer, submit, engine, on_event)
            table = groups_to_table(groups, layout.logprob_dtype)
            publish_shard(out, shard, plan.num_shards, table, layout.row_group_size, layout.logprob_dtype)
            shard_record(out, shard, plan.num_shards)
            shutil.rmtree(shard_folder(out / WORK / "journal", shard), ignore_errors=True)
            on_event(Event("shard", count=table.num_rows))


def _written_by(plan: Plan, phase: Phase) -> str:
    record = next(record for record in plan.models if record.role == phase.source)
    return f"{shown_name(record.name)}@{record.revision[:12]}"


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
    out = Path(config.out)
    resolve(config.reward.name)
    check_output(config, out)
    survey = Survey(config, load_tokenizer(config.model))
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


def phases(config: GenerateConfig) -> list[Phase]:
    """The sources that are drawn: teachers first, the starting model last, since its engine goes on to score."""
    responses = config.responses

    def limit(sampling: SamplingConfig) -> Sampling:
        return sampling.with_limit(responses.max_tokens)

    teachers = [Phase(t.source, t.model, t.count, limit(t.sampling)) for t in responses.teachers if t.model]
    return [*teachers, Phase(SELF, config.model, responses.own.count, limit(responses.own.sampling))]


def check_output(config: GenerateConfig, out: Path) -> None:
    """Refuse an output that holds something else, or a data set of another recipe."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: exists and is not a folder (out)")
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


def read_plan(out: Path) -> Plan | None:
    """The plan of an output that was created before."""
    path = out / WORK / "plan.json"
    return Plan.model_validate_json(path.read_bytes()) if path.is_file() else None


def create_output(config: GenerateConfig, out: Path, tokenizer: Tokenizer) -> Plan:
    """Fix the prompts and their shards. The plan is written last; a mistake on the way leaves nothing behind."""
    existed = out.is_dir()
    try:
        plan = _write_prompts(config, out, tokenizer)
    except BaseException:
        shutil.rmtree(out / WORK if existed else out, ignore_errors=True)
        raise
    write_atomic(out / WORK / "plan.json", plan.model_dump_json(indent=2))
    return plan


def _write_prompts(config: GenerateConfig, out: Path, tokenizer: Tokenizer) -> Plan:
    models = tuple(
        ModelRecord(role=role, name=name, revision=model_revision(name))
        for role, name in [("reference", config.model), *((phase.source, phase.model) for phase in phases(config))]
    )
    folder = out / WORK / "prompts"
    survey = Survey(config, tokenizer)
    num_shards = 0
    prompts = survey.prompts()
    while batch := list(islice(prompts, config.shards.groups_per_shard)):
        text = "".join(prompt_to_json(prompt) + "\n" for prompt in batch)
        write_atomic(folder / f"{num_shards:05d}.jsonl", text)
        num_shards += 1
    return Plan(recipe=config.recipe(), models=models, prompts=survey.counts(), num_shards=num_shards)


class Survey:
    """One pass over the prompt source: yields the prompts that fit and counts what does not."""

    def __init__(self, config: GenerateConfig, tokenizer: Tokenizer) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._readers = {config.model: tokenizer}  # every model that the prompts are put to
        for phase in phases(config):
            if phase.model not in self._readers:
                self._readers[phase.model] = load_tokenizer(phase.model)
        self._longest = dict.fromkeys(self._readers, 0)
        self._read = self._too_long = self._given_missing = self._given_too_long = 0
        self.prompt_tokens = self.given_tokens = 0

    def prompts(self) -> Iterator[Prompt]:
        """Raises UserError as `read_prompts` does, where nothing fits, and where a group would not fit the model."""
        config, limit = self._config, self._config.prompts.max_prompt_tokens
        needs_truth = config.reward.name in NEEDS_GROUND_TRUTH
        wanted = sum(config.responses.given_counts.values())
        for prompt in read_prompts(config.prompts, grouping.given_columns(config), needs_ground_truth=needs_truth):
            self._read += 1
            lengths = {model: self._length(model, prompt) for model in self._readers}
            length = lengths[config.model]
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
            self._longest = {model: max(longest, lengths[model]) for model, longest in self._longest.items()}
            yield prompt
        if self._read == self._too_long:
            raise UserError(f"all {self._read} prompts are longer than prompts.max_prompt_tokens={limit}")
        for model, longest in self._longest.items():
            context = context_length(model)
            if context is not None and longest + config.responses.max_tokens > context:
                raise UserError(
                    f"{model} holds {context} tokens, but the longest prompt has {longest} and "
                    f"responses.max_tokens is {config.responses.max_tokens}; lower that, or prompts.max_prompt_tokens"
                )

    def _length(self, model: str, prompt: Prompt) -> int:
        try:
            return len(encode_prompt(self._readers[model], prompt.messages))
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


def shard_prompts(out: Path, shard: int) -> list[Prompt]:
    with (out / WORK / "prompts" / f"{shard:05d}.jsonl").open(encoding="utf-8") as lines:
        return [prompt_from_json(line) for line in lines]


def rows_of_shard(config: GenerateConfig, plan: Plan, shard: int) -> int:
    size = config.shards.groups_per_shard
    return min(size, plan.prompts.prompts - shard * size)


def sample_seed(run_seed: int, prompt_id: str, source: str, index: int) -> Seed:
    """The seed of one sample: 63 bits of sha256 over what identifies it, so that it is the same in every run."""
    digest = hashlib.sha256(f"{run_seed}\n{prompt_id}\n{source}\n{index}".encode()).digest()
    return Seed(int.from_bytes(digest[:8], "big") >> 1)


def count_missing(config: GenerateConfig, plan: Plan, shards: Sequence[int], phase: Phase) -> int:
    """Samples of a phase that no journal holds yet."""
    total = sum(rows_of_shard(config, plan, shard) for shard in shards) * phase.count
    journals = (read_journal(Path(config.out) / WORK / "journal", shard) for shard in shards)
    return total - sum(source == phase.source for entries in journals for source, _, _ in entries)


@dataclass(frozen=True, slots=True)
class Placed:
    """A request and where its sample belongs."""

    shard: int
    row: int
    request: SampleRequest


def phase_requests(
    config: GenerateConfig, out: Path, shards: Sequence[int], phase: Phase, tokenizer: Tokenizer
) -> Iterator[Placed]:
    """The requests of a phase that no journal answers yet, a group's one after the other."""
    for shard in shards:
        done = read_journal(out / WORK / "journal", shard)
        for row, prompt in enumerate(shard_prompts(out, shard)):
            wanted = [k for k in range(phase.count) if (phase.source, row, k) not in done]
            if not wanted:
                continue
            prompt_ids = encode_prompt(tokenizer, prompt.messages)
            for k in wanted:
                seed = sample_seed(config.seed, prompt.prompt_id, phase.source, k)
                yield Placed(shard, row, SampleRequest(prompt.prompt_id, k, prompt_ids, seed))


def draw(
    engine: "Sampler", placed: Iterable[Placed], phase: Phase, journal: Journal, model: str, on_event: Listener
) -> None:
    """Draw what is asked; a finished sample is in the journal before anything else happens to it."""
    places: dict[tuple[str, int], tuple[int, int]] = {}

    def requests() -> Iterator[SampleRequest]:
        for item in placed:
            places[item.request.prompt_id, item.request.index] = item.shard, item.row
            yield item.request

    for sample in engine.sample(requests(), phase.sampling):
        shard, row = places.pop((sample.request.prompt_id, sample.request.index))
        entry = entry_of(sample, phase.source, row, model)
        journal.append(shard, entry)
        on_event(Event("sample", phase.source, tokens=len(entry.response_ids)))


def assemble(config: GenerateConfig, shard: int, tokenizer: Tokenizer) -> list[tuple[Prompt, list[Completion]]]:
    """A shard's prompts with all their completions: given ones, then teachers, then self, each in order."""
    out = Path(config.out)
    entries = read_journal(out / WORK / "journal", shard)
    rows = []
    for row, prompt in enumerate(shard_prompts(out, shard)):
        drawn = [
            grouping.drawn_completion(config.responses, entries[phase.source, row, k], tokenizer)
            for phase in phases(config)
            for k in range(phase.count)
        ]
        given = grouping.given_completions(config.responses, prompt, tokenizer)
        rows.append((prompt, grouping.ordered(config.responses, [*given, *(c for c in drawn if c is not None)])))
    return rows


def finish(
    rows: Sequence[tuple[Prompt, Sequence[Completion]]],
    tokenizer: Tokenizer,
    submit: Callable[[Prompt, str], "Future[Verdict]"],
    scorer: "Scorer",
    on_event: Listener,
) -> list[Group]:
    """Judge and score a shard's completions. Judging runs in its pool while the model scores."""
    verdicts = [[submit(prompt, completion.text) for completion in completions] for prompt, completions in rows]
    prompt_ids: list[TokenIds] = [encode_prompt(tokenizer, prompt.messages) for prompt, _ in rows]
    requests = [
        ScoreRequest(ids, completion.response_ids)
        for ids, (_, completions) in zip(prompt_ids, rows, strict=True)
        for completion in completions
    ]
    scores = iter(scorer.score(requests))
    groups = []
    for ids, (prompt, completions), futures in zip(prompt_ids, rows, verdicts, strict=True):
        responses = []
        for completion, future in zip(completions, futures, strict=True):
            verdict = future.result()
            responses.append(Response(completion, verdict, next(scores)))
            on_event(Event("judged", completion.source, reward=verdict.reward))
        groups.append(Group(prompt, ids, tuple(responses)))
    return groups


def finalize(config: GenerateConfig, out: Path, plan: Plan, tokenizer: Tokenizer) -> Manifest:
    """Gather the commit records and mark the data set final."""
    records = [shard_record(out, shard, plan.num_shards) for shard in range(plan.num_shards)]
    missing = [shard_name(i, plan.num_shards) for i, record in enumerate(records) if record is None]
    if missing:
        raise UserError(f"{out}: {len(missing)} shards are not there yet, the first is {missing[0]}")
    complete = tuple(record for record in records if record is not None)
    paths = [out / DATA / record.name for record in complete]
    summary = summarise(paths)
    expected = config.responses.size * plan.prompts.prompts - plan.prompts.given_missing - plan.prompts.given_too_long
    manifest = Manifest(
        format=FORMAT,
        schema_version=SCHEMA_VERSION,
        toolkit_version=importlib.metadata.version("gft-toolkit"),
        recipe=_without_folders(plan.recipe),
        models=tuple(record.model_copy(update={"name": shown_name(record.name)}) for record in plan.models),
        tokenizer=TokenizerRecord(
            hash=tokenizer.hash,
            template_hash=tokenizer.template_hash,
            end_id=tokenizer.end_id,
            stop_ids=tokenizer.stop_ids,
        ),
        engine=f"{config.engine.name} {importlib.metadata.version('transformers')}",
        packages={name: importlib.metadata.version(name) for name in PACKAGES},
        prompts=plan.prompts,
        teacher_samples_left_out=expected - summary.responses,
        summary=summary,
        shards=complete,
    )
    write_manifest(out, manifest)
    for folder in ("journal", "prompts", "staged"):
        shutil.rmtree(out / WORK / folder, ignore_errors=True)
    return manifest


def _without_folders(value: Any, key: str = "") -> Any:
    """A recipe as it may be shared: absolute paths are cut to their last part."""
    if isinstance(value, dict):
        return {name: _without_folders(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if key in ("model", "path", "dataset") and isinstance(value, str) and Path(value).is_absolute():
        return shown_name(value) if Path(value).is_dir() else Path(value).name
    return value


def open_engine(model: str, config: EngineConfig, tokenizer: Tokenizer) -> "HfEngine":
    """Start the configured engine; torch is imported here and not before."""
    from gftdata.engines.hf import open_engine as open_hf

    return open_hf(model, config, tokenizer)
