"""The plan: coverage, N against a naive count, budgets, windows, hashes, and what is refused."""

import dataclasses
import time

import numpy as np
import pytest
from training_helpers import make_index, random_groups

from gftdata.errors import UserError
from gftdata.index import Index
from gfttrain.advantage import group_advantages
from gfttrain.config import BatchConfig, FilterConfig, ObjectiveConfig
from gfttrain.plan import (
    Cost,
    Layout,
    LayoutTotals,
    Selection,
    Step,
    check_context,
    check_selection,
    lay_out,
    layout_totals,
    make_schedule,
    pass_rate,
    schedule_hash,
    select,
    shuffled_groups,
)

GFT = ObjectiveConfig()


def responses_of(index: Index, group: int) -> list[tuple[str, float, int]]:
    return [
        (index.source_names[index.source_codes[r]], float(index.rewards[r]), int(index.num_tokens[r]))
        for r in range(index.offsets[group], index.offsets[group + 1])
    ]


def schedule(
    index: Index, selection: Selection, *, seed: int = 0, epochs: int = 1, skip: bool = False, **batch: int
) -> tuple[Step, ...]:
    return make_schedule(
        index, selection, BatchConfig(**batch), seed=seed, epochs=epochs, max_steps=None, skip_unjudged=skip
    )


@pytest.fixture(scope="module")
def index() -> Index:
    return make_index(random_groups(np.random.default_rng(0), 101), prompt_tokens=np.arange(101) % 13 + 1)


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("size", [1, 8, 64, 200])
def test_every_group_once_an_epoch(index: Index, size: int, epochs: int) -> None:
    steps = schedule(index, select(index, GFT), epochs=epochs, groups_per_step=size, shuffle_row_groups=3)
    assert {step.epoch for step in steps} == set(range(epochs))
    for epoch in range(epochs):
        own = [step.groups for step in steps if step.epoch == epoch]
        assert sorted(np.concatenate(own).tolist()) == list(range(101))
        assert [len(groups) for groups in own[:-1]] == [size] * (len(own) - 1) and 0 < len(own[-1]) <= size


def test_a_seed_decides_the_order(index: Index) -> None:
    def orders(seed: int) -> list[list[int]]:
        steps = schedule(index, select(index, GFT), seed=seed, epochs=2, groups_per_step=101)
        return [step.groups.tolist() for step in steps]

    assert orders(0) == orders(0)
    assert orders(0) != orders(1)
    first, second = orders(0)
    assert first != second  # another order every epoch
    assert first != list(range(101))


def test_max_steps_is_a_prefix(index: Index) -> None:
    selection = select(index, GFT)
    batch = BatchConfig(groups_per_step=10)
    whole = make_schedule(index, selection, batch, seed=0, epochs=2, max_steps=None, skip_unjudged=False)
    for count in (1, 11, 13, 100):
        part = make_schedule(index, selection, batch, seed=0, epochs=2, max_steps=count, skip_unjudged=False)
        assert len(part) == min(count, len(whole))
        assert [s.groups.tolist() for s in part] == [s.groups.tolist() for s in whole[:count]]


@pytest.mark.parametrize(
    "objective",
    [
        GFT,
        ObjectiveConfig(sources=("expert", "self")),
        ObjectiveConfig(sources=("teacher",), advantage="one"),
        ObjectiveConfig(advantage="one", min_reward=1.0),
        ObjectiveConfig(kl_coef=0.1),
    ],
    ids=["gft", "no mix", "teacher", "rft", "kl"],
)
def test_n_is_the_naive_count(index: Index, objective: ObjectiveConfig) -> None:
    wanted = [s.replace("teacher", "teacher:a") for s in objective.sources]
    seen = {"unjudged": 0, "unused": 0, "zero-signal": 0}
    for step in schedule(index, select(index, objective), groups_per_step=7):
        count = 0
        for group in step.groups:
            used = []
            for source, reward, tokens in responses_of(index, group):
                seen["unjudged"] += np.isnan(reward)
                seen["unused"] += source not in wanted
                if source not in wanted or np.isnan(reward):
                    continue
                if objective.min_reward is not None and reward < objective.min_reward:
                    continue
                used.append(reward)
                count += tokens
            seen["zero-signal"] += len(used) > 1 and len(set(used)) == 1
        assert step.num_loss_tokens == count
    assert seen["unjudged"] and (seen["unused"] or len(wanted) == 3) and seen["zero-signal"]


