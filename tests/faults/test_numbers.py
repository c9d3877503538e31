"""Numbers: properties of advantage, objective, plan and schema over anything; and no step on what is no number.

What the formulas are is tested in tests/gfttrain and tests/gftdata; here is what must hold whatever goes in.
"""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from aid.demo_data import make_demo_data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gftdata.config import validate_config
from gftdata.errors import UserError
from gftdata.index import Index, check_short_columns
from gftdata.schema import check_rows, groups_to_table, parquet_options, table_to_groups
from gftdata.types import Completion, Group, Message, Prompt, Response, Verdict
from gfttrain import train as training
from gfttrain.advantage import group_advantages, segment_advantages
from gfttrain.config import BatchConfig, ObjectiveConfig, TrainConfig
from gfttrain.objective import gft_token_losses, token_losses
from gfttrain.plan import Cost, lay_out, make_schedule, select
from gfttrain.train import train

PROPERTY = "numbers: a property of {} holds"
POISON = "NaN or infinity in the model's outputs: the step stops before the optimizer moves"
SAMPLE, FULL = 60, 2000
FINITE = st.floats(-1e6, 1e6, width=32)
REWARDS = st.lists(st.one_of(st.none(), st.sampled_from([0.0, 1.0]), FINITE), min_size=1, max_size=12)


def property_test(count: int) -> Any:
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.differing_executors]
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=checks, database=None)


def holds(num_cases: Any, tried: Any, what: str, strategy: Any, check: Callable[..., None]) -> None:
    """Try a property on so many examples of a strategy."""
    count = num_cases(SAMPLE, FULL)
    tried(PROPERTY.format(what), count)
    property_test(count)(given(strategy)(check))()


def test_advantages_are_finite_bounded_and_do_not_depend_on_the_order(num_cases: Any, tried: Any) -> None:
    def check(case: tuple[list[float | None], Random]) -> None:
        rewards, shuffler = case
        found = group_advantages(rewards)
        assert np.isfinite(found).all()
        if len(rewards) > 1:  # of K values none is further from their mean than (K-1)/sqrt(K) deviations
            assert np.abs(found).max() <= (len(rewards) - 1) / math.sqrt(len(rewards)) * (1 + 1e-9)
        assert all(a == 0 for a, r in zip(found, rewards, strict=True) if r is None)
        order = list(range(len(rewards)))
        shuffler.shuffle(order)
        again = group_advantages([rewards[i] for i in order])
        np.testing.assert_allclose(again, found[order], rtol=1e-6, atol=1e-9)

    holds(num_cases, tried, "advantages", st.tuples(REWARDS, st.randoms(use_true_random=False)), check)


def test_advantages_keep_the_order_of_rewards_and_forget_a_scale(num_cases: Any, tried: Any) -> None:
    values = st.lists(st.integers(-20, 20), min_size=2, max_size=12)

    def check(case: tuple[list[int], int, int]) -> None:
        rewards, factor, shift = case
        found = group_advantages([float(r) for r in rewards])
        for a, r in zip(found, rewards, strict=True):
            for b, s in zip(found, rewards, strict=True):
                assert (a < b) == (r < s)
        scaled = group_advantages([float(r * factor + shift) for r in rewards])
        np.testing.assert_allclose(scaled, found, atol=1e-5)  # but for eps

    holds(num_cases, tried, "advantages", st.tuples(values, st.integers(1, 50), st.integers(-50, 50)), check)


def test_advantages_of_groups_together_are_those_of_each_alone(num_cases: Any, tried: Any) -> None:
    def check(groups: list[list[float | None]]) -> None:
        flat = np.array([np.nan if r is None else r for group in groups for r in group])
        offsets = np.cumsum([0, *map(len, groups)])
        together = segment_advantages(flat, offsets)
        alone = np.concatenate([group_advantages(group) for group in groups])
        np.testing.assert_allclose(together, alone, rtol=1e-9, atol=1e-12)

    holds(num_cases, tried, "advantages", st.lists(REWARDS, min_size=1, max_size=6), check)


LOGPROBS = st.lists(st.floats(-200.0, -1e-12), min_size=1, max_size=20)


