"""The data set on disk: staged shards published in one step, commit records, manifest, verification, index.

    DIR/data/train-00000-of-00032.parquet   complete by construction
    DIR/manifest.json                       there when, and only when, the data set is final
    DIR/.work/                              recipe, prompts, journals, staging, commit records

Nothing here knows how responses come about; `generate.py` does.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gftdata.errors import UserError, first_line
from gftdata.schema import SCHEMA_VERSION, check_rows, check_schema, parquet_options
from gftdata.sealed import read_sealed, sealed
from gftdata.store import FolderStore, Store, named, read_file

DATA, WORK, MANIFEST = "data", ".work", "manifest.json"
QUARANTINE = "quarantine"  # of prompts: QUARANTINE.jsonl in a finished data set, a folder of .work/ before
MAX_ROW_GROUP_BYTES = 100 * 2**20
BOMB = 10  # times MAX_ROW_GROUP_BYTES: a row group that unpacks to more is not unpacked
MAX_MANIFEST_BYTES = 64 * 2**20  # of 200,000 shards; what comes from elsewhere may be anything
RECORD = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

Count = Annotated[int, Field(ge=0, le=2**53)]
Amount = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PACKAGES = ("gft-toolkit", "torch", "transformers", "datasets", "pyarrow", "math-verify", "reasoning-gym")


class ShardRecord(BaseModel):
    """What a published shard file holds; made from the file itself."""

    model_config = RECORD

    name: str
    sha256: str
    rows: Count
    response_tokens: Count
    bytes: Count


class ModelRecord(BaseModel):
    """A model that took part, and its exact revision (Hub commit, or hash of a local folder)."""

    model_config = RECORD

    role: str  # reference, self, teacher:<name>
    name: str
    revision: str


class TokenizerRecord(BaseModel):
    """The starting model's tokenizer, by what it does."""

    model_config = RECORD

    hash: str
    template_hash: str
    end_id: int
    stop_ids: tuple[int, ...]


class PromptCounts(BaseModel):
    """What became of the rows of the prompt source and of given texts. None: not known, as of a part of a data set."""

    model_config = RECORD

    rows_read: Count
    prompts: Count
    prompts_too_long: Count | None
    duplicates: Count | None  # rows whose messages and ground truth came before
    near_duplicates: Count | None  # other rows with almost the words of an earlier one; also None: not looked for
    duplicates_removed: Count | None  # of both kinds, left out
    contaminated: Count | None  # left out: they share 8 words in a row with a text of an evaluation set
    given_missing: Count | None  # fewer given texts than the recipe asks for
    given_left_out: Count | None  # given texts over responses.max_tokens, or with nothing but thinking


class SourceSummary(BaseModel):
    """Responses of one source over the data set."""

    model_config = RECORD

    source: str
    responses: Count
    judged: Count
    mean_reward: float | None  # over judged responses
    pass_rate: Share | None  # share of judged responses with reward 1
    finish_reasons: dict[str, Count]  # those that occur -> responses
    mean_tokens: Amount
    median_tokens: Count  # exact: the shortest length that at least half of the responses do not exceed
    p95_tokens: Count  # and 95 %
    max_tokens: Count
    truncated: Count  # cut by the length limit
    identical: Count  # word for word an earlier response of this source in the same group
    groups_all_identical: Count  # groups with at least 2 responses of this source, all of them the same
    mean_ref_logprob: float  # nats per token


class Summary(BaseModel):
    """The data set in a few numbers."""

    model_config = RECORD

    groups: Count
    responses: Count
    response_tokens: Count
    groups_without_signal: Count  # all judged rewards equal
    groups_unjudged: Count  # no response could be judged
    sources: tuple[SourceSummary, ...]


class Derivation(BaseModel):
    """One step from earlier data sets to this one."""

    model_config = RECORD

    by: str  # rejudge, rescore, merge, filter, split
    settings: dict[str, Any]
    sources: tuple[str, ...]  # sha256 of the manifests that were read
    toolkit_version: str


