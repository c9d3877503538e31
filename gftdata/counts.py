"""What a finished data set holds, counted from the short columns of its shards: for `gft inspect`.

The numbers of a source are summary.py's, so that they can be held against the manifest's. Shards are read some
thousands of groups at a time, remote ones by ranges; what is kept of them is counts, and 8 bytes a prompt to find
prompts that come again. Texts and token ids are content.py's, what is wrong with all that audit.py's.

Polars is imported here: only inspection.py and what it needs import this module.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from gftdata.errors import UserError, first_line
from gftdata.locations import DataSet, Shard, is_remote, open_shard, read_tables
from gftdata.manifest import Summary
from gftdata.summary import Tally, quantile, source_summary, summarise
from gftdata.types import EXPERT, SELF

GROUPS_AT_ONCE = 16_384
SHARDS_AT_ONCE = 256  # a manifest may lie about rows
EXAMPLES = 3
RESPONSE_COLUMNS = ["sources", "rewards", "reward_status", "finish_reasons", "num_tokens", "ref_logprob_means"]
COLUMNS = ["prompt_id", *RESPONSE_COLUMNS, "num_prompt_tokens"]
PROMPT_COLUMNS = ["prompt", "ground_truth"]  # what makes a prompt the same as another
BINS = ("0", "(0, .25]", "(.25, .5]", "(.5, .75]", "(.75, 1)", "1")  # of pass rates


@dataclass(frozen=True, slots=True)
class Sighting:
    """How often something was seen, and the prompt ids of the first groups with it."""

    count: int = 0
    examples: tuple[str, ...] = ()

    def and_then(self, later: "Sighting") -> "Sighting":
        together = dict.fromkeys((*self.examples, *later.examples))
        return Sighting(self.count + later.count, tuple(together)[:EXAMPLES])


@dataclass(frozen=True, slots=True)
class SourceDetail:
    """What the manifest's summary does not say of a source."""

    source: str
    groups: int  # with a response of it
    varied_groups: int  # of those, where its judged rewards are not all equal
    lowest_reward: float | None  # over judged responses
    highest_reward: float | None
    unjudged: Mapping[str, int]  # reward status -> responses with a null reward
    pass_rates: tuple[int, ...]  # [BINS] groups by the share of its judged responses with reward 1
    logprob_gap: float | None  # nats per token: its mean reference log-prob minus that of self


@dataclass(frozen=True, slots=True)
class PromptLengths:
    """Tokens of prompts, generation prompt included."""

    mean: float
    median: int
    p95: int
    max: int


@dataclass(frozen=True, slots=True)
class Counts:
    """What the short columns of all groups say."""

    summary: Summary
    details: tuple[SourceDetail, ...]  # in the order of summary.sources
    pass_rates: tuple[int, ...]  # [BINS] groups by the share of all judged responses with reward 1
    prompt_lengths: PromptLengths | None  # None: no groups
    truncated: Mapping[str, Sighting]  # source -> responses cut by the limit
    ends_at_once: Mapping[str, Sighting]  # source -> responses of one token that are not cut: nothing but an end
    unjudged: Mapping[str, Sighting]  # source -> responses with a null reward
    failing: Mapping[str, Sighting]  # of expert only: judged responses without reward 1
    without_signal: Sighting  # groups
    groups_unjudged: Sighting
    repeated_prompts: Sighting | None  # groups whose messages and ground truth came before; None: not looked for
    row_counts: tuple[str, ...]  # shards with another number of rows than the manifest says
    texts_compared: bool  # whether `identical` in the summary was counted; else it is the manifest's


SEEN = ("truncated", "ends_at_once", "unjudged", "failing")  # fields of Counts that are by source


def count(data: DataSet, *, deep: bool = False) -> Counts:
    """Count a data set. `deep` reads the texts as well, and fetches remote shards. Raises UserError.

    Without it, how many responses are identical is what the manifest says, and prompts of remote data are not compared.
    """
    is_here = not is_remote(data.location)
    try:
        read = _parts(data.shards, compares_prompts=deep or is_here, is_here=is_here)
        parts = [_count_part(*part) for part in read]
    except pl.exceptions.PolarsError as error:
        raise UserError(
            f"{data.location}: its columns do not run parallel: {first_line(error)}; `gft validate` names the rows"
        ) from None
    try:
        texts = summarise(shard.fetch() for shard in data.shards) if deep else data.manifest.summary
        return _put_together(data, parts, texts, deep)
    except (ValueError, TypeError) as error:  # nulls and numbers that no shard of ours has; Arrow's errors are of these
        raise UserError(
            f"{data.location}: its columns hold what cannot be: {first_line(error)}; `gft validate` names the rows"
        ) from None


