"""Pure: index, objective, seed, epochs -> the schedule (step -> groups and N), and its layout on devices.

Two layers. The *schedule* is the same for any number of ranks; its hash is in every checkpoint. The *layout* cuts one
step into micro-batches and deals them to the ranks; it does not change the update. Shapes: G groups, R responses.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from gftdata.errors import UserError
from gftdata.index import Index
from gfttrain.advantage import segment_advantages
from gfttrain.config import BatchConfig, FilterConfig, ObjectiveConfig

Ints = npt.NDArray[np.int64]
Layout = Literal["shared_prefix", "packed", "padded"]
BLOCK_GROUPS = 2**15  # that `select` looks at together


@dataclass(frozen=True, slots=True)
class Selection:
    """What the objective makes of each response and group."""

    kept_G: npt.NDArray[np.bool_]  # what the filter leaves
    used_R: npt.NDArray[np.bool_]  # judged, of a source that the objective uses, not too long, of a kept group
    advantages_R: npt.NDArray[np.float64]  # 0 where not used
    trained_R: npt.NDArray[np.bool_]  # goes through the model
    judged_G: npt.NDArray[np.bool_]  # some response could be judged
    loss_tokens_G: Ints  # response tokens of the used responses


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step."""

    epoch: int
    groups: Ints  # indices into the Index
    num_loss_tokens: int  # N


@dataclass(frozen=True, slots=True)
class Piece:
    """A prompt with responses of its group that are computed together."""

    group: int  # index into the Index
    responses: tuple[int, ...]  # indices into the Index's responses
    num_tokens: int  # positions it takes in a forward pass
    cost: float  # FLOPs, forward and backward


Pack = tuple[Piece, ...]  # one micro-batch; empty where a rank has nothing to do


@dataclass(frozen=True, slots=True)
class Cost:
    """FLOPs of training, forward and backward, by what they grow with. `model.py` fills it in for a model."""

    per_token: float  # a position through the layers
    per_pair: float  # a query looking at a key, over all layers and heads
    per_response_token: float  # a token through the head

    def of(self, num_prompt: int, response_lengths: Sequence[int]) -> tuple[int, float]:
        """Positions and FLOPs of a prompt and the responses to it, each of which goes in without its last token."""
        inside = [length - 1 for length in response_lengths]
        positions = num_prompt + sum(inside)
        pairs = num_prompt * (num_prompt + 1) / 2 + sum(t * num_prompt + t * (t + 1) / 2 for t in inside)
        flops = self.per_token * positions + self.per_pair * pairs + self.per_response_token * sum(response_lengths)
        return positions, flops


