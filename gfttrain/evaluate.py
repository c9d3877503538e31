"""`gft eval`: sample, judge, score with the reference, count. Each benchmark continues where it was stopped.

Read `evaluate` downward. What is known before a model is loaded is benchmarks.py's, what stands on disk samples.py's
and results.py's, the statistics estimates.py's. `measure` is the same for a model that is in memory already.
"""

import fcntl
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from gftdata.config import RewardConfig
from gftdata.errors import UserError
from gftdata.generate import MAX_REFUSALS, open_engine
from gftdata.groups import sample_seed
from gftdata.journal import Entry, entry_of, open_journal, read_journal
from gftdata.judging import Submit, open_judges
from gftdata.models import shown_name
from gftdata.store import FolderStore, hold
from gftdata.tasks import new_attempt
from gftdata.types import SELF, Refusal, Sample, SampleRequest, ScoreRequest, Unscored, Verdict
from gfttrain.benchmarks import Benchmark, Plan, Questions, plan, reference_engine, settings_of
from gfttrain.config import DrawConfig, EvalConfig
from gfttrain.estimates import estimate, mean_rewards, passes
from gfttrain.results import EVALS_FOLDER, Estimate, Result, append_result
from gfttrain.samples import (
    GREEDY,
    SHARD,
    WORK,
    Judged,
    Key,
    all_keys,
    begin,
    drop_journals,
    drop_verdicts,
    is_complete,
    judged,
    num_drawn,
    open_verdicts,
    read_samples,
    read_verdicts,
    refused,
    rewards_PN,
    write_samples,
)

if TYPE_CHECKING:
    from gftdata.engines.protocol import Sampler, Scorer

LOCK = f"{EVALS_FOLDER}/.lock"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, for whoever shows progress."""

    kind: Literal["anew", "benchmark", "sample", "reference", "there"]  # there: it was finished before
    benchmark: str = ""
    count: int = 0  # benchmark: of its samples; reference: of samples to score
    done: int = 0  # benchmark: drawn before
    tokens: int = 0
    note: str = ""  # anew: how the samples that were there, and go, were drawn otherwise


Listener = Callable[[Event], None]


def evaluate(config: EvalConfig, on_event: Listener = lambda event: None) -> dict[str, Result]:
    """Evaluate a model on every benchmark of the config; returns their results by name.

    Killed at any moment and called again with the same config it continues, and the results are those of an evaluation
    that was never stopped. A benchmark that is finished with the same recipe is not sampled again; of one with another
    recipe the samples go, and an event says so. Raises UserError for what the user can mend.
    """
    found = plan(config)
    results: dict[str, Result] = {}
    for one in found.benchmarks:
        if one.result is not None:
            results[one.name] = one.result
            drop_journals(one.folder)  # a kill may have come between the result and this
            on_event(Event("there", one.name))
    open_ones = [one for one in found.benchmarks if one.name not in results]
    if open_ones:
        with _alone(found.out):
            for one in open_ones:
                if one.replaces:
                    on_event(Event("anew", one.name, note=one.replaces))
                begin(one.folder, one.recipe)
            results |= _draw_and_count(found, open_ones, on_event)
    return {one.name: results[one.name] for one in found.benchmarks}


def _draw_and_count(found: Plan, open_ones: Sequence[Benchmark], on_event: Listener) -> dict[str, Result]:
    """Draw what is missing with the model's engine, then, with that one closed, score with the references."""
    results: dict[str, Result] = {}
    safe: dict[str, set[Key]] = {}
    undrawn = [one for one in open_ones if not is_complete(one.folder)]
    with ExitStack() as stack:
        engine: Sampler | None = None  # after a stop that came later, nothing is to be drawn
        if any(num_drawn(one.folder) < one.num_samples for one in undrawn):
            engine = stack.enter_context(closing(open_engine(found.config.model, found.config.engine, found.tokenizer)))
        judges: dict[RewardConfig, Submit] = {}  # left before the engine: an error ends them first
        for one in undrawn:
            reward = one.settings.reward
            if reward not in judges:
                judges[reward] = stack.enter_context(open_judges(reward))
            safe[one.name] = _draw(found, one, engine, judges[reward], on_event)
            if one.settings.reference is None:
                results[one.name] = _finish(found, one, safe[one.name], {})
    for reference in dict.fromkeys(one.settings.reference for one in undrawn if one.settings.reference is not None):
        of_it = [one for one in undrawn if one.settings.reference == reference]
        with closing(open_engine(reference, reference_engine(found.config), found.tokenizer)) as scorer:
            for one in of_it:
                sums = _score(one, safe[one.name], scorer, on_event)
                results[one.name] = _finish(found, one, safe[one.name], sums)
    for one in open_ones:
        if one.name not in results:  # all samples are there, and were not counted, or for other k
            results[one.name] = count(found, one, read_samples(one.folder, one.questions.prompts))
            append_result(found.out, results[one.name])
            drop_journals(one.folder)
    return results


