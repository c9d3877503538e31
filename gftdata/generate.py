"""`gft generate`: prompts -> expert + teacher + self responses -> rewards -> reference log-probs -> shards.

Read it downward: `generate` is the pipeline, what follows are its steps in order. What a run decides once is in
`prepare.py`.
"""

import importlib.metadata
import json
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gftdata import groups as grouping
from gftdata.config import EngineConfig, GenerateConfig, SglangConfig
from gftdata.errors import UserError
from gftdata.journal import Journal, entry_of, read_journal, shard_folder
from gftdata.judging import Submit, open_judges
from gftdata.models import shown_name
from gftdata.prepare import (
    Phase,
    Plan,
    check_engine,
    check_output,
    create_output,
    phases,
    read_plan,
    rows_of_shard,
    sample_seed,
    shard_prompts,
)
from gftdata.rewards import resolve
from gftdata.schema import SCHEMA_VERSION, groups_to_table
from gftdata.shards import (
    DATA,
    FORMAT,
    MANIFEST,
    WORK,
    Manifest,
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
    Refusal,
    Response,
    SampleRequest,
    ScoreRequest,
    TokenIds,
)

if TYPE_CHECKING:
    from gftdata.engines.protocol import Engine, Sampler, Scorer

QUARANTINE = "quarantine"
PACKAGES = ("gft-toolkit", "torch", "transformers", "datasets", "pyarrow", "math-verify", "reasoning-gym")


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, for whoever shows progress; may come from another thread."""

    kind: Literal["groups", "phase", "sample", "quarantined", "judged", "shard"]
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
    for phase in phases(config):
        check_engine(phase.engine)
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
    missing = count_missing(config, plan, shards, phase)
    if not missing.total():
        return
    tokenizer = load_tokenizer(phase.model)
    with closing(open_engine(phase.model, phase.engine, tokenizer)) as engine:
        on_event(Event("phase", phase.source, missing.total()))
        for _ in draw(config, plan, shards, phase, engine, tokenizer, journal, on_event):
            pass


def finish_shards(
    config: GenerateConfig,
    plan: Plan,
    shards: Sequence[int],
    own: Phase,
    tokenizer: Tokenizer,
    journal: Journal,
    on_event: Listener,
) -> None:
    """The last phase: the starting model draws its samples, all responses are judged and scored, shards published.

    A shard is finished as soon as its last sample is there; beside the sampling where the engine can do both at once.
    """
    missing = count_missing(config, plan, shards, own)
    with (
        closing(open_engine(own.model, own.engine, tokenizer)) as engine,
        open_judges(config.reward) as submit,
        ThreadPoolExecutor(1) as background,
    ):
        write_atomic(Path(config.out) / WORK / "engine", engine.version)
        on_event(Event("phase", own.source, missing.total()))
        running: deque[Future[None]] = deque()

        def finish(shard: int) -> None:
            journal.close_shard(shard)
            if not engine.concurrent:
                finish_shard(config, plan, shard, tokenizer, submit, engine, on_event)
                return
            while len(running) > 1:  # a shard in work and one that waits: memory stays flat
                running.popleft().result()
            running.append(background.submit(finish_shard, config, plan, shard, tokenizer, submit, engine, on_event))

        incomplete = [shard for shard in shards if missing[shard]]
        for shard in sorted(set(shards) - set(incomplete)):
            finish(shard)
        for shard in draw(config, plan, incomplete, own, engine, tokenizer, journal, on_event):
            missing[shard] -= 1
            if not missing[shard]:
                finish(shard)
        for future in running:
            future.result()


def finish_shard(
    config: GenerateConfig,
    plan: Plan,
    shard: int,
    tokenizer: Tokenizer,
    submit: Submit,
    scorer: "Scorer",
    on_event: Listener,
) -> None:
    """Judge, score and publish one shard whose samples are all there."""
    out, layout = Path(config.out), config.shards
    groups = judge_and_score(assemble(config, shard, tokenizer), tokenizer, submit, scorer, on_event)
    table = groups_to_table(groups, layout.logprob_dtype)
    publish_shard(out, shard, plan.num_shards, table, layout.row_group_size, layout.logprob_dtype)
    shard_record(out, shard, plan.num_shards)
    shutil.rmtree(shard_folder(out / WORK / "journal", shard), ignore_errors=True)
    on_event(Event("shard", count=table.num_rows))


def _written_by(plan: Plan, phase: Phase) -> str:
    record = next(record for record in plan.models if record.role == phase.source)
    return f"{shown_name(record.name)}@{record.revision[:12]}"


def count_missing(config: GenerateConfig, plan: Plan, shards: Sequence[int], phase: Phase) -> Counter[int]:
    """Shard -> samples of a phase that are still to be drawn."""
    out = Path(config.out)
    refused = quarantined(out)
    missing: Counter[int] = Counter()
    for shard in shards:
        done = Counter(row for source, row, _ in read_journal(out / WORK / "journal", shard) if source == phase.source)
        if not refused:  # the usual case needs no look at the prompts
            missing[shard] = rows_of_shard(config, plan, shard) * phase.count - done.total()
            continue
        ids = (prompt.prompt_id for prompt in shard_prompts(out, shard))
        missing[shard] = sum(phase.count - done[row] for row, prompt_id in enumerate(ids) if prompt_id not in refused)
    return missing


def quarantined(out: Path) -> set[str]:
    """Prompts that the engine gave up; each has a file that says why."""
    return {path.stem for path in (out / WORK / QUARANTINE).glob("*.json")}


def quarantine(out: Path, source: str, refusal: Refusal) -> None:
    """Leave a prompt out of the data set, with its reason on record. Deleting the file has it tried again."""
    entry = {"prompt_id": refusal.request.prompt_id, "source": source, "reason": refusal.reason}
    write_atomic(out / WORK / QUARANTINE / f"{refusal.request.prompt_id}.json", json.dumps(entry))


@dataclass(frozen=True, slots=True)
class Placed:
    """A request and where its sample belongs."""

    shard: int
    row: int
    request: SampleRequest


def phase_requests(
    config: GenerateConfig, shards: Sequence[int], phase: Phase, tokenizer: Tokenizer
) -> Iterator[Placed]:
    """The requests of a phase that no journal answers yet, a group's one after the other."""
    out = Path(config.out)
    refused = quarantined(out)
    for shard in shards:
        done = read_journal(out / WORK / "journal", shard)
        for row, prompt in enumerate(shard_prompts(out, shard)):
            wanted = [k for k in range(phase.count) if (phase.source, row, k) not in done]
            if not wanted or prompt.prompt_id in refused:
                continue
            prompt_ids = encode_prompt(tokenizer, prompt.messages)
            for k in wanted:
                seed = sample_seed(config.seed, prompt.prompt_id, phase.source, k)
                yield Placed(shard, row, SampleRequest(prompt.prompt_id, k, prompt_ids, seed))


