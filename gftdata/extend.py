"""A finished data set of the same recipe, to which prompts or responses are added: what it holds is not done again.

Its groups are found by prompt id, and its samples by their seeds, or by their order where they have none. They are
carried over whole, with rewards and log-probs. What a teacher gave there and was left out is not asked for again.
"""

import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import count, filterfalse
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from gftdata.config import GenerateConfig, recipe_differences
from gftdata.errors import UserError
from gftdata.groups import sample_seed
from gftdata.manifest import DATA, MANIFEST, Manifest, ModelRecord, TokenizerRecord, read_manifest
from gftdata.models import shareable
from gftdata.reuse import find_data
from gftdata.schema import check_rows, table_to_groups
from gftdata.shards import check_shard, check_unpacked_size, open_parquet, sha256_file
from gftdata.types import SELF, TEACHER_PREFIX, Prompt, Response

RECIPES_DIFFER = "recipes_differ"  # in the settings of a merge: how

Key = tuple[str, int, int]  # source, row in the new shard, k


class Place(NamedTuple):
    """Where a group is in the extended data set."""

    name: str
    row_group: int
    row: int


class Item(Protocol):
    """A prompt of a shard, and where the extended data set has it."""

    @property
    def prompt(self) -> Prompt: ...

    @property
    def earlier(self) -> Place | None: ...


@dataclass(frozen=True, slots=True)
class Extended:
    """The data set that is added to."""

    folder: Path
    manifest: Manifest
    sha256: str  # of its manifest.json, by which a run that is continued knows it
    counts: Mapping[str, int]  # drawn source -> samples that each prompt was to have


def read_extended(name: str) -> Extended:
    """Raises UserError where there is no finished data set of that name."""
    folder = find_data(name)
    manifest = read_manifest(folder)
    return Extended(folder, manifest, sha256_file(folder / MANIFEST), drawn_counts(manifest.recipe))


def drawn_counts(recipe: Mapping[str, Any]) -> dict[str, int]:
    """Drawn source -> samples of each prompt."""
    responses = recipe.get("responses", {})
    counts = {TEACHER_PREFIX + t["name"]: t["count"] for t in responses.get("teachers", []) if t.get("model")}
    return counts | {SELF: responses.get("self", {}).get("count", 0)}


def check_extension(config: GenerateConfig, tokenizer: TokenizerRecord, models: Sequence[ModelRecord]) -> None:
    """Raise UserError unless the data set in `config.extend` was made as this one will be, but for what it lacks."""
    assert config.extend is not None
    manifest = read_extended(config.extend).manifest
    for step in manifest.derived:
        if mixed := step.settings.get(RECIPES_DIFFER):
            raise UserError(
                f"{config.extend}: was merged from data sets of different recipes ({mixed[0]}); extend one of them"
            )
    before, now = comparable(manifest.recipe), comparable(shareable(config.recipe()))
    for name, teacher in before["teachers"].items():
        if name not in now["teachers"]:
            raise UserError(
                f"{config.extend}: has responses of teacher:{name}, which this config lacks; keep that teacher"
            )
        if differing := recipe_differences(teacher, now["teachers"][name]):
            raise UserError(f"{config.extend}: cannot be extended: of teacher:{name}, {differing}")
    if differing := recipe_differences(before["rest"], now["rest"]):
        raise UserError(f"{config.extend}: cannot be extended with another recipe: {differing}")
    if manifest.tokenizer != tokenizer:
        raise UserError(
            f"{config.extend}: was made with another tokenizer, chat template or end token; take its responses with "
            "prompts.reuse instead"
        )
    revisions = {record.role: record.revision for record in models}
    for record in manifest.models:
        if revisions.get(record.role, record.revision) != record.revision:
            raise UserError(
                f"{config.extend}: its {record.role} model is {record.name} at revision {record.revision[:12]}, now "
                f"at {revisions[record.role][:12]}; take its responses with prompts.reuse instead"
            )


