"""Where a data set is: a local folder, hf://datasets/<owner>/<name>[@revision] or s3://<bucket>/<path>.

To plan, only the manifest and the short columns of each shard are read, remote ones by ranges. A shard becomes a local
file when it is first touched, and its sha256 is compared with the manifest's then. Files of the Hub lie in the Hub's
own cache (what `hf download --repo-type dataset` fetched is there, HF_HUB_OFFLINE=1 works, HF_HOME moves it), those of
an object store under their sha256 in $GFT_CACHE/shards (~/.cache/gft-toolkit/shards). Credentials and endpoints come
from the environment (HF_TOKEN, HF_ENDPOINT, AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...) and are in no message.

What is in the files is shards.py's and schema.py's.
"""

import fcntl
import os
import re
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from gftdata.errors import UserError, first_line, quoted, without_password
from gftdata.hub import failures, not_there
from gftdata.index import Index, ShortColumns, make_index, read_short_columns
from gftdata.manifest import DATA, MANIFEST, Manifest, ShardRecord, parse_manifest, read_manifest
from gftdata.schema import INDEX_COLUMNS
from gftdata.shards import (
    check_shard,
    count_problems,
    hashes_differ,
    open_parquet,
    sha256_file,
    shard_paths,
    shard_problems,
    verify,
)
from gftdata.store import FULL, S3, fsync_file, fsync_folder, open_s3, open_store, s3_failed