def test_the_gradient_of_a_token_is_bounded_by_its_advantage(num_cases: Any, tried: Any) -> None:
    """d loss / d log pi = -A C(pi), and C is at most 1: however unlikely the token, no gradient explodes."""

    def check(case: tuple[list[float], float, float]) -> None:
        values, advantage, tau = case
        logprobs = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        losses = gft_token_losses(logprobs, torch.full_like(logprobs, advantage).detach(), tau)
        (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
        pi = logprobs.detach().exp()
        expected = -advantage * torch.where(pi < tau, pi, torch.ones_like(pi))
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)
        assert (gradient.abs() <= abs(advantage) + 1e-12).all() and losses.isfinite().all()

    strategy = st.tuples(LOGPROBS, st.floats(-5, 5), st.floats(0, 2))
    holds(num_cases, tried, "objectives", strategy, check)


OBJECTIVES = [
    ObjectiveConfig(),
    ObjectiveConfig(tau=0.0),
    ObjectiveConfig(tau=2.0, kl_coef=0.05),
    ObjectiveConfig(coefficient="clipped_ratio"),
]


def test_every_objective_is_elementwise_and_finite(num_cases: Any, tried: Any) -> None:
    """What one token's loss is, no other token changes: no cut into micro-batches can."""

    def check(case: tuple[list[float], list[float], int, int]) -> None:
        values, others, cut, number = case
        objective = OBJECTIVES[number]
        logprobs = torch.tensor(values, dtype=torch.float64)
        reference = torch.tensor([others[i % len(others)] for i in range(len(values))], dtype=torch.float64)
        reference = torch.maximum(reference, logprobs - 30.0)  # the ratio of a run that has not lost its way
        advantages = torch.linspace(-2, 2, len(values), dtype=torch.float64)
        whole = token_losses(objective, logprobs, advantages, reference, reference)
        at = cut % len(values)
        parts = [
            token_losses(objective, logprobs[s], advantages[s], reference[s], reference[s])
            for s in (slice(0, at), slice(at, None))
        ]
        assert torch.equal(torch.cat(parts), whole) and whole.isfinite().all()

    strategy = st.tuples(LOGPROBS, LOGPROBS, st.integers(0, 50), st.integers(0, len(OBJECTIVES) - 1))
    holds(num_cases, tried, "objectives", strategy, check)


