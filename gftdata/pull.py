"""`gft pull`: a data set of the Hub -> a folder, byte for byte what was pushed.

The manifest is compared with the Hub's listing before a shard is downloaded. Downloads go to DIR/.work/pull, what has
the right sha256 to DIR/data, and the manifest comes last: a pull that was cut off leaves no data set, and continues.
"""

import fcntl
import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gftdata.errors import UserError
from gftdata.hub import CARD, REFUSED, SHOWN, Event, Listener, listed_files, open_api, repo_name, said_in_one_line
from gftdata.manifest import DATA, MANIFEST, MAX_MANIFEST_BYTES, WORK, Manifest, ShardRecord, parse_manifest
from gftdata.shards import check_writable, sha256_file, verify, write_atomic
from gftdata.store import fsync_folder, hold, read_file

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PULL = "pull"  # in .work/: the client's downloads, and in pull.json what is pulled
CONNECTIONS = 8  # shards downloaded at the same time
SPARE_BYTES = 64 * 2**20  # left free on the disk
TRIES = 2  # downloads of a shard that came with the wrong content


@dataclass(frozen=True, slots=True)
class Pulled:
    """What a pull has brought."""

    manifest: Manifest
    commit: str
    bytes: int  # of the shards
    downloaded: int  # shards; the others were there


def pull(repo: str, folder: Path, *, revision: str | None = None, on_event: Listener = lambda event: None) -> Pulled:
    """Bring a data set from the Hub, whole, or what is missing of it here.

    Raises UserError: no such data set, a manifest that is none or contradicts the Hub's listing, a full disk, a folder
    that holds something else, a file that came damaged. Given again, it continues.
    """
    repo = repo_name(repo)
    _check_folder(folder, repo)
    with said_in_one_line(repo, "pull", revision):
        api = open_api()
        commit = api.dataset_info(repo, revision=revision).sha
        assert commit is not None
        small = _small_files(api, repo, commit)
        if MANIFEST not in small:
            raise UserError(f"{repo}: has no {MANIFEST}: not a finished data set of gft generate")
        manifest = parse_manifest(small[MANIFEST], f"{repo}/{MANIFEST}")
        _check_listing(api, repo, commit, manifest)
    if (folder / MANIFEST).is_file() and read_file(folder / MANIFEST) != small[MANIFEST]:
        raise UserError(f"{folder}: holds another data set, or another version of this one; name another folder")
    missing = [record for record in manifest.shards if not _is_there(folder, record)]
    num_bytes = sum(record.bytes for record in missing)
    _check_space(folder, num_bytes)
    on_event(Event("start", bytes=num_bytes, count=len(missing)))
    with _pulling(folder, repo) as staged:
        _clear(folder, manifest)
        with said_in_one_line(repo, "pull", revision):
            _download(repo, commit, missing, folder, staged, on_event)
        problems = verify(
            folder, manifest=manifest, progress=lambda name: on_event(Event("verify", name, count=len(manifest.shards)))
        )
        if problems:
            raise UserError(f"{folder}: as it came from {repo}, not a whole data set: {'; '.join(problems[:SHOWN])}")
        if not (folder / MANIFEST).is_file():
            for name, content in small.items():  # the manifest last
                (staged / name).write_bytes(content)
                (staged / name).replace(folder / name)
        fsync_folder(folder)
    return Pulled(manifest, commit, num_bytes, len(missing))


def _check_folder(folder: Path, repo: str) -> None:
    """Refuse a folder that is not empty, unless it holds a data set or what an earlier pull of this one has begun."""
    check_writable(folder)
    if not folder.is_dir() or (folder / MANIFEST).is_file():
        return
    begun = folder / WORK / PULL / f"{PULL}.json"
    if begun.is_file():
        try:
            earlier = json.loads(begun.read_bytes())["repo"]
        except (ValueError, KeyError, TypeError):
            earlier = "another data set"
        if earlier != repo:
            raise UserError(f"{folder}: holds an unfinished pull of {earlier}; name another folder")
    elif any(path.name != WORK or any(p.name != PULL for p in path.iterdir()) for path in folder.iterdir()):
        raise UserError(f"{folder}: not empty, and holds no data set of this name; name another folder")


