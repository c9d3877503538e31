"""Shards on disk: published in one step, commit records, reading, verification. The manifest is manifest.py's.

Nothing here knows how responses come about; `generate.py` does.
"""

import hashlib
import importlib.metadata
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from gftdata.errors import UserError, first_line
from gftdata.manifest import DATA, WORK, Manifest, ShardRecord, first_mistake, read_manifest
from gftdata.schema import check_rows, check_schema, parquet_options
from gftdata.store import FolderStore, Store, named

MAX_ROW_GROUP_BYTES = 100 * 2**20
BOMB = 10  # times MAX_ROW_GROUP_BYTES: a row group that unpacks to more is not unpacked

PACKAGES = ("gft-toolkit", "torch", "transformers", "datasets", "pyarrow", "math-verify", "reasoning-gym")


MIN_VALUES_READ, VALUES_PER_BYTE = 2**20, 16  # of a short column: what is read whatever the file's size, and beyond
MAX_ROW_GROUPS = 2**16  # of a shard: of each there is something in memory
# what damaged or hostile files make pyarrow raise: besides its own errors, of texts that are no UTF-8, of names that
# are no columns, and of sizes that no array has
PARQUET_FAILURES = (pa.ArrowException, OSError, ValueError, KeyError, IndexError, OverflowError, MemoryError)


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
        said = first_mistake(error)
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
