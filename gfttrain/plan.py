"""Pure: index, objective, seed, epochs -> the schedule (step -> groups and N), then its cut into micro-batches.

The schedule does not know the device; its hash is in every checkpoint. Shapes: G groups, R responses.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gftdata.errors import UserError
from gftdata.shards import Index
from gfttrain.advantage import segment_advantages
from gfttrain.config import BatchConfig, ObjectiveConfig


@dataclass(frozen=True, slots=True)
class Selection:
    """What the objective makes of each response and group."""

    used_R: npt.NDArray[np.bool_]  # judged, and of a source that the objective uses
    advantages_R: npt.NDArray[np.float64]  # 0 where not used
    trained_R: npt.NDArray[np.bool_]  # goes through the model
    judged_G: npt.NDArray[np.bool_]  # some response could be judged
    loss_tokens_G: npt.NDArray[np.int64]  # response tokens of the used responses


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step."""

    epoch: int
    groups: npt.NDArray[np.int64]  # indices into the Index
    num_loss_tokens: int  # N


@dataclass(frozen=True, slots=True)
class Row:
    """One response to train on."""

    group: int  # index into the Index
    response: int  # k within the group
    length: int  # prompt and response tokens

    @property
    def key(self) -> str:
        return f"{self.group}.{self.response}"


def select(index: Index, objective: ObjectiveConfig) -> Selection:
    """Which responses are used, with which advantages. See METHOD: null rewards and unused sources are left out first.

    Groups with A = 0 everywhere have no gradient: they count in N and are not computed, unless a KL penalty gives them
    one.
    """
    wanted = np.array([_wanted(name, objective.sources) for name in index.source_names], dtype=bool)
    judged_R = np.isfinite(index.rewards)
    used_R = judged_R & wanted[index.source_codes] if len(wanted) else judged_R
    if objective.min_reward is not None:
        used_R = used_R & (np.nan_to_num(index.rewards, nan=-np.inf) >= objective.min_reward)
    if objective.advantage == "group":
        advantages_R = segment_advantages(index.rewards, index.offsets, used_R)
    else:
        advantages_R = used_R.astype(np.float64)
    group_R = np.repeat(np.arange(index.num_groups), np.diff(index.offsets))
    has_signal_G = np.bincount(group_R, weights=advantages_R != 0, minlength=index.num_groups) > 0
    trained_R = used_R if objective.kl_coef > 0 else used_R & has_signal_G[group_R]
    return Selection(
        used_R=used_R,
        advantages_R=advantages_R,
        trained_R=trained_R,
        judged_G=np.bincount(group_R, weights=judged_R, minlength=index.num_groups) > 0,
        loss_tokens_G=_sum_by(group_R, index.num_tokens * used_R, index.num_groups),
    )


def _sum_by(group_R: npt.NDArray[np.int64], values_R: npt.NDArray[np.int32], num_groups: int) -> npt.NDArray[np.int64]:
    return np.bincount(group_R, weights=values_R, minlength=num_groups).astype(np.int64)


def _wanted(source: str, sources: Sequence[str]) -> bool:
    return source in sources or (source.startswith("teacher:") and "teacher" in sources)


def check_selection(index: Index, selection: Selection, objective: ObjectiveConfig, *, skip_unjudged: bool) -> None:
    """Raise UserError where there is nothing to train on, or an unjudged group without leave to skip it."""
    teachers = [s for s in objective.sources if s.startswith("teacher:") and s not in index.source_names]
    if teachers:
        found = ", ".join(index.source_names)
        raise UserError(f"objective.sources names {teachers[0]}, which the data does not have; it has {found}")
    unjudged = int((~selection.judged_G).sum())
    if unjudged and not skip_unjudged:
        first = int(np.flatnonzero(~selection.judged_G)[0])
        raise UserError(
            f"{unjudged} of {index.num_groups} groups have no judged response (the first is row "
            f"{index.row_of_group[first]} of row group {index.row_group_of_group[first]} in "
            f"{index.paths[index.path_of_group[first]].name}); set unjudged_groups=skip to leave them out"
        )
    if not selection.used_R.any():
        raise UserError(
            f"no response is left to train on: objective.sources is {', '.join(objective.sources)}"
            + (f" with min_reward {objective.min_reward}" if objective.min_reward is not None else "")
            + f", the data has {', '.join(index.source_names) or 'no responses'}"
        )
    if not selection.trained_R.any():
        raise UserError(
            "no group has a training signal: in each, the rewards of the used responses are all equal or there is only "
            "one such response; use objective.advantage=one, more sources, or data of another difficulty"
        )


def make_schedule(
    index: Index,
    selection: Selection,
    batch: BatchConfig,
    *,
    seed: int,
    epochs: int,
    max_steps: int | None,
    skip_unjudged: bool,
) -> tuple[Step, ...]:
    """Every step of the run. A last, smaller step of an epoch is kept; groups without judged responses are left out."""
    steps: list[Step] = []
    for epoch in range(epochs):
        order = shuffled_groups(index, batch.shuffle_row_groups, np.random.default_rng([seed, epoch]))
        if skip_unjudged:
            order = order[selection.judged_G[order]]
        for start in range(0, len(order), batch.groups_per_step):
            if max_steps is not None and len(steps) == max_steps:
                return tuple(steps)
            groups = order[start : start + batch.groups_per_step]
            steps.append(Step(epoch, groups, int(selection.loss_tokens_G[groups].sum())))
    return tuple(steps)


def shuffled_groups(index: Index, window: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """All groups in random order, [G]: row groups are shuffled, then groups within windows of so many row groups.

    A reader that holds two windows decodes each row group once an epoch.
    """
    key_G = index.path_of_group.astype(np.int64) << 32 | index.row_group_of_group
    row_groups, of_G = np.unique(key_G, return_inverse=True)
    place = rng.permutation(len(row_groups))  # row group -> its place in the order
    window_G = place[of_G] // window
    return np.lexsort((rng.random(index.num_groups), window_G)).astype(np.int64)


def schedule_hash(index: Index, selection: Selection, steps: Sequence[Step], shard_hashes: Sequence[str]) -> str:
    """sha256 over what every step trains on: the shards' content, groups, advantages, N."""
    digest = hashlib.sha256("\n".join(shard_hashes).encode())
    for array in (index.offsets, index.num_tokens, index.num_prompt_tokens, selection.advantages_R, selection.used_R):
        digest.update(np.ascontiguousarray(array).tobytes())
    for step in steps:
        digest.update(step.groups.tobytes() + step.num_loss_tokens.to_bytes(8, "big"))
    return digest.hexdigest()


def micro_batches(index: Index, selection: Selection, step: Step, batch: BatchConfig) -> list[list[Row]]:
    """Cut a step's responses into forward passes of at most `micro_batch_tokens`, of like lengths together.

    A response longer than that is a micro-batch of its own.
    """
    rows = [
        Row(int(group), int(r - index.offsets[group]), int(index.num_prompt_tokens[group] + index.num_tokens[r]))
        for group in step.groups
        for r in range(index.offsets[group], index.offsets[group + 1])
        if selection.trained_R[r]
    ]
    rows.sort(key=lambda row: -row.length)
    cuts: list[list[Row]] = []
    tokens = 0
    for row in rows:
        # rows come longest first, so a padded micro-batch is as wide as its first row
        width = cuts[-1][0].length if cuts and batch.layout == "padded" else row.length
        if not cuts or tokens + width > batch.micro_batch_tokens:
            cuts.append([])
            tokens, width = 0, row.length
        cuts[-1].append(row)
        tokens += width
    return cuts
