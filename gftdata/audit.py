"""What is wrong with a finished data set, or worth a look: findings with counts, example groups and what to do.

Judged from what counts.py counted and content.py saw; nothing is read here. What makes a data set unreadable or
inconsistent (schema, checksums, NaN or positive log-probs) is `gft validate`'s.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gftdata.content import Content
from gftdata.counts import Counts, Sighting
from gftdata.manifest import Manifest, SourceSummary, Summary
from gftdata.summary import mostly_identical, weakness
from gftdata.types import EXPERT, SELF

TOLERANCE = 1e-6  # relative, of means that were added up in another order

Severity = Literal["problem", "note"]  # --strict fails on problems; a sound data set may have notes


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found."""

    kind: str
    severity: Severity
    source: str | None  # of the responses; None: not of one source
    what: str  # a sentence about `count` of `of`
    count: int
    of: int
    examples: tuple[str, ...]  # prompt ids
    advice: str


def audit(manifest: Manifest, counts: Counts, content: Content) -> tuple[Finding, ...]:
    """Everything that was found, problems first."""
    found = [
        *_reading(manifest, counts),
        *_endings(manifest, counts, content),
        *_rewards(counts),
        *_templates(counts, content),
        *_repetitions(counts),
    ]
    return tuple(sorted(found, key=lambda finding: finding.severity != "problem"))


def _reading(manifest: Manifest, counts: Counts) -> Iterator[Finding]:
    """Where the manifest and the shards disagree."""
    if counts.row_counts:
        yield Finding(
            "row_counts",
            "problem",
            None,
            f"shards have another number of groups than the manifest says ({counts.row_counts[0]})",
            len(counts.row_counts),
            len(manifest.shards),
            (),
            "see `gft validate`; copy the data set again",
        )
    if differing := summary_differences(manifest.summary, counts.summary):
        yield Finding(
            "summary_differs",
            "problem",
            None,
            f"numbers of the manifest's summary are not those of the shards ({differing[0]})",
            len(differing),
            _num_values(manifest.summary),
            (),
            "the shards are right; see `gft validate`, and make the data set anew before it is shared",
        )


def _endings(manifest: Manifest, counts: Counts, content: Content) -> Iterator[Finding]:
    responses = {source.source: source.responses for source in counts.summary.sources}
    for source, seen in counts.truncated.items():
        yield _of_responses(
            "truncated",
            seen,
            source,
            responses[source],
            "were cut at the length limit: they do not end, and were judged as they stand",
            "raise responses.max_tokens, or leave such groups out",
        )
    for source, seen in counts.ends_at_once.items():
        yield _of_responses(
            "empty",
            seen,
            source,
            responses[source],
            "are nothing but an end token",
            "look at the prompts (--show): the model sees no question to answer, or the template is wrong",
        )
    for source, seen in content.blank.items():
        yield _of_responses(
            "empty",
            seen,
            source,
            content.responses[source],
            "have tokens but no text",
            "look at them (--show): special tokens or spaces are all there is",
        )
    stop_texts = _stop_texts(manifest)
    for source, seen in content.no_end.items():
        by_text = source == SELF and stop_texts
        yield _of_responses(
            "missing_eos",
            seen,
            source,
            content.responses[source],
            f"are not cut and do not end with an end token ({', '.join(map(str, manifest.tokenizer.stop_ids))})"
            + (" but, it may be, with one of sampling.stop" if by_text else ""),
            "trained on them, a model learns not to stop; generate them again with this toolkit",
            "note" if by_text else "problem",
        )
    for source, seen in content.further_turns.items():
        yield _of_responses(
            "further_turns",
            seen,
            source,
            content.responses[source],
            "go on after an end token: another turn is in them",
            "the engine did not stop at the end of a turn: look at its stop tokens",
        )


