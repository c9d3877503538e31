"""The samples of a benchmark with their verdicts, in OUT/evals/<benchmark>/: what people look at. No torch here.

recipe.json        what the samples depend on: with another one the benchmark begins anew
samples.parquet    all of them, a row each, when the last one is judged: there whole or not at all
.work/             until then: the journals of samples (gftdata/journal.py) and of verdicts, a file for each attempt
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gftdata.errors import UserError
from gftdata.journal import Entry, checked_line, checked_lines, read_journal
from gftdata.shards import write_atomic
from gftdata.store import FolderStore, named, read_file, replacing
from gftdata.types import SELF, Prompt, Verdict
from gfttrain.estimates import Values
from gfttrain.results import EVALS_FOLDER

RECIPE, SAMPLES, WORK = "recipe.json", "samples.parquet", ".work"
VERDICTS = f"{WORK}/verdicts"
GREEDY = "greedy"  # the source of greedy samples; the others are the model's own (SELF)
REFUSED = "refused"  # finish_reason of a sample that the engine gave up; its status is error:refused
SHARD = 0  # the one part of a benchmark's journal

Key = tuple[str, int, int]  # source, row of the prompt, index

SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("question", pa.string(), nullable=False),  # the last message
        pa.field("ground_truth", pa.string()),
        pa.field("greedy", pa.bool_(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),  # k of the prompt's samples; 0 for the greedy one
        pa.field("text", pa.string(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),  # the end token included
        pa.field("finish_reason", pa.string(), nullable=False),  # stop, length, or refused by the engine
        pa.field("reward", pa.float64()),  # null: not judged, for the reason in status
        pa.field("status", pa.string(), nullable=False),
        pa.field("seed", pa.int64()),  # null where the engine does not honour seeds
        pa.field("logprob_sum", pa.float64(), nullable=False),  # nats, temperature-scaled, over the tokens
        pa.field("ref_logprob_sum", pa.float64()),  # of the reference, at temperature 1; null without one
    ]
)


@dataclass(frozen=True, slots=True)
class Judged:
    """One sample with its verdict."""

    row: int  # of its prompt
    index: int
    greedy: bool
    text: str
    num_tokens: int
    finish_reason: str
    verdict: Verdict
    seed: int | None  # None where the engine does not honour seeds
    logprob_sum: float
    ref_logprob_sum: float | None


@dataclass(frozen=True, slots=True)
class GreedyAnswer:
    """One prompt's greedy answer, for people to read."""

    question: str
    text: str
    reward: float | None


def benchmark_folder(out: Path, benchmark: str) -> Path:
    return out / EVALS_FOLDER / benchmark


def judged(entry: Entry, verdict: Verdict, ref_logprob_sum: float | None = None) -> Judged:
    """A sample of the journal with its verdict."""
    return Judged(
        row=entry.row,
        index=entry.index,
        greedy=entry.source == GREEDY,
        text=entry.text,
        num_tokens=len(entry.response_ids),
        finish_reason=entry.finish_reason,
        verdict=verdict,
        seed=entry.seed,
        logprob_sum=float(entry.behavior_logprobs.sum(dtype=np.float64)),
        ref_logprob_sum=ref_logprob_sum,
    )


def refused(key: Key) -> Judged:
    """What stands for a sample that the engine gave up."""
    source, row, index = key
    return Judged(row, index, source == GREEDY, "", 0, REFUSED, Verdict(None, "error:refused"), None, 0.0, None)


def all_keys(num_prompts: int, num_samples: int, *, greedy: bool) -> list[Key]:
    """Of every sample that a benchmark has, in their order: prompt by prompt, the greedy one last."""
    parts = [(SELF, k) for k in range(num_samples)] + ([(GREEDY, 0)] if greedy else [])
    return [(source, row, k) for row in range(num_prompts) for source, k in parts]


def rewards_PN(samples: Sequence[Judged], num_prompts: int, num_samples: int, *, greedy: bool) -> Values:
    """The rewards of the samples drawn [P, N], or of the greedy ones [P, 1]; NaN where there is none."""
    found = np.full((num_prompts, 1 if greedy else num_samples), np.nan)
    for sample in samples:
        if sample.greedy == greedy and sample.verdict.reward is not None:
            found[sample.row, sample.index] = sample.verdict.reward
    return found


# what is there