@st.composite
def indexes(draw: Any) -> Index:
    """Any index of up to 20 groups in up to 3 shards."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=20))
    total, groups = sum(sizes), len(sizes)
    names = ("expert", "teacher:a", "self")
    integers = st.lists(st.integers(1, 60), min_size=total, max_size=total)
    rewards = draw(st.lists(st.sampled_from([0.0, 1.0, 0.5, math.nan]), min_size=total, max_size=total))
    codes = draw(st.lists(st.integers(0, 2), min_size=total, max_size=total))
    prompts = draw(st.lists(st.integers(1, 60), min_size=groups, max_size=groups))
    number = np.arange(groups, dtype=np.int32)
    return Index(
        paths=(Path("a"), Path("b"), Path("c")),
        path_of_group=number // 7,
        row_group_of_group=(number % 7) // 3,
        row_of_group=(number % 7) % 3,
        offsets=np.cumsum([0, *sizes]).astype(np.int64),
        num_prompt_tokens=np.array(prompts, np.int32),
        num_tokens=np.array(draw(integers), np.int32),
        rewards=np.array(rewards, np.float32),
        source_names=names,
        source_codes=np.array(codes, np.int32),
    )


def test_a_plan_trains_each_response_once_and_knows_its_tokens(num_cases: Any, tried: Any) -> None:
    """Over any index, batch size, layout and number of ranks: an epoch is every used response exactly once, with N."""

    def check(case: tuple[Index, int, int, int, int, Any]) -> None:
        index, size, budget, ranks, seed, layout = case
        objective = ObjectiveConfig()
        selection = select(index, objective)
        batch = BatchConfig(groups_per_step=size, micro_batch_tokens=budget, layout=layout, shuffle_row_groups=2)
        steps = make_schedule(index, selection, batch, seed=seed, epochs=1, max_steps=None, skip_unjudged=True)
        groups = np.concatenate([step.groups for step in steps]) if steps else np.empty(0, np.int64)
        assert sorted(groups.tolist()) == np.flatnonzero(selection.judged_G).tolist()
        trained: list[int] = []
        for step in steps:
            of_step = np.concatenate([np.arange(index.offsets[g], index.offsets[g + 1]) for g in step.groups])
            used = of_step[selection.used_R[of_step]]
            assert step.num_loss_tokens == int(index.num_tokens[used].sum())
            layout_of_step = lay_out(index, selection, step, batch, Cost(1.0, 1.0, 1.0), ranks)
            assert len(layout_of_step) == ranks and len({len(rank) for rank in layout_of_step}) == 1
            found = [r for rank in layout_of_step for pack in rank for piece in pack for r in piece.responses]
            assert set(found) <= set(of_step.tolist())
            trained += found
        assert sorted(trained) == np.flatnonzero(selection.trained_R).tolist()
        left_out = selection.advantages_R[~selection.trained_R]
        assert (left_out == 0).all()

    strategy = st.tuples(
        indexes(),
        st.integers(1, 25),
        st.integers(1, 500),
        st.integers(1, 4),
        st.integers(0, 2**32 - 1),
        st.sampled_from(["shared_prefix", "packed", "padded"]),
    )
    holds(num_cases, tried, "plans", strategy, check)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
IDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=8)


@st.composite
def responses(draw: Any) -> Response:
    ids = draw(IDS)
    logprobs = st.lists(st.floats(-1e4, 0.0, width=32), min_size=len(ids), max_size=len(ids))
    behavior = draw(st.one_of(st.none(), logprobs))
    reward = draw(st.one_of(st.none(), FINITE))
    return Response(
        Completion(
            source=draw(st.sampled_from(["expert", "self", "teacher:x"])),
            text=draw(TEXT),
            response_ids=np.array(ids, np.int32),
            finish_reason=draw(st.sampled_from(["stop", "length", "given"])),
            model=draw(TEXT),
            seed=draw(st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1))),
            behavior_logprobs=None if behavior is None else np.array(behavior, np.float32),
        ),
        Verdict(reward, "timeout" if reward is None else "ok"),
        np.array(draw(logprobs), np.float32),
    )


@st.composite
def groups(draw: Any) -> Group:
    messages = draw(st.lists(st.builds(Message, TEXT, TEXT), min_size=1, max_size=3))
    prompt = Prompt(
        prompt_id=draw(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8)),
        source_id=draw(st.one_of(st.none(), TEXT)),
        messages=tuple(messages),
        ground_truth=draw(st.one_of(st.none(), TEXT)),
        data_source=draw(TEXT),
        given=(),
        extra=draw(TEXT),
        question=messages[-1].content,
    )
    return Group(prompt, np.array(draw(IDS), np.int32), tuple(draw(st.lists(responses(), max_size=4))))


def test_groups_survive_the_file_whatever_is_in_them(num_cases: Any, tried: Any, tmp_path: Path) -> None:
    """To the last bit, and what is written is found sound by those who read it."""
    path = tmp_path / "groups.parquet"

    def check(written: list[Group]) -> None:
        pq.write_table(groups_to_table(written), path, **parquet_options("float32"))
        table = pq.read_table(path)
        assert check_rows(table, "f") == []
        check_short_columns(table.combine_chunks(), "f")
        for found, expected in zip(table_to_groups(table), written, strict=True):
            assert found.prompt == expected.prompt
            assert found.prompt_ids.tobytes() == expected.prompt_ids.tobytes()
            for one, other in zip(found.responses, expected.responses, strict=True):
                mine, yours = one.completion, other.completion
                assert one.verdict.status == other.verdict.status and one.verdict.reward == other.verdict.reward
                assert (mine.source, mine.text, mine.finish_reason) == (yours.source, yours.text, yours.finish_reason)
                assert (mine.model, mine.seed) == (yours.model, yours.seed)
                assert mine.response_ids.tobytes() == yours.response_ids.tobytes()
                assert one.ref_logprobs.tobytes() == other.ref_logprobs.tobytes()
                a, b = mine.behavior_logprobs, yours.behavior_logprobs
                assert (a is None) == (b is None) and (a is None or b is None or a.tobytes() == b.tobytes())

    holds(num_cases, tried, "the schema's round trip", st.lists(groups(), max_size=3), check)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo_data(tmp_path_factory.mktemp("numbers"), 16)


Hook = Callable[[Any, torch.Tensor], torch.Tensor]
WHERE = ("hidden states", "one hidden value", "logits", "one token's loss", "gradient only", "one gradient value")
VALUES = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("where", WHERE)
def test_what_is_no_number_moves_nothing(
    where: str, data: Path, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: Random, tried: Any
) -> None:
    """In the second step: the run ends with an error that names it, and the checkpoint has the weights of the first."""
    tried(POISON, len(VALUES))
    for value in VALUES:
        out = tmp_path / f"{where} {value}".replace(" ", "-")
        run = {"model": str(demo / "model"), "data": str(data), "out": str(out), "device": "cpu"}
        short = {"max_steps": 3, "batch": {"groups_per_step": 4}, "checkpoint": {"every_steps": 99}}
        config = validate_config(TrainConfig, run | short, "test")
        seen = poisoned(monkeypatch, where, value)
        with pytest.raises(UserError, match=r"step 2: .*nothing was updated, and the state before this step is saved"):
            train(config)
        monkeypatch.undo()
        assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000001"]
        assert len((out / "metrics.jsonl").read_text().splitlines()) == 1 and not (out / "final").exists()
        before, after = seen["before"], seen["after"]
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        assert seen["optimizer steps"] == 1
        shutil.rmtree(out)


def poisoned(monkeypatch: pytest.MonkeyPatch, where: str, value: float) -> dict[str, Any]:
    """Put a value into the second step; what is seen: weights before it and after the run, steps of the optimizer."""
    seen: dict[str, Any] = {"optimizer steps": 0}
    load, token_losses, means = training.load_for_training, training.token_losses, training.metrics.TokenSums.means
    step = torch.optim.AdamW.step

    def now() -> bool:
        return bool(seen["optimizer steps"] == 1)

    def loaded(*arguments: Any) -> Any:
        policy = load(*arguments)
        seen["policy"] = policy
        first = next(policy.parameters())

        def forward_hook(module: Any, inputs: Any, output: Any) -> Any:
            if now() and policy.training and torch.is_grad_enabled():
                hidden = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
                if where == "hidden states":
                    hidden = hidden * value
                elif where == "one hidden value":
                    mask = torch.zeros_like(hidden)
                    mask.view(-1)[hidden.numel() // 2] = 1.0
                    hidden = torch.where(mask.bool(), torch.full_like(hidden, value), hidden)
                output.last_hidden_state = hidden
            return output

        def gradient_hook(gradient: torch.Tensor) -> torch.Tensor:
            if not now() or "gradient" not in where:
                return gradient
            spoiled = gradient.clone()
            spoiled.view(-1)[: 1 if where == "one gradient value" else None] = value
            return spoiled

        policy.model.base_model.register_forward_hook(forward_hook)
        first.register_hook(gradient_hook)
        return policy

    def losses(objective: Any, logprobs: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        if now() and where == "logits":
            logprobs = logprobs * value
        found = token_losses(objective, logprobs, *rest)
        if now() and where == "one token's loss" and "spoiled" not in seen and len(found):
            seen["spoiled"] = True
            mask = torch.zeros_like(found).bool()
            mask[0] = True
            found = torch.where(mask, torch.full_like(found, value), found)
        return found

    def stepped(optimizer: Any, *arguments: Any, **named: Any) -> Any:
        result = step(optimizer, *arguments, **named)
        seen["optimizer steps"] += 1
        seen["before"] = {name: p.detach().clone() for name, p in seen["policy"].named_parameters()}
        return result

    def counted(sums: Any, *arguments: Any, **named: Any) -> Any:
        seen["after"] = {name: p.detach() for name, p in seen["policy"].named_parameters()}
        return means(sums, *arguments, **named)

    monkeypatch.setattr(training, "load_for_training", loaded)
    monkeypatch.setattr(training, "token_losses", losses)
    monkeypatch.setattr(training.metrics.TokenSums, "means", counted)
    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)
    return seen
