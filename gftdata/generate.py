"""`gft generate`: prompts -> expert + teacher + self responses -> rewards -> reference log-probs -> shards.

Read it downward: `generate` is the pipeline, what follows are its steps in order. What a run decides once is in
`prepare.py`. Several tasks may be at work in one output (`tasks.py`), each on its own shards, and two copies of one
task on the same shards: of what they publish the first copy stays.
"""

import gc
import hashlib
import json
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gftdata import groups as grouping
from gftdata.config import EngineConfig, GenerateConfig, OpenaiConfig, ServerConfig, SglangConfig
from gftdata.errors import UserError
from gftdata.events import Event, Listener
from gftdata.extend import Key, carried_keys, carried_responses
from gftdata.finalize import ENGINES, finalize, read_final
from gftdata.journal import JOURNAL, Journal, entry_of, open_journal, read_journal
from gftdata.judging import Submit, open_judges
from gftdata.manifest import DATA, QUARANTINE, WORK, Manifest
from gftdata.models import shown_name
from gftdata.prepare import (
    Phase,
    Plan,
    ShardPrompt,
    create_output,
    phases,
    preflight,
    quarantined,
    read_plan,
    rows_of_shard,
    shard_prompts,
    writing,
)
from gftdata.schema import groups_to_table
from gftdata.shards import publish_shard, published, shard_name, shard_record
from gftdata.status import reporting
from gftdata.store import Store, open_store
from gftdata.tasks import Task, new_attempt, owned
from gftdata.tokens import Tokenizer, encode_prompt, load_tokenizer
from gftdata.types import (
    SELF,
    Completion,
    Group,
    Refusal,
    Response,
    SampleRequest,
    ScoreRequest,
    Unscored,
)

if TYPE_CHECKING:
    from gftdata.engines.protocol import Engine, Sampler, Scorer

NO_IDS = np.empty(0, np.int32)
FEW = 4  # groups of a last, short shard that may all be beyond scoring
MAX_REFUSALS = 32  # one after the other, without an answer between: not the prompts are to blame
MAX_IDLE_PASSES = 3  # over the same unfinished shards, none of which could be finished


@dataclass(frozen=True, slots=True)
class Run:
    """What is made, where, and of which prompts."""

    config: GenerateConfig
    store: Store
    plan: Plan


def generate(config: GenerateConfig, on_event: Listener = lambda event: None, task: Task = Task()) -> Manifest | None:
    """Run or continue the generation of a data set, or one task's share of it.

    Returns the manifest of the finished data set, which whoever finishes last writes; None where shards of other tasks
    are still missing. Raises UserError for what the user can mend. Killed at any moment and called again with the same
    config, it continues, and the finished data set holds every prompt exactly once.
    """
    store, tokenizer = open_store(config.out), preflight(config)
    if (manifest := read_final(store)) is not None:
        return manifest
    attempt = new_attempt()
    with writing(store, alone=task.alone), reporting(store, attempt, task, on_event) as listener:
        plan = read_plan(store) or create_output(config, store, tokenizer)
        try:
            with closing(open_journal(store, attempt)) as journal:
                engines = _make_shards(Run(config, store, plan), task, tokenizer, journal, listener)
        except OSError:
            if (manifest := read_final(store)) is None:
                raise
            return manifest  # another copy of this task was faster, and has put away what this one was reading
        if len(published(store, plan.num_shards)) < plan.num_shards:
            return None
        return finalize(store, plan, engines)


def _make_shards(
    run: Run,
    task: Task,
    tokenizer: Tokenizer,
    journal: Journal,
    on_event: Listener,
) -> set[str]:
    """Make the task's shards, as far as they are not there; returns the versions of the engines that scored.

    One pass does it, unless another copy of this task has taken its samples away with a shard that this one cannot see
    yet: on a shared file system that may take a minute. Then they are drawn again.
    """
    mine = owned(task, range(run.plan.num_shards))
    *teachers, own = phases(run.config)
    total, unfinished = sum(rows_of_shard(run.plan, shard) for shard in mine), _unfinished(run, mine)
    remaining = sum(rows_of_shard(run.plan, shard) for shard in unfinished)
    on_event(Event("groups", count=total, done=total - remaining))
    idle, engines = 0, set()
    while unfinished:
        for phase in teachers:
            draw_teacher(run, unfinished, phase, journal, on_event)
        engines |= {finish_shards(run, unfinished, own, tokenizer, journal, on_event)}
        before, unfinished = unfinished, _unfinished(run, mine)
        idle = idle + 1 if unfinished == before else 0
        if idle == MAX_IDLE_PASSES:
            raise UserError(
                f"{run.store.location}: {len(unfinished)} shards were drawn {idle} times and are not there, the first "
                f"is {shard_name(unfinished[0], run.plan.num_shards)}: is something taking away what is in {JOURNAL}?"
            )
    return engines