HUB = re.compile(r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
CONNECTIONS = 16  # shards whose short columns are read at the same time: remote ones cost waiting, not work
TRIES = 2  # downloads of a shard that came with the wrong content


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard of a data set, wherever it is."""

    path: Path  # for people; of a remote one only data/NAME
    where: str  # for errors
    record: ShardRecord
    peek: Callable[[], AbstractContextManager[Path | BinaryIO]]  # opens it for a look at its short columns
    fetch: Callable[[], Path]  # a local file that is what the manifest says


@dataclass(frozen=True, slots=True)
class DataSet:
    """A finished data set at a location."""

    location: str
    manifest: Manifest
    shards: tuple[Shard, ...]


def is_remote(location: str) -> bool:
    return "://" in location


def open_data(location: str) -> DataSet:
    """The data set at a location: its manifest is read, of its shards nothing. Raises UserError."""
    if not is_remote(location):
        return _open_folder(Path(location))
    if match := HUB.fullmatch(location.rstrip("/")):
        return _open_hub(match[0], match["repo"], match["revision"])
    if match := S3.fullmatch(location.rstrip("/")):
        return _open_s3(match[0], match["path"])
    shown = without_password(location)
    raise UserError(f"{shown}: expected a folder, hf://datasets/<owner>/<name>[@revision] or s3://<bucket>/<path>")


def verify_data(location: str) -> list[str]:
    """Everything that is wrong with a finished data set, wherever it is. Raises UserError.

    Shards of an object store are fetched anew: what our cache holds says nothing of them.
    """
    if not is_remote(location):
        return verify(Path(location))
    data, seen = open_data(location), dict[str, str]()
    problems: list[str] = []
    store = open_store(location) if S3.fullmatch(location.rstrip("/")) else None
    for shard in data.shards:
        name = f"{DATA}/{shard.record.name}"
        try:
            with store.local(name) if store else nullcontext(shard.fetch()) as path:
                if difference := _differs(path, shard.record):
                    problems.append(f"{shard.where}: {difference}")
                else:
                    problems += shard_problems(path, shard.record, seen, shard.where)
        except FileNotFoundError:
            problems.append(f"{shard.where}: missing")
        except UserError as error:
            problems.append(str(error))
    return [*problems, *count_problems(data.manifest, location)]


def read_index(shards: Sequence[Shard]) -> Index:
    """Read the short columns of every shard. Raises UserError."""
    paths = [shard.path for shard in shards]
    if not any(is_remote(shard.where) for shard in shards):
        return make_index(paths, map(_short_columns, shards))
    with ThreadPoolExecutor(CONNECTIONS) as threads:
        return make_index(paths, threads.map(_short_columns, shards))


def _short_columns(shard: Shard, columns: Sequence[str] = INDEX_COLUMNS) -> ShortColumns:
    with shard.peek() as opened:
        found, record = read_short_columns(opened, shard.where, columns), shard.record
    if "num_tokens" in columns:
        rows, tokens = found.table.num_rows, found.num_response_tokens
        if (rows, tokens) != (record.rows, record.response_tokens):
            raise UserError(
                f"{shard.where}: damaged or changed: {rows} rows with {tokens} response tokens, the manifest says "
                f"{record.rows} with {record.response_tokens}; put it there again from where the data set came from "
                "(`gft validate` lists all that is wrong)"
            )
    return found


def read_tables(shards: Sequence[Shard], columns: Sequence[str]) -> Iterator[pa.Table]:
    """Some columns of every shard, in order, read a few shards ahead. Raises UserError."""
    with ThreadPoolExecutor(CONNECTIONS) as threads:
        ahead: deque[Future[ShortColumns]] = deque()
        for shard in shards:
            ahead.append(threads.submit(_short_columns, shard, columns))
            if len(ahead) > CONNECTIONS:
                yield ahead.popleft().result().table
        while ahead:
            yield ahead.popleft().result().table


@contextmanager
def open_shard(shard: Shard) -> Iterator[pq.ParquetFile]:
    """A shard's file, to read some of its row groups; a remote one by ranges. Raises UserError."""
    with shard.peek() as opened, open_parquet(opened, shard.where) as file:
        yield file


def checked_shards(shards: Sequence[Shard]) -> Callable[[int], Path]:
    """Shard number -> a local file, whose sha256 is compared with the manifest's when it is first asked for."""
    found: dict[int, Path] = {}

    def locate(number: int) -> Path:
        if number not in found:
            found[number] = shards[number].fetch()
        return found[number]

    return locate


def _differs(path: Path, record: ShardRecord) -> str:
    """How the content differs from the manifest; empty where it does not."""
    found = sha256_file(path)
    return "" if found == record.sha256 else hashes_differ(found, record)


def _open_folder(folder: Path) -> DataSet:
    manifest = read_manifest(folder)

    def fetch(path: Path, record: ShardRecord) -> Path:
        check_shard(path, record)
        return path

    def peek(path: Path) -> AbstractContextManager[Path]:
        return nullcontext(path)

    shards = [
        Shard(path, str(path), record, partial(peek, path), partial(fetch, path, record))
        for path, record in zip(shard_paths(folder, manifest), manifest.shards, strict=True)
    ]
    return DataSet(str(folder), manifest, tuple(shards))


def _open_hub(location: str, repo: str, revision: str | None) -> DataSet:
    """hf_hub_download does the work: it caches, resumes, locks, retries, and serves from its cache without a network.

    The revision is turned into a commit once, so that a push in the middle of a run changes nothing.
    """
    from huggingface_hub import HfFileSystem, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fail(error: Exception, where: str) -> NoReturn:
        if found := not_there(error, revision):
            said = found
        elif isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            said = "the Hub has no such file: not a finished data set of gft generate"
        else:
            said = (
                f"the Hub has not given it: {quoted(error)}; check the network, then give the same command again (for "
                f"a machine without one, first where there is one: hf download --repo-type dataset {repo}"
                f"{f' --revision {revision}' if revision else ''})"
            )
        raise UserError(f"{where}: {said}") from None

    def download(name: str, commit: str | None, where: str, again: bool = False) -> Path:
        try:
            return Path(hf_hub_download(repo, name, repo_type="dataset", revision=commit, force_download=again))
        except failures() as error:
            fail(error, where)

    path = download(MANIFEST, revision, f"{location}/{MANIFEST}")
    manifest, commit = parse_manifest(path.read_bytes(), f"{location}/{MANIFEST}"), path.parent.name
    files = HfFileSystem()

    @contextmanager
    def peek(name: str, where: str, record: ShardRecord) -> Iterator[Path | BinaryIO]:
        cached = try_to_load_from_cache(repo, name, repo_type="dataset", revision=commit)
        if isinstance(cached, str):
            yield Path(cached)
            return
        try:
            with files.open(f"datasets/{repo}@{commit}/{name}", cache_type="none") as opened:
                yield opened
        except failures() as error:
            fail(error, where)

    def fetch(name: str, where: str, record: ShardRecord) -> Path:
        for tried in range(TRIES):
            path = download(name, commit, where, again=tried > 0)
            if not (difference := _differs(path, record)):
                return path
        raise UserError(f"{where}: {_wrong(difference)}")

    return DataSet(location, manifest, _remote_shards(location, manifest, peek, fetch))


def _open_s3(location: str, path: str) -> DataSet:
    files = open_s3(location)
    from botocore.exceptions import BotoCoreError

    s3_failures = (OSError, BotoCoreError)

    try:
        manifest = parse_manifest(files.cat_file(f"{path}/{MANIFEST}"), f"{location}/{MANIFEST}")
    except s3_failures as error:
        s3_failed(error, f"{location}/{MANIFEST}")

    @contextmanager
    def peek(name: str, where: str, record: ShardRecord) -> Iterator[Path | BinaryIO]:
        if (cached := _cached(record)).is_file():
            yield cached
            return
        try:
            with files.open(f"{path}/{name}", cache_type="none") as opened:
                yield opened
        except s3_failures as error:
            s3_failed(error, where)

    def fetch(name: str, where: str, record: ShardRecord) -> Path:
        def download(target: Path) -> None:
            try:
                files.get_file(f"{path}/{name}", str(target))
            except s3_failures as error:
                if isinstance(error, OSError) and error.errno in FULL:
                    raise
                s3_failed(error, where)

        return _into_cache(record, where, download)

    return DataSet(location, manifest, _remote_shards(location, manifest, peek, fetch))


def _remote_shards(
    location: str,
    manifest: Manifest,
    peek: Callable[[str, str, ShardRecord], AbstractContextManager[Path | BinaryIO]],
    fetch: Callable[[str, str, ShardRecord], Path],
) -> tuple[Shard, ...]:
    def shard(record: ShardRecord) -> Shard:
        name = f"{DATA}/{record.name}"
        which = (name, where := f"{location}/{name}", record)
        return Shard(Path(name), where, record, partial(peek, *which), partial(fetch, *which))

    return tuple(shard(record) for record in manifest.shards)


def _cached(record: ShardRecord) -> Path:
    """Where the file with this content is or will be in our cache."""
    cache = os.environ.get("GFT_CACHE") or Path.home() / ".cache" / "gft-toolkit"
    return Path(cache) / "shards" / f"{record.sha256}.parquet"


def _into_cache(record: ShardRecord, where: str, download: Callable[[Path], None]) -> Path:
    """The file with the content of `record` in our cache, downloaded unless it is there."""
    target = _cached(record)
    folder = target.parent
    try:
        if target.is_file() and not _differs(target, record):
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / f"{record.sha256}.lock"):
            if target.is_file() and not _differs(target, record):
                return target
            for left in folder.glob(f"{record.sha256}.*.part"):  # of a process that was killed
                left.unlink(missing_ok=True)
            for _ in range(TRIES):
                staged = folder / f"{record.sha256}.{uuid.uuid4().hex}.part"
                try:
                    download(staged)
                    if not (difference := _differs(staged, record)):
                        fsync_file(staged)
                        staged.replace(target)
                        fsync_folder(folder)
                        return target
                finally:
                    staged.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{where}: cannot be kept in {folder}: {first_line(error)}; GFT_CACHE=FOLDER names another place"
        ) from None
    raise UserError(f"{where}: {_wrong(difference)}")


def _wrong(difference: str) -> str:
    return (
        f"damaged or changed: downloaded {TRIES} times, {difference}; put the data set there again, from where it is "
        "whole (`gft validate` says whether a copy is)"
    )


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process downloads while the others wait. That no half file is used does not rest on it."""
    with path.open("w") as file:
        with suppress(OSError):  # some shared file systems have no locks: then each downloads
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
