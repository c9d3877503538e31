"""What the texts and token ids of a data set are like: how responses end, and whether the template made the prompts.

The long columns are read one row group at a time: all of them, or of a large data set some that are spread over it, and
the caller says how many. Log-probs are not read: they are `gft validate`'s. What is made of it is audit.py's.

Shapes: G groups, R responses, T their tokens and P those of prompts, one after another.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gftdata.counts import Sighting
from gftdata.errors import UserError
from gftdata.locations import DataSet, Shard, is_remote, open_shard
from gftdata.manifest import Manifest, TokenizerRecord
from gftdata.shards import check_unpacked_size
from gftdata.tokens import NO_TEMPLATE_HASH, Tokenizer, encode_prompt, load_tokenizer
from gftdata.types import Message

SAMPLE_GROUPS = 2048  # a data set of no more is looked at as a whole
SAMPLE_ROW_GROUPS = 16  # of a larger one
ENCODED_PROMPTS = 16  # of each row group
LONGEST_TAIL = 64  # tokens; what follows the last end of a turn and is longer is no generation prompt
MOST_TAILS = 1000  # that are told apart
COLUMNS = ["prompt_id", "prompt", "prompt_ids", "sources", "finish_reasons", "responses", "response_ids"]
# What the common chat templates put around a turn. In a text that came from elsewhere it was copied along with it.
MARKERS = (
    r"<\|(?:im_start|im_end|start_header_id|end_header_id|eot_id|end_of_text|endoftext|begin_of_text|user|assistant|"
    r"system|end)\|>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>"
)


@dataclass(frozen=True, slots=True)
class Content:
    """What was seen of the texts and token ids that were looked at."""

    groups: int  # looked at
    responses: Mapping[str, int]  # source -> looked at
    left_out: tuple[str, ...]  # row groups too large to unpack
    no_end: Mapping[str, Sighting]  # source -> responses that are not cut and do not end with an end token
    further_turns: Mapping[str, Sighting]  # source -> responses with an end token before their last token
    blank: Mapping[str, Sighting]  # source -> responses of several tokens whose text is empty
    markers: Mapping[str, Sighting]  # source -> responses with a chat template's marker in their text
    generation_prompt: tuple[int, ...] | None  # what follows the last end of a turn in most prompts, that end included
    other_prompts: Sighting  # prompts that end in another way
    encoded: int  # prompts that were encoded again
    encoded_by: str  # the tokenizer that did, or why none could
    encoded_otherwise: Sighting  # prompts whose stored ids are not what it gives


SEEN = ("no_end", "further_turns", "blank", "markers")  # fields of Content that are by source


@dataclass(slots=True)
class _Tally:
    """What has been seen so far."""

    groups: int = 0
    responses: Counter[str] = field(default_factory=Counter)  # by source
    left_out: list[str] = field(default_factory=list)
    seen: dict[str, dict[str, Sighting]] = field(default_factory=lambda: {name: {} for name in SEEN})
    tails: dict[tuple[int, ...], Sighting] = field(default_factory=dict)  # how prompts end
    encoded: int = 0
    otherwise: Sighting = field(default_factory=Sighting)


def look(data: DataSet, *, deep: bool = False, model: str | None = None) -> Content:
    """Look at all texts and token ids (`deep`, which fetches remote shards), or at those of some row groups.

    `model` (folder or Hub id) has the tokenizer that encodes some prompts again; default: the manifest's reference
    model, where it is on this machine. Raises UserError for what cannot be read, and where `model` has another
    tokenizer or template.
    """
    tokenizer, encoded_by = _find_tokenizer(data.manifest, model)
    tally = _Tally()
    for number, shard in enumerate(data.shards):
        if deep and is_remote(shard.where):
            shard.fetch()
        for table in filter(len, _row_groups(shard, _wanted(data, number, deep), tally.left_out)):
            _look_at(table, shard.where, data.manifest.tokenizer, tally)
            if tokenizer is not None:
                _encode_again(table, tokenizer, tally)
    common = _generation_prompt(data.manifest.tokenizer, tally)
    others = Sighting()
    for tail, sighting in tally.tails.items():
        if common is not None and tail != common:
            others = others.and_then(sighting)
    return Content(
        groups=tally.groups,
        responses=dict(tally.responses),
        left_out=tuple(tally.left_out),
        **tally.seen,
        generation_prompt=common,
        other_prompts=others,
        encoded=tally.encoded,
        encoded_by=encoded_by,
        encoded_otherwise=tally.otherwise,
    )


def is_small(data: DataSet) -> bool:
    """Whether all texts and token ids are looked at in any case."""
    return sum(record.rows for record in data.manifest.shards) <= SAMPLE_GROUPS


def _wanted(data: DataSet, shard: int, deep: bool) -> int | None:
    """How many row groups of a shard are looked at; None: all."""
    if deep or is_small(data):
        return None
    num_shards = len(data.shards)
    chosen = np.unique(np.linspace(0, num_shards - 1, min(num_shards, SAMPLE_ROW_GROUPS)).round())
    return -(-SAMPLE_ROW_GROUPS // len(chosen)) if shard in chosen else 0


def _row_groups(shard: Shard, wanted: int | None, left_out: list[str]) -> Iterator[pa.Table]:
    """The long columns of some row groups of a shard, spread over it."""
    if wanted == 0:
        return
    with open_shard(shard) as file:
        there = file.num_row_groups
        spread = np.linspace(0, there - 1, min(there, wanted or there)).round()
        for number in np.unique(spread).astype(int).tolist():
            try:
                check_unpacked_size(file, number, shard.where)
            except UserError as error:
                left_out.append(str(error))
                continue
            yield file.read_row_group(number, columns=COLUMNS)


def _look_at(table: pa.Table, where: str, tokenizer: TokenizerRecord, tally: _Tally) -> None:
    ids = np.asarray(table["prompt_id"].fill_null("").to_pylist(), dtype=object)
    sources = table["sources"].combine_chunks()
    group_R = np.repeat(np.arange(len(table)), pc.list_value_length(sources).fill_null(0).to_numpy())
    source_R = np.asarray(sources.flatten().fill_null("").to_pylist(), dtype=object)
    reasons = table["finish_reasons"].combine_chunks().flatten()
    texts = table["responses"].combine_chunks().flatten()
    tokens = table["response_ids"].combine_chunks().flatten()
    if not len(group_R) == len(reasons) == len(texts) == len(tokens):
        raise UserError(f"{where}: its columns do not run parallel; `gft validate` names the rows")
    lengths_R = pc.list_value_length(tokens).fill_null(0).to_numpy().astype(np.int64)
    tokens_T = tokens.flatten().fill_null(-1).to_numpy()
    ends_R = np.cumsum(lengths_R)
    is_end_T = np.isin(tokens_T, tokenizer.stop_ids)
    ended_R = np.zeros(len(lengths_R), bool)
    ended_R[lengths_R > 0] = is_end_T[ends_R[lengths_R > 0] - 1]
    whole_R = pc.not_equal(reasons, "length").fill_null(True).to_numpy(zero_copy_only=False)
    early_T = is_end_T.copy()
    early_T[ends_R[lengths_R > 0] - 1] = False
    further_R = np.zeros(len(lengths_R), bool)
    further_R[np.searchsorted(ends_R, np.flatnonzero(early_T), side="right")] = True
    blank_R = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0).fill_null(True)
    marked_R = pc.match_substring_regex(texts, MARKERS).fill_null(False)
    for name, found_R in {
        "no_end": whole_R & ~ended_R,
        "further_turns": further_R,
        # one that is nothing but its end is counted from the short columns of all groups
        "blank": blank_R.to_numpy(zero_copy_only=False) & ((lengths_R > 1) | ~whole_R),
        "markers": marked_R.to_numpy(zero_copy_only=False),
    }.items():
        for source in dict.fromkeys(source_R[found_R].tolist()):
            mine_R = found_R & (source_R == source)
            sighting = Sighting().and_then(Sighting(int(mine_R.sum()), tuple(ids[group_R[mine_R]].tolist())))
            tally.seen[name][source] = tally.seen[name].get(source, Sighting()).and_then(sighting)
    tally.groups += len(table)
    tally.responses.update(source_R.tolist())
    if tokenizer.template_hash != NO_TEMPLATE_HASH:
        prompts = table["prompt_ids"].combine_chunks()
        prompt_ids_P = prompts.flatten().to_numpy(zero_copy_only=False)
        ends_G = np.cumsum(pc.list_value_length(prompts).fill_null(0).to_numpy())
        for prompt_id, first, end in zip(ids.tolist(), [0, *ends_G[:-1]], ends_G, strict=True):
            tail = _tail(prompt_ids_P[first:end], tokenizer.stop_ids)
            if tail not in tally.tails and len(tally.tails) >= MOST_TAILS:
                tail = ()
            tally.tails[tail] = tally.tails.get(tail, Sighting()).and_then(Sighting(1, (prompt_id,)))


def _tail(prompt_ids_P: npt.NDArray[Any], stop_ids: Sequence[int]) -> tuple[int, ...]:
    """What follows the last end of a turn, that end included; empty where there is none, or where it is long."""
    places = np.flatnonzero(np.isin(prompt_ids_P, stop_ids))
    if not len(places) or len(prompt_ids_P) - places[-1] > LONGEST_TAIL:
        return ()
    return tuple(prompt_ids_P[places[-1] :].tolist())


def _generation_prompt(tokenizer: TokenizerRecord, tally: _Tally) -> tuple[int, ...] | None:
    """What most prompts end with, where ends of turns are seen in prompts; a template may have none there."""
    if not tally.tails:
        return None
    tail = max(tally.tails, key=lambda tail: tally.tails[tail].count)
    return tail if tail and 2 * tally.tails[tail].count > tally.groups else None


def _encode_again(table: pa.Table, tokenizer: Tokenizer, tally: _Tally) -> None:
    for row in table.select(["prompt_id", "prompt", "prompt_ids"]).slice(0, ENCODED_PROMPTS).to_pylist():
        messages = [Message(found["role"] or "", found["content"] or "") for found in row["prompt"] or () if found]
        tally.encoded += 1
        try:
            same = encode_prompt(tokenizer, messages).tolist() == row["prompt_ids"]
        except UserError:  # the template refuses these messages: they did not become ids by it
            same = False
        if not same:
            tally.otherwise = tally.otherwise.and_then(Sighting(1, (row["prompt_id"] or "",)))


def _find_tokenizer(manifest: Manifest, model: str | None) -> tuple[Tokenizer | None, str]:
    """The tokenizer that made the ids, and its model; or None, and why not."""
    recorded = manifest.tokenizer
    if model is not None:
        tokenizer = load_tokenizer(model)
        if (tokenizer.hash, tokenizer.template_hash) != (recorded.hash, recorded.template_hash):
            what = "tokenizer" if tokenizer.hash != recorded.hash else "chat template"
            raise UserError(f"{model}: its {what} is not the one that made the ids of this data set (--model)")
        return tokenizer, model
    name = next((record.name for record in manifest.models if record.role == "reference"), None)
    folder = None if name is None else _folder_of(name)
    if folder is None:
        return None, f"its reference model {name or ''} is not on this machine (--model names it)"
    try:
        tokenizer = load_tokenizer(folder)
    except UserError as error:
        return None, f"{error} (--model names another)"
    if (tokenizer.hash, tokenizer.template_hash) != (recorded.hash, recorded.template_hash):
        return (
            None,
            f"{name} here has another tokenizer or chat template than the data set (--model names the right one)",
        )
    return tokenizer, str(name)


def _folder_of(name: str) -> str | None:
    """Where the files of a model are on this machine, without asking the Hub; None: nowhere."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(name).is_dir():
        return name
    try:
        found = [try_to_load_from_cache(name, file) for file in ("config.json", "tokenizer.json")]
    except HFValidationError:
        return None
    here = [Path(path) for path in found if isinstance(path, str)]
    return str(here[0].parent) if len(here) == len(found) else None
