"""The journal of finished samples: what a killed run has not to draw again.

In a folder one append-only file for each shard and attempt, `.work/journal/<shard>/<attempt>.jsonl`; on an object
store, where nothing can be appended, an object for each shard every SEGMENT_S seconds, `<attempt>.<number>.jsonl`. By
shard, so that a shard is assembled without reading the others' samples. An attempt takes away only what it wrote
itself, when the shard is published: another one may be at work on the same shard. A line is a checksum and a JSON
object; a torn last line is what a kill leaves and is passed over, any other damage is an error.
"""

import base64
import json
import os
import threading
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gftdata.errors import UserError
from gftdata.store import FolderStore, Store, named
from gftdata.types import FinishReason, LogProbs, Sample, TokenIds

JOURNAL = ".work/journal"
SEGMENT_S = 20.0  # on an object store: at most so many seconds of finished samples are lost by a kill
MAX_OPEN = 64  # files held open at a time: a teacher's phase goes through all shards of the data set


@dataclass(frozen=True, slots=True)
class Entry:
    """One finished sample: the k-th of `source` for the shard's prompt number `row`."""

    source: str
    row: int
    index: int
    text: str
    response_ids: TokenIds
    behavior_logprobs: LogProbs
    finish_reason: FinishReason
    seed: int | None
    model: str

    @property
    def key(self) -> tuple[str, int, int]:
        return self.source, self.row, self.index


def entry_of(sample: Sample, source: str, row: int, model: str) -> Entry:
    """The journal entry of a sample."""
    return Entry(
        source,
        row,
        sample.request.index,
        sample.text,
        sample.response_ids,
        sample.behavior_logprobs,
        sample.finish_reason,
        sample.seed,
        model,
    )


class Journal(Protocol):
    """Where the samples of one attempt go."""

    def append(self, shard: int, entry: Entry) -> None: ...

    def close_shard(self, shard: int) -> None:
        """Make the shard's entries durable; more may follow."""

    def drop_shard(self, shard: int) -> None:
        """The shard is published: take away what this attempt wrote of it."""

    def close(self) -> None: ...


def open_journal(store: Store, attempt: str) -> Journal:
    """The journal of an attempt, whose name no other one has."""
    if isinstance(store, FolderStore):
        return FileJournal(store.folder, attempt)
    return SegmentJournal(store, attempt)


class FileJournal:
    """Appends entries; each is with the operating system when `append` returns, so a killed process loses none."""

    def __init__(self, out: Path, attempt: str) -> None:
        self._out = out
        self._attempt = attempt
        self._files: dict[int, int] = {}

    def append(self, shard: int, entry: Entry) -> None:
        line = _line(entry, shard)
        descriptor = self._open(shard)
        with named(self._path(shard)):
            while line:  # a write may be cut short by a signal or a full disk
                line = line[os.write(descriptor, line) :]

    def close_shard(self, shard: int) -> None:
        if (descriptor := self._files.pop(shard, None)) is not None:
            try:
                with named(self._path(shard)):
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def drop_shard(self, shard: int) -> None:
        self._path(shard).unlink(missing_ok=True)

    def close(self) -> None:
        for shard in list(self._files):
            self.close_shard(shard)

    def _path(self, shard: int) -> Path:
        return self._out / shard_folder(shard) / f"{self._attempt}.jsonl"

    def _open(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) == MAX_OPEN:
                self.close_shard(next(iter(self._files)))
            path = self._path(shard)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._files[shard] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        return self._files[shard]