def select(index: Index, objective: ObjectiveConfig, kept: FilterConfig | None = None) -> Selection:
    """Which responses are used, with which advantages. See METHOD: null rewards and unused sources are left out first.

    Groups with A = 0 everywhere have no gradient: they count in N and are not computed, unless a KL penalty gives them
    one.
    """
    # in blocks of groups, so that what is in between takes no more memory for a large data set than for a small one
    firsts = range(0, max(1, index.num_groups), BLOCK_GROUPS)
    parts = [_select(_block(index, first, first + BLOCK_GROUPS), objective, kept or FilterConfig()) for first in firsts]
    names = [field.name for field in fields(Selection)]
    return Selection(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def _block(index: Index, first: int, last: int) -> Index:
    """The groups from `first` up to `last`, by themselves."""
    offsets = index.offsets[first : last + 1]
    groups, responses = slice(first, last), slice(int(offsets[0]), int(offsets[-1]))
    return replace(
        index,
        path_of_group=index.path_of_group[groups],
        row_group_of_group=index.row_group_of_group[groups],
        row_of_group=index.row_of_group[groups],
        offsets=offsets - offsets[0],
        num_prompt_tokens=index.num_prompt_tokens[groups],
        num_tokens=index.num_tokens[responses],
        rewards=index.rewards[responses],
        source_codes=index.source_codes[responses],
    )


def _select(index: Index, objective: ObjectiveConfig, kept: FilterConfig) -> Selection:
    group_R = np.repeat(np.arange(index.num_groups), np.diff(index.offsets))
    judged_R = np.isfinite(index.rewards)
    kept_G = _kept_groups(index, kept, group_R, judged_R)
    used_R = judged_R & _of_sources(index, objective.sources) & kept_G[group_R]
    if kept.max_response_tokens is not None:
        used_R &= index.num_tokens <= kept.max_response_tokens
    if objective.min_reward is not None:
        used_R &= np.nan_to_num(index.rewards, nan=-np.inf) >= objective.min_reward
    if objective.advantage == "group":
        advantages_R = segment_advantages(index.rewards, index.offsets, used_R)
    else:
        advantages_R = used_R.astype(np.float64)
    if objective.advantage_floor is not None:
        advantages_R = np.maximum(advantages_R, objective.advantage_floor)
    has_signal_G = np.bincount(group_R, weights=advantages_R != 0, minlength=index.num_groups) > 0
    trained_R = used_R if objective.kl_coef > 0 else used_R & has_signal_G[group_R]
    return Selection(
        kept_G=kept_G,
        used_R=used_R,
        advantages_R=advantages_R,
        trained_R=trained_R,
        judged_G=np.bincount(group_R, weights=judged_R, minlength=index.num_groups) > 0,
        loss_tokens_G=_sum_by(group_R, index.num_tokens * used_R, index.num_groups),
    )


def _kept_groups(
    index: Index, kept: FilterConfig, group_R: Ints, judged_R: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    kept_G = np.ones(index.num_groups, dtype=bool)
    if kept.max_prompt_tokens is not None:
        kept_G &= index.num_prompt_tokens <= kept.max_prompt_tokens
    if kept.min_pass > 0 or kept.max_pass < 1:
        counted_R = judged_R & _of_sources(index, kept.pass_sources)
        counts_G = np.bincount(group_R, weights=counted_R, minlength=index.num_groups)
        passed_G = np.bincount(group_R, weights=counted_R & (index.rewards == 1.0), minlength=index.num_groups)
        rate_G = np.divide(passed_G, counts_G, out=np.full(index.num_groups, np.nan), where=counts_G > 0)
        kept_G &= (rate_G >= kept.min_pass) & (rate_G <= kept.max_pass)  # NaN, nothing judged, is left out
    return kept_G


def _sum_by(group_R: Ints, values_R: npt.NDArray[np.int32], num_groups: int) -> Ints:
    return np.bincount(group_R, weights=values_R, minlength=num_groups).astype(np.int64)


def _of_sources(index: Index, sources: Sequence[str]) -> npt.NDArray[np.bool_]:
    wanted = [s in sources or (s.startswith("teacher:") and "teacher" in sources) for s in index.source_names]
    return np.array(wanted, dtype=bool)[index.source_codes] if wanted else np.ones(len(index.source_codes), bool)


def pass_rate(index: Index, sources: Sequence[str]) -> float | None:
    """Share of the judged responses of these sources with reward 1; None where there is none."""
    rewards = index.rewards[np.isfinite(index.rewards) & _of_sources(index, sources)]
    return float((rewards == 1.0).mean()) if len(rewards) else None


def check_selection(index: Index, selection: Selection, objective: ObjectiveConfig, *, skip_unjudged: bool) -> None:
    """Raise UserError where there is nothing to train on, or an unjudged group without leave to skip it."""
    teachers = [s for s in objective.sources if s.startswith("teacher:") and s not in index.source_names]
    if teachers:
        found = ", ".join(index.source_names)
        raise UserError(f"objective.sources names {teachers[0]}, which the data does not have; it has {found}")
    if not selection.kept_G.any():
        raise UserError(f"filter leaves none of {index.num_groups} groups; widen filter.min_pass, max_pass or lengths")
    unjudged_G = ~selection.judged_G & selection.kept_G
    unjudged = int(unjudged_G.sum())
    if unjudged and not skip_unjudged:
        raise UserError(
            f"{unjudged} of {index.num_groups} groups have no judged response (the first is "
            f"{index.place_of(int(np.flatnonzero(unjudged_G)[0]))}); set unjudged_groups=skip to leave them out"
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


def check_context(index: Index, selection: Selection, max_positions: int | None) -> None:
    """Raise UserError where a used prompt and response are longer than the model's context."""
    if max_positions is None or not selection.used_R.any():
        return
    group_R = np.repeat(np.arange(index.num_groups), np.diff(index.offsets))
    length_R = np.where(selection.used_R, index.num_prompt_tokens[group_R] + index.num_tokens, 0)
    longest = int(length_R.argmax())
    if length_R[longest] > max_positions:
        raise UserError(
            f"{int((length_R > max_positions).sum())} responses are, with their prompt, longer than the {max_positions}"
            f" positions of the model (the longest, {length_R[longest]}, is of {index.place_of(int(group_R[longest]))})"
            "; leave them out with filter.max_response_tokens and filter.max_prompt_tokens"
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
    taken_G = selection.kept_G & selection.judged_G if skip_unjudged else selection.kept_G
    for epoch in range(epochs):
        order = shuffled_groups(index, batch.shuffle_row_groups, np.random.default_rng([seed, epoch]))
        order = order[taken_G[order]]
        for start in range(0, len(order), batch.groups_per_step):
            if max_steps is not None and len(steps) == max_steps:
                return tuple(steps)
            groups = order[start : start + batch.groups_per_step]
            steps.append(Step(epoch, groups, int(selection.loss_tokens_G[groups].sum())))
    return tuple(steps)


def shuffled_groups(index: Index, window: int, rng: np.random.Generator) -> Ints:
    """All groups in random order, [G]: row groups are shuffled, then groups within windows of so many row groups.

    A reader that holds two windows decodes each row group once an epoch.
    """
    key_G = index.path_of_group.astype(np.int64) << 32 | index.row_group_of_group
    row_groups, of_G = np.unique(key_G, return_inverse=True)
    place = rng.permutation(len(row_groups))  # row group -> its place in the order
    window_G = place[of_G] // window
    return np.lexsort((rng.random(index.num_groups), window_G)).astype(np.int64)


def unscheduled_shards(index: Index, selection: Selection, steps: Sequence[Step]) -> tuple[int, ...]:
    """Shards with groups that are left out, and none in a step."""
    left_out = index.path_of_group[~(selection.kept_G & selection.judged_G)]
    taken = [np.unique(index.path_of_group[step.groups]) for step in steps]
    return tuple(np.setdiff1d(left_out, np.concatenate(taken) if taken else []).tolist())


def schedule_hash(index: Index, selection: Selection, steps: Sequence[Step], shard_hashes: Sequence[str]) -> str:
    """sha256 over what every step trains on: the shards' content, groups, advantages, N."""
    digest = hashlib.sha256("\n".join(shard_hashes).encode())
    for array in (index.offsets, index.num_tokens, index.num_prompt_tokens, selection.advantages_R, selection.used_R):
        digest.update(np.ascontiguousarray(array).tobytes())
    for step in steps:
        digest.update(step.groups.tobytes() + step.num_loss_tokens.to_bytes(8, "big"))
    return digest.hexdigest()


def lay_out(
    index: Index, selection: Selection, step: Step, batch: BatchConfig, cost: Cost, num_ranks: int = 1
) -> tuple[tuple[Pack, ...], ...]:
    """Cut a step into micro-batches of at most `batch.limit` tokens and deal them to ranks: [rank][micro-batch].

    Every rank gets the same number, filled up with empty ones, or FSDP would wait for ever. A response longer than the
    limit is a micro-batch of its own.
    """
    pieces = list(_pieces(index, selection, step, batch, cost))
    if batch.layout == "padded":
        return _deal(_padded_packs(pieces, batch.limit), num_ranks)
    return _deal(_packs(pieces, batch.limit, num_ranks), num_ranks)


def _pieces(index: Index, selection: Selection, step: Step, batch: BatchConfig, cost: Cost) -> Iterator[Piece]:
    shared, limit = batch.layout == "shared_prefix", batch.limit
    begins = index.offsets[step.groups]
    sizes = index.offsets[step.groups + 1] - begins
    number_R = np.repeat(np.arange(len(sizes)), sizes)  # of its group in the step
    response_R = np.arange(len(number_R)) + np.repeat(begins - (sizes.cumsum() - sizes), sizes)
    trained_R = selection.trained_R[response_R]
    counts = np.bincount(number_R[trained_R], minlength=len(sizes)).tolist()
    of_step = response_R[trained_R]
    every, every_length = of_step.tolist(), index.num_tokens[of_step].tolist()
    first = 0
    prompts = index.num_prompt_tokens[step.groups].tolist()
    for group, prompt, count in zip(step.groups.tolist(), prompts, counts, strict=True):
        responses, lengths = every[first : first + count], every_length[first : first + count]
        first += count
        start, positions = 0, prompt
        for number, length in enumerate(lengths):
            if number > start and (not shared or positions + length - 1 > limit):
                yield Piece(group, tuple(responses[start:number]), *cost.of(prompt, lengths[start:number]))
                start, positions = number, prompt
            positions += length - 1
        if responses:
            yield Piece(group, tuple(responses[start:]), *cost.of(prompt, lengths[start:]))


def _packs(pieces: Sequence[Piece], limit: int, multiple: int) -> list[Pack]:
    """As few packs of at most `limit` positions as fit, of like cost, their number a multiple of `multiple`.

    Longest-processing-time scheduling with a capacity: pieces in order of falling cost, each into the cheapest pack
    that has room; where one finds none, everything again with more packs.
    """
    if not pieces:
        return []
    order = sorted(pieces, key=lambda piece: -piece.cost)
    sizes = np.minimum([piece.num_tokens for piece in order], limit)
    count = _up(max(1, -(-int(sizes.sum()) // limit)), multiple)
    while True:
        members: list[list[Piece]] = [[] for _ in range(count)]
        costs, room = np.zeros(count), np.full(count, limit)
        for piece, size in zip(order, sizes.tolist(), strict=True):
            fits = room >= size
            if not fits.any():
                break
            chosen = int(np.where(fits, costs, np.inf).argmin())
            members[chosen].append(piece)
            costs[chosen] += piece.cost
            room[chosen] -= size
        else:
            return [tuple(pack) for pack in members if pack]
        count += multiple


def _padded_packs(pieces: Sequence[Piece], limit: int) -> list[Pack]:
    """Responses of like lengths together, a row each, as wide as the longest."""
    packs: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda piece: -piece.num_tokens):
        if not packs or (len(packs[-1]) + 1) * packs[-1][0].num_tokens > limit:
            packs.append([])
        packs[-1].append(piece)
    return [tuple(pack) for pack in packs]


def _deal(packs: Sequence[Pack], num_ranks: int) -> tuple[tuple[Pack, ...], ...]:
    """Packs to ranks, the dearest first, each to the rank that has least to do of those with a place left."""
    places = _up(len(packs), num_ranks) // num_ranks
    ranks: list[list[Pack]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for pack in sorted(packs, key=lambda pack: -_cost(pack)):
        rank = min((r for r in range(num_ranks) if len(ranks[r]) < places), key=lambda r: loads[r])
        ranks[rank].append(pack)
        loads[rank] += _cost(pack)
    return tuple(tuple(rank) + ((),) * (places - len(rank)) for rank in ranks)


def _cost(pack: Pack) -> float:
    return sum(piece.cost for piece in pack)


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


@dataclass(frozen=True, slots=True)
class LayoutTotals:
    """What a layout of some steps costs."""

    micro_batches: int  # over all ranks, empty ones included
    computed_positions: int  # padding included
    real_positions: int  # padding excluded
    unshared_positions: int  # what they would be with each response's prompt computed again
    response_tokens: int
    largest_micro_batch: int  # positions
    flops: float
    slowest_rank_flops: float  # summed over steps: balance is flops / ranks / this

    @property
    def packing_efficiency(self) -> float:
        """Share of the computed positions that are no padding."""
        return self.real_positions / max(1, self.computed_positions)

    @property
    def prefix_saving(self) -> float:
        """Share of the positions that need not be computed because prompts are shared."""
        return 1 - self.real_positions / max(1, self.unshared_positions)


def layout_totals(
    index: Index, selection: Selection, steps: Sequence[Step], batch: BatchConfig, cost: Cost, num_ranks: int
) -> LayoutTotals:
    """Add up the layouts of these steps."""
    count = computed = real = unshared = tokens = largest = 0
    flops = slowest = 0.0
    for step in steps:
        ranks = lay_out(index, selection, step, batch, cost, num_ranks)
        slowest += max(sum(_cost(pack) for pack in rank) for rank in ranks)
        for pack in (pack for rank in ranks for pack in rank):
            sizes = [piece.num_tokens for piece in pack]
            width = max(sizes, default=0) * len(pack) if batch.layout == "padded" else sum(sizes)
            largest = max(largest, width)
            count, computed, real, flops = count + 1, computed + width, real + sum(sizes), flops + _cost(pack)
            for piece in pack:
                prompt, responses = int(index.num_prompt_tokens[piece.group]), len(piece.responses)
                inside = piece.num_tokens - prompt  # each response without its last token
                tokens += inside + responses
                unshared += inside + responses * prompt
    return LayoutTotals(count, computed, real, unshared, tokens, largest, flops, slowest)