def _unfinished(run: Run, shards: Sequence[int]) -> list[int]:
    there = set(published(run.store, run.plan.num_shards))
    return [shard for shard in shards if shard not in there]


def draw_teacher(
    run: Run,
    shards: Sequence[int],
    phase: Phase,
    journal: Journal,
    on_event: Listener,
) -> None:
    """One teacher's phase over all shards: its model is up only meanwhile."""
    missing = count_missing(run, shards, phase)
    if not missing.total():
        return
    tokenizer = None if phase.takes_text else load_tokenizer(phase.model)
    with closing(open_sampler(phase, tokenizer)) as sampler:
        on_event(Event("phase", phase.source, missing.total()))
        begun = has_begun(run, shards, phase, missing)
        for _ in draw(run, shards, phase, sampler, tokenizer, journal, on_event, begun=begun):
            pass


def finish_shards(
    run: Run,
    shards: Sequence[int],
    own: Phase,
    tokenizer: Tokenizer,
    journal: Journal,
    on_event: Listener,
) -> str:
    """The last phase: the starting model draws its samples, all responses are judged and scored, shards published.

    A shard is finished as soon as its last sample is there; beside the sampling where the engine can do both at once.
    Returns the engine's version.
    """
    missing = count_missing(run, shards, own)
    # left in reverse: judges first (an error kills them), then the engine (whose closing answers whoever waits for it),
    # so that the thread in the background, joined last, has nothing left to wait for
    with (
        _background_thread() as background,
        closing(open_engine(run.config.model, run.config.engine, tokenizer)) as engine,
        open_judges(run.config.reward) as submit,
        _imports_out_of_the_way(),
    ):
        run.store.write(f"{ENGINES}/{hashlib.sha256(engine.version.encode()).hexdigest()[:8]}", engine.version.encode())
        on_event(Event("phase", own.source, missing.total()))
        running: deque[Future[None]] = deque()

        def finish(shard: int) -> None:
            journal.close_shard(shard)
            work = (run, shard, tokenizer, submit, engine, journal, on_event)
            if not engine.concurrent:
                finish_shard(*work)
                return
            while len(running) > 1:  # a shard in work and one that waits: memory stays flat
                running.popleft().result()
            running.append(background.submit(finish_shard, *work))

        incomplete = [shard for shard in shards if missing[shard]]
        for shard in sorted(set(shards) - set(incomplete)):
            finish(shard)
        begun = has_begun(run, shards, own, missing)
        for shard in draw(run, incomplete, own, engine, tokenizer, journal, on_event, begun=begun):
            missing[shard] -= 1
            if not missing[shard]:
                finish(shard)
        for future in running:
            future.result()
        return engine.version


