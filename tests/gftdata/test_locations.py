"""Data sets by location: an object store (moto's S3 server) and the Hub (its few endpoints, served on this machine)."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from aid.bucket import BUCKET, SECRET
from aid.download_hub import COMMIT, DownloadHub

from gftdata.config import validate_config
from gftdata.errors import UserError
from gftdata.index import Index
from gftdata.index import read_index as read_local_index
from gftdata.locations import checked_shards, open_data, read_index, verify_data
from gftdata.manifest import read_manifest
from gftdata.schema import parquet_options
from gftdata.shards import sha256_file, shard_paths

FETCH = """
import json, sys
from gftdata.errors import UserError
from gftdata.locations import checked_shards, open_data, read_index, verify_data
from gftdata.shards import sha256_file
try:
    data = open_data(sys.argv[1])
    groups = read_index(data.shards).num_groups
    locate = checked_shards(data.shards)
    shards = [sha256_file(locate(n)) for n in range(len(data.shards))] if sys.argv[2] == "fetch" else []
except UserError as error:
    sys.exit(f"UserError: {error}")
print(json.dumps({"groups": groups, "shards": shards}))
"""
KILLED_AT_HALF = """
import os, signal, s3fs
whole = s3fs.S3FileSystem.get_file
def half(self, source, target):
    whole(self, source, target)
    os.truncate(target, os.path.getsize(target) // 2)
    os.kill(os.getpid(), signal.SIGKILL)
s3fs.S3FileSystem.get_file = half
"""
COUNTED = """
import s3fs
whole, fetched = s3fs.S3FileSystem.get_file, []
def counted(self, source, target):
    fetched.append(source)
    whole(self, source, target)
s3fs.S3FileSystem.get_file = counted
"""


@pytest.fixture
def stored(s3: s3fs.S3FileSystem, data: Path) -> s3fs.S3FileSystem:
    """The data set at s3://groups/made/data, and our cache empty."""
    for path in [data / "manifest.json", *(data / "data").iterdir()]:
        s3.put_file(str(path), f"{BUCKET}/made/data/{path.relative_to(data)}")
    return s3


S3_DATA = f"s3://{BUCKET}/made/data"


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def assert_same(found: Index, expected: Index) -> None:
    for name in Index.__slots__:
        if name != "paths":
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert [path.name for path in found.paths] == [path.name for path in expected.paths]
    assert found.place_of(9) == expected.place_of(9)


def test_a_folder(data: Path) -> None:
    opened = open_data(f"{data}/")
    assert (opened.location, opened.manifest) == (str(data), read_manifest(data))
    paths = shard_paths(data, opened.manifest)
    assert_same(read_index(opened.shards), read_local_index(paths))
    locate = checked_shards(opened.shards)
    assert [locate(number) for number in (2, 0, 1)] == [paths[number] for number in (2, 0, 1)]


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data, tmp_path / "copy"))


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_shard_is_named_when_it_is_first_touched(copy: Path) -> None:
    opened = open_data(str(copy))
    locate, damaged = checked_shards(opened.shards), opened.shards[1].path
    damage(damaged)
    assert locate(0) == opened.shards[0].path
    command = f"hf download --repo-type dataset --force-download REPO data/{damaged.name} --local-dir {copy}"
    with pytest.raises(UserError, match=f"^{damaged}: damaged or changed: sha256 .*{re.escape(command)}"):
        locate(1)
    damaged.unlink()
    with pytest.raises(UserError, match=f"^{damaged}: cannot be read"):
        locate(1)
    with pytest.raises(UserError, match=f"^{damaged}: this shard is missing"):
        read_index(opened.shards)


def test_a_shard_is_hashed_once(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locate = checked_shards(open_data(str(copy)).shards)
    locate(0)
    monkeypatch.setattr("gftdata.shards.sha256_file", lambda path: "another")
    locate(0)
    with pytest.raises(UserError, match="damaged"):
        locate(1)


@pytest.mark.parametrize("location", ["ftp://host/x", "hf://owner/name", "hf://datasets/name", "s3://", "s3:///x"])
def test_what_a_location_may_be(location: str) -> None:
    with pytest.raises(UserError, match=r"expected a folder, hf://datasets/<owner>/<name>\[@revision\] or s3://"):
        open_data(location)


def test_a_manifest_cannot_name_files_elsewhere(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_bytes())
    manifest["shards"][0]["sha256"] = "../../somewhere"
    del manifest["checksum"]  # as whoever lies would
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"not a sha256, of train-00000-of-00003.parquet: '../../somewhere'"):
        open_data(str(copy))


