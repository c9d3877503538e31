"""Tensors from shards: what the reader gives is what Parquet holds, and a batch predicts exactly the responses."""

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from training_helpers import MODEL, random_examples

from gftdata.errors import UserError
from gftdata.schema import groups_to_table, parquet_options, table_to_groups
from gftdata.shards import Index, read_index, read_manifest, shard_paths
from gftdata.tokens import load_tokenizer
from gfttrain.config import BatchConfig, ObjectiveConfig
from gfttrain.plan import Row, Selection, make_schedule, micro_batches, select
from gfttrain.stream import Batch, Example, ShardReader, collate, read_row_group

ONE = ObjectiveConfig(advantage="one")


@pytest.fixture(scope="module")
def index(data: Path) -> Index:
    return read_index(shard_paths(data, read_manifest(data)))


def all_rows(index: Index) -> list[Row]:
    return [
        Row(g, k, int(index.num_prompt_tokens[g] + index.num_tokens[index.offsets[g] + k]))
        for g in range(index.num_groups)
        for k in range(index.offsets[g + 1] - index.offsets[g])
    ]


def test_reader_gives_what_parquet_holds(index: Index) -> None:
    selection = select(index, ObjectiveConfig())
    truth = [row for path in index.paths for row in pq.read_table(path).to_pylist()]
    assert len(truth) == index.num_groups == 48
    rows = all_rows(index)
    assert len(rows) == 48 * 6
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]  # row groups come and go
    for row, example in zip(rows, ShardReader(index, selection, 1).examples(rows), strict=True):
        group, k = truth[row.group], row.response
        assert example.prompt_ids.tolist() == group["prompt_ids"]
        assert example.response_ids.tolist() == group["response_ids"][k]
        assert example.ref_logprobs.tolist() == group["ref_logprobs"][k]
        assert example.advantage == selection.advantages_R[index.offsets[row.group] + k]
        assert index.source_names[example.source_code] == group["sources"][k]
        assert row.length == len(example.prompt_ids) + len(example.response_ids)


