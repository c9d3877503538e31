"""The journal of finished samples: what a killed run has not to draw again.

One append-only file for each shard and worker attempt, `.work/journal/<shard>/<attempt>.jsonl`; by shard, so that a
shard is assembled without reading the others' samples and its journal goes when it is published. A line is a checksum
and a JSON object; a torn last line is what a kill leaves and is passed over, any other damage is an error.
"""

import base64
import json
import os
import time
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gftdata.errors import UserError
from gftdata.types import FinishReason, LogProbs, Sample, TokenIds

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


class Journal:
    """Appends entries; each is with the operating system when `append` returns, so a killed process loses none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._attempt = f"{int(time.time())}-{uuid.uuid4().hex[:8]}"
        self._files: dict[int, int] = {}

    def append(self, shard: int, entry: Entry) -> None:
        payload = json.dumps(_encode(entry), ensure_ascii=True).encode()
        line = b"%08x %s\n" % (zlib.crc32(payload), payload)
        descriptor = self._open(shard)
        while line:  # a write may be cut short by a signal or a full disk
            line = line[os.write(descriptor, line) :]

    def close_shard(self, shard: int) -> None:
        """Make the shard's entries durable; more may follow."""
        if (descriptor := self._files.pop(shard, None)) is not None:
            os.fsync(descriptor)
            os.close(descriptor)

    def close(self) -> None:
        for shard in list(self._files):
            self.close_shard(shard)

    def _open(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) == MAX_OPEN:
                self.close_shard(next(iter(self._files)))
            folder = shard_folder(self._folder, shard)
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{self._attempt}.jsonl"
            self._files[shard] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        return self._files[shard]


def shard_folder(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}"


def read_journal(folder: Path, shard: int) -> dict[tuple[str, int, int], Entry]:
    """All entries of a shard, over all attempts; of a sample that two attempts drew, the first."""
    entries: dict[tuple[str, int, int], Entry] = {}
    for path in sorted(shard_folder(folder, shard).glob("*.jsonl")):
        for entry in _read_file(path):
            entries.setdefault(entry.key, entry)
    return entries


def _read_file(path: Path) -> Iterator[Entry]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # torn: the sample it began is drawn again
            checksum, _, payload = line[:-1].partition(b" ")
            if checksum != b"%08x" % zlib.crc32(payload):
                raise UserError(f"{path}: line {number} is damaged; delete this file to draw its samples again")
            yield _decode(json.loads(payload))


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