def _small_files(api: "HfApi", repo: str, commit: str) -> dict[str, bytes]:
    """Name -> content of the files beside the shards, those that are there; the manifest last."""
    found: dict[str, bytes] = {}
    listed = listed_files(api, repo, commit, [CARD, REFUSED, MANIFEST])
    for name in (CARD, REFUSED, MANIFEST):
        if name not in listed:
            continue
        if listed[name].size > MAX_MANIFEST_BYTES:
            raise UserError(
                f"{repo}/{name}: {listed[name].size:,} bytes, expected at most {MAX_MANIFEST_BYTES:,}: not a data set "
                "of gft generate"
            )
        found[name] = Path(api.hf_hub_download(repo, name, repo_type="dataset", revision=commit)).read_bytes()
    return found


def _check_listing(api: "HfApi", repo: str, commit: str, manifest: Manifest) -> None:
    """Refuse a manifest that the Hub's own listing contradicts, before anything is downloaded."""
    listed = listed_files(api, repo, commit, [f"{DATA}/{record.name}" for record in manifest.shards])
    for record in manifest.shards:
        name = f"{DATA}/{record.name}"
        entry = listed.get(name)
        if entry is None:
            found = "the Hub has no such file"
        elif entry.size != record.bytes:
            found = f"{entry.size:,} bytes on the Hub, the manifest says {record.bytes:,}"
        elif entry.lfs is not None and entry.lfs.sha256 != record.sha256:
            found = f"sha256 {entry.lfs.sha256[:12]}... on the Hub, the manifest says {record.sha256[:12]}..."
        else:
            continue
        raise UserError(f"{repo}/{name}: damaged or changed: {found}; whoever shared it has to push it again")


def _is_there(folder: Path, record: ShardRecord) -> bool:
    path = folder / DATA / record.name
    return path.is_file() and path.stat().st_size == record.bytes and sha256_file(path) == record.sha256


def _check_space(folder: Path, num_bytes: int) -> None:
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if num_bytes and num_bytes + SPARE_BYTES > free:
        raise UserError(
            f"{folder}: {num_bytes / 1e6:,.1f} MB are to be downloaded, and {free / 1e6:,.1f} MB are free there; name "
            "a folder on another disk"
        )


@contextmanager
def _pulling(folder: Path, repo: str) -> Iterator[Path]:
    """Hold a folder for this pull; yields where downloads go. It stays where the pull is cut off, to be continued."""
    staged = folder / WORK / PULL
    write_atomic(staged / f"{PULL}.json", json.dumps({"repo": repo}))
    with (staged / "lock").open("w") as lock:
        hold(lock, fcntl.LOCK_EX, f"{folder}: another gft pull is writing to it; wait, or name another folder")
        yield staged
        shutil.rmtree(staged, ignore_errors=True)
        with suppress(OSError):  # a data set made here has more in it
            staged.parent.rmdir()


def _clear(folder: Path, manifest: Manifest) -> None:
    """Remove what an earlier, unfinished pull brought of another version."""
    names = {record.name for record in manifest.shards}
    if not (folder / MANIFEST).is_file():
        for path in (folder / DATA).glob("*"):
            if path.name not in names:
                path.unlink()


def _download(
    repo: str, commit: str, missing: Sequence[ShardRecord], folder: Path, staged: Path, on_event: Listener
) -> None:
    """Bring shards to DIR/data, each when its sha256 is the manifest's. Raises UserError where it is not."""
    from huggingface_hub import hf_hub_download

    def fetch(record: ShardRecord) -> ShardRecord:
        name = f"{DATA}/{record.name}"
        for tried in range(TRIES):
            path = Path(
                hf_hub_download(
                    repo, name, repo_type="dataset", revision=commit, local_dir=staged, force_download=tried > 0
                )
            )
            found = sha256_file(path)
            if found == record.sha256:
                path.replace(folder / name)
                return record
            path.unlink()
        raise UserError(
            f"{repo}/{name}: damaged or changed: downloaded {TRIES} times, sha256 {found[:12]}..., the manifest says "
            f"{record.sha256[:12]}...; whoever shared it has to push it again"
        )

    (folder / DATA).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(CONNECTIONS) as threads:
        futures = [threads.submit(fetch, record) for record in missing]
        try:
            for future in as_completed(futures):
                record = future.result()
                on_event(Event("file", record.name, record.bytes))
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    fsync_folder(folder / DATA)