class Manifest(BaseModel):
    """`manifest.json`."""

    model_config = RECORD

    format: str
    schema_version: int
    toolkit_version: str
    recipe: dict[str, Any]
    models: tuple[ModelRecord, ...]
    tokenizer: TokenizerRecord
    engine: str
    packages: dict[str, str]
    prompts: PromptCounts
    prompts_quarantined: Count  # given up by the engine; quarantine.jsonl says why
    teacher_samples_left_out: Count | None  # drawn, but empty or over responses.max_tokens in this vocabulary
    summary: Summary
    shards: tuple[ShardRecord, ...]
    derived: tuple[Derivation, ...] = ()  # oldest first; of a merge: its inputs', then itself


FORMAT = "gft-groups"
MIN_VALUES_READ, VALUES_PER_BYTE = 2**20, 16  # of a short column: what is read whatever the file's size, and beyond
MAX_ROW_GROUPS = 2**16  # of a shard: of each there is something in memory
MAX_TOKENS = 2**27  # of a prompt or response: more is a damaged number
# what damaged or hostile files make pyarrow raise: besides its own errors, of texts that are no UTF-8, of names that
# are no columns, and of sizes that no array has
PARQUET_FAILURES = (pa.ArrowException, OSError, ValueError, KeyError, IndexError, OverflowError, MemoryError)
SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}\.parquet")  # what a file in data/ may be called


def shard_name(shard: int, num_shards: int) -> str:
    return f"train-{shard:05d}-of-{num_shards:05d}.parquet"