@contextmanager
def _imports_out_of_the_way() -> Iterator[None]:
    """Garbage collections look at what the run makes, not at what imports have left: a tenth of our own time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _background_thread() -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(1)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def finish_shard(
    run: Run,
    shard: int,
    tokenizer: Tokenizer,
    submit: Submit,
    scorer: "Scorer",
    journal: Journal,
    on_event: Listener,
) -> None:
    """Judge, score and publish one shard whose samples are all there, unless another copy of this task has done it."""
    layout, name = run.config.shards, f"{DATA}/{shard_name(shard, run.plan.num_shards)}"
    rows = None if run.store.exists(name) else assemble(run, shard, tokenizer)
    if rows is not None:
        groups = judge_and_score(run.store, rows, submit, scorer, on_event)
        table = groups_to_table(groups, layout.logprob_dtype)
        publish_shard(run.store, shard, run.plan.num_shards, table, layout.row_group_size, layout.logprob_dtype)
    if (record := shard_record(run.store, shard, run.plan.num_shards)) is not None:
        journal.drop_shard(shard)
        on_event(Event("shard", count=record.rows))


def _written_by(plan: Plan, phase: Phase) -> str:
    record = next(record for record in plan.models if record.role == phase.source)
    return f"{shown_name(record.name)}@{record.revision[:12]}"


def count_missing(run: Run, shards: Sequence[int], phase: Phase) -> Counter[int]:
    """Shard -> samples of a phase that are still to be drawn."""
    simple = not quarantined(run.store) and run.config.extend is None  # the usual case needs no look at the prompts
    missing: Counter[int] = Counter()
    for shard in shards:
        if simple:
            done = sum(source == phase.source for source, *_ in read_journal(run.store, shard))
            missing[shard] = rows_of_shard(run.plan, shard) * phase.count - done
        else:
            missing[shard] = sum(len(wanted) for _, _, wanted in _wanted(run, shard, phase))
    return missing


def has_begun(run: Run, shards: Sequence[int], phase: Phase, missing: Counter[int]) -> bool:
    """Whether some samples of a phase are there already, so that its engine and settings have been seen to work."""
    everything = sum(rows_of_shard(run.plan, shard) for shard in shards) * phase.count
    refused = len(quarantined(run.store)) * phase.count
    return missing.total() < everything - refused or any(run.store.names(DATA))


def _wanted(run: Run, shard: int, phase: Phase) -> Iterator[tuple[int, ShardPrompt, list[int]]]:
    """(row, prompt, the k that a phase still has to draw for it), for each prompt that was not given up."""
    refused, items = quarantined(run.store), shard_prompts(run.store, run.plan, shard)
    done = read_journal(run.store, shard).keys() | carried_keys(run.config, items)
    for row, item in enumerate(items):
        if item.prompt.prompt_id not in refused:
            yield row, item, [k for k in range(phase.count) if (phase.source, row, k) not in done]


def quarantine(store: Store, prompt_id: str, source: str, reason: str) -> None:
    """Leave a prompt out of the data set, with its reason on record."""
    entry = {"prompt_id": prompt_id, "source": source, "reason": reason}
    store.write(f"{WORK}/{QUARANTINE}/{prompt_id}.json", json.dumps(entry).encode())


@dataclass(frozen=True, slots=True)
class Placed:
    """A request and where its sample belongs."""

    shard: int
    row: int
    request: SampleRequest


def phase_requests(
    run: Run,
    shards: Sequence[int],
    phase: Phase,
    tokenizer: Tokenizer | None,
) -> Iterator[Placed]:
    """The requests of a phase that no journal answers yet, a group's one after the other."""
    for shard in shards:
        for row, item, wanted in _wanted(run, shard, phase):
            if not wanted:
                continue
            prompt_id, messages = item.prompt.prompt_id, phase.messages(item.prompt)
            if phase.source == SELF:
                prompt_ids = item.prompt_ids
            else:
                prompt_ids = NO_IDS if tokenizer is None else encode_prompt(tokenizer, messages)
            for k in wanted:
                seed = grouping.sample_seed(run.config.seed, prompt_id, phase.source, k)
                yield Placed(shard, row, SampleRequest(prompt_id, k, messages, prompt_ids, seed))


def draw(
    run: Run,
    shards: Sequence[int],
    phase: Phase,
    sampler: "Sampler",
    tokenizer: Tokenizer | None,
    journal: Journal,
    on_event: Listener,
    *,
    begun: bool,
) -> Iterator[int]:
    """Draw what a phase still lacks; yields the shard of each request as it is answered.

    A finished sample is in the journal before anything else happens to it. A refused prompt is quarantined once
    another request has been answered, now or before (`begun`): refusals alone speak of the engine or its settings, and
    raise UserError.
    """
    refused: list[tuple[Refusal, int]] = []  # not yet believed, with their shards
    answered = begun
    written_by = _written_by(run.plan, phase)
    places: dict[tuple[str, int], tuple[int, int]] = {}

    def requests() -> Iterator[SampleRequest]:
        for item in phase_requests(run, shards, phase, tokenizer):
            places[item.request.prompt_id, item.request.index] = item.shard, item.row
            yield item.request

    for answer in sampler.sample(requests(), phase.sampling):
        shard, row = places.pop((answer.request.prompt_id, answer.request.index))
        if isinstance(answer, Refusal):
            refused.append((answer, shard))
            if len(refused) >= MAX_REFUSALS:
                break
            continue
        entry = entry_of(answer, phase.source, row, written_by)
        journal.append(shard, entry)
        answered = True
        on_event(Event("sample", phase.source, tokens=answer.num_tokens))
        yield from _believe(run.store, phase.source, refused, on_event)
        yield shard
    if refused and (not answered or len(refused) >= MAX_REFUSALS):
        reason = refused[-1][0].reason
        raise UserError(f"{len(refused)} requests for {phase.source} were refused with no answer between: {reason}")
    yield from _believe(run.store, phase.source, refused, on_event)


def _believe(store: Store, source: str, refused: list[tuple[Refusal, int]], on_event: Listener) -> Iterator[int]:
    """Quarantine what was refused; yields the shards."""
    while refused:
        refusal, shard = refused.pop(0)
        quarantine(store, refusal.request.prompt_id, source, refusal.reason)
        on_event(Event("quarantined", source))
        yield shard


Row = tuple[ShardPrompt, list[Completion | Response]]  # a response needs no judging and scoring any more


