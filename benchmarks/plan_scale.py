"""What planning costs as a data set grows: seconds and memory of index, plan and layout for 10^4 to 10^6 groups.

    python benchmarks/plan_scale.py                          # 10,000, 100,000 and a million groups; a minute or two
    python benchmarks/plan_scale.py --groups 1000 10000

Shards of 256 groups of 8 responses (synthetic.py) with short texts, of which planning reads nothing. At most 391 of
them are made; more groups are those same shards again, opened and decoded as if they were others. Each size is a
process of its own, with the shards in the page cache. Columns:

    index    every shard's short columns read from Parquet, and checked
    plan     selection, advantages, schedule of an epoch and its hash: what `gft train` does before its first step
    layout   the first 2,000 steps (or all, where there are fewer) cut into micro-batches for 8 ranks; training does
             this step by step beside the model, only `--dry-run` does it at once
    peak     resident memory, of which `before` was there when one shard had been planned; torch is not imported

`x` is the ratio to the line before; ten times the groups in ten times the seconds is x 10.
"""

import argparse
import json
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

from measure import Failed, end, last_json, peak_megabytes, print_end, print_table, run_process

PER_SHARD = 256
MOST_SHARDS = 391
LAID_OUT = 2000  # as many as --dry-run looks at
RANKS = 8


def shards_for(groups: int) -> int:
    return -(-groups // PER_SHARD)


def make(data: Path, groups: int) -> None:
    from synthetic import Lengths, make_data

    make_data(data, min(shards_for(groups), MOST_SHARDS), Lengths(prompt=16, shortest=4, longest=28))


def plan(data: Path, groups: int) -> dict[str, float]:
    """Index, plan and layout, in this process."""
    from stream import COST, plan_epoch

    from gftdata.locations import open_data
    from gfttrain.config import BatchConfig
    from gfttrain.plan import Cost, layout_totals

    made = open_data(str(data)).shards
    plan_epoch(made[:1])  # what is imported late is imported now
    before = peak_megabytes()
    shards = list(islice(cycle(made), shards_for(groups)))
    epoch = plan_epoch(shards)
    laid_out = epoch.steps[:LAID_OUT]
    began = time.perf_counter()
    totals = layout_totals(epoch.index, epoch.selection, laid_out, BatchConfig(), Cost(*COST), RANKS)
    layout = time.perf_counter() - began
    assert epoch.index.num_groups == len(shards) * PER_SHARD == sum(len(step.groups) for step in epoch.steps)
    assert totals.response_tokens > 0
    return {
        "groups": epoch.index.num_groups,
        "shards": len(shards),
        "index": epoch.indexing,
        "plan": epoch.planning,
        "steps": len(laid_out),
        "layout": layout,
        "before": before,
        "peak": peak_megabytes(),
    }


def with_ratio(rows: list[dict[str, float]], number: int, name: str, text: str) -> str:
    """A cell, with its ratio to the one above."""
    if number == 0:
        return text
    return f"{text}, x {rows[number][name] / rows[number - 1][name]:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", help="where the shards are made and removed again; default: the temporary folder")
    parser.add_argument("--make", help=argparse.SUPPRESS)
    parser.add_argument("--plan", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(Path(options.make), max(options.groups))
        return
    if options.plan:
        print(json.dumps(plan(Path(options.plan), options.groups[0])))
        return
    this = [sys.executable, __file__]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        data = str(Path(folder) / "data")
        run_process([*this, "--make", data, "--groups", *map(str, options.groups)])
        rows = [last_json(run_process([*this, "--plan", data, "--groups", str(n)])) for n in sorted(options.groups)]
    header = ("groups", "shards", "index", "plan", "steps laid out", "layout", "before", "peak")
    print_table(
        header,
        [
            (
                f"{row['groups']:,}",
                f"{row['shards']:,}",
                with_ratio(rows, number, "index", f"{row['index']:.2f} s"),
                with_ratio(rows, number, "plan", f"{row['plan']:.3f} s"),
                f"{row['steps']:,}",
                with_ratio(rows, number, "layout", f"{row['layout']:.2f} s"),
                f"{row['before']:,.0f} MB",
                with_ratio(rows, number, "peak", f"{row['peak']:,.0f} MB"),
            )
            for number, row in enumerate(rows)
        ],
    )
    print_end("pyarrow", "numpy")


if __name__ == "__main__":
    try:
        main()
    except Failed as failed:
        end(failed)