@dataclass(frozen=True, slots=True)
class _Part:
    """Counts over the groups of some shards."""

    rows_of_shard: list[int]
    sources: pl.DataFrame  # a row for each source, in the order in which they come
    lengths: pl.DataFrame  # sources, num_tokens, len
    finish_reasons: pl.DataFrame  # sources, finish_reasons, len
    statuses: pl.DataFrame  # sources, reward_status, len; of null rewards
    source_rates: pl.DataFrame  # sources, bin, len; groups
    rates: pl.DataFrame  # bin, len; groups
    prompt_lengths: pl.DataFrame  # num_prompt_tokens, len
    without_signal: Sighting
    unjudged: Sighting
    prompt_hashes: pl.DataFrame | None  # prompt_hash; of every group


def _parts(
    shards: Sequence[Shard], *, compares_prompts: bool, is_here: bool
) -> Iterator[tuple[pl.DataFrame, list[int]]]:
    """Groups, a row each: COLUMNS and, if asked for, a hash of the prompt; and how many each shard has."""
    prompt = pl.struct(PROMPT_COLUMNS).hash().alias("prompt_hash")
    wanted = [*COLUMNS, prompt] if compares_prompts else COLUMNS
    for some in _cut(shards):
        scanned, sizes = _scan(some) if is_here else _read(some, COLUMNS + PROMPT_COLUMNS * compares_prompts)
        for first in range(0, max(1, sum(sizes)), GROUPS_AT_ONCE):
            try:
                frame = scanned.slice(first, GROUPS_AT_ONCE).select(wanted).collect()
            except pl.exceptions.PolarsError:
                _read(some, COLUMNS + PROMPT_COLUMNS * compares_prompts)  # of files; this names the one
                raise
            yield frame, [] if first else sizes


def _scan(shards: Sequence[Shard]) -> tuple[pl.LazyFrame, list[int]]:
    """Local files, which polars reads in half of pyarrow's time."""
    sizes = []
    for shard in shards:
        with open_shard(shard) as file:
            sizes.append(file.metadata.num_rows)
    return pl.scan_parquet([shard.path for shard in shards], glob=False), sizes


def _read(shards: Sequence[Shard], columns: Sequence[str]) -> tuple[pl.LazyFrame, list[int]]:
    """Files anywhere, by ranges."""
    tables = list(read_tables(shards, columns))
    frame = pl.from_arrow(pa.concat_tables(tables))
    assert isinstance(frame, pl.DataFrame)
    return frame.lazy(), [table.num_rows for table in tables]


def _cut(shards: Sequence[Shard]) -> Iterator[Sequence[Shard]]:
    """Shards together that, as the manifest says, have about GROUPS_AT_ONCE rows."""
    first = num_rows = 0
    for number, shard in enumerate(shards, start=1):
        num_rows += shard.record.rows
        if num_rows >= GROUPS_AT_ONCE or number - first == SHARDS_AT_ONCE or number == len(shards):
            yield shards[first:number]
            first, num_rows = number, 0


