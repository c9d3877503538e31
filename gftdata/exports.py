"""Response groups -> a Parquet file that TRL or verl trains from. The other direction: `imports.py`.

A data set is read row group by row group, so that memory does not grow with it, and what another format has no place
for is counted and said. What the rows look like: `layouts.py`.
"""

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gftdata.errors import UserError, first_line
from gftdata.layouts import FORMATS, Candidate, ExportOptions, GroupRow, rows_of, trl_schema
from gftdata.locations import DataSet, open_data
from gftdata.shards import check_unpacked_size, check_writable, open_parquet
from gftdata.store import replacing
from gftdata.tokens import NO_TEMPLATE_HASH
from gftdata.types import EXPERT, TEACHER_PREFIX

TRAIN_FILE = "train.parquet"
ROWS_AT_A_TIME = 1024
USES = {  # setting -> the formats that have a use for it
    "sources": ("trl-sft", "trl-dpo", "trl-kto"),
    "min_reward": ("trl-sft", "trl-dpo", "trl-kto"),
    "pairs": ("trl-dpo",),
    "tokens": ("trl-sft", "trl-dpo"),
    "truncated": ("trl-sft", "trl-dpo", "trl-kto"),
}
COLUMNS = [
    *("prompt_id", "source_id", "prompt", "ground_truth", "data_source", "extra"),
    *("responses", "sources", "rewards", "finish_reasons", "num_tokens", "models", "ref_logprob_means"),
]
TOKEN_COLUMNS = ["prompt_ids", "response_ids"]


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export made."""

    path: Path
    rows: int
    groups: int  # read
    left_out: Mapping[str, int]  # what -> how many
    no_place: tuple[str, ...]  # what the format cannot hold
    notes: tuple[str, ...]


def export(data: str, kind: str, out: Path, options: ExportOptions | None = None) -> Exported:
    """Write a data set (a folder or a location) as one Parquet file: `out`, or OUT/train.parquet.

    Raises UserError for a data set that cannot be read, settings that do not fit, an output that exists, and where
    nothing is left to write. The file is there whole or not at all.
    """
    options = options or ExportOptions()
    _check_options(kind, options)
    path = out if out.suffix == ".parquet" else out / TRAIN_FILE
    if path.exists():
        raise UserError(f"{path}: exists already and is not overwritten; name another file (--out)")
    check_writable(path.parent)
    source = open_data(data)
    is_chat = source.manifest.tokenizer.template_hash != NO_TEMPLATE_HASH
    make = rows_of(kind, options, _wanted_sources(source, kind, options.sources), is_chat)
    left_out: Counter[str] = Counter()

    def rows(counter: Counter[str]) -> Iterator[dict[str, Any]]:
        for group in _groups(source, options.tokens):
            yield from make(group, counter)

    schema = trl_schema(kind, is_chat, options.tokens) if kind != "verl" else _inferred(rows(Counter()), data)
    num_rows = _write(rows(left_out), schema, path, data, left_out)
    return Exported(
        path=path,
        rows=num_rows,
        groups=sum(record.rows for record in source.manifest.shards),
        left_out={what: count for what, count in left_out.items() if count},
        no_place=_no_place(kind, options),
        notes=_notes(kind, options, is_chat),
    )


def _check_options(kind: str, options: ExportOptions) -> None:
    if kind not in FORMATS:
        near = difflib.get_close_matches(kind, FORMATS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(FORMATS)}"
        raise UserError(f"unknown format {kind!r} (--format): {hint}")
    for name, kinds in USES.items():
        if getattr(options, name) != getattr(ExportOptions(), name) and kind not in kinds:
            option = {"sources": "--source", "min_reward": "--min-reward"}.get(name, f"--{name}")
            raise UserError(f"{option} is for {', '.join(kinds)}; leave it out for {kind}")
    if options.tokens and options.truncated:
        raise UserError("--tokens exports truncated responses as they are; leave --truncated out")


def _wanted_sources(source: DataSet, kind: str, asked: Sequence[str]) -> frozenset[str]:
    there = [summary.source for summary in source.manifest.summary.sources]
    if kind == "trl-sft" and not asked:
        asked = [EXPERT]
    wanted = set() if asked else set(there)
    for name in asked:
        found = {s for s in there if s == name or (name == "teacher" and s.startswith(TEACHER_PREFIX))}
        if not found:
            raise UserError(f"{source.location}: no responses of source `{name}`; --source: {', '.join(there)}")
        wanted |= found
    return frozenset(wanted)


def _groups(source: DataSet, tokens: bool) -> Iterator[GroupRow]:
    number = 0
    for shard in source.shards:
        with open_parquet(shard.fetch(), shard.where) as file:
            for i in range(file.num_row_groups):
                check_unpacked_size(file, i, shard.where)
                table = file.read_row_group(i, COLUMNS + (TOKEN_COLUMNS if tokens else []))
                for batch in table.to_batches(max_chunksize=8):
                    for row in batch.to_pylist():
                        yield _group(number, row)
                        number += 1


def _group(number: int, row: Mapping[str, Any]) -> GroupRow:
    return GroupRow(
        number=number,
        prompt_id=row["prompt_id"],
        source_id=row["source_id"],
        messages=tuple(row["prompt"]),
        ground_truth=row["ground_truth"],
        data_source=row["data_source"],
        extra=row["extra"],
        prompt_ids=tuple(row.get("prompt_ids", ())),
        responses=tuple(
            Candidate(
                text=row["responses"][k],
                source=row["sources"][k],
                reward=row["rewards"][k],
                is_truncated=row["finish_reasons"][k] == "length",
                model=row["models"][k],
                # the mean was taken in float64 and kept in float32: as exact as a sum in float32
                ref_logp=row["ref_logprob_means"][k] * row["num_tokens"][k],
                response_ids=tuple(row["response_ids"][k]) if "response_ids" in row else (),
            )
            for k in range(len(row["responses"]))
        ),
    )


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    remaining = iter(rows)
    while batch := list(islice(remaining, ROWS_AT_A_TIME)):
        yield batch


def _inferred(rows: Iterable[dict[str, Any]], data: str) -> pa.Schema:
    """The schema that holds all rows: structs of all their fields. Rows that came from verl may have any."""
    schema = pa.schema([])
    try:
        for batch in _batches(rows):
            names = dict.fromkeys(name for row in batch for name in row)
            found = pa.schema([(name, pa.array([row.get(name) for row in batch]).type) for name in names])
            schema = pa.unify_schemas([schema, found], promote_options="permissive")
    except pa.ArrowException as error:
        raise UserError(
            f"{data}: its rows have values of different kinds in one column, which Parquet cannot hold: "
            f"{first_line(error)}; give the source of the import one kind and import it again"
        ) from None
    return pa.schema([pa.field(field.name, _without_null(field.type)) for field in schema])


def _without_null(kind: pa.DataType) -> pa.DataType:
    """Text where no row has a value: readers stumble over a type that is always null."""
    if pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_without_null(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(kind.field(i).name, _without_null(kind.field(i).type)) for i in range(kind.num_fields)])
    return kind


def _write(
    rows: Iterable[dict[str, Any]], schema: pa.Schema, path: Path, data: str, left_out: Mapping[str, int]
) -> int:
    num_rows = 0
    try:
        with replacing(path) as file:
            with pq.ParquetWriter(file, schema, compression="zstd") as writer:
                for batch in _batches(rows):
                    writer.write_table(pa.Table.from_pylist(batch, schema))
                    num_rows += len(batch)
            if not num_rows:
                reasons = ", ".join(f"{count:,} {what}" for what, count in left_out.items() if count)
                raise UserError(f"{data}: nothing of it can be exported so ({reasons}); ask for less")
    except pa.ArrowException as error:
        raise UserError(f"{data}: Parquet cannot hold its rows as they are: {first_line(error)}") from None
    return num_rows


def _no_place(kind: str, options: ExportOptions) -> tuple[str, ...]:
    """What of a group the format has no place for."""
    if kind in ("verl", "trl-grpo"):
        always = ["rewards, token ids and log-probs of all responses", "seeds and finish reasons"]
    else:
        always = ["seeds, finish reasons and log-probs at decoding"]
        always.append("reference log-probs" + (" of single tokens" if kind == "trl-dpo" else ""))
    if kind == "verl":
        always.append("which teacher wrote which response")
    if kind in USES["tokens"]:
        always.append("the texts (the file has token ids)" if options.tokens else "token ids (--tokens exports them)")
    elif kind == "trl-kto":
        always.append("token ids")
    return tuple(always)


def _notes(kind: str, options: ExportOptions, is_chat: bool) -> tuple[str, ...]:
    """What a reader does with the rows that the data set's trainer does not."""
    notes = []
    if kind in ("trl-sft", "trl-dpo", "trl-kto") and not options.tokens:
        after = (
            "puts what its chat template writes after the end token, often a line break, behind it"
            if is_chat
            else "adds the tokenizer's eos_token"
        )
        notes.append(
            f"TRL turns the texts into tokens again: it {after}, may cut a sample into other tokens than were drawn, "
            "and reads special tokens that a text spells"
        )
    if kind == "trl-dpo":
        notes.append(
            "TRL 1.16 never uses ref_chosen_logps and ref_rejected_logps by itself: samples/rl/dpo.py makes it"
            + ("" if options.tokens else "; they are exact for the tokens of the data set (--tokens)")
        )
    if kind == "verl" and not is_chat:
        notes.append("the starting model has no chat template, and verl needs one to read a prompt")
    return tuple(notes)