def draw(
    config: GenerateConfig,
    plan: Plan,
    shards: Sequence[int],
    phase: Phase,
    engine: "Sampler",
    tokenizer: Tokenizer,
    journal: Journal,
    on_event: Listener,
) -> Iterator[int]:
    """Draw what a phase still lacks; yields the shard of each request as it is answered.

    A finished sample is in the journal before anything else happens to it.
    """
    written_by = _written_by(plan, phase)
    places: dict[tuple[str, int], tuple[int, int]] = {}

    def requests() -> Iterator[SampleRequest]:
        for item in phase_requests(config, shards, phase, tokenizer):
            places[item.request.prompt_id, item.request.index] = item.shard, item.row
            yield item.request

    for answer in engine.sample(requests(), phase.sampling):
        shard, row = places.pop((answer.request.prompt_id, answer.request.index))
        if isinstance(answer, Refusal):
            quarantine(Path(config.out), phase.source, answer)
            on_event(Event("quarantined", phase.source))
        else:
            entry = entry_of(answer, phase.source, row, written_by)
            journal.append(shard, entry)
            on_event(Event("sample", phase.source, tokens=len(entry.response_ids)))
        yield shard


def assemble(config: GenerateConfig, shard: int, tokenizer: Tokenizer) -> list[tuple[Prompt, list[Completion]]]:
    """A shard's prompts with all their completions: given ones, then teachers, then self, each in order."""
    out = Path(config.out)
    entries = read_journal(out / WORK / "journal", shard)
    rows = []
    refused = quarantined(out)
    for row, prompt in enumerate(shard_prompts(out, shard)):
        if prompt.prompt_id in refused:
            continue
        drawn = [
            grouping.drawn_completion(config.responses, entries[phase.source, row, k], tokenizer)
            for phase in phases(config)
            for k in range(phase.count)
        ]
        given = grouping.given_completions(config.responses, prompt, tokenizer)
        rows.append((prompt, grouping.ordered(config.responses, [*given, *(c for c in drawn if c is not None)])))
    return rows


def judge_and_score(
    rows: Sequence[tuple[Prompt, Sequence[Completion]]],
    tokenizer: Tokenizer,
    submit: Submit,
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
    refused = sorted(quarantined(out))
    if refused:
        entries = [(out / WORK / QUARANTINE / f"{prompt_id}.json").read_text() for prompt_id in refused]
        write_atomic(out / f"{QUARANTINE}.jsonl", "".join(f"{entry}\n" for entry in entries))
    drawn_by_teachers = {phase.source: phase.count for phase in phases(config) if phase.source != SELF}
    expected = sum(drawn_by_teachers.values()) * summary.groups
    found = sum(source.responses for source in summary.sources if source.source in drawn_by_teachers)
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
        engine=(out / WORK / "engine").read_text(),
        packages={name: importlib.metadata.version(name) for name in PACKAGES},
        prompts=plan.prompts,
        prompts_quarantined=len(refused),
        teacher_samples_left_out=expected - found,
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


def open_engine(model: str, config: EngineConfig, tokenizer: Tokenizer) -> "Engine":
    """Start the configured engine. What an engine needs is imported here and not before."""
    if isinstance(config, SglangConfig):
        from gftdata.engines.sglang import open_engine as open_sglang

        return open_sglang(model, config, tokenizer)
    from gftdata.engines.hf import open_engine as open_hf

    return open_hf(model, config, tokenizer)