def check_writable(folder: Path) -> None:
    """Raise UserError unless `folder` is, or can become, a folder that this user may write to."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{folder}: cannot be a folder, {there} is a file")
    if os.statvfs(there).f_flag & os.ST_RDONLY:
        raise UserError(f"{folder}: cannot be written, the file system of {there} is read-only")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: cannot be written, no permission in {there}")


def write_atomic(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    FolderStore(path.parent).write(path.name, text.encode())


def publish_shard(store: Store, shard: int, num_shards: int, table: pa.Table, row_group_size: int, dtype: str) -> None:
    """Stage a shard, make it durable and publish it in one step; if another worker was first, its copy stays."""
    name = shard_name(shard, num_shards)
    by_size = max(1, int(MAX_ROW_GROUP_BYTES / max(1, table.nbytes / max(1, table.num_rows))))
    with store.staging() as folder:
        staged = folder / f"{name}.{uuid.uuid4().hex}"
        with named(staged):
            pq.write_table(table, staged, row_group_size=min(row_group_size, by_size), **parquet_options(dtype))
        store.publish(staged, f"{DATA}/{name}")


def published(store: Store, num_shards: int) -> list[int]:
    """The shards that are there."""
    names = set(store.names(DATA))
    return [shard for shard in range(num_shards) if shard_name(shard, num_shards) in names]


def shard_record(store: Store, shard: int, num_shards: int) -> ShardRecord | None:
    """The commit record of a published shard, written from the file if its worker died before; None if unpublished."""
    name = shard_name(shard, num_shards)
    if not store.exists(f"{DATA}/{name}"):
        return None
    record_name = record_of(name)
    if store.exists(record_name):
        return _read_record(store, name)
    with store.local(f"{DATA}/{name}") as path:
        record = make_record(path, name, f"{store.location}/{DATA}/{name}")
    store.write(record_name, record.model_dump_json(indent=2).encode())
    return record


def record_of(name: str) -> str:
    """Where the commit record of a shard is."""
    return f"{WORK}/records/{name}.json"


def _read_record(store: Store, name: str) -> ShardRecord:
    where = f"{store.location}/{record_of(name)}"
    try:
        record = ShardRecord.model_validate_json(store.read(record_of(name)))
        said = "" if record.name == name else f"it is of {record.name[:80]!r}"
    except ValidationError as error:
        said = _first_mistake(error)
    if said:
        raise UserError(f"{where}: damaged: {said}; delete it, and it is made again from the shard")
    return record


def make_record(path: Path, name: str, where: str) -> ShardRecord:
    """What the record of this file has to say; `where` is for errors. Raises UserError where it cannot be read."""
    with open_parquet(path, where) as file:
        num_tokens = file.read(columns=["num_tokens"])["num_tokens"].combine_chunks().flatten().to_numpy()
        return ShardRecord(
            name=name,
            sha256=sha256_file(path),
            rows=file.metadata.num_rows,
            response_tokens=int(num_tokens.sum(dtype=np.int64)),
            bytes=path.stat().st_size,
        )


def check_record(store: Store, record: ShardRecord, path: Path) -> None:
    """Raise UserError unless the commit record of a shard is true of its file, which is at `path`."""
    where = f"{store.location}/{DATA}/{record.name}"
    if make_record(path, record.name, where) != record:
        raise UserError(
            f"{where}: is not what its record {record_of(record.name)} says: one of the two is damaged; delete both, "
            "then give the command that made them again"
        )


def prompt_ids(path: Path, where: str) -> list[str]:
    """Of all rows of a shard, in order. Raises UserError."""
    with open_parquet(path, where) as file:
        found: list[str] = file.read(columns=["prompt_id"])["prompt_id"].to_pylist()
        return found


@contextmanager
def open_parquet(source: Path | BinaryIO, where: str) -> Iterator[pq.ParquetFile]:
    """A shard, its schema checked; its pages are compared with their checksums as they are read.

    Raises UserError, which names the file as `where`, also for what is read of it inside the block; an OSError of the
    system's as it is: of a path it names the file, and whoever opened an open one knows what it means.
    """
    try:
        with pq.ParquetFile(source, pre_buffer=not isinstance(source, Path), page_checksum_verification=True) as file:
            check_schema(file.schema_arrow, where)
            _check_amounts(file.metadata, _num_bytes(source), where)
            yield file
    except FileNotFoundError:
        if not isinstance(source, Path):
            raise
        raise UserError(f"{where}: this shard is missing; `gft validate` lists all that is wrong") from None
    except PARQUET_FAILURES as error:
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            if isinstance(source, Path) and error.filename is None:  # the disk's failure, which is no damage
                error.filename = str(source)
            raise
        raise UserError(
            f"{where}: cannot be read: {first_line(error)[:200]}; it is damaged, `gft validate` lists all that is wrong"
        ) from None


def _num_bytes(source: Path | BinaryIO) -> int:
    return source.stat().st_size if isinstance(source, Path) else source.seek(0, os.SEEK_END)


def _check_amounts(metadata: pq.FileMetaData, num_bytes: int, where: str) -> None:
    """Refuse a footer that promises more than a file of this size can hold: memory is taken by what it promises."""
    if metadata.num_rows > num_bytes:
        raise UserError(f"{where}: promises {metadata.num_rows:,} rows in {num_bytes:,} bytes, and was not read")
    if metadata.num_row_groups > MAX_ROW_GROUPS:
        raise UserError(f"{where}: has {metadata.num_row_groups:,} row groups, and was not read")
    most = max(MIN_VALUES_READ, VALUES_PER_BYTE * num_bytes)
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for number in range(metadata.num_columns):
            column = row_group.column(number)
            start, size = column.data_page_offset, column.total_compressed_size
            if min(start, size) < 0 or max(start, size) > num_bytes:
                raise UserError(f"{where}: row group {group}: {column.path_in_schema} is not where the footer says")
            if column.num_values > most or row_group.num_rows > num_bytes:
                raise UserError(
                    f"{where}: row group {group} promises {column.num_values:,} values of {column.path_in_schema} in "
                    f"{num_bytes:,} bytes, and was not read"
                )


def check_unpacked_size(file: pq.ParquetFile, row_group: int, where: str) -> None:
    """Raise UserError for a row group that would fill the memory."""
    if (size := file.metadata.row_group(row_group).total_byte_size) > BOMB * MAX_ROW_GROUP_BYTES:
        raise UserError(f"{where}: row group {row_group} unpacks to {size:,} bytes, and was not read")


def check_shard(path: Path, record: ShardRecord) -> None:
    """Raise UserError unless the content of a local shard is what its record says."""
    try:
        found = sha256_file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from None
    if found != record.sha256:
        raise UserError(
            f"{path}: damaged or changed: {hashes_differ(found, record)}; copy it again from where the data set came "
            f"from (from the Hub: hf download --repo-type dataset --force-download REPO data/{record.name} --local-dir "
            f"{path.parent.parent})"
        )


def hashes_differ(found: str, record: ShardRecord) -> str:
    return f"sha256 {found[:12]}..., the manifest says {record.sha256[:12]}..."


def all_records(store: Store, num_shards: int) -> tuple[ShardRecord, ...]:
    """The commit records of all shards, in order. Raises UserError where a shard is not there yet."""
    records = [shard_record(store, shard, num_shards) for shard in range(num_shards)]
    missing = [shard_name(i, num_shards) for i, record in enumerate(records) if record is None]
    if missing:
        raise UserError(
            f"{store.location}: {len(missing)} of {num_shards} shards are not there yet, the first is {missing[0]}; "
            "give the command that makes them again (`gft status` shows who is at work)"
        )
    return tuple(record for record in records if record is not None)


def toolkit_version() -> str:
    return importlib.metadata.version("gft-toolkit")


def package_versions() -> dict[str, str]:
    """What a manifest says of the packages that made it."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def sha256_file(path: Path) -> str:
    with path.open("rb") as file, named(path):
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(store: Store, manifest: Manifest) -> None:
    """Mark the data set final."""
    text = json.dumps(sealed(manifest.model_dump(mode="json")), indent=2, ensure_ascii=False) + "\n"
    store.write(MANIFEST, text.encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished data set. Raises UserError where there is none, or not one of ours."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"{folder}: no such data set folder")
    if not path.is_file():
        unfinished = (folder / WORK).is_dir()
        raise UserError(
            f"{folder}: "
            + (
                "an unfinished data set; give the command that makes it again, and it is finished"
                if unfinished
                else "no manifest.json"
            )
        )
    return parse_manifest(read_file(path), str(path))


def parse_manifest(content: bytes, where: str) -> Manifest:
    """The manifest that these bytes are, from wherever they come; `where` is for errors. Raises UserError."""
    if len(content) > MAX_MANIFEST_BYTES:
        raise UserError(f"{where}: not a manifest: {len(content):,} bytes, expected at most {MAX_MANIFEST_BYTES:,}")
    data = read_sealed(content, where, "a manifest")
    if data.get("format") != FORMAT or data.get("schema_version") != SCHEMA_VERSION:
        found = (str(data.get(key))[:40] for key in ("format", "schema_version"))
        raise UserError(f"{where}: expected format {FORMAT} version {SCHEMA_VERSION}, found {' version '.join(found)}")
    try:
        manifest = Manifest.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise UserError(f"{where}: not a manifest: {_first_mistake(error)}") from None
    seen: set[str] = set()
    for record in manifest.shards:
        if Path(record.name).name != record.name or not SHARD.fullmatch(record.name):
            raise UserError(f"{where}: names a shard outside its data folder: {record.name[:80]!r}")
        if record.name in seen:
            raise UserError(f"{where}: names the shard {record.name} twice")
        if not re.fullmatch(r"[0-9a-f]{64}", record.sha256):
            raise UserError(f"{where}: not a sha256, of {record.name}: {record.sha256[:80]!r}")
        seen.add(record.name)
    return manifest


def _first_mistake(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    found = "" if isinstance(first["input"], dict | list) else f", found {str(first['input'])[:40]!r}"
    return f"{'.'.join(map(str, first['loc']))[:80]}: {first['msg'][:120]}{found}"


def shard_paths(folder: Path, manifest: Manifest) -> list[Path]:
    return [folder / DATA / record.name for record in manifest.shards]


def verify(
    folder: Path, *, manifest: Manifest | None = None, progress: Callable[[str], None] = lambda name: None
) -> list[str]:
    """Everything that is wrong with a finished data set: files, checksums, schema, rows. Empty when it is whole.

    `manifest` is for one whose manifest.json is not there yet.
    """
    manifest = read_manifest(folder) if manifest is None else manifest
    problems: list[str] = []
    seen: dict[str, str] = {}
    for record in manifest.shards:
        path = folder / DATA / record.name
        progress(record.name)
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif (found := sha256_file(path)) != record.sha256:
            problems.append(f"{path}: sha256 {found[:12]}…, the manifest says {record.sha256[:12]}…")
        else:
            problems += shard_problems(path, record, seen, str(path))
    listed = {record.name for record in manifest.shards}
    problems += [f"{p}: not in the manifest" for p in sorted((folder / DATA).glob("*")) if p.name not in listed]
    return [*problems, *count_problems(manifest, str(folder))]


def count_problems(manifest: Manifest, where: str) -> Iterator[str]:
    """Whether the manifest's shards have as many rows as there are prompts."""
    rows = sum(record.rows for record in manifest.shards)
    expected = manifest.prompts.prompts - manifest.prompts_quarantined
    if rows != expected:
        yield f"{where}: {rows} rows in the manifest's shards for {expected} prompts"


def shard_problems(path: Path, record: ShardRecord, seen: dict[str, str], where: str) -> Iterator[str]:
    """What is wrong with the content of a shard; `seen` (prompt id -> shard) is added to; `where` is for people."""
    try:
        with open_parquet(path, where) as file:
            if file.metadata.num_rows != record.rows:
                yield f"{where}: {file.metadata.num_rows} rows, the manifest says {record.rows}"
            tokens, unread = 0, False
            for group in range(file.num_row_groups):
                try:
                    check_unpacked_size(file, group, where)
                except UserError as error:
                    yield str(error)
                    unread = True
                    continue
                table = file.read_row_group(group)
                yield from check_rows(table, f"{where}: row group {group}")
                tokens += sum(n or 0 for row in table["num_tokens"].to_pylist() for n in row or ())
                for prompt_id in table["prompt_id"].to_pylist():
                    if prompt_id in seen:
                        yield f"{where}: prompt {prompt_id} is also in {seen[prompt_id]}"
                    seen[prompt_id] = record.name
            if not unread and tokens != record.response_tokens:
                yield f"{where}: {tokens} response tokens, the manifest says {record.response_tokens}"
    except UserError as error:
        yield str(error)
    except OSError as error:
        yield f"{where}: cannot be read: {error.strerror or first_line(error)}"


@dataclass(frozen=True, slots=True)
class Index:
    """The short columns of all groups: all that planning an epoch needs. G groups, R responses."""

    paths: tuple[Path, ...]
    path_of_group: npt.NDArray[np.int32]  # [G] index into paths
    row_group_of_group: npt.NDArray[np.int32]  # [G] row group within the file
    row_of_group: npt.NDArray[np.int32]  # [G] row within the row group
    offsets: npt.NDArray[np.int64]  # [G+1] responses of group g are offsets[g]:offsets[g+1]
    num_prompt_tokens: npt.NDArray[np.int32]  # [G]
    num_tokens: npt.NDArray[np.int32]  # [R]
    rewards: npt.NDArray[np.float32]  # [R] NaN where it could not be judged
    source_names: tuple[str, ...]
    source_codes: npt.NDArray[np.int32]  # [R] index into source_names

    @property
    def num_groups(self) -> int:
        return len(self.num_prompt_tokens)

    def place_of(self, group: int) -> str:
        """Where a group is, for people."""
        row, row_group = self.row_of_group[group], self.row_group_of_group[group]
        return f"row {row} of row group {row_group} in {self.paths[self.path_of_group[group]].name}"


PLANNED_LISTS = ["rewards", "sources", "num_tokens"]
INDEX_COLUMNS = [*PLANNED_LISTS, "num_prompt_tokens"]


@dataclass(frozen=True, slots=True)
class ShortColumns:
    """INDEX_COLUMNS of one shard, or others that are asked for."""

    table: pa.Table
    rows: tuple[int, ...]  # of each row group

    @property
    def num_response_tokens(self) -> int:
        """Of all responses together."""
        return int(_flat(self.table, "num_tokens").fill_null(0).to_numpy().sum(dtype=np.int64))


def read_short_columns(source: Path | BinaryIO, where: str, columns: Sequence[str] = INDEX_COLUMNS) -> ShortColumns:
    """Read some columns of a file, or of an open one by its ranges; `where` is for errors.

    Raises UserError, and what reading an open one raises.
    """
    with open_parquet(source, where) as file:
        rows = tuple(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
        table = file.read(columns=list(columns)).combine_chunks()
        if table.num_rows != sum(rows):
            raise UserError(f"{where}: damaged: {table.num_rows} rows, its row groups are said to hold {sum(rows)}")
        if set(INDEX_COLUMNS) <= set(columns):
            check_short_columns(table, where)
        return ShortColumns(table, rows)


def check_short_columns(table: pa.Table, where: str) -> None:
    """Raise UserError for rows that contradict themselves in what planning reads: the first of them is named."""
    lists = [pc.list_value_length(table[name]).fill_null(-1).to_numpy() for name in PLANNED_LISTS]
    bad_G = (lists[0] < 0) | (lists[0] != lists[1]) | (lists[0] != lists[2])
    if bad_G.any():
        row = int(bad_G.argmax())
        found = ", ".join(f"{name} {sizes[row]}" for name, sizes in zip(PLANNED_LISTS, lists, strict=True))
        raise UserError(f"{where}: row {row}: lists of different lengths, or none (-1): {found}")
    rewards_R, tokens_R = _flat(table, "rewards"), _flat(table, "num_tokens").fill_null(0).to_numpy(False)
    group_R = np.repeat(np.arange(table.num_rows), lists[0])
    prompt_G = table["num_prompt_tokens"].fill_null(0).to_numpy()
    complaints = {
        "a reward is not a finite number": ~np.isfinite(rewards_R.fill_null(0.0).to_numpy(False)),
        "a response without a source": _flat(table, "sources").is_null().to_numpy(False),
        f"num_tokens is not a number from 1 to {MAX_TOKENS:,}": (tokens_R < 1) | (tokens_R > MAX_TOKENS),
    }
    for complaint, bad_R in complaints.items():
        if bad_R.any():
            raise UserError(f"{where}: row {group_R[bad_R.argmax()]}: {complaint}")
    if len(bad := np.flatnonzero((prompt_G < 1) | (prompt_G > MAX_TOKENS))):
        raise UserError(f"{where}: row {bad[0]}: num_prompt_tokens is not a number from 1 to {MAX_TOKENS:,}")


def read_index(paths: Sequence[Path]) -> Index:
    """Read the short columns of every shard."""
    return make_index(paths, (read_short_columns(path, str(path)) for path in paths))


def make_index(paths: Sequence[Path], columns: Iterable[ShortColumns]) -> Index:
    """The index of shards, from the short columns of each."""
    names: dict[str, int] = {}
    parts: dict[str, list[npt.NDArray[Any]]] = {
        key: [] for key in ("path", "row_group", "row", "sizes", "prompt", "tokens", "rewards", "codes")
    }
    for number, shard in enumerate(columns):
        table, sizes = shard.table, shard.rows
        parts["path"].append(np.full(table.num_rows, number, np.int32))
        parts["row_group"].append(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes))
        parts["row"].append(np.concatenate([np.arange(s, dtype=np.int32) for s in sizes] or [np.empty(0, np.int32)]))
        sources = _flat(table, "sources").dictionary_encode()
        local = np.array([names.setdefault(s, len(names)) for s in sources.dictionary.to_pylist()], dtype=np.int32)
        parts["codes"].append(local[sources.indices.to_numpy()] if len(sources) else np.empty(0, np.int32))
        parts["sizes"].append(pc.list_value_length(table["num_tokens"]).to_numpy().astype(np.int64))
        parts["prompt"].append(table["num_prompt_tokens"].to_numpy())
        parts["tokens"].append(_flat(table, "num_tokens").to_numpy())
        parts["rewards"].append(_flat(table, "rewards").fill_null(float("nan")).to_numpy())

    def join(key: str, dtype: Any) -> npt.NDArray[Any]:
        arrays = parts.pop(key)  # and let go: of millions of groups they are not held twice
        return np.concatenate(arrays, dtype=dtype, casting="same_kind") if arrays else np.empty(0, dtype)

    return Index(
        paths=tuple(paths),
        path_of_group=join("path", np.int32),
        row_group_of_group=join("row_group", np.int32),
        row_of_group=join("row", np.int32),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(join("sizes", np.int64))]),
        num_prompt_tokens=join("prompt", np.int32),
        num_tokens=join("tokens", np.int32),
        rewards=join("rewards", np.float32),
        source_names=tuple(names),
        source_codes=join("codes", np.int32),
    )


def _flat(table: pa.Table, column: str) -> pa.Array:
    chunked = table[column].combine_chunks()
    return (chunked if isinstance(chunked, pa.Array) else pa.concat_arrays(chunked.chunks)).flatten()
