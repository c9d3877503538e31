"""Plan + shards -> Batches, read ahead in a thread: the only code that builds tensors for training.

Shapes: B rows, L positions of a row, N response tokens of the whole micro-batch, R its responses, in the order in which
its pieces hold them.
"""

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from gftdata.errors import UserError
from gftdata.index import Index, make_index, read_short_columns
from gftdata.shards import check_unpacked_size, open_parquet
from gftdata.tokens import next_token_inputs
from gftdata.types import LogProbs, TokenIds
from gfttrain.attention import Segments, make_segments, moved
from gfttrain.plan import Layout, Pack, Selection

LONG_COLUMNS = ["prompt_ids", "response_ids", "ref_logprobs"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass. The logits at position `predicts_N[i]` of the flattened rows are those of response token i."""

    input_ids_BL: torch.Tensor
    position_ids_BL: torch.Tensor
    attention_mask_BL: torch.Tensor | None  # padded: which positions are real
    segments: Segments | None  # packed: what may see what
    predicts_N: torch.Tensor
    target_ids_N: torch.Tensor
    advantages_N: torch.Tensor
    ref_logprobs_N: torch.Tensor
    source_codes_N: torch.Tensor  # index into Index.source_names
    responses_R: npt.NDArray[np.int64]  # index into the Index's responses
    lengths_R: npt.NDArray[np.int64]  # their tokens

    def to(self, device: torch.device) -> "Batch":
        def move(tensor: torch.Tensor) -> torch.Tensor:
            return moved(tensor, device)

        mask, segments = self.attention_mask_BL, self.segments
        return Batch(
            move(self.input_ids_BL),
            move(self.position_ids_BL),
            None if mask is None else move(mask),
            None if segments is None else segments.to(device),
            move(self.predicts_N),
            move(self.target_ids_N),
            move(self.advantages_N),
            move(self.ref_logprobs_N),
            move(self.source_codes_N),
            self.responses_R,
            self.lengths_R,
        )


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with some of its group's responses, and what the objective needs of each."""

    prompt_ids: TokenIds
    response_ids: tuple[TokenIds, ...]
    ref_logprobs: tuple[LogProbs, ...]
    advantages: npt.NDArray[np.float64]
    source_codes: npt.NDArray[np.int32]
    responses: tuple[int, ...]  # index into the Index's responses


def collate(examples: Sequence[Example], layout: Layout = "shared_prefix", dtype: torch.dtype = torch.float32) -> Batch:
    """Examples -> tensors. `dtype` is that of advantages and log-probs."""
    if layout != "shared_prefix":
        examples = [one for example in examples for one in singles(example)]
    layers = _pad(examples) if layout == "padded" else _pack(examples)
    input_ids, position_ids, mask, segments, predicts = layers
    lengths = [len(ids) for e in examples for ids in e.response_ids]
    advantages, codes = (_joined([getattr(e, name) for e in examples]) for name in ("advantages", "source_codes"))
    return Batch(
        input_ids_BL=torch.from_numpy(input_ids),
        position_ids_BL=torch.from_numpy(position_ids),
        attention_mask_BL=None if mask is None else torch.from_numpy(mask),
        segments=segments,
        predicts_N=torch.from_numpy(predicts),
        target_ids_N=torch.from_numpy(_joined([ids for e in examples for ids in e.response_ids]).astype(np.int64)),
        advantages_N=torch.from_numpy(np.repeat(advantages, lengths)).to(dtype),
        ref_logprobs_N=torch.from_numpy(_joined([ref for e in examples for ref in e.ref_logprobs])).to(dtype),
        source_codes_N=torch.from_numpy(np.repeat(codes, lengths).astype(np.int64)),
        responses_R=np.array([r for e in examples for r in e.responses], np.int64),
        lengths_R=np.array(lengths, np.int64),
    )


def _joined(parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def singles(example: Example) -> Iterator[Example]:
    """Each response of an example with the prompt, by itself."""
    for k in range(len(example.response_ids)):
        here = slice(k, k + 1)
        yield Example(
            example.prompt_ids,
            example.response_ids[here],
            example.ref_logprobs[here],
            example.advantages[here],
            example.source_codes[here],
            example.responses[here],
        )


_Layers = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any] | None, Segments | None, npt.NDArray[Any]]


