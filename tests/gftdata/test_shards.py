"""Publication in one step, commit records, the manifest, verification and the index."""

import itertools
import json
import math
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gftdata import shards
from gftdata.errors import UserError
from gftdata.index import Index, check_short_columns, read_index
from gftdata.manifest import DATA, MANIFEST, MAX_MANIFEST_BYTES, WORK, Manifest, read_manifest, write_manifest
from gftdata.schema import groups_to_table, schema, table_to_groups
from gftdata.shards import (
    check_record,
    publish_shard,
    sha256_file,
    shard_name,
    shard_paths,
    shard_record,
    verify,
    write_atomic,
)
from gftdata.store import FolderStore
from gftdata.types import Completion, Group, Message, Prompt, Response, Verdict

OneLine = Callable[[BaseException], str]
SIZES = (5, 7, 1, 0, 3)  # groups of each shard; an empty one is allowed


def group(number: int) -> Group:
    rng = np.random.default_rng(number)

    def response(k: int) -> Response:
        length = int(rng.integers(1, 12))
        verdict = [Verdict(1.0, "ok"), Verdict(0.0, "ok"), Verdict(None, "timeout")][rng.integers(3)]
        return Response(
            Completion(
                "expert" if k == 0 else "self", "x", rng.integers(0, 9, length).astype(np.int32), "stop", "m", 1, None
            ),
            verdict,
            -rng.exponential(size=length).astype(np.float32),
        )

    prompt = Prompt(f"p{number}", None, (Message("user", "q"),), "1", "s", (), "{}", "q")
    return Group(
        prompt, np.arange(1 + number % 4, dtype=np.int32), tuple(response(k) for k in range(rng.integers(0, 5)))
    )


def publish(out: Path, row_group_size: int = 3) -> list[list[Group]]:
    numbers = itertools.count()
    groups = [[group(next(numbers)) for _ in range(size)] for size in SIZES]
    for shard, members in enumerate(groups):
        publish_shard(FolderStore(out), shard, len(SIZES), groups_to_table(members), row_group_size, "float32")
    return groups


def manifest_of(out: Path, prompts: int | None = None) -> Manifest:
    records = [shard_record(FolderStore(out), shard, len(SIZES)) for shard in range(len(SIZES))]
    count = sum(SIZES) if prompts is None else prompts
    return Manifest.model_validate(
        {
            "format": "gft-groups",
            "schema_version": 1,
            "toolkit_version": "0",
            "recipe": {},
            "models": [],
            "tokenizer": {"hash": "", "template_hash": "", "end_id": 1, "stop_ids": [1]},
            "engine": "none",
            "packages": {},
            "prompts": {
                "rows_read": count,
                "prompts": count,
                "prompts_too_long": 0,
                "duplicates": 0,
                "near_duplicates": None,
                "duplicates_removed": 0,
                "contaminated": 0,
                "given_missing": 0,
                "given_left_out": 0,
            },
            "prompts_quarantined": 0,
            "teacher_samples_left_out": 0,
            "summary": {
                "groups": 0,
                "responses": 0,
                "response_tokens": 0,
                "groups_without_signal": 0,
                "groups_unjudged": 0,
                "sources": [],
            },
            "shards": [r.model_dump() for r in records if r],
        }
    )


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    out = tmp_path / "set"
    publish(out)
    write_manifest(FolderStore(out), manifest_of(out))
    return out