def _rewards(counts: Counts) -> Iterator[Finding]:
    summary = counts.summary
    for source, detail in zip(summary.sources, counts.details, strict=True):
        constant = source.judged > 1 and detail.lowest_reward == detail.highest_reward
        if constant and not (source.source == EXPERT and detail.lowest_reward == 1):  # as it should be
            yield Finding(
                "no_reward_variance",
                "problem" if source.source == SELF else "note",
                source.source,
                f"judged responses of {source.source} all have the reward {detail.lowest_reward:g}",
                source.judged,
                source.judged,
                (),
                "look at some (--show): prompts too easy or too hard, or a reward that reads no answer",
            )
        if source.source in counts.unjudged:
            seen = counts.unjudged[source.source]
            why = ", ".join(f"{number:,} {status}" for status, number in detail.unjudged.items())
            yield _of_responses(
                "unjudged",
                seen,
                source.source,
                source.responses,
                f"could not be judged ({why}): their reward is null",
                "look at timeouts and errors of the reward; `gft rejudge` judges again",
            )
        if source.source == EXPERT and EXPERT in counts.failing:
            seen = counts.failing[EXPERT]
            yield Finding(
                "expert_fails",
                "problem",
                EXPERT,
                "judged expert responses do not get the full reward; among right answers they get a negative advantage",
                seen.count,
                source.judged,
                seen.examples,
                "check that the reward reads them correctly",
            )
        if source.source == SELF and (said := weakness(source.pass_rate)):
            passed = round((source.pass_rate or 0.0) * source.judged)
            yield Finding("weak_self", "note", SELF, "judged responses of self pass", passed, source.judged, (), said)
    if counts.groups_unjudged.count:
        yield Finding(
            "groups_unjudged",
            "problem",
            None,
            "groups have no judged response",
            counts.groups_unjudged.count,
            summary.groups,
            counts.groups_unjudged.examples,
            "gft train needs unjudged_groups: skip; `gft rejudge` judges again",
        )
    of_one = summary.responses == summary.groups  # the advantage of a group's only response is its reward
    if counts.without_signal.count and not of_one:
        everywhere = counts.without_signal.count + counts.groups_unjudged.count == summary.groups
        yield Finding(
            "no_signal",
            "problem" if everywhere else "note",
            None,
            "groups have equal rewards throughout: with group advantages nothing is learnt from them",
            counts.without_signal.count,
            summary.groups,
            counts.without_signal.examples,
            "`gft filter --with-signal` leaves them out; other prompts, or more responses, give signal",
        )


def _templates(counts: Counts, content: Content) -> Iterator[Finding]:
    for source, seen in content.markers.items():
        yield _of_responses(
            "template_markers",
            seen,
            source,
            content.responses[source],
            "have a chat template's marker in their text",
            "take such markers out of given texts; for sampled ones look at the engine's stop tokens",
        )
    if content.other_prompts.count:
        yield Finding(
            "template_mismatch",
            "problem",
            None,
            "prompts do not end with the generation prompt that most have "
            f"({' '.join(map(str, content.generation_prompt or ()))})",
            content.other_prompts.count,
            content.groups,
            content.other_prompts.examples,
            "their token ids come from another template: generate them again",
        )
    if content.encoded_otherwise.count:
        yield Finding(
            "template_mismatch",
            "problem",
            None,
            f"prompts have other token ids than tokenizer and template of {content.encoded_by} give their messages",
            content.encoded_otherwise.count,
            content.encoded,
            content.encoded_otherwise.examples,
            "generate them again with this toolkit",
        )


def _repetitions(counts: Counts) -> Iterator[Finding]:
    summary = counts.summary
    if counts.repeated_prompts is not None and counts.repeated_prompts.count:
        yield Finding(
            "repeated_prompts",
            "note",
            None,
            "groups have the messages and ground truth of an earlier group",
            counts.repeated_prompts.count,
            summary.groups,
            counts.repeated_prompts.examples,
            "they weigh more in training; duplicates in generate.yaml says what becomes of them",
        )
    for source in summary.sources:
        if source.identical:
            same = mostly_identical(source, summary.groups)
            yield Finding(
                "identical",
                "problem" if same else "note",
                source.source,
                f"responses of {source.source} are word for word an earlier one of their group"
                + (f"; in {source.groups_all_identical:,} groups all are the same" if same else ""),
                source.identical,
                source.responses,
                (),
                "a mistake in seeds or temperature is likely" if same else "what a model says twice weighs twice",
            )


def _of_responses(
    kind: str, seen: Sighting, source: str, of: int, what: str, advice: str, severity: Severity = "problem"
) -> Finding:
    return Finding(kind, severity, source, f"responses of {source} {what}", seen.count, of, seen.examples, advice)


def _stop_texts(manifest: Manifest) -> bool:
    """Whether self samples may end with a text instead of a token."""
    value: Any = manifest.recipe
    for key in ("responses", "self", "sampling", "stop"):
        value = value.get(key) if isinstance(value, Mapping) else None
    return bool(value)


def summary_differences(said: Summary, found: Summary) -> list[str]:
    """Where two summaries differ, as `what: said, found`."""
    if [source.source for source in said.sources] != [source.source for source in found.sources]:
        before, now = (", ".join(source.source for source in one.sources) or "none" for one in (said, found))
        if sorted(before.split(", ")) != sorted(now.split(", ")):
            return [f"sources: {before}, found {now}"]
    pairs: list[tuple[str, Summary | SourceSummary, Summary | SourceSummary]] = [("", said, found)]
    by_name = {source.source: source for source in found.sources}
    pairs += [(f" of {source.source}", source, by_name[source.source]) for source in said.sources]
    return [
        f"{name}{whose}: {getattr(one, name)}, found {getattr(other, name)}"
        for whose, one, other in pairs
        for name in type(one).model_fields
        if name != "sources" and not _same(getattr(one, name), getattr(other, name))
    ]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return bool(one == other)


def _num_values(summary: Summary) -> int:
    return len(Summary.model_fields) - 1 + len(SourceSummary.model_fields) * len(summary.sources)