def _pack(examples: Sequence[Example]) -> _Layers:
    """One row: prompt, responses, prompt, responses ... The first token of each response is predicted by the prompt."""
    ids: list[TokenIds] = []
    predicts: list[npt.NDArray[np.int64]] = []
    insides: list[list[int]] = []
    start = 0
    for example in examples:
        prompt = len(example.prompt_ids)
        ids.append(example.prompt_ids)
        place, inside = start + prompt, []
        for response_ids in example.response_ids:
            inputs, first = next_token_inputs(example.prompt_ids, response_ids)
            inside.append(len(inputs) - prompt)
            ids.append(inputs[prompt:])
            places = np.arange(first, len(inputs))
            # what lies in the prompt is there once; the rest is where this response is
            predicts.append(places + np.where(places < prompt, start, place - prompt))
            place += inside[-1]
        insides.append(inside)
        start = place
    segments = make_segments([len(e.prompt_ids) for e in examples], insides)
    row = _joined(ids).astype(np.int64)[None]
    where = np.concatenate(predicts) if predicts else np.empty(0, np.int64)
    return row, segments.position_L.numpy()[None], None, segments, where


def _pad(examples: Sequence[Example]) -> _Layers:
    """A row for each response, as wide as the longest."""
    inputs, firsts = zip(*(next_token_inputs(e.prompt_ids, e.response_ids[0]) for e in examples), strict=True)
    lengths = np.array([len(row) for row in inputs])
    width = int(lengths.max())
    ids = np.zeros((len(examples), width), np.int64)
    for number, row in enumerate(inputs):
        ids[number, : len(row)] = row
    real = np.arange(width) < lengths[:, None]
    positions = np.where(real, np.arange(width), 0)
    predicts = [
        np.arange(first, length) + number * width
        for number, (first, length) in enumerate(zip(firsts, lengths, strict=True))
    ]
    return ids, positions, real.astype(np.int64), None, np.concatenate(predicts)


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
    """Gives the examples of planned pieces; holds the row groups of the last two shuffle windows.

    `locate` turns a shard's number into a local file that is what the manifest says (`gftdata.locations`). The plan was
    made before that was known: when a shard is first touched, what was planned from is compared with that file.
    """

    def __init__(
        self,
        index: Index,
        selection: Selection,
        shuffle_row_groups: int,
        locate: Callable[[int], Path],
        vocab_size: int | None = None,
    ) -> None:
        self._index = index
        self._selection = selection
        self._locate = locate
        self._vocab_size = vocab_size
        self._capacity = 2 * shuffle_row_groups
        self._held: OrderedDict[tuple[int, int], RowGroup] = OrderedDict()
        self._files: dict[int, Path] = {}  # shards that have been touched
        self._first_of_shard = np.searchsorted(index.path_of_group, np.arange(len(index.paths) + 1))

    def check(self, shards: Iterable[int]) -> None:
        """Compare these shards with the manifest and the plan. Raises UserError, once for each damaged one it meets."""
        for number in shards:
            self._file(number)

    def shards_of(self, groups: npt.NDArray[np.int64]) -> list[int]:
        """The shards that groups are in."""
        found: list[int] = np.unique(self._index.path_of_group[groups]).tolist()
        return found

    def _file(self, number: int) -> Path:
        if number not in self._files:
            path = self._locate(number)
            _check_planned(self._index, number, slice(*self._first_of_shard[number : number + 2].tolist()), path)
            self._files[number] = path
        return self._files[number]

    def examples(self, pack: Pack) -> list[Example]:
        """The examples of one micro-batch, in its order."""
        return [self._example(piece.group, piece.responses) for piece in pack]

    def _example(self, group: int, responses: tuple[int, ...]) -> Example:
        index = self._index
        held = self._row_group(int(index.path_of_group[group]), int(index.row_group_of_group[group]))
        place = int(index.row_of_group[group])
        first = int(held.first_response[place] - index.offsets[group])
        spans = [slice(*held.response_offsets[first + r : first + r + 2].tolist()) for r in responses]
        chosen = list(responses)
        return Example(
            prompt_ids=held.prompt_ids[held.prompt_offsets[place] : held.prompt_offsets[place + 1]],
            response_ids=tuple(held.response_ids[span] for span in spans),
            ref_logprobs=tuple(held.ref_logprobs[span] for span in spans),
            advantages=self._selection.advantages_R[chosen],
            source_codes=index.source_codes[chosen],
            responses=responses,
        )

    def _row_group(self, path: int, number: int) -> RowGroup:
        key = (path, number)
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        file = self._file(path)
        found = read_row_group(file, number, self._vocab_size)
        self._check_lengths(file, path, number, found)
        self._held[key] = found
        if len(self._held) > self._capacity:
            self._held.popitem(last=False)
        return self._held[key]

    def _check_lengths(self, file: Path, path: int, number: int, found: RowGroup) -> None:
        """Raise UserError where the long columns are not as long as the short ones say."""
        index, of_shard = self._index, slice(*self._first_of_shard[path : path + 2].tolist())
        first, last = of_shard.start + np.searchsorted(index.row_group_of_group[of_shard], [number, number + 1])
        offsets = index.offsets[first : last + 1]
        pairs = (
            ("prompt_ids", found.prompt_offsets, index.num_prompt_tokens[first:last]),
            ("responses", found.first_response, np.diff(offsets)),
            ("response_ids", found.response_offsets, index.num_tokens[offsets[0] : offsets[-1]]),
        )
        for what, found_offsets, expected in pairs:
            if not np.array_equal(np.diff(found_offsets), expected):
                raise UserError(f"{file}: row group {number}: {what} are not as many as num_tokens says")


