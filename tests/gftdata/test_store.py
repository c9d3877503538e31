"""Outputs in a folder and in an object store (moto's S3 server): what both promise, and whole generations to S3."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import s3fs
from aid.bucket import BUCKET, SECRET

from gftdata import journal as journals
from gftdata.config import GenerateConfig, validate_config
from gftdata.errors import UserError, storage_failed
from gftdata.finalize import finalize
from gftdata.generate import generate
from gftdata.journal import JOURNAL, Entry, open_journal, read_journal
from gftdata.locations import checked_shards, open_data, read_index
from gftdata.manifest import DATA, WORK, read_manifest
from gftdata.shards import verify
from gftdata.status import read_status
from gftdata.store import BucketStore, FolderStore, Store, open_store
from gftdata.tasks import Task

OneLine = Callable[[BaseException], str]


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return open_store(str(tmp_path / "out"))
    request.getfixturevalue("s3")
    return open_store(f"s3://{BUCKET}/{tmp_path.name}")


def test_what_is_written_is_there(store: Store) -> None:
    assert store.top() == set() and store.names("a") == [] and not store.exists("a/b")
    store.write("a/b", b"1")
    store.write("a/c/d", b"2")
    store.write("a/b", b"3")
    assert (store.read("a/b"), store.exists("a/b"), store.top()) == (b"3", True, {"a"})
    assert store.names("a") == ["b", "c"]
    with store.local("a/c/d") as path:
        assert path.read_bytes() == b"2"
    store.remove("a/c")
    store.remove("a/b")
    store.remove("a/none")
    assert not store.exists("a/b") and store.names("a") == []
    with pytest.raises(FileNotFoundError):
        store.read("a/b")


def test_of_those_who_create_a_name_one_gets_it(store: Store) -> None:
    barrier, won = threading.Barrier(8), []

    def create(number: int) -> None:
        barrier.wait()
        if store.create("plan", b"%d" % number):
            won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and store.read("plan") == b"%d" % won[0]
    assert not store.create("plan", b"late") and store.read("plan") == b"%d" % won[0]


def test_of_those_who_publish_a_file_the_first_stays(store: Store) -> None:
    for content, won in ((b"first", True), (b"second", False)):
        with store.staging() as folder:
            staged = folder / "staged"
            staged.write_bytes(content)
            assert store.publish(staged, "data/x") is won
            assert not staged.exists()
    assert store.read("data/x") == b"first" and store.names("data") == ["x"]


@pytest.mark.parametrize("location", ["hf://datasets/me/groups", "gs://bucket/path", "s3://bucket", "s3:///path"])
def test_other_places_are_refused(location: str, one_line: OneLine) -> None:
    with pytest.raises(UserError) as caught:
        open_store(location)
    assert f"{location}: an output is a folder or s3://" in one_line(caught.value)


def test_a_bucket_that_is_not_there_and_a_server_that_is_not(
    s3: s3fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch, one_line: OneLine
) -> None:
    with pytest.raises(UserError, match="check bucket and path") as caught:
        open_store("s3://no-such-bucket/x").top()
    one_line(caught.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL") as caught:
        open_store(f"s3://{BUCKET}/x").read("y")
    assert SECRET not in one_line(caught.value)


def entry(index: int) -> Entry:
    return Entry("self", 0, index, "7", np.arange(3, dtype=np.int32), np.zeros(3, np.float32), "stop", 1, "m@1")


def test_samples_are_in_the_bucket_after_some_seconds_and_at_the_end(
    s3: s3fs.S3FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journals, "SEGMENT_S", 0.2)
    store = open_store(f"s3://{BUCKET}/{tmp_path.name}")
    with closing(open_journal(store, "1-a")) as journal, closing(open_journal(store, "1-b")) as other:
        journal.append(0, entry(0))
        other.append(0, entry(1))
        deadline = time.monotonic() + 20
        while len(read_journal(store, 0)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        journal.append(0, entry(2))
        journal.close_shard(0)
        assert [key[2] for key in read_journal(store, 0)] == [0, 2, 1]
        journal.drop_shard(0)
        assert [key[2] for key in read_journal(store, 0)] == [1]
        journal.append(3, entry(5))
    assert [key[2] for key in read_journal(store, 3)] == [5]
    assert store.names(f"{JOURNAL}/00003") == ["1-a.00000.jsonl"]


def test_a_store_that_fails_ends_the_run(
    s3: s3fs.S3FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journals, "SEGMENT_S", 0.05)

    def fail(*_: Any) -> None:
        raise UserError("the object store is gone")

    monkeypatch.setattr(BucketStore, "write", fail)
    journal = open_journal(open_store(f"s3://{BUCKET}/{tmp_path.name}"), "1-a")
    with pytest.raises(UserError, match="is gone"):
        for index in range(200):
            journal.append(0, entry(index))
            time.sleep(0.02)
    with pytest.raises(UserError, match="is gone"):
        journal.close()


def settings(demo: Path, out: str) -> dict[str, Any]:
    return {
        "model": str(demo / "model"),
        "out": out,
        "prompts": {
            "path": str(demo / "train.jsonl"),
            "columns": {"ground_truth": "answer", "expert": "expert"},
            "limit": 20,
        },
        "reward": {"name": "exact", "workers": 1},
        "responses": {"self": {"count": 2}, "max_tokens": 24},
        "shards": {"groups_per_shard": 4, "row_group_size": 4},
        "engine": {"device": "cpu", "batch_size": 4},
    }


def config_of(data: dict[str, Any]) -> GenerateConfig:
    return validate_config(GenerateConfig, data, "test")


def test_a_data_set_made_in_a_bucket_is_the_one_made_in_a_folder(
    s3: s3fs.S3FileSystem, demo: Path, tmp_path: Path
) -> None:
    location = f"s3://{BUCKET}/{tmp_path.name}/data"
    local = generate(config_of(settings(demo, str(tmp_path / "data"))))
    for index in (1, 0, 2):
        made = generate(config_of(settings(demo, location)), task=Task(index, 3, "test"))
        assert (made is None) == (index != 2)
    assert local is not None and made is not None
    assert made.shards == local.shards and made.summary == local.summary  # the same bytes
    assert sorted(path.rpartition("/")[2] for path in s3.ls(f"{BUCKET}/{tmp_path.name}/data/{WORK}")) == [
        "engines",
        "plan.json",
        "records",
        "tasks",
    ]
    data = open_data(location)
    assert read_index(data.shards).num_groups == 20
    locate = checked_shards(data.shards)
    assert [locate(number).is_file() for number in range(5)] == [True] * 5
    s3.get(f"{BUCKET}/{tmp_path.name}/data", str(tmp_path / "copy"), recursive=True)
    assert verify(tmp_path / "copy") == []
    assert read_manifest(tmp_path / "copy") == made
    status = read_status(open_store(location))
    assert status.final and status.shards_done == status.shards == 5
    assert [(one.attempt.task, one.state) for one in status.latest] == [(0, "done"), (1, "done"), (2, "done")]
    assert finalize(open_store(location)) == made
    assert generate(config_of(settings(demo, location))) == made


def test_a_bucket_with_something_else_or_another_recipe_is_refused(
    s3: s3fs.S3FileSystem, demo: Path, tmp_path: Path, one_line: OneLine
) -> None:
    s3.pipe_file(f"{BUCKET}/{tmp_path.name}/notes.txt", b"mine")
    with pytest.raises(UserError, match="not empty and not a data set of gft generate"):
        generate(config_of(settings(demo, f"s3://{BUCKET}/{tmp_path.name}")))
    location = f"s3://{BUCKET}/{tmp_path.name}/data"
    generate(config_of(settings(demo, location)), task=Task(0, 2, "test"))
    with pytest.raises(UserError) as caught:
        generate(config_of(settings(demo, location) | {"seed": 1}))
    assert f"{location}: was begun with another config: `seed` was 0 and is now 1" in one_line(caught.value)


def test_a_store_that_writes_over_what_is_there_is_refused(
    s3: s3fs.S3FileSystem, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some object stores pass over If-None-Match without a word."""
    put = s3fs.S3FileSystem._call_s3

    async def forgetful(self: s3fs.S3FileSystem, method: str, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("IfNoneMatch", None)
        return await put(self, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", forgetful)
    with pytest.raises(UserError, match="writes over what is there"):
        generate(config_of(settings(demo, f"s3://{BUCKET}/{tmp_path.name}")))


@pytest.mark.parametrize("cleans_up", [True, False])
def test_a_disk_that_fails_names_the_file_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cleans_up: bool
) -> None:
    store = FolderStore(tmp_path)
    store.write("a", b"before")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def read_only(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(os, "fsync", full)
    if not cleans_up:
        monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(OSError) as caught:
        store.write("a", b"after")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a"))
    assert storage_failed(caught.value).startswith(f"{tmp_path / 'a'}: No space left on device; ")
    assert store.read("a") == b"before"
    assert len(list(tmp_path.iterdir())) == 1 + (not cleans_up)


def test_what_is_published_is_published_though_its_staging_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FolderStore(tmp_path)

    def fails(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(Path, "unlink", fails)
    assert store.create("a", b"content")
    assert store.read("a") == b"content"


# In a process of its own: the n-th PUT of a shard is cut in the middle, or comes after one part of several, by a kill.
KILLED_WHILE_UPLOADING = """
import os, signal, socket, sys
from urllib.parse import urlsplit
import s3fs, s3fs.core
from gftcli.main import main
call, uploads, nth = s3fs.S3FileSystem._call_s3, 0, int(sys.argv.pop())

async def killed(self, method, *args, **kwargs):
    global uploads
    if method in ("put_object", "upload_part") and kwargs["Key"].endswith(".parquet"):
        uploads += 1
        if uploads == nth and method == "upload_part":
            await call(self, method, *args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        if uploads == nth:  # a request whose headers promise more than comes
            url, body = urlsplit(os.environ["AWS_ENDPOINT_URL"]), kwargs["Body"]
            with socket.create_connection((url.hostname, url.port)) as connection:
                head = (f"PUT /{kwargs['Bucket']}/{kwargs['Key']} HTTP/1.1\\r\\nHost: {url.netloc}\\r\\n"
                        f"If-None-Match: *\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n").encode()
                connection.sendall(head + body[: len(body) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
    return await call(self, method, *args, **kwargs)

s3fs.S3FileSystem._call_s3 = killed
if os.environ["PARTS"]:
    s3fs.core.calculate_chunksize = lambda size, chunksize=None: 1024
sys.argv = ["gft", "generate", sys.argv[1], "--task", "0/1"]
main()
"""


@pytest.mark.parametrize("parts", ["", "1"])
def test_a_kill_while_a_shard_is_uploaded_leaves_no_half_of_it(
    s3: s3fs.S3FileSystem, demo: Path, tmp_path: Path, parts: str
) -> None:
    location, config = f"s3://{BUCKET}/{tmp_path.name}/data", tmp_path / "generate.yaml"
    config.write_text(json.dumps(settings(demo, location)))
    for nth in (1, 3):
        program = [sys.executable, "-c", KILLED_WHILE_UPLOADING, str(config), str(nth)]
        environment = {**os.environ, "PARTS": parts}
        ended = subprocess.run(program, capture_output=True, text=True, check=False, env=environment)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        there = open_store(location).names(DATA)
        for name in there:  # each of them whole: what is read is what a finished run has
            assert s3.size(f"{BUCKET}/{tmp_path.name}/data/{DATA}/{name}") > 0
            with open_store(location).local(f"{DATA}/{name}") as path:
                assert pq.read_table(path).num_rows == 4
        status = read_status(open_store(location))
        assert not status.final and status.shards_done == len(there) < 5
    manifest = generate(config_of(settings(demo, location)))
    assert manifest is not None
    s3.get(f"{BUCKET}/{tmp_path.name}/data", str(tmp_path / "copy"), recursive=True)
    assert verify(tmp_path / "copy") == []
    expected = generate(config_of(settings(demo, str(tmp_path / "local"))))
    assert expected is not None
    ids = [_ids(tmp_path / folder) for folder in ("copy", "local")]
    assert ids[0] == ids[1]


def _ids(folder: Path) -> list[Any]:
    return [pq.read_table(path)["response_ids"].to_pylist() for path in sorted((folder / DATA).glob("*.parquet"))]


def test_the_endpoint_is_in_no_data_set(s3: s3fs.S3FileSystem, demo: Path, tmp_path: Path) -> None:
    location = f"s3://{BUCKET}/{tmp_path.name}/data"
    generate(config_of(settings(demo, location)))
    text = s3.cat_file(f"{BUCKET}/{tmp_path.name}/data/manifest.json").decode()
    assert not re.search(rf"{SECRET}|127\.0\.0\.1|{tmp_path.name}", text)
    assert isinstance(open_store(str(tmp_path)), FolderStore)


def test_prompts_from_a_bucket(s3: s3fs.S3FileSystem, demo: Path, tmp_path: Path, one_line: OneLine) -> None:
    path = f"s3://{BUCKET}/{tmp_path.name}/prompts/train.jsonl"
    data = settings(demo, str(tmp_path / "data"))
    data["prompts"]["path"] = path
    with pytest.raises(UserError) as caught:
        generate(config_of(data))
    assert one_line(caught.value) == f"{path}: no such prompt file (prompts.path)"
    s3.pipe_file(path.removeprefix("s3://"), b"{half\n")
    with pytest.raises(UserError) as caught:
        generate(config_of(data))
    assert f"{path}: line 1: not valid JSON" in one_line(caught.value)
    s3.put_file(str(demo / "train.jsonl"), path.removeprefix("s3://"))
    made, local = generate(config_of(data)), generate(config_of(settings(demo, str(tmp_path / "local"))))
    assert made is not None and local is not None and made.summary == local.summary
