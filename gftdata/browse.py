"""Groups of a finished data set in full, chosen by id, source, reward, length and signal: for `gft inspect --show`.

Choosing reads short columns, shard by shard until there are enough groups; texts are read only of the row groups that
hold a chosen one. Token ids and log-probs are never read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import polars as pl
import pyarrow as pa

from gftdata.errors import UserError, first_line
from gftdata.locations import DataSet, Shard, open_shard, read_tables
from gftdata.shards import check_unpacked_size
from gftdata.types import Message

RESPONSE_COLUMNS = ["sources", "rewards", "num_tokens"]  # to choose by
PER_RESPONSE = [*RESPONSE_COLUMNS, "responses", "reward_status", "finish_reasons", "models", "ref_logprob_means"]
COLUMNS = ["prompt_id", "source_id", "prompt", "ground_truth", "data_source", "num_prompt_tokens", *PER_RESPONSE]


@dataclass(frozen=True, slots=True)
class Filter:
    """Which groups: those where one response is within all bounds, and the group as a whole fits."""

    id: str | None = None  # the beginning of a prompt_id, or a source_id
    sources: tuple[str, ...] = ()
    min_reward: float | None = None  # bounds are included; an unjudged response is within no bound of rewards
    max_reward: float | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    signal: bool | None = None  # whether the judged rewards of the group differ

    @property
    def asks_of_responses(self) -> bool:
        bounds = (self.min_reward, self.max_reward, self.min_tokens, self.max_tokens)
        return bool(self.sources) or any(bound is not None for bound in bounds)


@dataclass(frozen=True, slots=True)
class ShownResponse:
    """A response as people read it."""

    text: str
    source: str
    model: str
    reward: float | None
    reward_status: str
    finish_reason: str
    num_tokens: int
    mean_ref_logprob: float  # nats per token
    is_match: bool  # within all bounds of the filter; False where it has none


@dataclass(frozen=True, slots=True)
class ShownGroup:
    """A group as people read it."""

    prompt_id: str
    source_id: str | None
    data_source: str
    messages: tuple[Message, ...]
    ground_truth: str | None
    num_prompt_tokens: int
    shard: str
    responses: tuple[ShownResponse, ...]


def show_groups(data: DataSet, wanted: Filter, limit: int) -> list[ShownGroup]:
    """The first `limit` groups that fit, in the order of the data set. Raises UserError, also for an unknown source."""
    _check(data, wanted)
    return list(islice(_fitting(data, wanted), limit))


def _check(data: DataSet, wanted: Filter) -> None:
    there = [source.source for source in data.manifest.summary.sources]
    if unknown := [name for name in wanted.sources if name not in there]:
        raise UserError(f"{data.location}: no responses of source `{unknown[0]}`; --source: {', '.join(there)}")
    for option, low, high in (
        ("reward", wanted.min_reward, wanted.max_reward),
        ("tokens", wanted.min_tokens, wanted.max_tokens),
    ):
        if low is not None and high is not None and low > high:
            raise UserError(f"--min-{option} {low:g} is above --max-{option} {high:g}: no response can match")


def _fitting(data: DataSet, wanted: Filter) -> Iterator[ShownGroup]:
    columns = ["prompt_id", "source_id", *RESPONSE_COLUMNS]
    for shard, table in zip(data.shards, read_tables(data.shards, columns), strict=True):
        try:
            chosen = _choose(table, wanted)
        except pl.exceptions.PolarsError as error:
            raise UserError(
                f"{shard.where}: its columns do not run parallel: {first_line(error)}; see `gft validate`"
            ) from None
        if chosen:
            yield from _read(shard, chosen)


def _choose(table: pa.Table, wanted: Filter) -> dict[int, list[int]]:
    """Row of the shard -> the numbers of its responses that match."""
    groups = pl.from_arrow(table)
    assert isinstance(groups, pl.DataFrame)
    groups = groups.with_row_index("row")
    rewards = pl.col("rewards")
    if wanted.id is not None:
        is_id = pl.col("prompt_id").str.starts_with(wanted.id) | (pl.col("source_id") == wanted.id).fill_null(False)
        groups = groups.filter(is_id)
    responses = (
        groups.select("row", *RESPONSE_COLUMNS)
        .explode(RESPONSE_COLUMNS, empty_as_null=True)
        .with_columns(rewards.fill_nan(None), number=pl.int_range(pl.len()).over("row"))
    )
    if wanted.signal is not None:
        differs = (rewards.max() > rewards.min()).fill_null(False)
        fitting = responses.group_by("row").agg(differs=differs).filter(pl.col("differs") == wanted.signal)
        responses = responses.join(fitting, on="row", how="semi", maintain_order="left")
    if not wanted.asks_of_responses:
        return {row: [] for row in responses["row"].unique(maintain_order=True)}
    conditions = [
        pl.col("sources").is_in(wanted.sources) if wanted.sources else None,
        None if wanted.min_reward is None else rewards >= wanted.min_reward,
        None if wanted.max_reward is None else rewards <= wanted.max_reward,
        None if wanted.min_tokens is None else pl.col("num_tokens") >= wanted.min_tokens,
        None if wanted.max_tokens is None else pl.col("num_tokens") <= wanted.max_tokens,
    ]
    matching = responses.filter(*(condition for condition in conditions if condition is not None))
    found = matching.group_by("row", maintain_order=True).agg("number")
    return dict(zip(found["row"].to_list(), found["number"].to_list(), strict=True))


def _read(shard: Shard, chosen: dict[int, list[int]]) -> Iterator[ShownGroup]:
    """The chosen rows, one after another: whoever has enough stops here."""
    with open_shard(shard) as file:
        first = 0
        for number in range(file.num_row_groups):
            after = first + file.metadata.row_group(number).num_rows
            rows = [row for row in chosen if first <= row < after]
            if rows:
                check_unpacked_size(file, number, shard.where)
            table = file.read_row_group(number, columns=COLUMNS) if rows else None
            for row in rows:
                assert table is not None
                yield _shown(table.slice(row - first, 1), shard, chosen[row])
            first = after


def _shown(table: pa.Table, shard: Shard, matching: Sequence[int]) -> ShownGroup:
    (row,) = table.to_pylist()
    if len({len(row[name] or ()) for name in PER_RESPONSE}) != 1 or not row["prompt"]:
        raise UserError(
            f"{shard.where}: prompt {row['prompt_id']}: its columns do not run parallel; see `gft validate`"
        )
    return ShownGroup(
        prompt_id=row["prompt_id"],
        source_id=row["source_id"],
        data_source=row["data_source"],
        messages=tuple(Message(message["role"], message["content"]) for message in row["prompt"] if message),
        ground_truth=row["ground_truth"],
        num_prompt_tokens=row["num_prompt_tokens"] or 0,
        shard=shard.record.name,
        responses=tuple(
            ShownResponse(
                text=row["responses"][k],
                source=row["sources"][k],
                model=row["models"][k],
                reward=row["rewards"][k],
                reward_status=row["reward_status"][k],
                finish_reason=row["finish_reasons"][k],
                num_tokens=row["num_tokens"][k] or 0,
                mean_ref_logprob=row["ref_logprob_means"][k],
                is_match=k in matching,
            )
            for k in range(len(row["responses"] or ()))
        ),
    )
