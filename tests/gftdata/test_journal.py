"""The journal of finished samples: what a kill can do to it, and what it must not."""

import base64
import errno
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from gftdata import journal as journals
from gftdata.errors import UserError
from gftdata.journal import JOURNAL, Entry, Journal, entry_of, open_journal
from gftdata.store import FolderStore
from gftdata.tasks import new_attempt
from gftdata.types import Sample, SampleRequest, Seed


def entry(row: int = 0, index: int = 0, source: str = "self", text: str = "7") -> Entry:
    rng = np.random.default_rng([row, index])
    length = int(rng.integers(1, 9))
    return Entry(
        source,
        row,
        index,
        text,
        rng.integers(0, 2**31 - 1, length).astype(np.int32),
        -rng.exponential(size=length).astype(np.float32),
        "stop",
        2**63 - 1 - row,
        "m@1",
    )


def attempt(folder: Path) -> Journal:
    return open_journal(FolderStore(folder), new_attempt())


def read_journal(folder: Path, shard: int) -> dict[tuple[str, int, int], Entry]:
    return journals.read_journal(FolderStore(folder), shard)


def shard_folder(folder: Path, shard: int) -> Path:
    return folder / JOURNAL / f"{shard:05d}"


def same(a: Entry, b: Entry) -> bool:
    return (
        a.response_ids.tobytes() == b.response_ids.tobytes()
        and a.behavior_logprobs.tobytes() == b.behavior_logprobs.tobytes()
        and (a.response_ids.dtype, a.behavior_logprobs.dtype) == (b.response_ids.dtype, b.behavior_logprobs.dtype)
        and (a.key, a.text, a.finish_reason, a.seed, a.model) == (b.key, b.text, b.finish_reason, b.seed, b.model)
    )


def write(folder: Path, entries: list[Entry], shard: int = 0) -> Path:
    before = set(shard_folder(folder, shard).glob("*"))
    with closing(attempt(folder)) as journal:
        for one in entries:
            journal.append(shard, one)
    (path,) = set(shard_folder(folder, shard).glob("*")) - before
    return path


def test_what_is_read_is_what_was_written_to_the_bit(tmp_path: Path) -> None:
    texts = ["", "two\nlines\r\u2028\x00", "été 😀 \\boxed{}", '{"a": 1}']
    entries = [entry(row, k, text=texts[k]) for row in range(5) for k in range(4)]
    extreme = np.array([-np.float32(1e-45), np.nextafter(np.float32(-1), np.float32(0)), -0.1, -3e38, -0.0], np.float32)
    entries.append(Entry("teacher:x", 9, 0, "", np.arange(5, dtype=np.int32), extreme, "length", 0, "m"))
    write(tmp_path, entries)
    found = read_journal(tmp_path, 0)
    assert list(found) == [one.key for one in entries]
    assert all(same(found[one.key], one) for one in entries)
    assert read_journal(tmp_path, 1) == {}


def test_shards_are_kept_apart(tmp_path: Path) -> None:
    with closing(attempt(tmp_path)) as journal:
        for shard in (0, 3, 0):
            journal.append(shard, entry(row=shard, index=len(read_journal(tmp_path, shard))))
        journal.close_shard(0)
        journal.append(0, entry(row=7))
    assert set(read_journal(tmp_path, 0)) == {("self", 0, 0), ("self", 0, 1), ("self", 7, 0)}
    assert set(read_journal(tmp_path, 3)) == {("self", 3, 0)}


def test_an_entry_is_there_as_soon_as_append_returns(tmp_path: Path) -> None:
    with closing(attempt(tmp_path)) as journal:
        for k in range(5):
            journal.append(0, entry(index=k))
            assert len(read_journal(tmp_path, 0)) == k + 1


def test_a_line_torn_anywhere_costs_only_itself(tmp_path: Path) -> None:
    entries = [entry(index=k) for k in range(3)]
    path = write(tmp_path, entries)
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(last, len(whole)):
        path.write_bytes(whole[:cut])
        assert list(read_journal(tmp_path, 0)) == [one.key for one in entries[:2]], cut


