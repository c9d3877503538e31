"""Shards -> their Summary, lazily, from the short columns only."""

import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gftdata.shards import SourceSummary, Summary

_COLUMNS = ["sources", "rewards", "finish_reasons", "num_tokens", "ref_logprob_means"]


def summarise(paths: Sequence[Path]) -> Summary:
    """Count groups, responses, verdicts and lengths over the given shards."""
    import polars as pl

    if threading.current_thread() is threading.main_thread():
        # polars' handler of Ctrl-C lets waiting calls go on; the next thing that waits must be interruptible again
        signal.siginterrupt(signal.SIGINT, True)
    groups = pl.scan_parquet(list(paths)).select(_COLUMNS).with_row_index("group")
    num_groups = groups.select(pl.len()).collect().item()
    # what an empty list explodes to, a row of nulls or none, depends on polars' version
    responses = groups.explode(_COLUMNS).filter(pl.col("sources").is_not_null())
    by_group = responses.group_by("group").agg(
        judged=pl.col("rewards").count(), lowest=pl.col("rewards").min(), highest=pl.col("rewards").max()
    )
    judged = pl.col("judged") > 0
    totals = by_group.select(
        without_signal=(judged & (pl.col("lowest") == pl.col("highest"))).sum(),
        judged=judged.sum(),
    ).collect()
    by_source = (
        responses.group_by("sources", maintain_order=True)
        .agg(
            responses=pl.len(),
            judged=pl.col("rewards").count(),
            mean_reward=pl.col("rewards").cast(pl.Float64).mean(),
            pass_rate=(pl.col("rewards") == 1).cast(pl.Float64).mean(),
            mean_tokens=pl.col("num_tokens").mean(),
            truncated=(pl.col("finish_reasons") == "length").sum(),
            tokens=pl.col("num_tokens").cast(pl.Int64).sum(),
            ref_sum=(pl.col("ref_logprob_means").cast(pl.Float64) * pl.col("num_tokens")).sum(),
        )
        .collect()
    )
    rows = by_source.to_dicts()
    return Summary(
        groups=num_groups,
        responses=sum(row["responses"] for row in rows),
        response_tokens=sum(row["tokens"] for row in rows),
        groups_without_signal=totals["without_signal"][0],
        groups_unjudged=num_groups - totals["judged"][0],
        sources=tuple(_source(row) for row in rows),
    )


def _source(row: dict[str, Any]) -> SourceSummary:
    return SourceSummary(
        source=row["sources"],
        responses=row["responses"],
        judged=row["judged"],
        mean_reward=row["mean_reward"],
        pass_rate=row["pass_rate"],
        mean_tokens=row["mean_tokens"],
        truncated=row["truncated"],
        mean_ref_logprob=row["ref_sum"] / row["tokens"] if row["tokens"] else 0.0,
    )