def _check_planned(index: Index, number: int, groups: slice, path: Path) -> None:
    """Raise UserError where what was planned from is not what the shard, now known to be whole, holds."""
    found = make_index([path], [read_short_columns(path, str(path))])
    offsets = index.offsets[groups.start : groups.stop + 1]
    responses = slice(int(offsets[0]), int(offsets[-1]))
    codes = np.array([index.source_names.index(s) if s in index.source_names else -1 for s in found.source_names])
    same = (
        np.array_equal(index.row_group_of_group[groups], found.row_group_of_group)
        and np.array_equal(offsets - offsets[0], found.offsets)
        and np.array_equal(index.num_prompt_tokens[groups], found.num_prompt_tokens)
        and np.array_equal(index.num_tokens[responses], found.num_tokens)
        and np.array_equal(index.rewards[responses], found.rewards, equal_nan=True)
        and np.array_equal(index.source_codes[responses], codes[found.source_codes] if len(codes) else [])
    )
    if not same:
        raise UserError(
            f"{path}: rewards, sources or lengths are not those that the run was planned from: what was read then was "
            "damaged on its way, or the file has changed since; give the same command again"
        )


def read_row_group(path: Path, number: int, vocab_size: int | None = None) -> RowGroup:
    """Decode the long columns of one row group.

    Raises UserError for a file that cannot be read, and for token ids and log-probs that cannot be: lists of different
    lengths, nulls, ids outside the vocabulary, log-probs that are positive or not finite.
    """
    where = f"{path}: row group {number}"
    with open_parquet(path, str(path)) as file:
        check_unpacked_size(file, number, str(path))
        table = file.read_row_group(number, columns=LONG_COLUMNS)
    prompts, responses, scores = (_array(table[name]) for name in LONG_COLUMNS)
    ids, ref = responses.flatten(), scores.flatten()
    parts = (prompts, responses, scores, ids, ref, prompts.flatten(), ids.flatten(), ref.flatten())
    if any(part.null_count for part in parts):
        raise UserError(f"{where}: a null among prompt_ids, response_ids or ref_logprobs")
    if not ids.offsets.equals(ref.offsets) or not responses.offsets.equals(scores.offsets):
        raise UserError(f"{where}: response_ids and ref_logprobs differ in length")
    for what, tokens in (("prompt_ids", prompts.flatten().to_numpy()), ("response_ids", ids.flatten().to_numpy())):
        if len(tokens) and (tokens.min() < 0 or (vocab_size is not None and tokens.max() >= vocab_size)):
            raise UserError(
                f"{where}: {what} from {tokens.min()} to {tokens.max()}, the model has "
                + ("ids from 0" if vocab_size is None else f"ids from 0 to {vocab_size - 1}")
            )
    logprobs = ref.flatten().to_numpy().astype(np.float32)
    if not np.isfinite(logprobs).all() or (logprobs > 0).any():
        raise UserError(f"{where}: a reference log-prob is positive or not finite")
    return RowGroup(
        prompt_ids=prompts.flatten().to_numpy(),
        prompt_offsets=prompts.offsets.to_numpy().astype(np.int64),
        first_response=responses.offsets.to_numpy().astype(np.int64),
        response_ids=ids.flatten().to_numpy(),
        ref_logprobs=logprobs,
        response_offsets=ids.offsets.to_numpy().astype(np.int64),
    )


def _array(column: pa.ChunkedArray) -> pa.ListArray:
    joined = column.combine_chunks()
    return joined if isinstance(joined, pa.Array) else pa.concat_arrays(joined.chunks)


@contextmanager
def read_ahead(items: Iterable[T], depth: int = 2) -> Iterator[Iterator[T]]:
    """The items, made by a thread that is up to `depth` of them ahead; what it raises is raised here."""
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(entry: tuple[T | None, BaseException | None]) -> bool:
        while not stopped.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((None, StopIteration()))
        except BaseException as error:
            put((None, error))

    def taken() -> Iterator[T]:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]

    thread = threading.Thread(target=work, name="gft-read-ahead", daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        stopped.set()
        thread.join()