def _count_part(groups: pl.DataFrame, rows_of_shard: list[int]) -> _Part:
    reward, tokens = pl.col("rewards"), pl.col("num_tokens")
    judged, passed, varied = reward.count(), (reward == 1).sum(), reward.max() > reward.min()
    has_judged, whole = pl.col("judged") > 0, pl.col("finish_reasons") != "length"
    seen = {
        "truncated": ~whole,
        "ends_at_once": whole & (tokens <= 1),
        "unjudged": reward.is_null(),
        "failing": (pl.col("sources") == EXPERT) & (reward != 1),
    }
    assert tuple(seen) == SEEN
    # what is null here is damaged, and `gft validate` says so
    groups = groups.with_columns(pl.col("prompt_id").fill_null(""), pl.col("num_prompt_tokens").fill_null(0))
    rows = (
        groups.lazy()
        .select(pl.row_index("group"), "prompt_id", *RESPONSE_COLUMNS)
        .explode(RESPONSE_COLUMNS, empty_as_null=True)
        .with_columns(
            reward.cast(pl.Float64).fill_nan(None),
            tokens.cast(pl.Int64).fill_null(0),
            pl.col("finish_reasons", "reward_status").fill_null(""),
        )
    )
    responses = rows.filter(pl.col("sources").is_not_null())  # of a group without responses there is a row of nulls
    rates = {"judged": judged, "passed": passed, "varied": varied}
    by_group = rows.group_by("group", maintain_order=True).agg(pl.col("prompt_id").first(), **rates)
    by_both = responses.group_by("group", "sources").agg(**rates)
    by_source = responses.group_by("sources", maintain_order=True).agg(
        judged.alias("judged"),
        passed.alias("passed"),
        reward.sum().alias("reward_sum"),
        reward.min().alias("lowest"),
        reward.max().alias("highest"),
        (pl.col("ref_logprob_means").cast(pl.Float64) * tokens).sum().alias("ref_sum"),
        *(condition.sum().alias(name) for name, condition in seen.items()),
        *(
            pl.col("prompt_id").filter(condition).unique(maintain_order=True).head(EXAMPLES).alias(f"{name}_ids")
            for name, condition in seen.items()
        ),
    )
    of_sources = by_both.group_by("sources").agg(groups=pl.len(), varied_groups=pl.col("varied").sum())
    of_groups, sources, lengths, finish_reasons, statuses, source_rates = pl.collect_all(
        [
            by_group,
            by_source.join(of_sources, on="sources", maintain_order="left"),
            responses.group_by("sources", "num_tokens").len(),
            responses.group_by("sources", "finish_reasons").len(),
            responses.filter(reward.is_null()).group_by("sources", "reward_status").len(),
            by_both.filter(has_judged).group_by("sources", bin=_bin()).len(),
        ]
    )
    return _Part(
        rows_of_shard=rows_of_shard,
        sources=sources,
        lengths=lengths,
        finish_reasons=finish_reasons,
        statuses=statuses,
        source_rates=source_rates,
        rates=of_groups.filter(has_judged).group_by(bin=_bin()).len(),
        prompt_lengths=groups.group_by("num_prompt_tokens").len(),
        without_signal=_sighting(of_groups.filter(has_judged & ~pl.col("varied"))),
        unjudged=_sighting(of_groups.filter(~has_judged)),
        prompt_hashes=groups.select("prompt_hash") if "prompt_hash" in groups.columns else None,
    )


def _bin() -> pl.Expr:
    """The number in BINS of a group's pass rate."""
    passed, judged = pl.col("passed"), pl.col("judged")
    quarter = (4 * passed + judged - 1) // judged  # rounded up, in whole numbers
    return pl.when(passed == judged).then(len(BINS) - 1).otherwise(quarter)


def _sighting(groups: pl.DataFrame) -> Sighting:
    return Sighting(len(groups), tuple(groups["prompt_id"].head(EXAMPLES).to_list()))


def _put_together(data: DataSet, parts: Sequence[_Part], texts: Summary, deep: bool) -> Counts:
    """All parts as one; of `texts` only what texts are needed for is taken."""
    lengths, finish_reasons, statuses = (
        _nested(parts, name, value)
        for name, value in (
            ("lengths", "num_tokens"),
            ("finish_reasons", "finish_reasons"),
            ("statuses", "reward_status"),
        )
    )
    source_rates = _nested(parts, "source_rates", "bin")
    by_source: dict[str, list[dict[str, Any]]] = {}
    for part in parts:
        for row in part.sources.iter_rows(named=True):
            by_source.setdefault(row["sources"], []).append(row)
    identical = {source.source: source for source in texts.sources}
    sources, details = [], []
    for name, rows in by_source.items():
        tally = Tally(
            lengths=lengths[name],
            finish_reasons=finish_reasons[name],
            judged=sum(row["judged"] for row in rows),
            passed=sum(row["passed"] for row in rows),
            reward_sum=sum(row["reward_sum"] for row in rows),
            ref_sum=sum(row["ref_sum"] for row in rows),
            identical=identical[name].identical if name in identical else 0,
            groups_all_identical=identical[name].groups_all_identical if name in identical else 0,
        )
        sources.append(source_summary(name, tally))
    own = next((source.mean_ref_logprob for source in sources if source.source == SELF), None)
    for source in sources:
        rows = by_source[source.source]
        details.append(
            SourceDetail(
                source=source.source,
                groups=sum(row["groups"] for row in rows),
                varied_groups=sum(row["varied_groups"] or 0 for row in rows),
                lowest_reward=min((row["lowest"] for row in rows if row["lowest"] is not None), default=None),
                highest_reward=max((row["highest"] for row in rows if row["highest"] is not None), default=None),
                unjudged=dict(sorted(statuses[source.source].items())),
                pass_rates=_binned(source_rates[source.source]),
                logprob_gap=None if own is None else source.mean_ref_logprob - own,
            )
        )
    prompt_lengths = _counted(part.prompt_lengths for part in parts)
    rates = _counted(part.rates for part in parts)
    without_signal, unjudged = Sighting(), Sighting()
    for part in parts:
        without_signal = without_signal.and_then(part.without_signal)
        unjudged = unjudged.and_then(part.unjudged)
    return Counts(
        summary=Summary(
            groups=prompt_lengths.total(),
            responses=sum(source.responses for source in sources),
            response_tokens=sum(length * count for tally in lengths.values() for length, count in tally.items()),
            groups_without_signal=without_signal.count,
            groups_unjudged=unjudged.count,
            sources=tuple(sources),
        ),
        details=tuple(details),
        pass_rates=_binned(rates),
        prompt_lengths=_prompt_lengths(prompt_lengths) if prompt_lengths else None,
        **{name: _by_source(by_source, name) for name in SEEN},
        without_signal=without_signal,
        groups_unjudged=unjudged,
        repeated_prompts=_repeated(data.shards, parts),
        row_counts=_row_counts(data.shards, [rows for part in parts for rows in part.rows_of_shard]),
        texts_compared=deep,
    )


