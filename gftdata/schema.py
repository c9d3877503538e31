"""THE Parquet schema of response groups, its version, and group <-> row.

One row is one prompt with its whole group. Per-response columns are top-level lists that run parallel: element k of
each speaks of response k.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa

from gftdata.errors import UserError
from gftdata.types import Completion, Group, Message, Prompt, Response, Verdict

SCHEMA_VERSION = 1

# what planning an epoch reads
PLANNED_LISTS = ["rewards", "sources", "num_tokens"]
INDEX_COLUMNS = [*PLANNED_LISTS, "num_prompt_tokens"]
VERSION_KEY = b"gft.schema_version"

PER_RESPONSE = (
    "responses",
    "sources",
    "rewards",
    "reward_status",
    "finish_reasons",
    "num_tokens",
    "models",
    "seeds",
    "ref_logprob_means",
    "response_ids",
    "ref_logprobs",
    "behavior_logprobs",
)
# Few distinct values: dictionary encoding pays. On token columns it does not.
DICTIONARY_COLUMNS = ("data_source", "sources", "reward_status", "finish_reasons", "models")


def _list(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", kind))


@cache
def schema(logprob_dtype: str = "float32") -> pa.Schema:
    """The schema; `logprob_dtype` is float32 or float16, of the two long log-prob columns."""
    logprob = {"float32": pa.float32(), "float16": pa.float16()}[logprob_dtype]
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    return pa.schema(
        [
            ("prompt_id", pa.string()),
            ("source_id", pa.string()),
            ("prompt", _list(message)),
            ("ground_truth", pa.string()),
            ("data_source", pa.string()),
            ("responses", _list(pa.string())),
            ("sources", _list(pa.string())),
            ("rewards", _list(pa.float32())),
            ("reward_status", _list(pa.string())),
            ("finish_reasons", _list(pa.string())),
            ("num_tokens", _list(pa.int32())),
            ("models", _list(pa.string())),
            ("seeds", _list(pa.int64())),
            ("ref_logprob_means", _list(pa.float32())),
            ("num_prompt_tokens", pa.int32()),
            ("prompt_ids", _list(pa.int32())),
            ("response_ids", _list(_list(pa.int32()))),
            ("ref_logprobs", _list(_list(logprob))),
            ("behavior_logprobs", _list(_list(logprob))),
            ("extra", pa.string()),
        ],
        metadata={VERSION_KEY: str(SCHEMA_VERSION).encode()},
    )


def check_schema(found: pa.Schema, where: str) -> None:
    """Raise UserError unless `found` is this version's schema, in either log-prob width."""
    version = (found.metadata or {}).get(VERSION_KEY, b"none").decode()
    if version != str(SCHEMA_VERSION):
        raise UserError(f"{where}: schema version {version}, this toolkit reads version {SCHEMA_VERSION}")
    if not any(found.equals(schema(dtype)) for dtype in ("float32", "float16")):
        expected = schema()
        wrong = [f.name for f in expected if f.name not in found.names or not _same_type(found, f)]
        unknown = [name for name in found.names if name not in expected.names]
        raise UserError(f"{where}: columns differ from the schema: {', '.join(wrong + unknown) or 'their order'}")


def _same_type(found: pa.Schema, field: pa.Field) -> bool:
    return any(found.field(field.name).type == schema(dtype).field(field.name).type for dtype in ("float32", "float16"))


def groups_to_table(groups: Sequence[Group], logprob_dtype: str = "float32") -> pa.Table:
    """Groups -> one Arrow table, a row each. The long columns go through numpy, never through Python lists."""
    target = schema(logprob_dtype)
    prompts = [group.prompt for group in groups]
    responses = [response for group in groups for response in group.responses]
    per_group = [len(group.responses) for group in groups]

    def flat(name: str, value: Callable[[Response], Any]) -> pa.Array:
        field = target.field(name).type
        return _lists(per_group, pa.array([value(r) for r in responses], type=field.value_type), field)

    def long(name: str, value: Callable[[Response], np.ndarray | None]) -> pa.Array:
        field = target.field(name).type
        parts = [value(r) for r in responses]
        dtype = field.value_type.value_type.to_pandas_dtype()
        filled = [np.empty(0, dtype) if part is None else part.astype(dtype, copy=False) for part in parts]
        values = pa.array(np.concatenate(filled) if filled else np.empty(0, dtype), type=field.value_type.value_type)
        inner = _lists([len(part) for part in filled], values, field.value_type, [part is None for part in parts])
        return _lists(per_group, inner, field)

    prompt_ids = np.concatenate([g.prompt_ids for g in groups]) if groups else np.empty(0, np.int32)
    columns: dict[str, Any] = {
        "prompt_id": [p.prompt_id for p in prompts],
        "source_id": [p.source_id for p in prompts],
        "prompt": [[asdict(m) for m in p.messages] for p in prompts],
        "ground_truth": [p.ground_truth for p in prompts],
        "data_source": [p.data_source for p in prompts],
        "responses": flat("responses", lambda r: r.completion.text),
        "sources": flat("sources", lambda r: r.completion.source),
        "rewards": flat("rewards", lambda r: r.verdict.reward),
        "reward_status": flat("reward_status", lambda r: r.verdict.status),
        "finish_reasons": flat("finish_reasons", lambda r: r.completion.finish_reason),
        "num_tokens": flat("num_tokens", lambda r: len(r.completion.response_ids)),
        "models": flat("models", lambda r: r.completion.model),
        "seeds": flat("seeds", lambda r: r.completion.seed),
        "ref_logprob_means": flat("ref_logprob_means", lambda r: float(r.ref_logprobs.mean(dtype=np.float64))),
        "num_prompt_tokens": [len(g.prompt_ids) for g in groups],
        "prompt_ids": _lists(
            [len(g.prompt_ids) for g in groups], pa.array(prompt_ids), target.field("prompt_ids").type
        ),
        "response_ids": long("response_ids", lambda r: r.completion.response_ids),
        "ref_logprobs": long("ref_logprobs", lambda r: r.ref_logprobs),
        "behavior_logprobs": long("behavior_logprobs", lambda r: r.completion.behavior_logprobs),
        "extra": [p.extra for p in prompts],
    }
    arrays = [
        columns[field.name]
        if isinstance(columns[field.name], pa.Array)
        else pa.array(columns[field.name], type=field.type)
        for field in target
    ]
    return pa.Table.from_arrays(arrays, schema=target)


