"""Shards -> their Summary, a few rows at a time: memory does not grow with the data set.

Of the long columns only the texts are read, to find responses that repeat one another. What a summary tells before
anybody trains on the data is here too, in words that every command uses.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gftdata.manifest import SourceSummary, Summary
from gftdata.store import named
from gftdata.types import EXPERT

_COLUMNS = ["responses", "sources", "rewards", "finish_reasons", "num_tokens", "ref_logprob_means"]
_ROWS_AT_ONCE = 64
# below it GFT on stored groups was seen to lose to RFT, and further below to diverge: benchmarks/STUDY.md
WEAK_PASS_RATE = 0.4


@dataclass(slots=True)
class Tally:
    """What has been counted of one source so far."""

    lengths: Counter[int] = field(default_factory=Counter)  # tokens -> responses
    finish_reasons: Counter[str] = field(default_factory=Counter)
    judged: int = 0
    passed: int = 0
    reward_sum: float = 0.0
    ref_sum: float = 0.0  # nats, over all tokens
    identical: int = 0
    groups_all_identical: int = 0


def summarise(paths: Iterable[Path]) -> Summary:
    """Count groups, responses, verdicts, lengths and repetitions over the given shards."""
    tallies: dict[str, Tally] = {}  # in the order in which the sources come
    num_groups = without_signal = judged_groups = 0
    for batch in _batches(paths):
        sizes = pc.list_value_length(batch.column("sources")).to_numpy(zero_copy_only=False)
        group_R = np.repeat(np.arange(len(sizes)), sizes)
        rewards_R = _flat(batch, "rewards").fill_null(float("nan")).to_numpy(zero_copy_only=False).astype(np.float64)
        judged, equal = _signals(rewards_R, group_R, len(sizes))
        num_groups += len(sizes)
        judged_groups += int(judged.sum())
        without_signal += int((judged & equal).sum())
        sources = _flat(batch, "sources").dictionary_encode()
        for code, source in enumerate(sources.dictionary.to_pylist()):
            mine_R = sources.indices.to_numpy() == code
            _add(tallies.setdefault(source, Tally()), batch, mine_R, group_R, rewards_R)
    return Summary(
        groups=num_groups,
        responses=sum(tally.lengths.total() for tally in tallies.values()),
        response_tokens=sum(_num_tokens(tally) for tally in tallies.values()),
        groups_without_signal=without_signal,
        groups_unjudged=num_groups - judged_groups,
        sources=tuple(source_summary(source, tally) for source, tally in tallies.items()),
    )


def _batches(paths: Iterable[Path]) -> Iterator[pa.RecordBatch]:
    for path in paths:
        with named(path), pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=_COLUMNS)


def _flat(batch: pa.RecordBatch, column: str) -> pa.Array:
    return batch.column(column).flatten()


def _signals(
    rewards_R: npt.NDArray[np.float64], group_R: npt.NDArray[np.int64], num_groups: int
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """For each group: whether a response was judged, and whether all judged rewards are equal."""
    lowest, highest = np.full(num_groups, np.inf), np.full(num_groups, -np.inf)
    known_R = ~np.isnan(rewards_R)
    np.minimum.at(lowest, group_R[known_R], rewards_R[known_R])
    np.maximum.at(highest, group_R[known_R], rewards_R[known_R])
    return lowest <= highest, lowest == highest


def _add(
    tally: Tally,
    batch: pa.RecordBatch,
    mine_R: npt.NDArray[np.bool_],
    group_R: npt.NDArray[np.int64],
    rewards_R: npt.NDArray[np.float64],
) -> None:
    """Count one source's responses in some groups."""
    chosen = pa.array(mine_R)
    tokens = _flat(batch, "num_tokens").filter(chosen).to_numpy().astype(np.int64)
    means = _flat(batch, "ref_logprob_means").filter(chosen).to_numpy().astype(np.float64)
    rewards = rewards_R[mine_R]
    tally.lengths.update(_counted(pa.array(tokens)))
    tally.finish_reasons.update(_counted(_flat(batch, "finish_reasons").filter(chosen)))
    tally.judged += int((~np.isnan(rewards)).sum())
    tally.passed += int((rewards == 1).sum())
    tally.reward_sum += float(np.nansum(rewards))
    tally.ref_sum += float((means * tokens).sum())
    texts = _flat(batch, "responses").filter(chosen).dictionary_encode()
    group = group_R[mine_R]
    num_texts = len(texts.dictionary)
    distinct = np.unique(group * num_texts + texts.indices.to_numpy())
    responses_of_group = np.bincount(group)
    texts_of_group = np.bincount(distinct // num_texts, minlength=len(responses_of_group))
    tally.identical += len(group) - len(distinct)
    tally.groups_all_identical += int(((responses_of_group > 1) & (texts_of_group == 1)).sum())


def _counted(values: pa.Array) -> dict[Any, int]:
    counted = values.value_counts()
    return dict(zip(counted.field("values").to_pylist(), counted.field("counts").to_pylist(), strict=True))


def _num_tokens(tally: Tally) -> int:
    return sum(length * count for length, count in tally.lengths.items())


def quantile(lengths: Counter[int], percent: int) -> int:
    """The shortest length that at least so many per cent of the responses do not exceed."""
    wanted, so_far = percent * lengths.total(), 0
    for length in sorted(lengths):
        so_far += lengths[length]
        if 100 * so_far >= wanted:
            break
    return length


def source_summary(source: str, tally: Tally) -> SourceSummary:
    """The numbers of one source, of which at least one response was counted."""
    responses, num_tokens = tally.lengths.total(), _num_tokens(tally)
    return SourceSummary(
        source=source,
        responses=responses,
        judged=tally.judged,
        mean_reward=tally.reward_sum / tally.judged if tally.judged else None,
        pass_rate=tally.passed / tally.judged if tally.judged else None,
        finish_reasons=dict(sorted(tally.finish_reasons.items())),
        mean_tokens=num_tokens / responses,
        median_tokens=quantile(tally.lengths, 50),
        p95_tokens=quantile(tally.lengths, 95),
        max_tokens=max(tally.lengths),
        truncated=tally.finish_reasons["length"],
        identical=tally.identical,
        groups_all_identical=tally.groups_all_identical,
        mean_ref_logprob=tally.ref_sum / num_tokens if num_tokens else 0.0,
    )


def weakness(self_pass_rate: float | None) -> str | None:
    """What to say before training on self samples that pass so rarely; None where there is nothing to say."""
    if self_pass_rate is None or self_pass_rate >= WEAK_PASS_RATE:
        return None
    return (
        f"the model's own samples pass at a rate of {self_pass_rate:.2f}: below about {WEAK_PASS_RATE} training on "
        "stored groups can diverge (few right answers with small weights against many wrong ones); watch pass@1 with "
        "evaluation, try RFT (min_reward: 1, advantage: one), or easier prompts"
    )


def num_failing(source: SourceSummary) -> int:
    """Judged responses without the full reward."""
    return source.judged - round((source.pass_rate or 0.0) * source.judged)


def mostly_identical(source: SourceSummary, num_groups: int) -> bool:
    """Whether samples were drawn and in most groups all of them are the same text."""
    sampled = source.source != EXPERT and source.finish_reasons.get("given", 0) < source.responses
    return sampled and 2 * source.groups_all_identical > num_groups
