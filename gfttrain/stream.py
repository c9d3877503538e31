"""Plan + shards -> Batches: the only code that builds tensors for training.

Shapes: B rows, L positions of a row, N response tokens of the whole micro-batch, in the order in which the rows hold
them.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from gftdata.errors import UserError, first_line
from gftdata.shards import Index
from gftdata.tokens import next_token_inputs
from gftdata.types import LogProbs, TokenIds
from gfttrain.plan import Row, Selection


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass. The logits at the positions that `predicts_BL` marks are those of the N response tokens."""

    input_ids_BL: torch.Tensor
    position_ids_BL: torch.Tensor
    attention_mask_BL: torch.Tensor | None  # None when packed: positions that start again at 0 separate the responses
    predicts_BL: torch.Tensor  # bool, N of them set
    target_ids_N: torch.Tensor
    advantages_N: torch.Tensor
    ref_logprobs_N: torch.Tensor
    source_codes_N: torch.Tensor  # index into Index.source_names

    def to(self, device: torch.device) -> "Batch":
        mask = self.attention_mask_BL
        return Batch(
            self.input_ids_BL.to(device),
            self.position_ids_BL.to(device),
            None if mask is None else mask.to(device),
            self.predicts_BL.to(device),
            self.target_ids_N.to(device),
            self.advantages_N.to(device),
            self.ref_logprobs_N.to(device),
            self.source_codes_N.to(device),
        )


@dataclass(frozen=True, slots=True)
class Example:
    """One response with what the objective needs of it."""

    prompt_ids: TokenIds
    response_ids: TokenIds
    ref_logprobs: LogProbs
    advantage: float
    source_code: int


def collate(
    examples: Sequence[Example], layout: Literal["padded", "packed"] = "padded", dtype: torch.dtype = torch.float32
) -> Batch:
    """Examples -> tensors: padded, a row each, or packed into one row. `dtype` is that of advantages and log-probs."""
    inputs, firsts = zip(*(next_token_inputs(e.prompt_ids, e.response_ids) for e in examples), strict=True)
    lengths = [len(ids) for ids in inputs]
    num_tokens = [len(e.response_ids) for e in examples]
    if layout == "padded":
        shape = (len(examples), max(lengths))
        starts = [row * shape[1] for row in range(len(examples))]
    else:
        shape = (1, sum(lengths))
        starts = [sum(lengths[:row]) for row in range(len(examples))]
    ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    attended, predicts = np.zeros(shape, bool), np.zeros(shape, bool)
    for row, first, length, start in zip(inputs, firsts, lengths, starts, strict=True):
        here = slice(start, start + length)
        ids.reshape(-1)[here] = row
        positions.reshape(-1)[here] = np.arange(length)
        attended.reshape(-1)[here] = True
        predicts.reshape(-1)[start + first : start + length] = True
    return Batch(
        input_ids_BL=torch.from_numpy(ids),
        position_ids_BL=torch.from_numpy(positions),
        attention_mask_BL=torch.from_numpy(attended.astype(np.int64)) if layout == "padded" else None,
        predicts_BL=torch.from_numpy(predicts),
        target_ids_N=torch.from_numpy(np.concatenate([e.response_ids for e in examples]).astype(np.int64)),
        advantages_N=torch.from_numpy(np.repeat([e.advantage for e in examples], num_tokens)).to(dtype),
        ref_logprobs_N=torch.from_numpy(np.concatenate([e.ref_logprobs for e in examples])).to(dtype),
        source_codes_N=torch.from_numpy(np.repeat([e.source_code for e in examples], num_tokens)),
    )


@dataclass(frozen=True, slots=True)
class RowGroup:
    """The long columns of one row group, as flat arrays. Group g's responses are number `first[g]` on."""

    prompt_ids: TokenIds
    prompt_offsets: npt.NDArray[np.int64]
    first_response: npt.NDArray[np.int64]
    response_ids: TokenIds
    ref_logprobs: LogProbs
    response_offsets: npt.NDArray[np.int64]


class ShardReader:
    """Gives the examples of planned rows; holds the row groups of the last two shuffle windows."""

    def __init__(self, index: Index, selection: Selection, shuffle_row_groups: int) -> None:
        self._index = index
        self._selection = selection
        self._capacity = 2 * shuffle_row_groups
        self._held: OrderedDict[tuple[int, int], RowGroup] = OrderedDict()

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        """The examples of one micro-batch, in its order."""
        return [self._example(row) for row in rows]

    def _example(self, row: Row) -> Example:
        index = self._index
        held = self._row_group(int(index.path_of_group[row.group]), int(index.row_group_of_group[row.group]))
        place = int(index.row_of_group[row.group])
        prompt = slice(held.prompt_offsets[place], held.prompt_offsets[place + 1])
        number = held.first_response[place] + row.response
        tokens = slice(held.response_offsets[number], held.response_offsets[number + 1])
        flat = index.offsets[row.group] + row.response
        return Example(
            prompt_ids=held.prompt_ids[prompt],
            response_ids=held.response_ids[tokens],
            ref_logprobs=held.ref_logprobs[tokens],
            advantage=float(self._selection.advantages_R[flat]),
            source_code=int(index.source_codes[flat]),
        )

    def _row_group(self, path: int, number: int) -> RowGroup:
        key = (path, number)
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        self._held[key] = read_row_group(self._index, path, number)
        if len(self._held) > self._capacity:
            self._held.popitem(last=False)
        return self._held[key]


def read_row_group(index: Index, path: int, number: int) -> RowGroup:
    """Decode the long columns of one row group."""
    file_path = index.paths[path]
    try:
        with pq.ParquetFile(file_path) as file:
            table = file.read_row_group(number, columns=["prompt_ids", "response_ids", "ref_logprobs"])
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file_path}: row group {number} cannot be read: {first_line(error)}") from None
    prompts, responses, scores = (table[name].combine_chunks() for name in table.column_names)
    ids, ref = responses.flatten(), scores.flatten()
    if not ids.offsets.equals(ref.offsets):
        raise UserError(f"{file_path}: row group {number}: response_ids and ref_logprobs differ in length")
    return RowGroup(
        prompt_ids=prompts.flatten().to_numpy(),
        prompt_offsets=prompts.offsets.to_numpy().astype(np.int64),
        first_response=responses.offsets.to_numpy().astype(np.int64),
        response_ids=ids.flatten().to_numpy(),
        ref_logprobs=ref.flatten().to_numpy().astype(np.float32),
        response_offsets=ids.offsets.to_numpy().astype(np.int64),
    )