def assemble(run: Run, shard: int, tokenizer: Tokenizer) -> list[Row] | None:
    """A shard's prompts with all their completions: given ones, then teachers, then self, each in order.

    What the extended data set has of them comes as it is there, judged and scored. None where samples are missing that
    had been there: another copy of this task has taken them away, because it has published the shard.
    """
    entries = read_journal(run.store, shard)
    refused, items = quarantined(run.store), shard_prompts(run.store, run.plan, shard)
    carried = carried_responses(run.config, items)
    left_out = carried_keys(run.config, items) - carried.keys()  # by the extended data set
    rows: list[Row] = []
    for row, item in enumerate(items):
        if item.prompt.prompt_id in refused:
            continue
        keys = [(phase.source, row, k) for phase in phases(run.config) for k in range(phase.count)]
        keys = [key for key in keys if key not in left_out]
        if any(key not in entries and key not in carried for key in keys):
            return None
        drawn = [
            carried.get(key) or grouping.drawn_completion(run.config.responses, entries[key], tokenizer) for key in keys
        ]
        given = [
            _already(carried, row, completion)
            for completion in grouping.given_completions(run.config.responses, item.prompt, tokenizer)
        ]
        rows.append((item, grouping.ordered(run.config.responses, [*given, *(c for c in drawn if c is not None)])))
    return rows


def _already(carried: Mapping[Key, Response], row: int, given: Completion) -> Completion | Response:
    """A given completion, or its carried response where that was the same text."""
    of_source = (response for key, response in carried.items() if key[:2] == (given.source, row))
    return next((r for r in of_source if np.array_equal(r.completion.response_ids, given.response_ids)), given)


def judge_and_score(
    store: Store,
    rows: Sequence[Row],
    submit: Submit,
    scorer: "Scorer",
    on_event: Listener,
) -> list[Group]:
    """Judge and score a shard's completions. Judging runs in its pool while the model scores.

    A prompt with a response that the engine cannot score is quarantined.
    """
    new = [[found for found in of_row if isinstance(found, Completion)] for _, of_row in rows]
    verdicts = [
        [submit(item.prompt, completion.text) for completion in completions]
        for (item, _), completions in zip(rows, new, strict=True)
    ]
    requests = [
        ScoreRequest(item.prompt_ids, completion.response_ids)
        for (item, _), completions in zip(rows, new, strict=True)
        for completion in completions
    ]
    answers = iter(scorer.score(requests))
    scores = [[next(answers) for _ in completions] for completions in new]
    unscored = [next((score for score in of_row if isinstance(score, Unscored)), None) for of_row in scores]
    failures = {row[0].prompt.prompt_id: f.reason for row, f in zip(rows, unscored, strict=True) if f is not None}
    give_up(store, failures, len(rows) - len(failures), on_event)
    groups = []
    for (item, found), of_row, failed, futures in zip(rows, scores, unscored, verdicts, strict=True):
        if failed is not None:
            continue
        responses = []
        judged = zip(of_row, futures, strict=True)
        for response in found:
            if isinstance(response, Completion):
                score, future = next(judged)
                assert not isinstance(score, Unscored)
                response = Response(response, future.result(), score)
            responses.append(response)
            on_event(Event("judged", response.completion.source, reward=response.verdict.reward))
        groups.append(Group(item.prompt, item.prompt_ids, tuple(responses)))
    return groups


def give_up(store: Store, failures: Mapping[str, str], num_scored: int, on_event: Listener) -> None:
    """Quarantine the prompts of a shard (id -> reason) that the engine could not score.

    Raises UserError, and quarantines none, where that says more of the engine than of the prompts: no group of the
    shard was scored, and there are several of them, or no shard was ever published.
    """
    doubtful = len(failures) > FEW or not store.names(DATA)
    if failures and not num_scored and doubtful:
        raise UserError(f"not one of {len(failures)} groups could be scored: {next(iter(failures.values()))}")
    for prompt_id, reason in failures.items():
        quarantine(store, prompt_id, "reference", reason)
        on_event(Event("quarantined", "reference"))


def open_sampler(phase: Phase, tokenizer: Tokenizer | None) -> "Sampler":
    """Start what draws a teacher's samples; it has a tokenizer unless it takes text."""
    if isinstance(phase.engine, OpenaiConfig):
        from gftdata.engines.endpoint import open_endpoint

        return open_endpoint(phase.model, phase.engine)
    assert tokenizer is not None
    return open_engine(phase.model, phase.engine, tokenizer)


def open_engine(model: str, config: EngineConfig, tokenizer: Tokenizer) -> "Engine":
    """Start the configured engine. What an engine needs is imported here and not before."""
    if isinstance(config, SglangConfig):
        from gftdata.engines.sglang import open_engine as open_sglang

        return open_sglang(model, config, tokenizer)
    if isinstance(config, ServerConfig):
        from gftdata.engines.server import open_engine as open_server

        return open_server(model, config, tokenizer)
    from gftdata.engines.hf import open_engine as open_hf

    return open_hf(model, config, tokenizer)