def test_half_precision_log_probs_are_read_as_float32(index: Index, tmp_path: Path) -> None:
    table = groups_to_table(list(table_to_groups(pq.read_table(index.paths[0]))), "float16")
    path = tmp_path / "half.parquet"
    pq.write_table(table, path, row_group_size=8, **parquet_options("float16"))
    half, full = read_row_group(read_index([path]), 0, 1), read_row_group(index, 0, 1)
    assert half.ref_logprobs.dtype == np.float32
    np.testing.assert_allclose(half.ref_logprobs, full.ref_logprobs, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(half.response_ids, full.response_ids)


def test_groups_of_different_sizes_are_told_apart(index: Index, tmp_path: Path) -> None:
    groups = list(table_to_groups(pq.read_table(index.paths[0])))
    ragged = [dataclasses.replace(g, responses=g.responses[: 1 + i % 5]) for i, g in enumerate(groups)]
    path = tmp_path / "ragged.parquet"
    pq.write_table(groups_to_table(ragged), path, row_group_size=8, **parquet_options("float32"))
    own = read_index([path])
    rows = all_rows(own)
    assert len(rows) == sum(1 + i % 5 for i in range(16))
    for row, example in zip(rows, ShardReader(own, select(own, ONE), 4).examples(rows), strict=True):
        expected = ragged[row.group].responses[row.response]
        np.testing.assert_array_equal(example.response_ids, expected.completion.response_ids)
        np.testing.assert_array_equal(example.ref_logprobs, expected.ref_logprobs)


def test_each_row_group_is_decoded_once_an_epoch(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[tuple[int, int]] = []

    def counted(index: Index, path: int, number: int) -> object:
        decoded.append((path, number))
        return read_row_group(index, path, number)

    monkeypatch.setattr("gfttrain.stream.read_row_group", counted)
    selection = select(index, ONE)
    batch = BatchConfig(groups_per_step=5, shuffle_row_groups=2)
    steps = make_schedule(index, selection, batch, seed=0, epochs=1, max_steps=None, skip_unjudged=False)
    reader = ShardReader(index, selection, batch.shuffle_row_groups)
    for step in steps:
        for rows in micro_batches(index, selection, step, batch):
            reader.examples(rows)
    assert sorted(decoded) == [(path, number) for path in range(3) for number in range(2)]


def test_a_shard_that_is_cut_short_is_a_user_error(index: Index, data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    own = read_index(shard_paths(copy, read_manifest(copy)))
    os.truncate(own.paths[1], own.paths[1].stat().st_size // 2)
    with pytest.raises(UserError, match=r"train-00001-of-00003.parquet: row group 0 cannot be read"):
        read_row_group(own, 1, 0)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_batch_predicts_each_response_token_from_what_comes_before_it(layout: str) -> None:
    examples = random_examples(9)
    batch = collate(examples, layout, torch.float64)  # type: ignore[arg-type]
    total = sum(len(e.response_ids) for e in examples)
    assert int(batch.predicts_BL.sum()) == total == len(batch.target_ids_N)
    lengths = [len(e.prompt_ids) + len(e.response_ids) - 1 for e in examples]
    assert batch.input_ids_BL.shape == ((9, max(lengths)) if layout == "padded" else (1, sum(lengths)))
    # walk the marked positions in order; each must see the tokens before its target and nothing else
    expected = [(e, t) for e in examples for t in range(len(e.response_ids))]
    marked = batch.predicts_BL.nonzero().tolist()
    for n, ((example, t), (row, place)) in enumerate(zip(expected, marked, strict=True)):
        before = [*example.prompt_ids, *example.response_ids][: len(example.prompt_ids) + t]
        start = place + 1 - len(before)
        assert batch.input_ids_BL[row, start : place + 1].tolist() == before
        assert batch.position_ids_BL[row, start : place + 1].tolist() == list(range(len(before)))
        assert batch.target_ids_N[n] == example.response_ids[t]
        assert batch.advantages_N[n] == example.advantage
        assert batch.ref_logprobs_N[n] == float(example.ref_logprobs[t])
        assert batch.source_codes_N[n] == example.source_code
    if layout == "packed":
        assert batch.attention_mask_BL is None
    else:
        assert batch.attention_mask_BL is not None
        assert batch.attention_mask_BL.sum(1).tolist() == lengths
        assert not (batch.predicts_BL & (batch.attention_mask_BL == 0)).any()


def test_the_end_token_is_predicted(index: Index) -> None:
    end_id = load_tokenizer(str(MODEL)).end_id
    rows = [row for row in all_rows(index) if row.response == 0]  # the expert's
    for example in ShardReader(index, select(index, ONE), 4).examples(rows):
        assert index.source_names[example.source_code] == "expert"
        batch = collate([example])
        assert batch.target_ids_N[-1] == end_id
        assert batch.predicts_BL[0, -1] and end_id not in batch.input_ids_BL  # predicted, never read


def test_an_end_token_that_equals_padding_is_not_masked() -> None:
    end = np.array([3, 4, 0], np.int32)  # 0 is what rows are padded with
    other = np.array([3] * 9, np.int32)
    examples = [Example(np.array([5], np.int32), ids, np.zeros(len(ids), np.float32), 1.0, 0) for ids in (end, other)]
    batch = collate(examples)
    assert batch.target_ids_N.tolist() == [3, 4, 0, *[3] * 9]
    assert batch.predicts_BL[0].tolist() == [True] * 3 + [False] * 6


def test_to_moves_every_tensor() -> None:
    for layout in ("padded", "packed"):
        batch = collate(random_examples(3), layout)
        moved = batch.to(torch.device("meta"))
        for field in dataclasses.fields(Batch):
            before, after = getattr(batch, field.name), getattr(moved, field.name)
            assert (after is None) == (before is None)
            if after is not None:
                assert after.device.type == "meta" and after.shape == before.shape


def test_selection_is_not_needed_to_read(index: Index) -> None:
    # advantages come from the selection by flat number, whatever the order of rows
    nothing = np.zeros(len(index.rewards), bool)
    marked = Selection(
        nothing, np.arange(len(index.rewards), dtype=np.float64), nothing, nothing[:48], np.zeros(48, int)
    )
    rows = all_rows(index)[::-1]
    found = [example.advantage for example in ShardReader(index, marked, 4).examples(rows)]
    assert found == list(range(len(index.rewards)))[::-1]