def _draw(found: Plan, one: Benchmark, engine: "Sampler | None", submit: Submit, on_event: Listener) -> set[Key]:
    """Draw and judge what the journals lack; returns which samples are there.

    A sample is in its journal before anything else happens to it.
    """
    store, attempt = FolderStore(one.folder), new_attempt()
    entries, known = read_journal(store, SHARD), read_verdicts(one.folder)
    if engine is None and len(entries) < one.num_samples:  # none was missing a moment ago
        raise _vanished(one, one.num_samples - len(entries))
    safe = set(entries)
    on_event(Event("benchmark", one.name, count=one.num_samples, done=len(entries)))
    written_by = f"{shown_name(found.config.model)}@{found.revision[:12]}"
    waiting: deque[tuple[Key, Future[Verdict]]] = deque()
    prompts = one.questions.prompts
    with closing(open_journal(store, attempt)) as journal, open_verdicts(one.folder, attempt) as note:
        for key, entry in entries.items():
            if key not in known:
                waiting.append((key, submit(prompts[entry.row], entry.text)))
        drawn: Iterable[tuple[Key, Sample]] = ()
        if engine is not None:
            seed, greedy = found.config.seed, one.settings.greedy
            drawn = draw(one.settings, one.questions, engine, seed, entries.keys(), greedy=greedy)
        for key, sample in drawn:
            source, row, _ = key
            journal.append(SHARD, entry_of(sample, source, row, written_by))
            safe.add(key)
            waiting.append((key, submit(prompts[row], sample.text)))
            on_event(Event("sample", one.name, tokens=sample.num_tokens))
            while waiting and waiting[0][1].done():
                first, future = waiting.popleft()
                note(first, future.result())
        for key, future in waiting:
            note(key, future.result())
    return safe


def _journal(one: Benchmark, safe: Collection[Key]) -> dict[Key, Entry]:
    """The samples that are there. Raises UserError where one of them is not any more."""
    entries = read_journal(FolderStore(one.folder), SHARD)
    if gone := set(safe) - entries.keys():
        raise _vanished(one, len(gone))
    return entries


def _vanished(one: Benchmark, count: int) -> UserError:
    return UserError(
        f"{one.folder / WORK}: {count:,} samples that were there are not: is something taking its files away, or the "
        "file system failing? The same command continues"
    )


def draw(
    settings: DrawConfig,
    questions: Questions,
    sampler: "Sampler",
    seed: int,
    done: Collection[Key] = (),
    *,
    greedy: bool,
) -> Iterator[tuple[Key, Sample]]:
    """Draw the samples of a benchmark that are not done, in order of completion; those the engine gives up are missing.

    Raises UserError where refusals alone speak of the engine or its settings: 32 in a row, or nothing else at all.
    """
    place = {prompt.prompt_id: row for row, prompt in enumerate(questions.prompts)}
    sampling = settings.sampling.with_limit(settings.max_tokens)
    in_a_row, answered = 0, bool(done)
    reason = ""
    for source, how, count in ((SELF, sampling, settings.num_samples), (GREEDY, sampling.greedily(), int(greedy))):
        requests = (
            SampleRequest(prompt.prompt_id, k, prompt.messages, ids, sample_seed(seed, prompt.prompt_id, "eval", k))
            for row, (prompt, ids) in enumerate(zip(questions.prompts, questions.ids, strict=True))
            for k in range(count)
            if (source, row, k) not in done
        )
        for answer in sampler.sample(requests, how):
            if isinstance(answer, Refusal):
                in_a_row, reason = in_a_row + 1, answer.reason
                if in_a_row >= MAX_REFUSALS:
                    break
                continue
            in_a_row, answered = 0, True
            yield (source, place[answer.request.prompt_id], answer.request.index), answer
        if in_a_row and (not answered or in_a_row >= MAX_REFUSALS):
            raise UserError(f"{in_a_row} requests were refused with no answer between: {reason}")


def _score(one: Benchmark, safe: Collection[Key], scorer: "Scorer", on_event: Listener) -> dict[Key, float]:
    """Sum of log pi_ref over the tokens of each sample that was drawn of the model itself."""
    entries = [entry for entry in _journal(one, safe).values() if entry.source == SELF]
    on_event(Event("reference", one.name, count=len(entries)))
    requests = [ScoreRequest(one.questions.ids[entry.row], entry.response_ids) for entry in entries]
    sums: dict[Key, float] = {}
    for entry, score in zip(entries, scorer.score(requests), strict=True):
        if isinstance(score, Unscored):
            raise UserError(
                f"benchmark {one.name}: the reference cannot score a sample: {score.reason}; the samples are kept, and "
                "the same command tries again; look at the reference and its engine"
            )
        sums[entry.key] = float(score.sum(dtype=np.float64))
    return sums


