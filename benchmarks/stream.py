"""How fast, and in how much memory, training data comes from shards to tensors; and how long planning takes. No model.

    python benchmarks/stream.py                     # 1 GB of shards, minutes
    python benchmarks/stream.py --gigabytes 10      # what the README says

Makes shards (synthetic.py): groups of 1 expert and 7 self responses of 100 to 600 tokens, a prompt of 200. Then a
quarter, half and all of the shards are read, each in a process of its own and each cold: their pages are dropped from
the page cache before (posix_fadvise DONTNEED). `of disk` is what then came from the device (GB, /proc/self/io), which
has caches of its own.

A pass is what `gft train` does for an epoch: index, plan, layout in micro-batches of 8192 positions with shared
prefixes, and every batch collated in the read-ahead thread, from row groups in shuffled order, with sha256 checks and
log-probs. `stream` is the response tokens a second of that, start-up, index and plan left out; `whole` with index and
plan. Memory is the peak resident size of the process (VmHWM), of which `before` is there once torch and the rest are
imported; `ratio` is the peak over that of the first row. Groups whose rewards are all equal are not given out, so their
tokens do not count.

Planning is that of synthetic groups in memory; what reading the index of real ones takes is `index`.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measure import Failed, end, last_json, peak_megabytes, print_end, print_table, run_process
from synthetic import NAMES, RESPONSES, Lengths, make_data, shard_bytes

LENGTHS = Lengths(prompt=200, shortest=100, longest=600)
COST = (9e9, 350e3, 1.4e9)  # FLOP of a model of 1.5B: see gfttrain.plan.Cost


def drop_pages(paths: list[Path]) -> None:
    """Take files out of the page cache, so that they come from the disk."""
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_from_disk() -> int:
    return int(Path("/proc/self/io").read_text().partition("\nread_bytes:")[2].split()[0])


@dataclass(frozen=True, slots=True)
class Epoch:
    """An epoch as `gft train` plans it, and the seconds that index and plan took."""

    index: Any
    selection: Any
    steps: Sequence[Any]
    indexing: float
    planning: float


def plan_epoch(shards: Sequence[Any], advantage: str = "group") -> Epoch:
    """Index and plan of shards. With advantage `one` every response is trained on, whatever its reward."""
    from gftdata.locations import read_index
    from gfttrain.config import BatchConfig, ObjectiveConfig
    from gfttrain.plan import make_schedule, schedule_hash, select

    began = time.perf_counter()
    index = read_index(shards)
    indexed = time.perf_counter()
    selection = select(index, ObjectiveConfig(advantage=advantage))
    steps = make_schedule(index, selection, BatchConfig(), seed=0, epochs=1, max_steps=None, skip_unjudged=False)
    schedule_hash(index, selection, steps, [shard.record.sha256 for shard in shards])
    return Epoch(index, selection, steps, indexed - began, time.perf_counter() - indexed)


@contextmanager
def batches_of(shards: Sequence[Any], epoch: Epoch) -> Iterator[Iterator[list[Any]]]:
    """The micro-batches of each step, collated in the read-ahead thread."""
    from gftdata.locations import checked_shards
    from gfttrain.config import BatchConfig
    from gfttrain.plan import Cost, lay_out
    from gfttrain.stream import ShardReader, collate, read_ahead

    batch, cost = BatchConfig(), Cost(*COST)
    reader = ShardReader(epoch.index, epoch.selection, batch.shuffle_row_groups, checked_shards(shards))
    made = (
        [
            collate(reader.examples(pack), batch.layout)
            for pack in lay_out(epoch.index, epoch.selection, step, batch, cost)[0]
        ]
        for step in epoch.steps
    )
    with read_ahead(made) as works:
        yield works


def import_trainer() -> None:
    """So that imports are in no measured time and in the memory that is there before."""
    import gftdata.locations  # noqa: F401
    import gfttrain.plan
    import gfttrain.stream  # noqa: F401


def read_through(data: Path, num_shards: int) -> dict[str, float]:
    """One epoch over the first shards, in this process."""
    import_trainer()
    from gftdata.locations import open_data

    shards = open_data(str(data)).shards[:num_shards]
    paths = [shard.path for shard in shards]
    drop_pages(paths)
    before, read_before, began = peak_megabytes(), bytes_from_disk(), time.perf_counter()
    epoch = plan_epoch(shards)
    planned = time.perf_counter()
    tokens = 0
    with batches_of(shards, epoch) as works:
        for work in works:
            tokens += sum(len(micro_batch.target_ids_N) for micro_batch in work)
    done = time.perf_counter()
    assert tokens == int(epoch.index.num_tokens[epoch.selection.trained_R].sum())
    return {
        "from_disk": (bytes_from_disk() - read_before) / 1e9,
        "gigabytes": sum(path.stat().st_size for path in paths) / 1e9,
        "groups": epoch.index.num_groups,
        "tokens": tokens,
        "index": epoch.indexing,
        "plan": epoch.planning,
        "stream": tokens / (done - planned),
        "whole": tokens / (done - began),
        "before": before,
        "peak": peak_megabytes(),
    }


def plan(num_groups: int) -> dict[str, float]:
    """Planning of so many groups like those in the shards, in this process."""
    from gftdata.index import Index
    from gfttrain.config import BatchConfig, ObjectiveConfig
    from gfttrain.plan import Cost, layout_totals, make_schedule, schedule_hash, select

    rng, number = np.random.default_rng(0), np.arange(num_groups, dtype=np.int32)
    responses = num_groups * RESPONSES
    rewards = rng.integers(0, 2, responses).astype(np.float32)
    rewards[::RESPONSES] = 1.0
    index = Index(
        paths=(Path("imaginary.parquet"),),
        path_of_group=np.zeros(num_groups, np.int32),
        row_group_of_group=number // 64,
        row_of_group=number % 64,
        offsets=np.arange(num_groups + 1, dtype=np.int64) * RESPONSES,
        num_prompt_tokens=np.full(num_groups, LENGTHS.prompt, np.int32),
        num_tokens=rng.integers(LENGTHS.shortest, LENGTHS.longest + 1, responses).astype(np.int32),
        rewards=rewards,
        source_names=NAMES,
        source_codes=(np.arange(responses) % RESPONSES > 0).astype(np.int32),
    )
    batch, cost = BatchConfig(), Cost(*COST)
    times = [time.perf_counter()]
    selection = select(index, ObjectiveConfig())
    times.append(time.perf_counter())
    steps = make_schedule(index, selection, batch, seed=0, epochs=1, max_steps=None, skip_unjudged=False)
    times.append(time.perf_counter())
    schedule_hash(index, selection, steps, ["0" * 64])
    times.append(time.perf_counter())
    totals = layout_totals(index, selection, steps, batch, cost, 8)
    times.append(time.perf_counter())
    seconds = dict(zip(("select", "make_schedule", "schedule_hash", "layout_totals"), np.diff(times), strict=True))
    return {"groups": num_groups, "steps": len(steps), **seconds, "efficiency": totals.packing_efficiency}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--plan-groups", type=int, default=1_000_000)
    parser.add_argument("--folder", help="where the shards are made and removed again; default: the temporary folder")
    parser.add_argument("--read", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--plan", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        print(json.dumps(read_through(Path(options.read[0]), int(options.read[1]))))
        return
    if options.plan:
        print(json.dumps(plan(options.plan)))
        return
    this = [sys.executable, __file__]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        size = shard_bytes(Path(folder) / "one", LENGTHS)
        make_data(Path(folder) / "data", max(1, round(options.gigabytes * 1e9 / size)), LENGTHS)
        count = len(list((Path(folder) / "data" / "data").iterdir()))
        parts = sorted({max(1, count // 4), max(1, count // 2), count})
        rows = [last_json(run_process([*this, "--read", str(Path(folder) / "data"), str(part)])) for part in parts]
    print_table(
        ("GB", "of disk", "groups", "tokens", "index", "plan", "stream t/s", "whole t/s", "before", "peak", "ratio"),
        [
            (
                f"{row['gigabytes']:.2f}",
                f"{row['from_disk']:.2f}",
                f"{row['groups']:,}",
                f"{row['tokens']:,}",
                f"{row['index']:.1f} s",
                f"{row['plan']:.1f} s",
                f"{row['stream']:,.0f}",
                f"{row['whole']:,.0f}",
                f"{row['before']:,.0f} MB",
                f"{row['peak']:,.0f} MB",
                f"{row['peak'] / rows[0]['peak']:.3f}",
            )
            for row in rows
        ],
        left=0,
    )
    planned = last_json(run_process([*this, "--plan", str(options.plan_groups)]))
    names = ("select", "make_schedule", "schedule_hash", "layout_totals")
    print(f"\nplanning {planned['groups']:,} groups of {RESPONSES} responses, {planned['steps']:,} steps, seconds:")
    print(", ".join(f"{name} {planned[name]:.1f}" for name in names) + " (all steps, 8 ranks)")
    print_end("torch", "pyarrow")


if __name__ == "__main__":
    try:
        main()
    except Failed as failed:
        end(failed)