def comparable(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without what an extension may change. Prompts are compared one by one, by their ids."""
    free = ("prompts", "duplicates", "decontaminate", "extend", "responses", "shards")
    asked = recipe.get("responses", {})
    responses = {name: value for name, value in asked.items() if name != "teachers"}
    for source in ("expert", "self"):
        responses[source] = {name: value for name, value in responses.get(source, {}).items() if name != "count"}
    rest = {name: value for name, value in recipe.items() if name not in free}
    rest |= {"responses": responses, "shards": {"logprob_dtype": recipe.get("shards", {}).get("logprob_dtype")}}
    teachers = {
        teacher["name"]: {name: value for name, value in teacher.items() if name != "count"}
        for teacher in asked.get("teachers", [])
    }
    return {"rest": rest, "teachers": teachers}


@dataclass(frozen=True, slots=True)
class Places:
    """Prompt id -> place, on disk: a data set may have any number of prompts."""

    connection: sqlite3.Connection

    def find(self, prompt_id: str) -> Place | None:
        found = self.connection.execute("SELECT name, row_group, row FROM places WHERE id = ?", (prompt_id,)).fetchone()
        return None if found is None else Place(*found)


@contextmanager
def open_places(data: str | None) -> Iterator[Places]:
    """Where each prompt of a finished data set is; of no data set, nowhere."""
    with (
        tempfile.TemporaryDirectory(prefix="gft-extend-") as folder,
        closing(sqlite3.connect(Path(folder) / "places.sqlite", isolation_level=None)) as connection,
    ):
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("CREATE TABLE places (id TEXT PRIMARY KEY, name TEXT, row_group INT, row INT) WITHOUT ROWID")
        if data is not None:
            source = read_extended(data)
            for name, row_group, ids in _prompt_ids(source.folder, source.manifest):
                rows = [(prompt_id, name, row_group, row) for row, prompt_id in enumerate(ids)]
                connection.executemany("INSERT OR IGNORE INTO places VALUES (?, ?, ?, ?)", rows)
        yield Places(connection)


def _prompt_ids(folder: Path, manifest: Manifest) -> Iterator[tuple[str, int, list[str]]]:
    for record in manifest.shards:
        path = folder / DATA / record.name
        check_shard(path, record)
        with open_parquet(path, str(path)) as file:
            for group in range(file.num_row_groups):
                yield record.name, group, file.read_row_group(group, columns=["prompt_id"])["prompt_id"].to_pylist()


def carried_keys(config: GenerateConfig, items: Sequence[Item]) -> set[Key]:
    """Which samples of a shard the extended data set has, or has left out: they are not drawn."""
    if config.extend is None:
        return set()
    counts = read_extended(config.extend).counts
    return {
        (source, row, k)
        for row, item in enumerate(items)
        if item.earlier is not None
        for source, count in counts.items()
        for k in range(count)
    }


def carried_responses(config: GenerateConfig, items: Sequence[Item]) -> dict[Key, Response]:
    """The samples of a shard that the extended data set has, whole; given responses are numbered in their order."""
    found: dict[Key, Response] = {}
    if config.extend is None:
        return found
    extended = read_extended(config.extend)
    for row, table in _rows(extended.folder, items):
        prompt_id = items[row].prompt.prompt_id
        if problems := check_rows(table, f"{config.extend}: prompt {prompt_id}"):
            raise UserError(f"{problems[0]}; `gft validate` lists all that is wrong")
        (group,) = table_to_groups(table)
        if group.prompt.prompt_id != prompt_id:
            raise UserError(f"{config.extend}: has changed while it was being extended; name another folder (out)")
        sources = [response.completion.source for response in group.responses]
        seeds = [response.completion.seed for response in group.responses]
        keys = number_samples(config.seed, prompt_id, row, sources, seeds, extended.counts)
        found.update(zip(keys, group.responses, strict=True))
    return found


def _rows(folder: Path, items: Sequence[Item]) -> Iterator[tuple[int, pa.Table]]:
    """(row in the new shard, its group as a table of one row); a row group is read once."""
    by_row_group: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for row, item in enumerate(items):
        if item.earlier is not None:
            by_row_group.setdefault(item.earlier[:2], []).append((row, item.earlier.row))
    for (name, group), rows in by_row_group.items():
        path = folder / DATA / name
        with open_parquet(path, str(path)) as file:
            check_unpacked_size(file, group, str(path))
            table = file.read_row_group(group)
        for row, earlier_row in rows:
            yield row, table.slice(earlier_row, 1)


def number_samples(
    run_seed: int,
    prompt_id: str,
    row: int,
    sources: Sequence[str],
    seeds: Sequence[int | None],
    counts: Mapping[str, int],
) -> list[Key]:
    """A group's samples by source and k. A sample without a seed takes the next free number of its source.

    Numbers may have gaps: a teacher's sample that was left out is in no data set.
    """
    number_of = {
        (source, int(sample_seed(run_seed, prompt_id, source, k))): k
        for source, total in counts.items()
        for k in range(total)
    }
    numbers = [number_of.get((s, -1 if seed is None else seed)) for s, seed in zip(sources, seeds, strict=True)]
    taken = {source: {k for s, k in zip(sources, numbers, strict=True) if s == source} for source in set(sources)}
    free = {source: filterfalse(used.__contains__, count()) for source, used in taken.items()}
    return [(s, row, next(free[s]) if k is None else k) for s, k in zip(sources, numbers, strict=True)]
