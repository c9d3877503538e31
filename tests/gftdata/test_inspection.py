"""The whole of an inspection: as JSON, of remote data by ranges, of what is not there."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from aid.bucket import BUCKET
from aid.data_sets import Made, group, save

from gftdata.browse import Filter, show_groups
from gftdata.counts import count
from gftdata.errors import UserError
from gftdata.inspection import as_json, inspect_data
from gftdata.locations import open_data
from gftdata.manifest import read_manifest, write_manifest
from gftdata.shards import sha256_file
from gftdata.store import FolderStore

S3_DATA = f"s3://{BUCKET}/made/data"


def test_it_is_json_with_everything(data: Path) -> None:
    found = inspect_data(str(data))
    read = json.loads(json.dumps(as_json(found), allow_nan=False))
    assert read["counts"]["summary"] == json.loads((data / "manifest.json").read_text())["summary"]
    assert read["shards"] == 3 and read["bytes"] == sum(path.stat().st_size for path in (data / "data").iterdir())
    assert len(read["pass_rate_bins"]) == len(read["counts"]["pass_rates"]) == 6
    assert sum(read["counts"]["pass_rates"]) == 24
    assert [f["kind"] for f in read["findings"]] == [f.kind for f in found.findings] and read["problems"] == 0
    assert read["content"]["groups"] == 24


def test_remote_data_is_inspected_by_ranges_and_deep_from_fetched_shards(
    s3: s3fs.S3FileSystem, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (path for path in data.rglob("*") if path.is_file() and ".work" not in path.parts):
        s3.put_file(str(path), f"{BUCKET}/made/data/{path.relative_to(data)}")
    fetched: list[str] = []
    original = s3fs.S3FileSystem._get_file

    async def counted(self: Any, source: str, *arguments: Any, **options: Any) -> Any:
        fetched.append(source)
        return await original(self, source, *arguments, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_get_file", counted)
    local, remote = inspect_data(str(data)), inspect_data(S3_DATA)
    assert (remote.counts.repeated_prompts, remote.counts.texts_compared) == (None, False)
    whole = replace(remote.counts, repeated_prompts=local.counts.repeated_prompts, texts_compared=True)
    assert whole == local.counts
    assert remote.content == local.content and remote.findings == local.findings
    wanted = Filter(sources=("self",), min_reward=1.0)
    assert show_groups(open_data(S3_DATA), wanted, 30) == show_groups(open_data(str(data)), wanted, 30)
    assert fetched == []
    assert inspect_data(S3_DATA, deep=True).counts == inspect_data(str(data), deep=True).counts
    assert len(fetched) == 3


def test_remote_texts_are_not_read_to_count(
    s3: s3fs.S3FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [group(n, [Made(text=os.urandom(50_000).hex())], question=os.urandom(50_000).hex()) for n in range(12)]
    folder = save(tmp_path, [made])
    for path in (folder / "manifest.json", *(folder / "data").iterdir()):
        s3.put_file(str(path), f"{BUCKET}/long/data/{path.relative_to(folder)}")
    read: list[int] = []
    whole = s3fs.core.S3File._fetch_range

    def counted(self: Any, start: int, end: int) -> bytes:
        read.append(end - start)
        return whole(self, start, end)

    monkeypatch.setattr(s3fs.core.S3File, "_fetch_range", counted)
    assert count(open_data(f"s3://{BUCKET}/long/data")).summary.groups == 12
    assert 0 < 10 * sum(read) < sum(path.stat().st_size for path in (folder / "data").iterdir())
    read.clear()
    (shown,) = show_groups(open_data(f"s3://{BUCKET}/long/data"), Filter(id="row-7"), 1)
    assert shown.responses[0].text == made[7].responses[0].completion.text
    assert 2 * sum(read) < sum(path.stat().st_size for path in (folder / "data").iterdir())


@pytest.mark.parametrize("kind", ["null", "null elements", "short", "NaN"])
def test_damaged_columns_end_in_one_line_or_in_numbers(tmp_path: Path, kind: str, one_line: Any) -> None:
    """Checksums are right: somebody else's program made it so."""
    folder = save(tmp_path, [[group(number, [Made(), Made(text="b", reward=0.0)]) for number in range(4)]])
    path = folder / "data" / "train-00000-of-00001.parquet"
    table, manifest, refused = pq.read_table(path), read_manifest(folder), 0
    for place, field in enumerate(table.schema):
        rows = [damaged(value, kind) for value in table[field.name].to_pylist()]
        pq.write_table(table.set_column(place, field, pa.array(rows, type=field.type)), path)
        record = manifest.shards[0].model_copy(update={"sha256": sha256_file(path)})
        write_manifest(FolderStore(folder), manifest.model_copy(update={"shards": (record,)}))
        for look in (
            lambda: json.dumps(as_json(inspect_data(str(folder)))),
            lambda: show_groups(open_data(str(folder)), Filter(sources=("self",), min_reward=0.5, signal=True), 9),
            lambda: show_groups(open_data(str(folder)), Filter(), 9),
        ):
            try:
                look()
            except UserError as error:
                refused += 1
                assert "gft validate" in one_line(error)
    assert refused > 0


def damaged(value: Any, kind: str) -> Any:
    if kind == "null":
        return None
    if not isinstance(value, list):
        return float("nan") if kind == "NaN" and isinstance(value, float) else value
    if kind == "short":
        return value[:-1]
    if kind == "NaN":
        return [float("nan") if isinstance(x, float) else damaged(x, kind) for x in value]
    return [None for _ in value]


def test_what_is_not_a_finished_data_set_is_refused(tmp_path: Path, one_line: Any) -> None:
    (tmp_path / ".work").mkdir()
    with pytest.raises(UserError, match="an unfinished data set") as refused:
        inspect_data(str(tmp_path))
    one_line(refused.value)