class SegmentJournal:
    """Collects entries and stores them every SEGMENT_S seconds, and when a shard or the journal is closed."""

    def __init__(self, store: Store, attempt: str) -> None:
        self._store = store
        self._attempt = attempt
        self._lines: dict[int, list[bytes]] = {}
        self._written: dict[int, list[str]] = {}
        self._lock = threading.Lock()  # also while a segment is on its way: what is closed has arrived
        self._error: UserError | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, daemon=True)
        self._thread.start()

    def append(self, shard: int, entry: Entry) -> None:
        line = _line(entry, shard)
        with self._lock:
            if self._error is not None:
                raise self._error
            self._lines.setdefault(shard, []).append(line)

    def close_shard(self, shard: int) -> None:
        with self._lock:
            self._write(shard)

    def drop_shard(self, shard: int) -> None:
        with self._lock:
            self._lines.pop(shard, None)
            names = self._written.pop(shard, [])
        for name in names:
            self._store.remove(name)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        for shard in list(self._lines):
            self.close_shard(shard)

    def _keep_writing(self) -> None:
        while not self._closed.wait(SEGMENT_S):
            for shard in list(self._lines):
                with self._lock:
                    try:
                        self._write(shard)
                    except UserError as error:
                        self._error = error
                        return

    def _write(self, shard: int) -> None:
        if not (lines := self._lines.get(shard)):
            return
        names = self._written.setdefault(shard, [])
        name = f"{shard_folder(shard)}/{self._attempt}.{len(names):05d}.jsonl"
        self._store.write(name, b"".join(lines))
        names.append(name)
        del self._lines[shard]


def shard_folder(shard: int) -> str:
    """Where the journals of a shard are."""
    return f"{JOURNAL}/{shard:05d}"


def read_journal(store: Store, shard: int) -> dict[tuple[str, int, int], Entry]:
    """All entries of a shard, over all attempts; of a sample that two attempts drew, the first."""
    entries: dict[tuple[str, int, int], Entry] = {}
    folder = shard_folder(shard)
    for name in store.names(folder):
        try:
            content = store.read(f"{folder}/{name}")
        except FileNotFoundError:  # its writer has published the shard in the meantime
            continue
        for entry in _entries(content, shard, f"{store.location}/{folder}/{name}"):
            entries.setdefault(entry.key, entry)
    return entries


def _entries(content: bytes, shard: int, where: str) -> Iterator[Entry]:
    return (_decode(data) for data in checked_lines(content, where, shard))


def checked_line(data: Mapping[str, Any], shard: int = 0) -> bytes:
    """A line of a journal: a checksum and a JSON object. In another shard's journal it is as wrong as a damaged one."""
    payload = json.dumps(data, ensure_ascii=True).encode()
    return b"%08x %s\n" % (zlib.crc32(payload, shard), payload)


def checked_lines(content: bytes, where: str, shard: int = 0) -> Iterator[dict[str, Any]]:
    """What `checked_line` wrote; a torn last line is passed over. Raises UserError for a damaged one."""
    for number, line in enumerate(BytesIO(content), start=1):
        if not line.endswith(b"\n"):
            return  # torn: the sample it began is drawn again
        checksum, _, payload = line[:-1].partition(b" ")
        if checksum != b"%08x" % zlib.crc32(payload, shard):
            if b"\0" in line:  # on a shared file system: what another machine writes, not all of it here yet
                return
            raise UserError(f"{where}: line {number} is damaged; delete this file to draw its samples again")
        yield json.loads(payload)


def _line(entry: Entry, shard: int) -> bytes:
    return checked_line(_encode(entry), shard)


def _encode(entry: Entry) -> dict[str, Any]:
    return {
        "source": entry.source,
        "row": entry.row,
        "k": entry.index,
        "text": entry.text,
        "ids": base64.b64encode(entry.response_ids.astype("<i4").tobytes()).decode(),
        "logprobs": base64.b64encode(entry.behavior_logprobs.astype("<f4").tobytes()).decode(),
        "finish": entry.finish_reason,
        "seed": entry.seed,
        "model": entry.model,
    }


def _decode(data: dict[str, Any]) -> Entry:
    return Entry(
        data["source"],
        data["row"],
        data["k"],
        data["text"],
        np.frombuffer(base64.b64decode(data["ids"]), dtype="<i4").astype(np.int32),
        np.frombuffer(base64.b64decode(data["logprobs"]), dtype="<f4").astype(np.float32),
        data["finish"],
        data["seed"],
        data["model"],
    )