def edit_manifest(out: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((out / MANIFEST).read_text())
    data.pop("checksum", None)  # changed on purpose
    change(data)
    (out / MANIFEST).write_text(json.dumps(data))


def republish(out: Path, shard: int, members: list[Group] | pa.Table) -> None:
    """Put another file in a shard's place, its record in the manifest made to match."""
    path = out / DATA / shard_name(shard, len(SIZES))
    path.unlink()
    table = members if isinstance(members, pa.Table) else groups_to_table(members)
    publish_shard(FolderStore(out), shard, len(SIZES), table, 3, "float32")
    tokens = sum(sum(row) for row in table["num_tokens"].to_pylist())
    said = {"rows": table.num_rows, "response_tokens": tokens}
    said |= {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    edit_manifest(out, lambda data: data["shards"][shard].update(said))


def test_a_published_shard_is_whole_and_nothing_is_left_of_its_staging(tmp_path: Path) -> None:
    groups = publish(tmp_path)
    assert sorted(p.name for p in (tmp_path / DATA).iterdir()) == [f"train-{i:05d}-of-00005.parquet" for i in range(5)]
    assert list((tmp_path / WORK / "staged").iterdir()) == []
    for shard, members in enumerate(groups):
        table = pq.read_table(tmp_path / DATA / shard_name(shard, 5))
        assert table.equals(groups_to_table(members))
        assert [g.prompt for g in table_to_groups(table)] == [g.prompt for g in members]


def test_the_second_publisher_loses(tmp_path: Path) -> None:
    publish_shard(FolderStore(tmp_path), 0, 1, groups_to_table([group(1)]), 3, "float32")
    path = tmp_path / DATA / shard_name(0, 1)
    first, inode = path.read_bytes(), path.stat().st_ino
    publish_shard(FolderStore(tmp_path), 0, 1, groups_to_table([group(2)]), 3, "float32")
    assert (path.read_bytes(), path.stat().st_ino) == (first, inode)
    assert list((tmp_path / WORK / "staged").iterdir()) == []


def test_of_publishers_at_the_same_time_one_wins_whole(tmp_path: Path) -> None:
    tables = [groups_to_table([group(n) for n in range(k, k + 5)]) for k in range(8)]
    barrier = threading.Barrier(len(tables))

    def run(table: pa.Table) -> None:
        barrier.wait()
        publish_shard(FolderStore(tmp_path), 0, 1, table, 3, "float32")

    threads = [threading.Thread(target=run, args=(table,)) for table in tables]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = pq.read_table(tmp_path / DATA / shard_name(0, 1))
    assert sum(found.equals(table) for table in tables) == 1
    assert list((tmp_path / WORK / "staged").iterdir()) == []


def test_a_shard_that_cannot_be_written_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(table: pa.Table, file: Path, **options: Any) -> None:
        file.write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(shards.pq, "write_table", fail)
    with pytest.raises(OSError, match="disk full"):
        publish_shard(FolderStore(tmp_path), 0, 1, groups_to_table([group(1)]), 3, "float32")
    assert not (tmp_path / DATA).exists()


def test_row_groups_are_bounded_in_rows_and_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = groups_to_table([group(n) for n in range(20)])

    def sizes(shard: int, row_group_size: int) -> list[int]:
        publish_shard(FolderStore(tmp_path), shard, 9, table, row_group_size, "float32")
        with pq.ParquetFile(tmp_path / DATA / shard_name(shard, 9)) as file:
            return [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]

    assert sizes(0, 8) == [8, 8, 4]
    monkeypatch.setattr(shards, "MAX_ROW_GROUP_BYTES", table.nbytes // 4 + 20)
    assert sizes(1, 8) == [5, 5, 5, 5]
    monkeypatch.setattr(shards, "MAX_ROW_GROUP_BYTES", 1)
    assert sizes(2, 8) == [1] * 20


def test_a_record_is_made_from_the_file_and_made_again_when_lost(tmp_path: Path) -> None:
    assert shard_record(FolderStore(tmp_path), 0, 5) is None
    groups = publish(tmp_path)
    for shard, members in enumerate(groups):
        path = tmp_path / DATA / shard_name(shard, 5)
        record = shard_record(FolderStore(tmp_path), shard, 5)
        assert record is not None
        assert record.model_dump() == {
            "name": path.name,
            "sha256": sha256_file(path),
            "rows": len(members),
            "response_tokens": sum(len(r.ref_logprobs) for g in members for r in g.responses),
            "bytes": path.stat().st_size,
        }
        stored = tmp_path / WORK / "records" / f"{path.name}.json"
        stored.unlink()
        assert shard_record(FolderStore(tmp_path), shard, 5) == record
        assert stored.is_file()


def test_a_small_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a" / "b.json"
    write_atomic(path, "é")
    assert path.read_text(encoding="utf-8") == "é"

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text(encoding="utf-8") == "é"


def test_a_finished_set_is_whole(finished: Path) -> None:
    seen: list[str] = []
    assert verify(finished, progress=seen.append) == []
    assert seen == [shard_name(i, 5) for i in range(5)]
    assert shard_paths(finished, read_manifest(finished)) == sorted((finished / DATA).iterdir())
    shutil.rmtree(finished / WORK)
    assert verify(finished) == [], "what is shared has no .work"


@pytest.mark.parametrize("shard", [0, 1, 3])
def test_a_flipped_byte_anywhere_is_found_and_its_file_named(finished: Path, shard: int) -> None:
    path = finished / DATA / shard_name(shard, 5)
    whole = path.read_bytes()
    for at in np.random.default_rng(0).choice(len(whole), 25, replace=False):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << (at % 8)
        path.write_bytes(damaged)
        (problem,) = verify(finished)
        assert problem.startswith(f"{path}: sha256 ")
    path.write_bytes(whole)
    assert verify(finished) == []


def test_files_that_lack_or_are_too_many(finished: Path) -> None:
    path = finished / DATA / shard_name(1, 5)
    stray = path.with_name("train-00001-of-00006.parquet")
    path.rename(stray)
    assert verify(finished) == [f"{path}: missing", f"{stray}: not in the manifest"]
    shutil.rmtree(finished / DATA)
    assert verify(finished) == [f"{finished / DATA / shard_name(i, 5)}: missing" for i in range(5)]


def test_a_wrong_row_count(finished: Path) -> None:
    edit_manifest(finished, lambda data: data["shards"][0].update(rows=6))
    path = finished / DATA / shard_name(0, 5)
    assert verify(finished) == [
        f"{path}: 5 rows, the manifest says 6",
        f"{finished}: 17 rows in the manifest's shards for 16 prompts",
    ]


def test_a_shard_that_the_manifest_forgot(finished: Path) -> None:
    edit_manifest(finished, lambda data: data["shards"].pop(1))
    assert verify(finished) == [
        f"{finished / DATA / shard_name(1, 5)}: not in the manifest",
        f"{finished}: 9 rows in the manifest's shards for 16 prompts",
    ]


def test_a_prompt_that_is_there_twice(finished: Path) -> None:
    republish(finished, 2, [group(3)])
    assert verify(finished) == [f"{finished / DATA / shard_name(2, 5)}: prompt p3 is also in {shard_name(0, 5)}"]
    republish(finished, 2, [group(12)])
    republish(finished, 0, [group(n) for n in (0, 1, 2, 3, 1)])
    path = finished / DATA / shard_name(0, 5)
    assert verify(finished) == [f"{path}: prompt p1 is also in {path.name}"]


def test_files_of_another_schema_and_rows_that_contradict_themselves(finished: Path) -> None:
    table = groups_to_table([group(12)])
    path = finished / DATA / shard_name(2, 5)
    republish(finished, 2, table.set_column(0, pa.field("prompt_id", pa.int32()), pa.array([1], pa.int32())))
    assert verify(finished) == [f"{path}: columns differ from the schema: prompt_id"]
    republish(finished, 2, table.replace_schema_metadata({}))
    assert verify(finished) == [f"{path}: schema version none, this toolkit reads version 1"]
    members = [group(n) for n in range(5, 12)]
    spoilt = next(n for n, g in enumerate(members) if n >= 3 and g.responses)
    wrong = replace(members[spoilt].responses[0], ref_logprobs=np.ones(1, np.float32))
    members[spoilt] = replace(members[spoilt], responses=(wrong,))
    republish(finished, 2, table)
    republish(finished, 1, members)
    (problem,) = verify(finished)
    assert problem.startswith(
        f"{finished / DATA / shard_name(1, 5)}: row group {spoilt // 3}: row {spoilt % 3}: response 0"
    )


def test_a_file_that_is_no_parquet_but_has_the_right_checksum(finished: Path) -> None:
    path = finished / DATA / shard_name(1, 5)
    path.write_text("no parquet")
    edit_manifest(finished, lambda data: data["shards"][1].update(sha256=sha256_file(path)))
    (problem,) = verify(finished)
    assert problem.startswith(f"{path}: ") and len(problem.splitlines()) == 1


def test_a_row_group_that_would_fill_the_memory_is_not_read(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_ROW_GROUP_BYTES", 1)
    problems = verify(finished)
    assert len(problems) == sum(max(1, -(-size // 3)) for size in SIZES)
    assert all("unpacks to" in problem for problem in problems)


@pytest.mark.parametrize("name", ["../evil.parquet", "/tmp/evil.parquet", "a/b.parquet", "../../x", "..", "", "x.txt"])
def test_a_manifest_may_not_name_files_elsewhere(finished: Path, one_line: OneLine, name: str) -> None:
    edit_manifest(finished, lambda data: data["shards"][0].update(name=name))
    for use in (read_manifest, verify):
        with pytest.raises(UserError) as caught:
            use(finished)
        assert "names a shard outside its data folder" in one_line(caught.value)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "not a manifest"),
        ("[]", "not a manifest"),
        ("null", "not a manifest"),
        (b"\xff", "not a manifest"),
        ('{"format": "gft-groups", "schema_version": 1}', "not a manifest"),
        ('{"format": "other", "schema_version": 1}', "expected format gft-groups version 1, found other version 1"),
        ('{"format": "gft-groups", "schema_version": 2}', "found gft-groups version 2"),
        ("{}", "found None version None"),
        (b"[" * 100_000, "not a manifest"),
        (b" " * (MAX_MANIFEST_BYTES + 1), "expected at most 67,108,864"),
    ],
)
def test_manifests_that_are_none(tmp_path: Path, one_line: OneLine, content: str | bytes, part: str) -> None:
    path = tmp_path / MANIFEST
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read_manifest(tmp_path)
    assert str(path) in one_line(caught.value) and part in str(caught.value)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (
            lambda m: m["shards"][0].update(rows=-1),
            "shards.0.rows: Input should be greater than or equal to 0, found",
        ),
        (lambda m: m["shards"][0].update(rows=2**60), "shards.0.rows"),
        (lambda m: m["shards"][0].update(bytes="7"), "shards.0.bytes: Input should be a valid integer, found '7'"),
        (lambda m: m["shards"].append(m["shards"][0]), "names the shard train-00000-of-00005.parquet twice"),
        (lambda m: m["summary"].update(groups=True), "summary.groups"),
        (lambda m: m["prompts"].update(duplicates=-3), "prompts.duplicates"),
        (lambda m: m.update(shards={}), "shards: Input should be"),
    ],
)
def test_manifests_with_impossible_numbers(
    finished: Path, one_line: OneLine, change: Callable[[dict[str, Any]], Any], part: str
) -> None:
    edit_manifest(finished, change)
    with pytest.raises(UserError) as caught:
        read_manifest(finished)
    assert part in one_line(caught.value)


def test_folders_without_a_manifest(tmp_path: Path, one_line: OneLine) -> None:
    def refusal(folder: Path) -> str:
        with pytest.raises(UserError) as caught:
            read_manifest(folder)
        return one_line(caught.value)

    assert "no such data set folder" in refusal(tmp_path / "none")
    assert refusal(tmp_path) == f"{tmp_path}: no manifest.json"
    publish(tmp_path)
    assert "an unfinished data set" in refusal(tmp_path)


def test_a_manifest_reads_back(finished: Path) -> None:
    manifest = manifest_of(finished)
    assert read_manifest(finished) == manifest
    assert [record.name for record in manifest.shards] == [shard_name(i, 5) for i in range(5)]


@pytest.mark.parametrize("row_group_size", [1, 3, 64])
def test_the_index_equals_a_naive_reading(tmp_path: Path, row_group_size: int) -> None:
    groups = [g for members in publish(tmp_path, row_group_size) for g in members]
    paths = sorted((tmp_path / DATA).iterdir())
    index = read_index(paths)
    assert index.num_groups == len(groups) == len(index.offsets) - 1
    files = [pq.ParquetFile(path) for path in paths]
    for g, expected in enumerate(groups):
        file = files[index.path_of_group[g]]
        row = file.read_row_group(index.row_group_of_group[g]).to_pylist()[index.row_of_group[g]]
        assert row["prompt_id"] == expected.prompt.prompt_id
        assert index.num_prompt_tokens[g] == len(expected.prompt_ids)
        mine = slice(index.offsets[g], index.offsets[g + 1])
        assert index.num_tokens[mine].tolist() == [len(r.ref_logprobs) for r in expected.responses]
        assert [index.source_names[c] for c in index.source_codes[mine]] == [
            r.completion.source for r in expected.responses
        ]
        rewards = [None if math.isnan(reward) else reward for reward in index.rewards[mine].tolist()]
        assert rewards == [r.verdict.reward for r in expected.responses]
    for file in files:
        file.close()
    assert index.offsets[-1] == len(index.rewards) == len(index.num_tokens) == len(index.source_codes)


def test_an_index_depends_on_the_order_of_its_files_only_in_where_things_are(tmp_path: Path) -> None:
    publish(tmp_path)
    paths = sorted((tmp_path / DATA).iterdir())
    forward, backward = read_index(paths), read_index(paths[::-1])

    def by_place(index: Index) -> dict[Any, Any]:
        return {
            (
                index.paths[index.path_of_group[g]].name,
                index.row_group_of_group[g],
                index.row_of_group[g],
            ): [
                (index.source_names[index.source_codes[r]], index.num_tokens[r], str(index.rewards[r]))
                for r in range(index.offsets[g], index.offsets[g + 1])
            ]
            for g in range(index.num_groups)
        }

    assert by_place(forward) == by_place(backward)
    assert read_index([]).num_groups == 0


def test_an_index_of_files_that_cannot_be_read(tmp_path: Path, one_line: OneLine) -> None:
    publish(tmp_path)
    paths = sorted((tmp_path / DATA).iterdir())
    with pytest.raises(UserError) as caught:
        read_index([*paths, tmp_path / "none.parquet"])
    assert "none.parquet: this shard is missing" in one_line(caught.value)
    paths[1].write_text("no parquet")
    with pytest.raises(UserError) as caught:
        read_index(paths)
    assert f"{paths[1]}: cannot be read" in one_line(caught.value)


def test_a_damaged_page_of_a_short_column_is_found_without_the_manifest(finished: Path) -> None:
    path = finished / DATA / shard_name(0, len(SIZES))
    column = next(i for i, f in enumerate(pq.read_schema(path)) if f.name == "rewards")
    metadata = pq.ParquetFile(path).metadata.row_group(0)
    places = [metadata.column(i) for i in range(metadata.num_columns)]
    page = next(c for c in places if c.path_in_schema.startswith("rewards"))
    content = bytearray(path.read_bytes())
    content[page.data_page_offset + page.total_compressed_size - 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path.name}: cannot be read"):
        read_index([path])
    assert column


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("rewards", [[1.0]], "lists of different lengths"),
        ("rewards", [None], "lists of different lengths, or none"),
        ("rewards", [[1.0, float("inf")]], "a reward is not a finite number"),
        ("sources", [["self", None]], "a response without a source"),
        ("num_tokens", [[1, 0]], "num_tokens is not a number"),
        ("num_tokens", [[1, -1]], "num_tokens is not a number"),
        ("num_tokens", [[1, None]], "num_tokens is not a number"),
        ("num_tokens", [[1, 2**31 - 1]], "num_tokens is not a number"),
        ("num_prompt_tokens", [0], "num_prompt_tokens is not a number"),
        ("num_prompt_tokens", [None], "num_prompt_tokens is not a number"),
    ],
)
def test_short_columns_that_contradict_themselves(column: str, values: list[Any], said: str) -> None:
    whole = {"rewards": [[1.0, None]], "sources": [["self", "self"]], "num_tokens": [[1, 2]], "num_prompt_tokens": [3]}
    fields = [schema().field(name) for name in whole]
    check_short_columns(pa.Table.from_pydict(whole, pa.schema(fields)), "f")
    with pytest.raises(UserError, match=f"^f: row 0: {said}"):
        check_short_columns(pa.Table.from_pydict({**whole, column: values}, pa.schema(fields)), "f")