def test_what_another_machine_has_not_written_yet_is_passed_over(tmp_path: Path) -> None:
    """On a shared file system a file may be as long as it will be, with zeros where something is still on its way."""
    path = write(tmp_path, [entry(index=k) for k in range(3)])
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for begin, end in ((start, start + 20), (start + 5, len(whole) - 9), (start, len(whole))):
        path.write_bytes(whole[:begin] + bytes(end - begin) + whole[end:])
        assert list(read_journal(tmp_path, 0)) == [("self", 0, 0)]


def test_the_next_attempt_goes_on_after_a_torn_line(tmp_path: Path) -> None:
    path = write(tmp_path, [entry(index=0), entry(index=1)])
    path.write_bytes(path.read_bytes()[:-3])
    write(tmp_path, [entry(index=1), entry(index=2)])
    assert sorted(read_journal(tmp_path, 0)) == [("self", 0, k) for k in range(3)]


def test_of_a_sample_drawn_in_two_attempts_the_first_counts(tmp_path: Path) -> None:
    paths = [write(tmp_path, [entry(text=text)]) for text in ("one", "two")]
    first, second = sorted(paths)
    assert first != second
    texts = dict(zip(paths, ("one", "two"), strict=True))
    for _ in range(2):
        assert read_journal(tmp_path, 0)["self", 0, 0].text == texts[first]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_any_other_damage_is_refused_with_its_place(
    tmp_path: Path, one_line: Callable[[BaseException], str], number: int
) -> None:
    path = write(tmp_path, [entry(index=k) for k in range(3)])
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    start = sum(map(len, lines[: number - 1]))
    for at in (start, start + 8, start + 9, start + len(lines[number - 1]) // 2):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(UserError) as caught:
            read_journal(tmp_path, 0)
        assert f"{path}: line {number} is damaged" in one_line(caught.value)


def test_many_shards_do_not_use_up_the_file_descriptors(tmp_path: Path) -> None:
    """A teacher's phase goes through all shards of the data set before any is finished."""
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("needs /proc")
    before = len(list(descriptors.iterdir()))
    with closing(attempt(tmp_path)) as journal:
        for k in range(2):
            for shard in range(300):
                journal.append(shard, entry(index=k))
        assert len(list(descriptors.iterdir())) - before < 100
    assert len(list(descriptors.iterdir())) <= before
    assert all(len(read_journal(tmp_path, shard)) == 2 for shard in range(300))
    assert all(len(list(shard_folder(tmp_path, shard).iterdir())) == 1 for shard in range(300))


def test_a_sample_becomes_the_entry_of_its_place() -> None:
    request = SampleRequest("p", 2, (), np.array([5], np.int32), Seed(2**62))
    sample = Sample(request, "t", np.array([1], np.int32), np.array([-0.5], np.float32), 1, "length", seed=2**62)
    made = entry_of(sample, "self", 4, "m@1")
    assert made.key == ("self", 4, 2)
    assert (made.text, made.finish_reason, made.seed, made.model) == ("t", "length", 2**62, "m@1")


def test_numbers_are_stored_little_endian(tmp_path: Path) -> None:
    path = write(tmp_path, [Entry("self", 0, 0, "", np.array([258], np.int32), np.zeros(1, np.float32), "stop", 1, "")])
    assert base64.b64encode(b"\x02\x01\x00\x00") in path.read_bytes()


def test_a_journal_in_another_shards_folder_is_refused(tmp_path: Path) -> None:
    journal = journals.FileJournal(tmp_path, "one")
    journal.append(0, entry())
    journal.close()
    shard_folder(tmp_path, 0).rename(shard_folder(tmp_path, 1))
    with pytest.raises(UserError, match=r"00001/one.jsonl: line 1 is damaged"):
        journals.read_journal(FolderStore(tmp_path), 1)


def test_a_full_disk_names_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, line: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with closing(attempt(tmp_path)) as journal, monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*00002/.*jsonl'"):
            journal.append(2, entry())