def _nested(parts: Sequence[_Part], name: str, value: str) -> dict[str, Counter[Any]]:
    """source -> value -> how many, over all parts; every source has a counter."""
    found: dict[str, Counter[Any]] = {source: Counter() for part in parts for source in part.sources["sources"]}
    for part in parts:
        for source, key, number in getattr(part, name).select("sources", value, "len").iter_rows():
            found[source][key] += number
    return found


def _counted(frames: Iterable[pl.DataFrame]) -> Counter[int]:
    """value -> how many, of frames of these two columns."""
    found: Counter[int] = Counter()
    for frame in frames:
        for value, number in frame.iter_rows():
            found[value] += number
    return found


def _binned(counts: Mapping[int, int]) -> tuple[int, ...]:
    return tuple(counts.get(number, 0) for number in range(len(BINS)))


def _by_source(by_source: Mapping[str, Sequence[dict[str, Any]]], name: str) -> dict[str, Sighting]:
    """Those sources where it was seen."""
    found: dict[str, Sighting] = {}
    for source, rows in by_source.items():
        sighting = Sighting()
        for row in rows:
            sighting = sighting.and_then(Sighting(row[name], tuple(row[f"{name}_ids"])))
        if sighting.count:
            found[source] = sighting
    return found


def _prompt_lengths(counts: Counter[int]) -> PromptLengths:
    return PromptLengths(
        mean=sum(length * number for length, number in counts.items()) / counts.total(),
        median=quantile(counts, 50),
        p95=quantile(counts, 95),
        max=max(counts),
    )


def _repeated(shards: Sequence[Shard], parts: Sequence[_Part]) -> Sighting | None:
    """Groups whose prompt came before. That two of a million differ with the same hash is as likely as 3e-8."""
    hashes = [part.prompt_hashes for part in parts if part.prompt_hashes is not None]
    if len(hashes) < len(parts):
        return None
    if not hashes:
        return Sighting()
    repeated = pl.concat(hashes).select(pl.col("prompt_hash").is_first_distinct().not_().arg_true()).to_series()
    ends = np.cumsum([rows for part in parts for rows in part.rows_of_shard])
    examples = []
    for row in repeated.head(EXAMPLES):
        number = int(np.searchsorted(ends, row, side="right"))
        (table,) = read_tables([shards[number]], ["prompt_id"])
        examples.append(table["prompt_id"][row - int(ends[number]) + table.num_rows].as_py() or "")
    return Sighting(len(repeated), tuple(examples))


def _row_counts(shards: Sequence[Shard], rows_of_shard: Sequence[int]) -> tuple[str, ...]:
    return tuple(
        f"{shard.record.name}: {rows:,} groups, the manifest says {shard.record.rows:,}"
        for shard, rows in zip(shards, rows_of_shard, strict=True)
        if rows != shard.record.rows
    )