def test_a_footer_that_promises_too_much_is_not_read(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = finished / DATA / shard_name(0, len(SIZES))
    monkeypatch.setattr("gftdata.shards.MIN_VALUES_READ", 0)
    monkeypatch.setattr("gftdata.shards.VALUES_PER_BYTE", 0)
    with pytest.raises(UserError, match=r"promises \d+ values of .* and was not read"):
        read_index([path])


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    publish(tmp_path)
    name = shard_name(1, len(SIZES))
    record = shard_record(FolderStore(tmp_path), 1, len(SIZES))
    assert record is not None
    path = tmp_path / WORK / "records" / f"{name}.json"
    whole = path.read_text()
    for content in ("", "{}", whole[:-5], whole.replace(name, shard_name(2, len(SIZES)))):
        path.write_text(content)
        with pytest.raises(UserError, match=f"{path.name}: damaged: .*delete it, and it is made again"):
            shard_record(FolderStore(tmp_path), 1, len(SIZES))
    other = record.model_copy(update={"rows": record.rows + 1})
    with pytest.raises(UserError, match=f"{name}: is not what its record .* says"):
        check_record(FolderStore(tmp_path), other, tmp_path / DATA / name)


def test_a_wrong_token_count(finished: Path) -> None:
    edit_manifest(finished, lambda data: data["shards"][1].update(response_tokens=1))
    (problem,) = verify(finished)
    assert "response tokens, the manifest says 1" in problem
