"""The short columns of all groups: what planning an epoch reads, checked, and put together as an Index."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gftdata.errors import UserError
from gftdata.schema import INDEX_COLUMNS, PLANNED_LISTS
from gftdata.shards import open_parquet

MAX_TOKENS = 2**27  # of a prompt or response: more is a damaged number


@dataclass(frozen=True, slots=True)
class Index:
    """The short columns of all groups: all that planning an epoch needs. G groups, R responses."""

    paths: tuple[Path, ...]
    path_of_group: npt.NDArray[np.int32]  # [G] index into paths
    row_group_of_group: npt.NDArray[np.int32]  # [G] row group within the file
    row_of_group: npt.NDArray[np.int32]  # [G] row within the row group
    offsets: npt.NDArray[np.int64]  # [G+1] responses of group g are offsets[g]:offsets[g+1]
    num_prompt_tokens: npt.NDArray[np.int32]  # [G]
    num_tokens: npt.NDArray[np.int32]  # [R]
    rewards: npt.NDArray[np.float32]  # [R] NaN where it could not be judged
    source_names: tuple[str, ...]
    source_codes: npt.NDArray[np.int32]  # [R] index into source_names

    @property
    def num_groups(self) -> int:
        return len(self.num_prompt_tokens)

    def place_of(self, group: int) -> str:
        """Where a group is, for people."""
        row, row_group = self.row_of_group[group], self.row_group_of_group[group]
        return f"row {row} of row group {row_group} in {self.paths[self.path_of_group[group]].name}"


@dataclass(frozen=True, slots=True)
class ShortColumns:
    """INDEX_COLUMNS of one shard, or others that are asked for."""

    table: pa.Table
    rows: tuple[int, ...]  # of each row group

    @property
    def num_response_tokens(self) -> int:
        """Of all responses together."""
        return int(_flat(self.table, "num_tokens").fill_null(0).to_numpy().sum(dtype=np.int64))


def read_short_columns(source: Path | BinaryIO, where: str, columns: Sequence[str] = INDEX_COLUMNS) -> ShortColumns:
    """Read some columns of a file, or of an open one by its ranges; `where` is for errors.

    Raises UserError, and what reading an open one raises.
    """
    with open_parquet(source, where) as file:
        rows = tuple(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
        table = file.read(columns=list(columns)).combine_chunks()
        if table.num_rows != sum(rows):
            raise UserError(f"{where}: damaged: {table.num_rows} rows, its row groups are said to hold {sum(rows)}")
        if set(INDEX_COLUMNS) <= set(columns):
            check_short_columns(table, where)
        return ShortColumns(table, rows)


def check_short_columns(table: pa.Table, where: str) -> None:
    """Raise UserError for rows that contradict themselves in what planning reads: the first of them is named."""
    lists = [pc.list_value_length(table[name]).fill_null(-1).to_numpy() for name in PLANNED_LISTS]
    bad_G = (lists[0] < 0) | (lists[0] != lists[1]) | (lists[0] != lists[2])
    if bad_G.any():
        row = int(bad_G.argmax())
        found = ", ".join(f"{name} {sizes[row]}" for name, sizes in zip(PLANNED_LISTS, lists, strict=True))
        raise UserError(f"{where}: row {row}: lists of different lengths, or none (-1): {found}")
    rewards_R, tokens_R = _flat(table, "rewards"), _flat(table, "num_tokens").fill_null(0).to_numpy(False)
    group_R = np.repeat(np.arange(table.num_rows), lists[0])
    prompt_G = table["num_prompt_tokens"].fill_null(0).to_numpy()
    complaints = {
        "a reward is not a finite number": ~np.isfinite(rewards_R.fill_null(0.0).to_numpy(False)),
        "a response without a source": _flat(table, "sources").is_null().to_numpy(False),
        f"num_tokens is not a number from 1 to {MAX_TOKENS:,}": (tokens_R < 1) | (tokens_R > MAX_TOKENS),
    }
    for complaint, bad_R in complaints.items():
        if bad_R.any():
            raise UserError(f"{where}: row {group_R[bad_R.argmax()]}: {complaint}")
    if len(bad := np.flatnonzero((prompt_G < 1) | (prompt_G > MAX_TOKENS))):
        raise UserError(f"{where}: row {bad[0]}: num_prompt_tokens is not a number from 1 to {MAX_TOKENS:,}")


def read_index(paths: Sequence[Path]) -> Index:
    """Read the short columns of every shard."""
    return make_index(paths, (read_short_columns(path, str(path)) for path in paths))


def make_index(paths: Sequence[Path], columns: Iterable[ShortColumns]) -> Index:
    """The index of shards, from the short columns of each."""
    names: dict[str, int] = {}
    parts: dict[str, list[npt.NDArray[Any]]] = {
        key: [] for key in ("path", "row_group", "row", "sizes", "prompt", "tokens", "rewards", "codes")
    }
    for number, shard in enumerate(columns):
        table, sizes = shard.table, shard.rows
        parts["path"].append(np.full(table.num_rows, number, np.int32))
        parts["row_group"].append(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes))
        parts["row"].append(np.concatenate([np.arange(s, dtype=np.int32) for s in sizes] or [np.empty(0, np.int32)]))
        sources = _flat(table, "sources").dictionary_encode()
        local = np.array([names.setdefault(s, len(names)) for s in sources.dictionary.to_pylist()], dtype=np.int32)
        parts["codes"].append(local[sources.indices.to_numpy()] if len(sources) else np.empty(0, np.int32))
        parts["sizes"].append(pc.list_value_length(table["num_tokens"]).to_numpy().astype(np.int64))
        parts["prompt"].append(table["num_prompt_tokens"].to_numpy())
        parts["tokens"].append(_flat(table, "num_tokens").to_numpy())
        parts["rewards"].append(_flat(table, "rewards").fill_null(float("nan")).to_numpy())

    def join(key: str, dtype: Any) -> npt.NDArray[Any]:
        arrays = parts.pop(key)  # and let go: of millions of groups they are not held twice
        return np.concatenate(arrays, dtype=dtype, casting="same_kind") if arrays else np.empty(0, dtype)

    return Index(
        paths=tuple(paths),
        path_of_group=join("path", np.int32),
        row_group_of_group=join("row_group", np.int32),
        row_of_group=join("row", np.int32),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(join("sizes", np.int64))]),
        num_prompt_tokens=join("prompt", np.int32),
        num_tokens=join("tokens", np.int32),
        rewards=join("rewards", np.float32),
        source_names=tuple(names),
        source_codes=join("codes", np.int32),
    )


def _flat(table: pa.Table, column: str) -> pa.Array:
    chunked = table[column].combine_chunks()
    return (chunked if isinstance(chunked, pa.Array) else pa.concat_arrays(chunked.chunks)).flatten()