def check_folder(folder: Path) -> None:
    """Raise UserError for a folder that holds something else than a benchmark's samples."""
    there = {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.is_dir() else set()
    if there - {RECIPE, SAMPLES} and read_recipe(folder) is None:
        raise UserError(f"{folder}: not empty and not of gft eval; move it away, or name another folder (out)")


def read_recipe(folder: Path) -> dict[str, Any] | None:
    """What the samples in a folder depend on; None where nothing was begun."""
    try:
        found = json.loads(read_file(folder / RECIPE))
    except (FileNotFoundError, ValueError):  # no other error of the system: what there is would be begun anew
        return None
    return found if isinstance(found, dict) else None


def num_drawn(folder: Path) -> int:
    """Samples in the journal."""
    return len(read_journal(FolderStore(folder), SHARD))


def is_complete(folder: Path) -> bool:
    """Whether every sample is there and judged."""
    return (folder / SAMPLES).is_file()


def begin(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Make a folder ready for samples of a recipe: those of another one go."""
    if read_recipe(folder) == recipe:
        return
    for name in (RECIPE, SAMPLES):  # the recipe first: what a kill leaves is begun anew
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / WORK, ignore_errors=True)
    write_atomic(folder / RECIPE, json.dumps(recipe, indent=2, ensure_ascii=False) + "\n")


# verdicts


@contextmanager
def open_verdicts(folder: Path, attempt: str) -> Iterator[Callable[[Key, Verdict], None]]:
    """Appends verdicts; each is with the operating system when the call returns."""
    path = folder / VERDICTS / f"{attempt}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def append(key: Key, verdict: Verdict) -> None:
        source, row, index = key
        data = {"source": source, "row": row, "k": index, "reward": verdict.reward, "status": verdict.status}
        line = checked_line(data)
        with named(path):
            while line:
                line = line[os.write(descriptor, line) :]

    try:
        yield append
    finally:
        os.close(descriptor)


def read_verdicts(folder: Path) -> dict[Key, Verdict]:
    """All verdicts so far. Raises UserError for a damaged line."""
    found: dict[Key, Verdict] = {}
    for path in sorted((folder / VERDICTS).glob("*.jsonl")):
        for data in checked_lines(read_file(path), str(path)):
            key = (data["source"], data["row"], data["k"])
            found.setdefault(key, Verdict(data["reward"], data["status"]))
    return found


def drop_verdicts(folder: Path) -> None:
    """Have all samples judged again."""
    shutil.rmtree(folder / VERDICTS, ignore_errors=True)


# the finished file


def write_samples(folder: Path, prompts: Sequence[Prompt], samples: Sequence[Judged]) -> None:
    """Write samples.parquet."""
    columns: dict[str, list[Any]] = {
        "prompt_id": [prompts[s.row].prompt_id for s in samples],
        "question": [prompts[s.row].messages[-1].content for s in samples],
        "ground_truth": [prompts[s.row].ground_truth for s in samples],
        "greedy": [s.greedy for s in samples],
        "index": [s.index for s in samples],
        "text": [s.text for s in samples],
        "num_tokens": [s.num_tokens for s in samples],
        "finish_reason": [s.finish_reason for s in samples],
        "reward": [s.verdict.reward for s in samples],
        "status": [s.verdict.status for s in samples],
        "seed": [s.seed for s in samples],
        "logprob_sum": [s.logprob_sum for s in samples],
        "ref_logprob_sum": [s.ref_logprob_sum for s in samples],
    }
    with replacing(folder / SAMPLES) as file:
        pq.write_table(pa.table(columns, schema=SCHEMA), file, compression="zstd")


def drop_journals(folder: Path) -> None:
    """The samples stand in samples.parquet: take away how they came."""
    shutil.rmtree(folder / WORK, ignore_errors=True)


def read_table(folder: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """samples.parquet. Raises UserError where there is none, or it is damaged."""
    path = folder / SAMPLES
    if not path.is_file():
        raise UserError(f"{path}: no such file; a finished `gft eval` leaves it there")
    try:
        return pq.read_table(path, columns=None if columns is None else list(columns))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read: {error}; delete it to evaluate this benchmark anew") from None


def read_samples(folder: Path, prompts: Sequence[Prompt]) -> list[Judged]:
    """The finished samples of these prompts."""
    place = {prompt.prompt_id: row for row, prompt in enumerate(prompts)}
    return [
        Judged(
            row=place[line["prompt_id"]],
            index=line["index"],
            greedy=line["greedy"],
            text=line["text"],
            num_tokens=line["num_tokens"],
            finish_reason=line["finish_reason"],
            verdict=Verdict(line["reward"], line["status"]),
            seed=line["seed"],
            logprob_sum=line["logprob_sum"],
            ref_logprob_sum=line["ref_logprob_sum"],
        )
        for line in read_table(folder).to_pylist()
    ]


def greedy_answers(out: Path, benchmark: str) -> list[GreedyAnswer]:
    """Each prompt's greedy answer, in the prompts' order. Raises UserError where the benchmark is not finished."""
    table = read_table(benchmark_folder(out, benchmark), ["greedy", "question", "text", "reward"])
    return [
        GreedyAnswer(line["question"], line["text"], line["reward"]) for line in table.to_pylist() if line["greedy"]
    ]
