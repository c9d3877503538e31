"""Finished data sets of random content, for the benchmarks that need shards and no model: nothing is run from here.

Schema, encodings and sizes are those of `gft generate`: groups of 1 expert and 7 self responses, random token ids,
random float32 log-probs (which do not compress), half of the self rewards 1, the expert's all 1. The manifest's summary
is counted from the shards. Columns are made as whole arrays, so that a million groups take minutes.
"""

import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gftdata.config import ShardsConfig
from gftdata.manifest import DATA, FORMAT, Manifest, ModelRecord, PromptCounts, TokenizerRecord, write_manifest
from gftdata.schema import SCHEMA_VERSION, schema
from gftdata.shards import all_records, package_versions, publish_shard, shard_record, toolkit_version
from gftdata.store import FolderStore
from gftdata.summary import summarise
from gftdata.tokens import NO_TEMPLATE_HASH

RESPONSES = 8
VOCABULARY = 32_000
END_ID = 0  # no other token of a response is it
NAMES = ("expert", "self")
CHARACTERS = 4  # of a token's text


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a prompt, and of the shortest and the longest response."""

    prompt: int
    shortest: int
    longest: int


def make_text(rng: np.random.Generator) -> str:
    """Two million characters of made-up words."""
    words = ["".join(map(chr, 97 + rng.integers(0, 26, size))) for size in rng.integers(2, 9, 5000)]
    return " ".join(words[k] for k in rng.integers(0, len(words), 400_000))


def make_table(rng: np.random.Generator, count: int, text: str, first: int, lengths: Lengths) -> pa.Table:
    """Groups number `first` and so on."""
    num = count * RESPONSES
    tokens_R = rng.integers(lengths.shortest, lengths.longest + 1, num).astype(np.int32)
    expert_R = np.arange(num) % RESPONSES == 0
    ends_R = np.cumsum(tokens_R)
    ids_T = rng.integers(1, VOCABULARY, ends_R[-1], dtype=np.int32)
    ids_T[ends_R - 1] = END_ID
    ref_T, drawn_T = (-rng.standard_exponential(ends_R[-1], dtype=np.float32) for _ in range(2))
    begins_R = rng.integers(0, len(text) // 2, num)
    texts = [text[b : b + CHARACTERS * n] for b, n in zip(begins_R.tolist(), tokens_R.tolist(), strict=True)]
    questions = [
        f"{n}: {text[begin : begin + CHARACTERS * lengths.prompt]}"
        for n, begin in enumerate(rng.integers(0, len(text) // 2, count).tolist(), start=first)
    ]
    drawn = _lists(tokens_R, pa.array(drawn_T), pa.array(expert_R))
    columns = {
        "prompt_id": [f"{first + k:064x}" for k in range(count)],
        "source_id": [None] * count,
        "prompt": [[{"role": "user", "content": question}] for question in questions],
        "ground_truth": ["1"] * count,
        "data_source": ["synthetic"] * count,
        "responses": _groups(pa.array(texts)),
        "sources": _groups(_chosen(expert_R, *NAMES)),
        "rewards": _groups(pa.array(np.where(expert_R, 1, rng.integers(0, 2, num)).astype(np.float32))),
        "reward_status": _groups(pa.array(["ok"] * num)),
        "finish_reasons": _groups(_chosen(expert_R, "given", "stop")),
        "num_tokens": _groups(pa.array(tokens_R)),
        "models": _groups(_chosen(expert_R, "data", "model@revision")),
        "seeds": _groups(pa.array(rng.integers(0, 2**31, num), mask=expert_R)),
        "ref_logprob_means": _groups(pa.array(np.add.reduceat(ref_T, ends_R - tokens_R) / tokens_R)),
        "num_prompt_tokens": [lengths.prompt] * count,
        "prompt_ids": list(rng.integers(1, VOCABULARY, (count, lengths.prompt), dtype=np.int32)),
        "response_ids": _groups(_lists(tokens_R, pa.array(ids_T))),
        "ref_logprobs": _groups(_lists(tokens_R, pa.array(ref_T))),
        "behavior_logprobs": _groups(drawn),
        "extra": ["{}"] * count,
    }
    arrays = [
        made.cast(field.type) if isinstance(made := columns[field.name], pa.Array) else pa.array(made, type=field.type)
        for field in schema()
    ]
    return pa.Table.from_arrays(arrays, schema=schema())


def _chosen(first_R: npt.NDArray[np.bool_], one: str, other: str) -> pa.Array:
    return pa.array(np.where(first_R, one, other).tolist())


def _lists(lengths: npt.NDArray[np.int32], values: pa.Array, is_null: pa.Array | None = None) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=is_null)


def _groups(values: pa.Array) -> pa.Array:
    return _lists(np.full(len(values) // RESPONSES, RESPONSES, np.int32), values)


def make_data(out: Path, num_shards: int, lengths: Lengths) -> None:
    """So many shards of the default size, and a manifest."""
    rng, per_shard = np.random.default_rng(0), ShardsConfig().groups_per_shard
    text = make_text(rng)
    tables = (make_table(rng, per_shard, text, number * per_shard, lengths) for number in range(num_shards))
    write_data(out, tables, num_shards)


def write_data(out: Path, tables: Iterable[pa.Table], num_shards: int) -> None:
    """A finished data set with a shard for each table."""
    settings, store = ShardsConfig(), FolderStore(out)
    for number, table in enumerate(tables):
        publish_shard(store, number, num_shards, table, settings.row_group_size, settings.logprob_dtype)
        shard_record(store, number, num_shards)
        if sys.stderr.isatty():
            print(f"\rmaking shards: {number + 1} of {num_shards}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    records = all_records(store, num_shards)
    rows = sum(record.rows for record in records)
    nothing = dict.fromkeys(PromptCounts.model_fields)
    manifest = Manifest(
        format=FORMAT,
        schema_version=SCHEMA_VERSION,
        toolkit_version=toolkit_version(),
        recipe={},
        models=(ModelRecord(role="reference", name="none", revision="none"),),
        tokenizer=TokenizerRecord(hash="", template_hash=NO_TEMPLATE_HASH, end_id=END_ID, stop_ids=(END_ID,)),
        engine="none",
        packages=package_versions(),
        prompts=PromptCounts(**{**nothing, "rows_read": rows, "prompts": rows}),
        prompts_quarantined=0,
        teacher_samples_left_out=None,
        summary=summarise(out / DATA / record.name for record in records),
        shards=records,
    )
    write_manifest(store, manifest)
    shutil.rmtree(out / ".work")


def shard_bytes(out: Path, lengths: Lengths) -> int:
    """The size of one shard, made in `out` and removed again."""
    make_data(out, 1, lengths)
    size = sum(path.stat().st_size for path in (out / DATA).iterdir())
    shutil.rmtree(out)
    return size
