"""Tensors from shards: what the reader gives is what Parquet holds, and a batch predicts exactly the responses."""

import dataclasses
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from training_helpers import MODEL, random_examples

from gftdata.errors import UserError
from gftdata.index import Index, read_index
from gftdata.manifest import read_manifest
from gftdata.schema import groups_to_table, parquet_options, table_to_groups
from gftdata.shards import shard_paths
from gftdata.tokens import load_tokenizer
from gfttrain.attention import visible
from gfttrain.config import BatchConfig, ObjectiveConfig
from gfttrain.plan import Cost, Layout, Piece, Selection, lay_out, make_schedule, select
from gfttrain.stream import Batch, Example, ShardReader, collate, read_ahead, read_row_group, singles

ONE = ObjectiveConfig(advantage="one")
COST = Cost(1.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def index(data: Path) -> Index:
    return read_index(shard_paths(data, read_manifest(data)))


def reader(index: Index, selection: Selection, window: int) -> ShardReader:
    return ShardReader(index, selection, window, lambda number: index.paths[number])


def whole_groups(index: Index) -> list[Piece]:
    return [Piece(g, tuple(range(index.offsets[g], index.offsets[g + 1])), 0, 0.0) for g in range(index.num_groups)]


def test_reader_gives_what_parquet_holds(index: Index) -> None:
    selection = select(index, ObjectiveConfig())
    truth = [row for path in index.paths for row in pq.read_table(path).to_pylist()]
    assert len(truth) == index.num_groups == 48
    pieces = whole_groups(index)
    pieces = [pieces[i] for i in np.random.default_rng(0).permutation(len(pieces))]  # row groups come and go
    for piece, example in zip(pieces, reader(index, selection, 1).examples(tuple(pieces)), strict=True):
        group = truth[piece.group]
        assert example.prompt_ids.tolist() == group["prompt_ids"]
        assert [ids.tolist() for ids in example.response_ids] == group["response_ids"]
        assert [ref.tolist() for ref in example.ref_logprobs] == group["ref_logprobs"]
        assert example.advantages.tolist() == selection.advantages_R[list(piece.responses)].tolist()
        assert [index.source_names[code] for code in example.source_codes] == group["sources"]
        assert example.responses == piece.responses


def test_reader_gives_some_of_a_group(index: Index) -> None:
    (whole,) = reader(index, select(index, ONE), 1).examples((whole_groups(index)[20],))
    begin = int(index.offsets[20])
    (some,) = reader(index, select(index, ONE), 1).examples((Piece(20, (begin + 1, begin + 4), 0, 0.0),))
    assert [ids.tolist() for ids in some.response_ids] == [whole.response_ids[k].tolist() for k in (1, 4)]
    assert some.source_codes.tolist() == whole.source_codes[[1, 4]].tolist()


def test_half_precision_log_probs_are_read_as_float32(index: Index, tmp_path: Path) -> None:
    table = groups_to_table(list(table_to_groups(pq.read_table(index.paths[0]))), "float16")
    path = tmp_path / "half.parquet"
    pq.write_table(table, path, row_group_size=8, **parquet_options("float16"))
    half, full = read_row_group(path, 1), read_row_group(index.paths[0], 1)
    assert half.ref_logprobs.dtype == np.float32
    np.testing.assert_allclose(half.ref_logprobs, full.ref_logprobs, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(half.response_ids, full.response_ids)


def test_groups_of_different_sizes_are_told_apart(index: Index, tmp_path: Path) -> None:
    groups = list(table_to_groups(pq.read_table(index.paths[0])))
    ragged = [dataclasses.replace(g, responses=g.responses[: 1 + i % 5]) for i, g in enumerate(groups)]
    path = tmp_path / "ragged.parquet"
    pq.write_table(groups_to_table(ragged), path, row_group_size=8, **parquet_options("float32"))
    own = read_index([path])
    pieces = whole_groups(own)
    assert sum(len(piece.responses) for piece in pieces) == sum(1 + i % 5 for i in range(16))
    for piece, example in zip(pieces, reader(own, select(own, ONE), 4).examples(tuple(pieces)), strict=True):
        expected = ragged[piece.group].responses
        assert len(expected) == len(example.response_ids)
        for k, response in enumerate(expected):
            np.testing.assert_array_equal(example.response_ids[k], response.completion.response_ids)
            np.testing.assert_array_equal(example.ref_logprobs[k], response.ref_logprobs)


def test_each_row_group_is_decoded_once_an_epoch(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[tuple[str, int]] = []

    def counted(path: Path, number: int, vocab_size: int | None) -> object:
        decoded.append((path.name, number))
        return read_row_group(path, number, vocab_size)

    monkeypatch.setattr("gfttrain.stream.read_row_group", counted)
    selection = select(index, ONE)
    batch = BatchConfig(groups_per_step=5, shuffle_row_groups=2)
    steps = make_schedule(index, selection, batch, seed=0, epochs=1, max_steps=None, skip_unjudged=False)
    shards = reader(index, selection, batch.shuffle_row_groups)
    for step in steps:
        for pack in lay_out(index, selection, step, batch, COST)[0]:
            shards.examples(pack)
    assert sorted(decoded) == [(path.name, number) for path in index.paths for number in range(2)]


def test_a_shard_that_is_cut_short_is_a_user_error(index: Index, data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    own = read_index(shard_paths(copy, read_manifest(copy)))
    os.truncate(own.paths[1], own.paths[1].stat().st_size // 2)
    with pytest.raises(UserError, match=r"train-00001-of-00003.parquet: cannot be read"):
        read_row_group(own.paths[1], 0)


LAYOUTS: tuple[Layout, ...] = ("shared_prefix", "packed", "padded")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_predicts_each_response_token_from_what_comes_before_it(layout: Layout) -> None:
    examples = random_examples(6)
    batch = collate(examples, layout, torch.float64)
    expected = [
        (one.prompt_ids, one.response_ids[0], t, one)
        for example in examples
        for one in singles(example)
        for t in range(len(one.response_ids[0]))
    ]
    assert len(batch.target_ids_N) == len(batch.predicts_N) == len(expected)
    width = batch.input_ids_BL.shape[1]
    mask = None if batch.segments is None else visible(batch.segments)
    for n, (prompt, response, t, one) in enumerate(expected):
        before = [*prompt, *response][: len(prompt) + t]
        row, place = divmod(int(batch.predicts_N[n]), width)
        # what the predicting position sees, in order, must be the tokens before its target and nothing else
        seen = torch.arange(place + 1) if mask is None else mask[place].nonzero().flatten()
        assert batch.input_ids_BL[row, seen].tolist() == before
        assert batch.position_ids_BL[row, seen].tolist() == list(range(len(before)))
        assert batch.target_ids_N[n] == response[t]
        assert batch.advantages_N[n] == one.advantages[0]
        assert batch.ref_logprobs_N[n] == float(one.ref_logprobs[0][t])
        assert batch.source_codes_N[n] == one.source_codes[0]
    assert batch.responses_R.tolist() == [r for example in examples for r in example.responses]
    assert batch.lengths_R.tolist() == [len(ids) for example in examples for ids in example.response_ids]
    inside = [len(ids) - 1 for example in examples for ids in example.response_ids]
    if layout == "shared_prefix":
        assert width == sum(len(example.prompt_ids) for example in examples) + sum(inside)
    if layout == "packed":
        assert width == sum(len(e.prompt_ids) * len(e.response_ids) for e in examples) + sum(inside)
    if layout == "padded":
        assert batch.attention_mask_BL is not None and batch.segments is None
        lengths = [len(e.prompt_ids) + len(ids) - 1 for e in examples for ids in e.response_ids]
        assert batch.attention_mask_BL.sum(1).tolist() == lengths and width == max(lengths)


def test_the_end_token_is_predicted(index: Index) -> None:
    end_id = load_tokenizer(str(MODEL)).end_id
    experts = tuple(Piece(g, (int(index.offsets[g]),), 0, 0.0) for g in range(index.num_groups))
    for example in reader(index, select(index, ONE), 4).examples(experts):
        assert [index.source_names[code] for code in example.source_codes] == ["expert"]
        batch = collate([example])
        assert batch.target_ids_N[-1] == end_id
        assert end_id not in batch.input_ids_BL  # predicted, never read


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_end_token_that_equals_padding_is_not_masked(layout: Layout) -> None:
    end = np.array([3, 4, 0], np.int32)  # 0 is what rows are padded with
    other = np.array([3] * 9, np.int32)
    refs = (np.zeros(3, np.float32), np.zeros(9, np.float32))
    example = Example(np.array([5], np.int32), (end, other), refs, np.ones(2), np.zeros(2, np.int32), (0, 1))
    assert collate([example], layout).target_ids_N.tolist() == [3, 4, 0, *[3] * 9]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_to_moves_every_tensor(layout: Layout) -> None:
    batch = collate(random_examples(3), layout)
    moved = batch.to(torch.device("meta"))
    for owner, other in ((batch, moved), (batch.segments, moved.segments)):
        assert (owner is None) == (other is None)
        for field in dataclasses.fields(owner) if owner is not None else ():  # type: ignore[arg-type]
            before, after = getattr(owner, field.name), getattr(other, field.name)
            if isinstance(before, torch.Tensor):
                assert after.device.type == "meta" and after.shape == before.shape
            elif isinstance(before, np.ndarray):
                assert after is before
    assert isinstance(batch, Batch)


def test_selection_is_not_needed_to_read(index: Index) -> None:
    # advantages come from the selection by flat number, whatever the order of pieces
    everything = np.ones(len(index.rewards), bool)
    marked = dataclasses.replace(
        select(index, ONE), advantages_R=np.arange(len(everything), dtype=np.float64), used_R=everything
    )
    examples = reader(index, marked, 4).examples(tuple(whole_groups(index)[::-1]))
    found = np.concatenate([example.advantages for example in examples[::-1]])
    assert found.tolist() == list(range(len(everything)))


def test_read_ahead_keeps_order_and_runs_in_a_thread() -> None:
    threads = set()

    def made() -> Iterator[int]:
        for number in range(50):
            threads.add(threading.current_thread().name)
            yield number

    with read_ahead(made(), depth=3) as items:
        assert list(items) == list(range(50))
    assert threads == {"gft-read-ahead"}


def test_read_ahead_passes_an_error_on_after_what_came_before() -> None:
    def made() -> Iterator[int]:
        yield 1
        raise UserError("broken shard")

    with read_ahead(made()) as items:
        assert next(items) == 1
        with pytest.raises(UserError, match="broken shard"):
            next(items)


def test_read_ahead_is_at_most_so_far_ahead_and_ends_with_its_block() -> None:
    made_so_far = []

    def made() -> Iterator[int]:
        for number in range(1000):
            made_so_far.append(number)
            yield number

    with read_ahead(made(), depth=2) as items:
        next(items)
        time.sleep(0.3)
        assert len(made_so_far) <= 1 + 2 + 1
    assert not [thread for thread in threading.enumerate() if thread.name == "gft-read-ahead"]


def test_what_was_planned_from_other_numbers_is_refused_when_a_shard_is_touched(index: Index) -> None:
    """Also where no group of the shard goes through the model: it counts in N."""
    group = 20
    shard, first = int(index.path_of_group[group]), int(index.offsets[group])
    for name, change in (("rewards", 0.5), ("num_tokens", 1), ("source_codes", 1)):
        values = getattr(index, name).copy()
        values[first] += change
        planned = dataclasses.replace(index, **{name: values})
        shards = reader(planned, select(planned, ONE), 1)
        shards.check([number for number in range(3) if number != shard])
        with pytest.raises(UserError, match=f"{index.paths[shard].name}: rewards, sources or lengths are not those"):
            shards.check(shards.shards_of(np.array([group])))


def test_token_ids_and_log_probs_that_cannot_be(index: Index, tmp_path: Path) -> None:
    table = pq.read_table(index.paths[0])

    def said(column: str, value: object) -> str:
        rows = table.to_pylist()
        rows[1][column][0][0] = value
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), tmp_path / "x.parquet")
        with pytest.raises(UserError, match=r"x.parquet: row group 0: ") as caught:
            read_row_group(tmp_path / "x.parquet", 0, 18)
        return str(caught.value)

    assert "the model has ids from 0 to 17" in said("response_ids", 18)
    assert "response_ids from -1" in said("response_ids", -1)
    assert "a null among" in said("response_ids", None)
    for value in (0.1, float("nan"), float("-inf")):
        assert "a reference log-prob is positive or not finite" in said("ref_logprobs", value)
