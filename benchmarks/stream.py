"""How fast, and in how much memory, training data comes from shards to tensors; and how long planning takes. No model.

    python benchmarks/stream.py                     # 1 GB of shards, minutes
    python benchmarks/stream.py --gigabytes 10      # what the README says

Makes shards as `gft generate` does (its schema, encodings, sizes): groups of 1 expert and 7 self responses of 100 to
600 tokens, a prompt of 200, random ids, random float32 log-probs (which do not compress), half of the rewards 1. Then a
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
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PROMPT, SHORTEST, LONGEST, RESPONSES = 200, 100, 600, 8
VOCABULARY = 32_000
NAMES = ("expert", "self")
WIDTHS = (6, 8, 8, 14, 8, 7, 11, 11, 9, 9, 7)  # of the table


def make_groups(rng: np.random.Generator, count: int, text: str, first: int) -> list[Any]:
    from gftdata.types import Completion, Group, Message, Prompt, Response, Verdict

    def response(number: int) -> Response:
        length = int(rng.integers(SHORTEST, LONGEST + 1))
        begin, expert = int(rng.integers(len(text) // 2)), number == 0
        completion = Completion(
            source=NAMES[0] if expert else NAMES[1],
            text=text[begin : begin + 4 * length],
            response_ids=rng.integers(0, VOCABULARY, length, dtype=np.int32),
            finish_reason="given" if expert else "stop",
            model="data" if expert else "model@revision",
            seed=None if expert else int(rng.integers(2**31)),
            behavior_logprobs=None if expert else -rng.standard_exponential(length, dtype=np.float32),
        )
        reward = 1.0 if expert else float(rng.integers(2))
        return Response(completion, Verdict(reward, "ok"), -rng.standard_exponential(length, dtype=np.float32))

    def group(number: int) -> Group:
        question = text[number % 1000 : number % 1000 + 4 * PROMPT]
        prompt = Prompt(f"{number:064x}", None, (Message("user", question),), "1", "synthetic", (), "{}", question)
        ids = rng.integers(0, VOCABULARY, PROMPT, dtype=np.int32)
        return Group(prompt, ids, tuple(response(k) for k in range(RESPONSES)))

    return [group(first + k) for k in range(count)]


def make_data(out: Path, gigabytes: float) -> None:
    """Shards of so many bytes in all, and a manifest."""
    from gftdata.config import ShardsConfig
    from gftdata.schema import SCHEMA_VERSION, groups_to_table
    from gftdata.shards import (
        FORMAT,
        Manifest,
        ModelRecord,
        PromptCounts,
        Summary,
        TokenizerRecord,
        all_records,
        package_versions,
        publish_shard,
        shard_record,
        toolkit_version,
        write_manifest,
    )
    from gftdata.store import FolderStore

    rng, settings = np.random.default_rng(0), ShardsConfig()
    words = ["".join(map(chr, 97 + rng.integers(0, 26, size))) for size in rng.integers(2, 9, 5000)]
    text = " ".join(words[k] for k in rng.integers(0, len(words), 400_000))

    def publish(number: int, count: int) -> int:
        per_shard = settings.groups_per_shard
        table = groups_to_table(make_groups(rng, per_shard, text, number * per_shard), settings.logprob_dtype)
        publish_shard(FolderStore(out), number, count, table, settings.row_group_size, settings.logprob_dtype)
        record = shard_record(FolderStore(out), number, count)
        assert record is not None
        return record.bytes

    size = publish(0, 1)
    shutil.rmtree(out)
    count = max(1, round(gigabytes * 1e9 / size))
    for number in range(count):
        publish(number, count)
        print(f"\rmaking shards: {number + 1} of {count}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    records = all_records(FolderStore(out), count)
    rows = sum(record.rows for record in records)
    nothing = dict.fromkeys(PromptCounts.model_fields)
    tokens = sum(record.response_tokens for record in records)
    manifest = Manifest(
        format=FORMAT,
        schema_version=SCHEMA_VERSION,
        toolkit_version=toolkit_version(),
        recipe={},
        models=(ModelRecord(role="reference", name="none", revision="none"),),
        tokenizer=TokenizerRecord(hash="", template_hash="", end_id=0, stop_ids=(0,)),
        engine="none",
        packages=package_versions(),
        prompts=PromptCounts(**{**nothing, "rows_read": rows, "prompts": rows}),
        prompts_quarantined=0,
        teacher_samples_left_out=None,
        summary=Summary(
            groups=rows,
            responses=rows * RESPONSES,
            response_tokens=tokens,
            groups_without_signal=0,
            groups_unjudged=0,
            sources=(),
        ),
        shards=records,
    )
    write_manifest(FolderStore(out), manifest)


def drop_pages(paths: list[Path]) -> None:
    """Take files out of the page cache, so that they come from the disk."""
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak_megabytes() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def bytes_from_disk() -> int:
    return int(Path("/proc/self/io").read_text().partition("\nread_bytes:")[2].split()[0])


def read_through(data: Path, num_shards: int) -> dict[str, float]:
    """One epoch over the first shards, in this process."""
    from gftdata.locations import checked_shards, open_data, read_index
    from gfttrain.config import BatchConfig, ObjectiveConfig
    from gfttrain.plan import Cost, lay_out, make_schedule, schedule_hash, select
    from gfttrain.stream import ShardReader, collate, read_ahead

    shards = open_data(str(data)).shards[:num_shards]
    paths = [shard.path for shard in shards]
    drop_pages(paths)
    before, read_before, began = peak_megabytes(), bytes_from_disk(), time.perf_counter()
    batch, cost = BatchConfig(), Cost(9e9, 350e3, 1.4e9)  # of a model of 1.5B
    index = read_index(shards)
    indexed = time.perf_counter()
    selection = select(index, ObjectiveConfig())
    steps = make_schedule(index, selection, batch, seed=0, epochs=1, max_steps=None, skip_unjudged=False)
    schedule_hash(index, selection, steps, [shard.record.sha256 for shard in shards])
    planned = time.perf_counter()
    reader = ShardReader(index, selection, batch.shuffle_row_groups, checked_shards(shards))
    made = (
        [collate(reader.examples(pack), batch.layout) for pack in lay_out(index, selection, step, batch, cost)[0]]
        for step in steps
    )
    tokens = 0
    with read_ahead(made) as works:
        for work in works:
            tokens += sum(len(micro_batch.target_ids_N) for micro_batch in work)
    done = time.perf_counter()
    assert tokens == int(index.num_tokens[selection.trained_R].sum())
    return {
        "from_disk": (bytes_from_disk() - read_before) / 1e9,
        "gigabytes": sum(path.stat().st_size for path in paths) / 1e9,
        "groups": index.num_groups,
        "tokens": tokens,
        "index": indexed - began,
        "plan": planned - indexed,
        "stream": tokens / (done - planned),
        "whole": tokens / (done - began),
        "before": before,
        "peak": peak_megabytes(),
    }


def plan(num_groups: int) -> dict[str, float]:
    """Planning of so many groups like those in the shards, in this process."""
    from gftdata.shards import Index
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
        num_prompt_tokens=np.full(num_groups, PROMPT, np.int32),
        num_tokens=rng.integers(SHORTEST, LONGEST + 1, responses).astype(np.int32),
        rewards=rewards,
        source_names=NAMES,
        source_codes=(np.arange(responses) % RESPONSES > 0).astype(np.int32),
    )
    batch, cost = BatchConfig(), Cost(9e9, 350e3, 1.4e9)
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


def in_own_process(*arguments: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


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
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        make_data(Path(folder) / "data", options.gigabytes)
        count = len(list((Path(folder) / "data" / "data").iterdir()))
        parts = sorted({max(1, count // 4), max(1, count // 2), count})
        rows = [in_own_process("--read", str(Path(folder) / "data"), str(part)) for part in parts]
    print(f"python benchmarks/stream.py --gigabytes {options.gigabytes:g} --plan-groups {options.plan_groups}\n")
    heads = ("GB", "of disk", "groups", "tokens", "index", "plan", "stream t/s", "whole t/s", "before", "peak", "ratio")
    print("".join(f"{head:>{width}}" for head, width in zip(heads, WIDTHS, strict=True)))
    for row in rows:
        cells = (
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
        print("".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True)))
    planned = in_own_process("--plan", str(options.plan_groups))
    names = ("select", "make_schedule", "schedule_hash", "layout_totals")
    print(f"\nplanning {planned['groups']:,} groups of {RESPONSES} responses, {planned['steps']:,} steps, seconds:")
    print(", ".join(f"{name} {planned[name]:.1f}" for name in names) + " (all steps, 8 ranks)")


if __name__ == "__main__":
    main()
