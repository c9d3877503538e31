"""Shards -> the groups that a report shows: chosen, read, weighed as a run's objective does, scored if asked.

Which responses count and with which advantages is plan.py's, as in training. Without scoring nothing here needs torch.

Shapes: G groups, R responses, T shown tokens of a response.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gftdata.config import HfConfig
from gftdata.errors import UserError
from gftdata.index import Index
from gftdata.locations import Shard, open_data, open_shard, read_index
from gftdata.schema import check_rows, table_to_groups
from gftdata.shards import check_unpacked_size
from gftdata.tokens import VOCABULARY, load_tokenizer, load_vocabulary, token_texts
from gftdata.types import Group, LogProbs, ScoreRequest
from gfttrain.advantage import segment_advantages
from gfttrain.config import FilterConfig, ObjectiveConfig
from gfttrain.plan import select
from gfttrain.runs import FINAL

MAX_TOKENS = 2000  # of a response: what is beyond is neither shown nor scored


@dataclass(frozen=True, slots=True)
class Examples:
    """Some groups of a data set."""

    locations: tuple[str, ...]
    tokenizers: frozenset[str]  # hashes, of the data sets
    index: Index
    chosen: tuple[int, ...]  # groups of the index
    groups: tuple[Group, ...]
    places: tuple[str, ...]  # where each is, for people


@dataclass(frozen=True, slots=True)
class View:
    """What a run's objective makes of the examples of its data."""

    tau: float
    rectifies: bool
    advantages: tuple[tuple[float, ...], ...]  # of each response of each group
    used: tuple[tuple[bool, ...], ...]  # False: the objective leaves this response out
    logprobs: tuple[tuple[LogProbs, ...], ...] | None  # [T] of the trained model; None: not scored


def choose_groups(index: Index, count: int) -> tuple[int, ...]:
    """Which groups to show: spread over the data, first those with right and wrong answers. The same for every run."""
    group_R = np.repeat(np.arange(index.num_groups), np.diff(index.offsets))
    signal_R = segment_advantages(index.rewards, index.offsets) != 0
    mixed_G = np.bincount(group_R, weights=signal_R, minlength=index.num_groups) > 0
    mixed, others = np.flatnonzero(mixed_G), np.flatnonzero(~mixed_G)
    chosen = _spread(mixed, count)
    return (*chosen, *_spread(others, count - len(chosen)))


def _spread(among: npt.NDArray[np.int64], count: int) -> tuple[int, ...]:
    count = min(count, len(among))
    return tuple(int(among[n * len(among) // count]) for n in range(count))


def read_examples(locations: Sequence[str], count: int) -> Examples:
    """Choose and read groups of the data sets at these locations, taken together. Raises UserError."""
    data = [open_data(location) for location in locations]
    shards = [shard for each in data for shard in each.shards]
    index = read_index(shards)
    chosen = choose_groups(index, count)
    groups = tuple(_read_group(index, shards, group) for group in chosen)
    tokenizers = frozenset(each.manifest.tokenizer.hash for each in data)
    places = tuple(index.place_of(group) for group in chosen)
    return Examples(tuple(locations), tokenizers, index, chosen, groups, places)


def _read_group(index: Index, shards: Sequence[Shard], group: int) -> Group:
    shard, row_group = shards[int(index.path_of_group[group])], int(index.row_group_of_group[group])
    with open_shard(shard) as file:
        check_unpacked_size(file, row_group, shard.where)
        row = file.read_row_group(row_group).slice(int(index.row_of_group[group]), 1)
    if problems := check_rows(row, f"{shard.where}: row group {row_group}"):
        raise UserError(f"{problems[0]}; `gft validate` lists all that is wrong")
    return next(table_to_groups(row))


def view(examples: Examples, objective: ObjectiveConfig, kept: FilterConfig) -> View:
    """Advantages as the trainer takes them."""
    index = examples.index
    selection = select(index, objective, kept)
    spans = [slice(int(index.offsets[g]), int(index.offsets[g + 1])) for g in examples.chosen]
    return View(
        tau=objective.tau,
        rectifies=objective.coefficient == "rectified",
        advantages=tuple(tuple(selection.advantages_R[span].tolist()) for span in spans),
        used=tuple(tuple(selection.used_R[span].tolist()) for span in spans),
        logprobs=None,
    )


def score(examples: Examples, run: Path) -> tuple[tuple[LogProbs, ...], ...]:
    """log pi of the first MAX_TOKENS tokens of each response under the trained model of a run. Raises UserError."""
    from gftdata.engines.hf import open_engine

    final = run / FINAL
    if not final.is_dir():
        raise UserError(f"{run}: not scored: this run of gft train is not finished")
    tokenizer = load_tokenizer(str(final))
    if examples.tokenizers != {tokenizer.hash}:
        raise UserError(f"{run}: not scored: its tokenizer is not that of {', '.join(examples.locations)}")
    engine = open_engine(str(final), HfConfig(), tokenizer)
    try:
        requests = [
            ScoreRequest(group.prompt_ids, response.completion.response_ids[:MAX_TOKENS])
            for group in examples.groups
            for response in group.responses
        ]
        scores = iter(engine.score(requests))
    finally:
        engine.close()
    return tuple(tuple(next(scores) for _ in group.responses) for group in examples.groups)


def texts(examples: Examples, models: Sequence[str]) -> dict[int, str]:
    """The text of every shown token, with the tokenizer of the first of these models that has one here.

    Raises UserError where none has.
    """
    ids = np.unique(
        np.concatenate(
            [
                np.empty(0, np.int32),
                *(r.completion.response_ids[:MAX_TOKENS] for group in examples.groups for r in group.responses),
            ]
        )
    )
    last = UserError("no model is named")
    for model in models:
        try:
            return token_texts(load_vocabulary(model), ids.tolist())
        except UserError as error:
            last = error
    raise last


def tokenizer_of(run: Path) -> list[str]:
    """The folder of a run's trained model, where it has a tokenizer."""
    return [str(run / FINAL)] if (run / FINAL / VOCABULARY).is_file() else []