def _finish(found: Plan, one: Benchmark, safe: Collection[Key], reference_sums: dict[Key, float]) -> Result:
    """The journals become samples.parquet, and that a result."""
    entries, verdicts = _journal(one, safe), read_verdicts(one.folder)
    keys = all_keys(len(one.questions.prompts), one.settings.num_samples, greedy=one.settings.greedy)
    samples = [
        judged(entries[key], verdicts[key], reference_sums.get(key)) if key in entries else refused(key) for key in keys
    ]
    try:
        result = count(found, one, samples)
    except UserError:
        drop_verdicts(one.folder)  # with the reward mended, the same samples are judged again
        raise
    write_samples(one.folder, one.questions.prompts, samples)
    append_result(found.out, result)
    drop_journals(one.folder)
    return result


def count(found: Plan, one: Benchmark, samples: Sequence[Judged]) -> Result:
    """What the samples of a benchmark say of the model. Raises UserError where none could be judged."""
    try:
        measured = measure(one.settings, one.questions, samples, one.settings.ks)
    except UserError as error:
        raise UserError(f"benchmark {one.name}: {error}") from None
    scored = [s for s in samples if s.ref_logprob_sum is not None]
    tokens = sum(s.num_tokens for s in scored)
    drift = sum(s.logprob_sum - s.ref_logprob_sum for s in scored if s.ref_logprob_sum is not None)
    greedy_P1 = rewards_PN(samples, len(one.questions.prompts), 1, greedy=True)
    return Result(
        benchmark=one.name,
        model=found.config.model,
        revision=found.revision,
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        prompts=len(one.questions.prompts),
        prompts_too_long=one.questions.too_long,
        samples_per_prompt=one.settings.num_samples,
        unjudged_samples=measured.unjudged,
        truncated_samples=measured.truncated,
        mean_tokens=measured.mean_tokens,
        mean_reward=measured.mean_reward,
        pass_at=measured.pass_at,
        greedy=estimate(passes(greedy_P1, 1)) if one.settings.greedy else None,
        entropy=measured.entropy,
        kl=drift / tokens if tokens else None,
        settings=settings_of(one),
    )


@dataclass(frozen=True, slots=True)
class Measured:
    """What the samples drawn of a model say of it, the greedy ones aside."""

    mean_reward: Estimate
    pass_at: dict[int, Estimate]  # no entry for a k that no prompt has judged samples for
    mean_tokens: float
    truncated: int
    unjudged: int
    entropy: float | None  # nats per token


def measure(settings: DrawConfig, questions: Questions, samples: Sequence[Judged], ks: Sequence[int]) -> Measured:
    """Averages over prompts with at least one judged sample. Raises UserError where none has one."""
    found_PN = rewards_PN(samples, len(questions.prompts), settings.num_samples, greedy=False)
    drawn = [sample for sample in samples if not sample.greedy]
    mean = estimate(mean_rewards(found_PN))
    if mean is None:
        raise UserError(
            f"none of {len(drawn)} samples could be judged ({drawn[0].verdict.status}); look at reward.name"
        )
    estimates = {k: estimate(passes(found_PN, k)) for k in ks}
    answered = [sample for sample in drawn if sample.num_tokens]
    num_tokens = sum(sample.num_tokens for sample in answered)
    own = settings.samples_the_model_itself and num_tokens
    return Measured(
        mean_reward=mean,
        pass_at={k: at_k for k, at_k in estimates.items() if at_k is not None},
        mean_tokens=num_tokens / max(1, len(answered)),
        truncated=sum(sample.finish_reason == "length" for sample in drawn),
        unjudged=sum(sample.verdict.reward is None for sample in drawn),
        entropy=-sum(sample.logprob_sum for sample in answered) / num_tokens if own else None,
    )


def measure_engine(settings: DrawConfig, questions: Questions, engine: "Sampler", seed: int) -> Measured:
    """pass@1 and what else the samples of a model say that is in memory. Writes nothing. Raises UserError."""
    with open_judges(settings.reward) as submit:
        drawn = [
            (key, sample, submit(questions.prompts[key[1]], sample.text))
            for key, sample in draw(settings, questions, engine, seed, greedy=False)
        ]
        samples = [
            judged(entry_of(sample, source, row, ""), future.result()) for (source, row, _), sample, future in drawn
        ]
    return measure(settings, questions, samples, (1,))


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    (out / LOCK).parent.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("w") as lock:
        hold(lock, fcntl.LOCK_EX, f"{out}: another gft eval is writing there; wait, or name another folder (out)")
        yield