def _lists(lengths: Sequence[int], values: pa.Array, kind: pa.DataType, is_null: Sequence[bool] = ()) -> pa.Array:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    mask = pa.array(is_null, type=pa.bool_()) if any(is_null) else None
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=kind, mask=mask)


def table_to_groups(table: pa.Table) -> Iterator[Group]:
    """The inverse of `groups_to_table`, except for what a prompt was given beyond its responses."""
    for row in table.to_pylist():
        prompt = Prompt(
            prompt_id=row["prompt_id"],
            source_id=row["source_id"],
            messages=tuple(Message(**message) for message in row["prompt"]),
            ground_truth=row["ground_truth"],
            data_source=row["data_source"],
            given=(),
            extra=row["extra"],
            question=row["prompt"][-1]["content"],
        )
        responses = tuple(_response(row, k) for k in range(len(row["responses"])))
        yield Group(prompt, np.asarray(row["prompt_ids"], dtype=np.int32), responses)


def _response(row: dict[str, Any], k: int) -> Response:
    behavior = row["behavior_logprobs"][k]
    return Response(
        completion=Completion(
            source=row["sources"][k],
            text=row["responses"][k],
            response_ids=np.asarray(row["response_ids"][k], dtype=np.int32),
            finish_reason=row["finish_reasons"][k],
            model=row["models"][k],
            seed=row["seeds"][k],
            behavior_logprobs=None if behavior is None else np.asarray(behavior, dtype=np.float32),
        ),
        verdict=Verdict(row["rewards"][k], row["reward_status"][k]),
        ref_logprobs=np.asarray(row["ref_logprobs"][k], dtype=np.float32),
    )


def parquet_options(logprob_dtype: str) -> dict[str, Any]:
    """How shards are encoded, as arguments of `pyarrow.parquet.ParquetWriter`.

    BYTE_STREAM_SPLIT only for float32: DuckDB cannot read it on float16.
    """
    nested = "list.element.list.element"
    split = [f"{name}.{nested}" for name in ("ref_logprobs", "behavior_logprobs")] if logprob_dtype == "float32" else []
    return {
        "compression": "zstd",
        "compression_level": 3,
        "use_dictionary": [n if n == "data_source" else f"{n}.list.element" for n in DICTIONARY_COLUMNS],
        "use_byte_stream_split": split or False,
        "write_page_index": True,
        "write_page_checksum": True,  # planning reads a few columns long before the whole file is hashed
        "use_content_defined_chunking": True,
    }


def check_rows(table: pa.Table, where: str) -> list[str]:
    """What is wrong with the content of rows that have the right schema; empty when all is well."""
    problems: list[str] = []

    def complain(row: int, what: str) -> None:
        problems.append(f"{where}: row {row}: {what}")

    for i, row in enumerate(table.to_pylist()):
        sizes = {name: len(row[name]) if row[name] is not None else -1 for name in PER_RESPONSE}
        if len(set(sizes.values())) != 1 or -1 in sizes.values():
            complain(i, f"per-response columns of different lengths: {json.dumps(sizes)}")
            continue
        if row["num_prompt_tokens"] != len(row["prompt_ids"] or ()) or not row["prompt_ids"]:
            complain(i, "num_prompt_tokens is not the length of prompt_ids")
        elif None in row["prompt_ids"] or min(row["prompt_ids"]) < 0:
            complain(i, "a negative or null prompt token id")
        if not row["prompt_id"] or not row["prompt"] or not all(m and None not in m.values() for m in row["prompt"]):
            complain(i, "no prompt_id, or a prompt without messages, or a message without role or content")
        for k in range(len(row["responses"])):
            for what in _response_problems(row, k):
                complain(i, f"response {k}: {what}")
    return problems


def _response_problems(row: dict[str, Any], k: int) -> Iterator[str]:
    ids, behavior = row["response_ids"][k] or [], row["behavior_logprobs"][k]
    logprobs = np.asarray(row["ref_logprobs"][k] or [], dtype=np.float32)
    if not len(ids) == row["num_tokens"][k] == len(logprobs) or not ids:
        yield "num_tokens, response_ids and ref_logprobs differ in length, or are empty"
    elif None in ids or min(ids) < 0:
        yield "negative or null token id"
    elif not np.isfinite(logprobs).all() or (logprobs > 0).any():
        yield "a reference log-prob is positive or not finite"
    elif behavior is not None and (len(behavior) != len(ids) or not np.isfinite(np.array(behavior, np.float32)).all()):
        yield "behavior_logprobs are not finite, or not one for each token"
    reward, status = row["rewards"][k], row["reward_status"][k]
    judged = status == "ok" and reward is not None and math.isfinite(reward)
    if not judged and (reward is not None or status in (None, "ok")):
        yield f"reward {reward} with status {str(status)[:40]}"
    for name in ("responses", "sources", "finish_reasons", "models"):
        if row[name][k] is None:
            yield f"{name} is null"