def test_advantages_are_those_of_the_used_responses(index: Index) -> None:
    selection = select(index, ObjectiveConfig(sources=("expert", "self")))
    for group in range(index.num_groups):
        responses = responses_of(index, group)
        rewards = [None if np.isnan(r) else r for _, r, _ in responses]
        used = [source in ("expert", "self") for source, _, _ in responses]
        here = slice(index.offsets[group], index.offsets[group + 1])
        np.testing.assert_allclose(selection.advantages_R[here], group_advantages(rewards, used), atol=1e-12)
        assert selection.used_R[here].tolist() == [u and r is not None for u, r in zip(used, rewards, strict=True)]


@pytest.mark.parametrize("objective", [GFT, ObjectiveConfig(kl_coef=0.1, advantage_floor=-1.0)])
def test_a_selection_does_not_depend_on_how_groups_are_taken_together(
    index: Index, objective: ObjectiveConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = FilterConfig(min_pass=0.2, max_response_tokens=30)
    whole = select(index, objective, kept)
    for size in (1, 7, 100):
        monkeypatch.setattr("gfttrain.plan.BLOCK_GROUPS", size)
        parts = select(index, objective, kept)
        for field in dataclasses.fields(Selection):
            np.testing.assert_array_equal(getattr(parts, field.name), getattr(whole, field.name), strict=True)
    assert len(select(make_index([]), objective).used_R) == 0


def test_groups_without_signal_are_not_trained_but_counted() -> None:
    index = make_index([[("self", 1.0, 3), ("self", 1.0, 4)], [("self", 1.0, 5), ("self", 0.0, 6), ("self", None, 7)]])
    selection = select(index, GFT)
    assert selection.trained_R.tolist() == [False, False, True, True, False]
    assert selection.loss_tokens_G.tolist() == [7, 11]
    with_kl = select(index, ObjectiveConfig(kl_coef=0.1))  # a KL penalty gives them a gradient
    assert with_kl.trained_R.tolist() == [True, True, True, True, False]
    assert with_kl.loss_tokens_G.tolist() == [7, 11]


def test_one_teacher_by_name() -> None:
    index = make_index([[("teacher:a", 1.0, 1), ("teacher:b", 0.0, 1), ("expert", 1.0, 1)]])
    assert select(index, ObjectiveConfig(sources=("teacher:b",))).used_R.tolist() == [False, True, False]
    assert select(index, ObjectiveConfig(sources=("teacher",))).used_R.tolist() == [True, True, False]
    assert select(index, ObjectiveConfig(sources=("teacher:missing",))).used_R.tolist() == [False] * 3


def test_min_reward_keeps_the_threshold_itself() -> None:
    index = make_index([[("self", 0.0, 1), ("self", 0.5, 1), ("self", 1.0, 1), ("self", None, 1)]])
    chosen = select(index, ObjectiveConfig(advantage="one", min_reward=0.5))
    assert chosen.used_R.tolist() == [False, True, True, False]
    assert chosen.advantages_R.tolist() == [0.0, 1.0, 1.0, 0.0]
    # a negative threshold must not let an unjudged response in
    assert select(index, ObjectiveConfig(advantage="one", min_reward=-9.0)).used_R.tolist() == [True] * 3 + [False]


COST = Cost(per_token=100.0, per_pair=1.0, per_response_token=10.0)


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("layout", ["shared_prefix", "packed", "padded"])
@pytest.mark.parametrize("budget", [1, 60, 200, 10**6])
def test_a_layout_covers_every_trained_response_once_within_the_budget(
    index: Index, budget: int, layout: str, num_ranks: int
) -> None:
    batch = BatchConfig.model_validate({"groups_per_step": 20, "micro_batch_tokens": budget, "layout": layout})
    selection = select(index, GFT)
    for step in schedule(index, selection, groups_per_step=20):
        ranks = lay_out(index, selection, step, batch, COST, num_ranks)
        assert len(ranks) == num_ranks and len({len(packs) for packs in ranks}) == 1
        packs = [pack for rank in ranks for pack in rank]
        pieces = [piece for pack in packs for piece in pack]
        expected = [
            (int(g), int(r))
            for g in step.groups
            for r in range(index.offsets[g], index.offsets[g + 1])
            if selection.trained_R[r]
        ]
        assert sorted((piece.group, r) for piece in pieces for r in piece.responses) == sorted(expected)
        for piece in pieces:
            inside = sum(int(index.num_tokens[r]) - 1 for r in piece.responses)
            assert piece.num_tokens == index.num_prompt_tokens[piece.group] + inside
            assert len(piece.responses) == 1 or layout == "shared_prefix"
        for pack in packs:
            sizes = [piece.num_tokens for piece in pack]
            size = len(sizes) * max(sizes, default=0) if layout == "padded" else sum(sizes)
            assert size <= budget or (len(pack) == 1 and len(pack[0].responses) == 1)
        if budget == 10**6:
            assert len(packs) == (num_ranks if expected else 0)


def test_a_group_stays_together_where_it_fits() -> None:
    index = make_index([[("self", float(k % 2), 10) for k in range(8)]], prompt_tokens=50)
    selection = select(index, GFT)
    (step,) = schedule(index, selection)
    ((pack,),) = lay_out(index, selection, step, BatchConfig(), COST)
    (piece,) = pack
    assert piece.responses == tuple(range(8)) and piece.num_tokens == 50 + 8 * 9
    ((*packs,),) = lay_out(index, selection, step, BatchConfig(micro_batch_tokens=80), COST)
    assert sorted(len(piece.responses) for pack in packs for piece in pack) == [2, 3, 3]


def test_cost_is_counted_token_by_token() -> None:
    prompt, lengths = 5, [3, 1, 4]
    # position by position: the prompt's, then each response's without its last token
    pairs = sum(range(1, prompt + 1))
    for length in lengths:
        pairs += sum(prompt + t for t in range(1, length))
    positions, flops = COST.of(prompt, lengths)
    assert positions == prompt + 2 + 0 + 3
    assert flops == 100.0 * positions + pairs + 10.0 * sum(lengths)


def test_ranks_are_balanced_by_cost() -> None:
    rng = np.random.default_rng(0)
    groups = [[("self", float(k % 2), int(t)) for k, t in enumerate(rng.integers(10, 400, 8))] for _ in range(64)]
    index = make_index(groups, prompt_tokens=rng.integers(10, 300, 64).tolist())
    selection = select(index, GFT)
    (step,) = schedule(index, selection)
    for num_ranks in (2, 4, 8):
        totals = layout_totals(index, selection, [step], BatchConfig(micro_batch_tokens=4096), COST, num_ranks)
        assert totals.flops / num_ranks / totals.slowest_rank_flops > 0.97


def test_totals_of_a_layout() -> None:
    index = make_index([[("self", 1.0, 10), ("self", 0.0, 20)], [("self", 1.0, 5), ("self", 1.0, 5)]], prompt_tokens=7)
    selection = select(index, GFT)
    (step,) = schedule(index, selection)

    def totals(layout: Layout) -> LayoutTotals:
        return layout_totals(index, selection, [step], BatchConfig(layout=layout), COST, 1)

    shared, packed, padded = totals("shared_prefix"), totals("packed"), totals("padded")
    assert shared.response_tokens == packed.response_tokens == padded.response_tokens == 30  # no zero-signal group
    assert shared.real_positions == shared.computed_positions == shared.largest_micro_batch == 7 + 9 + 19
    assert packed.real_positions == packed.computed_positions == shared.unshared_positions == 14 + 9 + 19
    assert padded.computed_positions == 2 * 26 and padded.real_positions == 42
    assert shared.prefix_saving == pytest.approx(7 / 42) and packed.prefix_saving == 0
    assert shared.packing_efficiency == 1 and padded.packing_efficiency == pytest.approx(42 / 52)


def test_the_schedule_knows_no_ranks_and_no_layout(index: Index) -> None:
    selection = select(index, GFT)
    hashes = {
        schedule_hash(
            index, selection, schedule(index, selection, groups_per_step=20, micro_batch_tokens=budget), ["a"]
        )
        for budget in (50, 5000)
    }
    assert len(hashes) == 1


def test_a_step_without_signal_has_no_micro_batch() -> None:
    index = make_index([[("self", 1.0, 3), ("self", 1.0, 4)]])
    selection = select(index, GFT)
    (step,) = schedule(index, selection)
    assert step.num_loss_tokens == 7
    assert lay_out(index, selection, step, BatchConfig(), COST, 2) == ((), ())


def test_filter_by_pass_rate() -> None:
    def group(passed: int, of: int) -> list[tuple[str, float | None, int]]:
        return [("expert", 1.0, 3), *[("self", float(k < passed), 2) for k in range(of)]]

    index = make_index([group(0, 4), group(1, 4), group(3, 4), group(4, 4), [("expert", 1.0, 1)]])
    selection = select(index, GFT, FilterConfig(min_pass=0.25, max_pass=0.75))
    assert selection.kept_G.tolist() == [False, True, True, False, False]
    steps = schedule(index, selection)
    assert sorted(steps[0].groups.tolist()) == [1, 2] and steps[0].num_loss_tokens == 22
    everything = select(index, GFT, FilterConfig())
    assert everything.kept_G.all()
    of_expert = select(index, GFT, FilterConfig(min_pass=1.0, pass_sources=("expert",)))
    assert of_expert.kept_G.all()
    with pytest.raises(UserError, match=r"filter leaves none of 5 groups"):
        nothing = select(index, GFT, FilterConfig(min_pass=0.9, max_pass=0.95))
        check_selection(index, nothing, GFT, skip_unjudged=False)


def test_filter_by_length_comes_before_the_advantages() -> None:
    index = make_index(
        [[("self", 1.0, 2), ("self", 0.0, 9), ("self", 0.0, 3)], [("self", 1.0, 2), ("self", 0.0, 2)]],
        prompt_tokens=[5, 50],
    )
    selection = select(index, GFT, FilterConfig(max_prompt_tokens=10, max_response_tokens=8))
    assert selection.kept_G.tolist() == [True, False]
    assert selection.used_R.tolist() == [True, False, True, False, False]
    expected = group_advantages([1.0, 0.0])
    np.testing.assert_allclose(selection.advantages_R, [expected[0], 0, expected[1], 0, 0])


def test_a_floor_under_the_advantages() -> None:
    rewards = [("self", 1.0, 2)] * 7 + [("self", 0.0, 2)]
    index = make_index([rewards])
    assert select(index, GFT).advantages_R.min() == pytest.approx(-2.47, abs=0.01)
    floored = select(index, ObjectiveConfig(advantage_floor=-1.0)).advantages_R
    assert floored.min() == -1.0 and floored.max() == select(index, GFT).advantages_R.max()


def test_what_is_longer_than_the_context_is_named() -> None:
    index = make_index([[("self", 1.0, 3), ("self", 0.0, 100)], [("self", 1.0, 200), ("self", 0.0, 5)]])
    selection = select(index, GFT)
    check_context(index, selection, 205)
    check_context(index, selection, None)
    with pytest.raises(
        UserError, match=r"1 responses are.*longer than the 204 positions.*205, is of row 1 of row group 0"
    ):
        check_context(index, selection, 204)


def test_pass_rate_of_sources() -> None:
    index = make_index([[("self", 1.0, 2), ("self", 0.0, 2), ("self", None, 2), ("expert", 1.0, 1)]])
    assert pass_rate(index, ("self",)) == 0.5 and pass_rate(index, ("expert",)) == 1.0
    assert pass_rate(index, ("teacher",)) is None


@pytest.mark.parametrize("window", [1, 2, 3, 100])
def test_shuffling_stays_within_windows_of_row_groups(window: int) -> None:
    index = make_index([[("self", 1.0, 1)]] * 60, row_group=4)  # 15 row groups
    for seed in range(5):
        order = shuffled_groups(index, window, np.random.default_rng(seed))
        assert sorted(order.tolist()) == list(range(60))
        row_groups = (order // 4).tolist()
        size = 4 * window
        pieces = [set(row_groups[start : start + size]) for start in range(0, 60, size)]
        assert all(len(piece) <= window for piece in pieces)  # a window at a time
        assert sum(len(piece) for piece in pieces) == 15  # and none of it again later
    mixed = shuffled_groups(index, window, np.random.default_rng(0)) // 4
    assert (np.diff(mixed) != 0).sum() > 14 or window == 1  # groups of one window are mixed


def test_the_hash_speaks_for_what_is_trained(index: Index) -> None:
    def digest(
        changed: Index,
        *,
        seed: int = 0,
        objective: ObjectiveConfig = GFT,
        size: int = 8,
        shards: tuple[str, ...] = ("a",),
    ) -> str:
        selection = select(changed, objective)
        return schedule_hash(changed, selection, schedule(changed, selection, seed=seed, groups_per_step=size), shards)

    original = digest(index)
    assert digest(index) == original
    rewards = index.rewards.copy()
    place = int(np.flatnonzero(rewards == 0)[0])
    rewards[place] = 1.0
    tokens = index.num_tokens.copy()
    tokens[place] += 1
    prompts = index.num_prompt_tokens.copy()
    prompts[0] += 1
    others = [
        digest(dataclasses.replace(index, rewards=rewards)),
        digest(dataclasses.replace(index, num_tokens=tokens)),
        digest(dataclasses.replace(index, num_prompt_tokens=prompts)),
        digest(index, seed=1),
        digest(index, shards=("b",)),
        digest(index, size=9),
        digest(index, objective=ObjectiveConfig(sources=("self",))),
    ]
    assert len({original, *others}) == len(others) + 1


def test_a_group_without_judgement_is_an_error_or_skipped() -> None:
    index = make_index(
        [[("self", 1.0, 2), ("self", 0.0, 2)], [("self", None, 3), ("expert", None, 4)], [("self", 0.0, 5)]]
    )
    selection = select(index, GFT)
    with pytest.raises(UserError, match=r"1 of 3 groups have no judged.* row 1 of row group 0 in imaginary.parquet"):
        check_selection(index, selection, GFT, skip_unjudged=False)
    check_selection(index, selection, GFT, skip_unjudged=True)
    kept = np.concatenate([step.groups for step in schedule(index, selection, skip=True, groups_per_step=1)])
    assert sorted(kept.tolist()) == [0, 2]


def test_no_used_response_is_an_error() -> None:
    index = make_index([[("self", 1.0, 2), ("self", 0.0, 2)]])
    for objective in (ObjectiveConfig(sources=("expert",)), ObjectiveConfig(advantage="one", min_reward=2.0)):
        with pytest.raises(UserError, match="no response is left to train on"):
            check_selection(index, select(index, objective), objective, skip_unjudged=False)
    everything_null = make_index([[("self", None, 2)]])
    with pytest.raises(UserError, match="no response is left"):
        check_selection(everything_null, select(everything_null, GFT), GFT, skip_unjudged=True)


def test_no_signal_is_an_error() -> None:
    index = make_index([[("self", 1.0, 2), ("self", 1.0, 2)], [("expert", 1.0, 3), ("self", 1.0, 1)]])
    with pytest.raises(UserError, match="no group has a training signal"):
        check_selection(index, select(index, GFT), GFT, skip_unjudged=False)
    for objective in (ObjectiveConfig(advantage="one"), ObjectiveConfig(kl_coef=0.1)):
        check_selection(index, select(index, objective), objective, skip_unjudged=False)


def test_a_data_set_of_single_responses_is_trained_by_its_rewards() -> None:
    index = make_index([[("expert", 1.0, 2)], [("expert", 0.0, 3)]])
    selection = select(index, GFT)
    assert selection.advantages_R.tolist() == [1.0, 0.0]
    assert selection.trained_R.tolist() == [True, False]


def test_a_hundred_thousand_groups() -> None:
    rng = np.random.default_rng(0)
    count, size = 100_000, 8
    index = Index(
        paths=make_index([]).paths,
        path_of_group=np.zeros(count, np.int32),
        row_group_of_group=(np.arange(count) // 64).astype(np.int32),
        row_of_group=(np.arange(count) % 64).astype(np.int32),
        offsets=np.arange(count + 1, dtype=np.int64) * size,
        num_prompt_tokens=rng.integers(10, 500, count).astype(np.int32),
        num_tokens=rng.integers(10, 2000, count * size).astype(np.int32),
        rewards=rng.integers(0, 2, count * size).astype(np.float32),
        source_names=("expert", "self"),
        source_codes=np.tile([0, *[1] * 7], count).astype(np.int32),
    )
    began = time.perf_counter()
    selection = select(index, GFT)
    steps = schedule(index, selection, groups_per_step=64)
    schedule_hash(index, selection, steps, [])
    cuts = lay_out(index, selection, steps[0], BatchConfig(), COST)
    print(f"planned in {time.perf_counter() - began:.2f} s")
    assert sum(step.num_loss_tokens for step in steps) == index.num_tokens.sum()
    assert sum(len(step.groups) for step in steps) == count
    assert cuts