# ---- S3


def test_s3_is_planned_from_ranges_and_fetched_on_first_touch(
    stored: s3fs.S3FileSystem, data: Path, tmp_path: Path
) -> None:
    opened = open_data(S3_DATA + "/")
    assert (opened.location, opened.manifest) == (S3_DATA, read_manifest(data))
    expected = read_local_index(shard_paths(data, opened.manifest))
    assert_same(read_index(opened.shards), expected)
    assert not (tmp_path / "cache").exists()
    locate, record = checked_shards(opened.shards), opened.manifest.shards[1]
    assert locate(1) == tmp_path / "cache" / "shards" / f"{record.sha256}.parquet"
    assert locate(1).read_bytes() == (data / "data" / record.name).read_bytes()
    assert [path.name for path in (tmp_path / "cache" / "shards").glob("*.p*")] == [f"{record.sha256}.parquet"]
    stored.rm(S3_DATA + "/data/" + record.name)
    assert_same(read_index(opened.shards), expected)  # what is in the cache is not asked for again
    assert checked_shards(open_data(S3_DATA).shards)(1).is_file()


def test_planning_reads_only_a_little_of_large_shards(
    stored: s3fs.S3FileSystem, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shard_paths(copy, read_manifest(copy))[0]
    table = pq.read_table(path)
    noise = pa.array([os.urandom(400_000).hex() for _ in range(len(table))])
    large = table.set_column(table.column_names.index("extra"), "extra", noise)
    pq.write_table(large, path, row_group_size=4, **parquet_options("float32"))
    stored.put_file(str(path), f"{BUCKET}/made/data/data/{path.name}")
    read: list[int] = []
    whole = s3fs.core.S3File._fetch_range

    def counted(self: Any, start: int, end: int) -> bytes:
        read.append(end - start)
        return whole(self, start, end)

    monkeypatch.setattr(s3fs.core.S3File, "_fetch_range", counted)
    index = read_index(open_data(S3_DATA).shards)
    assert index.num_groups == 24
    assert path.stat().st_size > 3_000_000 > 20 * sum(read) > 0
    assert len(read) <= 3 * (1 + 2)  # the end of each file, and once for each row group


def run_settings(data: str, out: Path, demo: Path) -> dict[str, Any]:
    batch = {"groups_per_step": 8, "micro_batch_tokens": 1024}
    return {
        "model": str(demo / "model"),
        "data": data,
        "out": str(out),
        "batch": batch,
        "optim": {"lr": 1e-3},
        "max_steps": 2,
        "device": "cpu",
        "max_reference_gap": 9.0,
    }


def test_training_from_s3_is_training_from_the_folder(
    stored: s3fs.S3FileSystem, data: Path, tmp_path: Path, demo: Path
) -> None:
    from gfttrain.config import TrainConfig
    from gfttrain.train import train

    finals = [
        train(validate_config(TrainConfig, run_settings(location, tmp_path / name, demo), "test"))
        for name, location in (("local", str(data)), ("remote", S3_DATA))
    ]
    weights = [(final / "model.safetensors").read_bytes() for final in finals]
    assert weights[0] == weights[1] != (demo / "model" / "model.safetensors").read_bytes()
    losses = [
        [json.loads(line)["loss"] for line in (final.parent / "metrics.jsonl").read_text().splitlines()]
        for final in finals
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_a_wrong_download_is_tried_once_more(
    stored: s3fs.S3FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_line: Callable[..., str]
) -> None:
    whole, times = s3fs.S3FileSystem.get_file, []

    def once_damaged(self: Any, source: str, target: str) -> None:
        whole(self, source, target)
        times.append(source)
        if len(times) == 1:
            damage(Path(target))

    monkeypatch.setattr(s3fs.S3FileSystem, "get_file", once_damaged)
    opened = open_data(S3_DATA)
    cached = checked_shards(opened.shards)(0)
    assert sha256_file(cached) == opened.manifest.shards[0].sha256
    damage(cached)  # on this machine's disk
    assert sha256_file(checked_shards(opened.shards)(0)) == opened.manifest.shards[0].sha256
    assert len(times) == 3

    name = opened.manifest.shards[2].name
    with stored.open(f"{S3_DATA}/data/{name}", "rb") as file:
        content = bytearray(file.read())
    content[len(content) // 2] ^= 1
    stored.pipe_file(f"{S3_DATA}/data/{name}", bytes(content))
    with pytest.raises(UserError) as error:
        checked_shards(opened.shards)(2)
    assert one_line(error.value).startswith(f"{S3_DATA}/data/{name}: damaged or changed: downloaded 2 times, sha256 ")
    assert len(times) == 5
    assert len(list((tmp_path / "cache" / "shards").glob("*.p*"))) == 1


def test_a_process_killed_while_downloading_leaves_nothing_that_is_used(
    stored: s3fs.S3FileSystem, tmp_path: Path
) -> None:
    assert python(KILLED_AT_HALF + FETCH, S3_DATA, "fetch").returncode == -9
    record = open_data(S3_DATA).manifest.shards[0]
    (left,) = (tmp_path / "cache" / "shards").glob("*.p*")
    assert left.name.startswith(record.sha256) and left.suffix == ".part"
    assert sha256_file(checked_shards(open_data(S3_DATA).shards)(0)) == record.sha256
    assert [path.name for path in left.parent.glob("*.p*")] == [f"{record.sha256}.parquet"]


def test_of_two_processes_one_downloads(stored: s3fs.S3FileSystem) -> None:
    hashes = [record.sha256 for record in open_data(S3_DATA).manifest.shards]
    script = COUNTED + FETCH + "print(len(fetched))"
    both = [
        subprocess.Popen([sys.executable, "-c", script, S3_DATA, "fetch"], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    lines = [process.communicate(timeout=120)[0].splitlines() for process in both]
    assert [json.loads(line[0])["shards"] for line in lines] == [hashes, hashes]
    assert sum(int(line[1]) for line in lines) == 3


def test_a_full_disk_is_told_from_a_failing_store(
    stored: s3fs.S3FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, source: str, target: str) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(s3fs.S3FileSystem, "get_file", full)
    with pytest.raises(UserError, match=r"cannot be kept in .*/cache/shards: \[Errno 28\] No space.*GFT_CACHE=FOLDER"):
        checked_shards(open_data(S3_DATA).shards)(0)
    assert not list((tmp_path / "cache" / "shards").glob("*.p*"))


def test_s3_errors_are_one_line_without_secrets(
    stored: s3fs.S3FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_line: Callable[..., str]
) -> None:
    def said(location: str) -> str:
        with pytest.raises(UserError) as error:
            open_data(location)
        text = one_line(error.value)
        assert text.startswith(location) and SECRET not in text
        return text

    assert "no such object: check bucket and path" in said(f"s3://{BUCKET}/made")
    assert "no such object" in said("s3://no-such-bucket/x")
    opened = open_data(S3_DATA)
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cannot be kept in .*cache.*GFT_CACHE=FOLDER"):
        checked_shards(opened.shards)(0)
    name = opened.manifest.shards[1].name
    stored.pipe_file(f"{S3_DATA}/data/{name}", b"not Parquet at all")
    with pytest.raises(UserError, match=f"^{S3_DATA}/data/{name}: cannot be read"):
        read_index(opened.shards)
    stored.rm(f"{S3_DATA}/data/{name}")
    with pytest.raises(UserError, match=f"^{S3_DATA}/data/{name}: no such object"):
        read_index(opened.shards)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://someone:{SECRET}@127.0.0.1:9")
    assert "check the network, AWS_ENDPOINT_URL and the credentials" in said(S3_DATA)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    assert said(S3_DATA).endswith("needs s3fs; install it with pip install 'gft-toolkit[s3]'")


# ---- the Hub


@pytest.fixture
def hub(copy: Path, tmp_path: Path) -> Iterator[DownloadHub]:
    """It has some/groups."""
    (tmp_path / "served" / "datasets" / "some").mkdir(parents=True)
    (tmp_path / "served" / "datasets" / "some" / "groups").symlink_to(copy)
    hub = DownloadHub(tmp_path / "served")
    yield hub
    hub.stop()


def from_hub(hub: DownloadHub, home: Path, location: str, mode: str, offline: bool = False) -> str:
    """What FETCH prints. In a process of its own: the endpoint is read when huggingface_hub is imported."""
    done = python(
        FETCH,
        location,
        mode,
        HF_ENDPOINT=hub.url,
        HF_HOME=str(home),
        HF_HUB_CACHE=str(home / "hub"),
        HF_HUB_OFFLINE=str(int(offline)),
        HF_HUB_DISABLE_PROGRESS_BARS="1",
    )
    return done.stdout or done.stderr.strip().splitlines()[-1]


def test_the_hub_online_and_then_offline_from_its_cache(hub: DownloadHub, copy: Path, tmp_path: Path) -> None:
    location, home = "hf://datasets/some/groups", tmp_path / "home"
    expected = {"groups": 24, "shards": [record.sha256 for record in read_manifest(copy).shards]}
    assert "not given it" in from_hub(hub, home, location, "plan", offline=True) and not hub.asked
    assert json.loads(from_hub(hub, home, location, "plan")) == {"groups": 24, "shards": []}
    shards = [asked for asked in hub.asked if "parquet" in asked]
    assert shards and all(asked.endswith("range") for asked in shards)
    assert not list(home.rglob("*.parquet"))
    offline = from_hub(hub, home, location, "plan", offline=True)  # the manifest is there, the shards are not
    assert offline.startswith(f"UserError: {location}/data/train-0000") and "hf download --repo-type dataset" in offline
    assert json.loads(from_hub(hub, home, location, "fetch")) == expected
    asked = len(hub.asked)
    assert json.loads(from_hub(hub, home, location, "fetch", offline=True)) == expected
    assert json.loads(from_hub(hub, home, f"{location}@{COMMIT}", "fetch", offline=True)) == expected
    assert len(hub.asked) == asked


def test_what_the_hub_does_not_have(hub: DownloadHub, copy: Path, tmp_path: Path) -> None:
    location, home = "hf://datasets/some/groups", tmp_path / "home"
    assert "no such data set, or not for you" in from_hub(hub, home, "hf://datasets/some/thing", "plan")
    assert f"{location}@v2/manifest.json: the Hub has no revision v2" in from_hub(hub, home, f"{location}@v2", "plan")
    damaged = copy / "data" / read_manifest(copy).shards[1].name
    damage(damaged)
    said = from_hub(hub, home, location, "fetch")
    assert said.startswith(f"UserError: {location}/data/{damaged.name}: damaged or changed: downloaded 2 times, sha256")
    assert sum(asked.startswith("GET") and asked.endswith(f"/data/{damaged.name}") for asked in hub.asked) == 2
    (copy / "manifest.json").unlink()
    assert "no such file: not a finished data set" in from_hub(hub, tmp_path / "other", location, "plan")


def test_a_data_set_in_a_bucket_is_verified(stored: s3fs.S3FileSystem, data: Path) -> None:
    assert verify_data(S3_DATA) == verify_data(str(data)) == []
    name = f"{BUCKET}/made/data/data/train-00001-of-00003.parquet"
    content = bytearray(stored.cat_file(name))
    content[len(content) // 2] ^= 1
    stored.pipe_file(name, bytes(content))
    problems = verify_data(S3_DATA)
    assert "train-00001-of-00003.parquet" in problems[0] and "sha256" in problems[0]
    stored.rm(name)
    assert verify_data(S3_DATA) == [f"s3://{name}: missing"]


def test_a_manifest_that_counts_otherwise_is_found_when_planning(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_bytes())
    manifest["shards"][1]["response_tokens"] += 1
    del manifest["checksum"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"train-00001-of-00003.parquet: damaged or changed: 8 rows with"):
        read_index(open_data(str(copy)).shards)


def test_a_password_in_a_location_is_not_shown() -> None:
    with pytest.raises(UserError, match=r"^https://host/x: expected a folder"):
        open_data("https://user:word@host/x")
