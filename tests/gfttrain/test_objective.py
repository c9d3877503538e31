"""Objectives: values and gradients by hand on both sides of every threshold, and against losses of the logits."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gfttrain.config import ObjectiveConfig
from gfttrain.objective import (
    clipped_token_losses,
    gft_loss,
    gft_token_losses,
    kl_token_penalties,
    rectified_coefficient,
    token_losses,
)

FLOATS = [torch.float32, torch.float64]


def logs(*probs: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor([math.log(p) for p in probs], dtype=dtype).requires_grad_()


def everything(tensor: torch.Tensor) -> torch.Tensor:
    return torch.ones(tensor.shape, dtype=torch.bool)


def gradient_of(loss: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(loss.sum(), logprobs, retain_graph=True)
    return found


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("advantage", [1.5, -2.47, 0.0])
def test_gft_loss_on_both_sides_of_tau(advantage: float, dtype: torch.dtype) -> None:
    # below tau: -A pi log pi with gradient -A pi; above: -A log pi with gradient -A; both over N
    logprobs = logs(0.1, 0.69, 0.71, 1.0, dtype=dtype)
    advantages = torch.full((4,), advantage, dtype=dtype)
    loss = gft_loss(logprobs, advantages, everything(logprobs), tau=0.7, num_loss_tokens=5)
    by_hand = -advantage / 5 * (0.1 * math.log(0.1) + 0.69 * math.log(0.69) + math.log(0.71) + 0.0)
    gradient = [-advantage / 5 * c for c in (0.1, 0.69, 1.0, 1.0)]
    rtol = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(loss, torch.tensor(by_hand, dtype=dtype), rtol=rtol, atol=1e-15)
    torch.testing.assert_close(gradient_of(loss, logprobs), torch.tensor(gradient, dtype=dtype), rtol=rtol, atol=1e-15)


@pytest.mark.parametrize("dtype", FLOATS)
def test_exactly_at_tau_the_coefficient_is_one(dtype: torch.dtype) -> None:
    logprobs = logs(0.5, 0.25, dtype=dtype)
    for place, tau in enumerate(logprobs.detach().exp().tolist()):
        assert rectified_coefficient(logprobs, tau)[place] == 1.0
        above = math.nextafter(tau, 1.0) if dtype == torch.float64 else tau * (1 + 2**-22)
        assert rectified_coefficient(logprobs, above)[place] == pytest.approx(tau)


def test_default_tau_is_the_papers_best() -> None:
    logprobs = logs(0.69, 0.71)
    ones = torch.ones(2, dtype=torch.float64)
    default = gft_loss(logprobs, ones, everything(logprobs), num_loss_tokens=1)
    assert default == gft_loss(logprobs, ones, everything(logprobs), tau=0.7, num_loss_tokens=1)
    assert ObjectiveConfig().tau == 0.7


def test_no_gradient_flows_through_coefficient_or_advantage() -> None:
    logprobs = logs(0.3, 0.9)
    assert not rectified_coefficient(logprobs, 0.7).requires_grad
    # were C differentiated, d(-A pi log pi)/d log pi would be -A pi (1 + log pi)
    found = gradient_of(gft_token_losses(logprobs, torch.ones(2, dtype=torch.float64), 0.7), logprobs)
    torch.testing.assert_close(found, torch.tensor([-0.3, -1.0], dtype=torch.float64))


def test_the_push_on_a_bad_response_vanishes_with_its_probability() -> None:
    logprobs = torch.tensor([-1.0, -5.0, -20.0, -80.0, -1e4]).requires_grad_()
    minus = torch.full((5,), -2.47)
    push = gradient_of(gft_token_losses(logprobs, minus, 0.7), logprobs)
    assert (push > 0).tolist() == [True, True, True, True, False]  # away from it, and nothing left in the end
    assert (push.diff() < 0).all() and push[-1] == 0.0
    plain = gradient_of(gft_token_losses(logprobs, minus, 0.0), logprobs)
    assert (plain == 2.47).all()  # without rectification it never lets go


@pytest.mark.parametrize("poison", [-math.inf, math.nan, math.inf])
def test_a_masked_token_gives_nothing_whatever_it_holds(poison: float) -> None:
    clean = logs(0.2, 0.8)
    dirty = torch.tensor([math.log(0.2), poison, math.log(0.8)], dtype=torch.float64).requires_grad_()
    mask = torch.tensor([True, False, True])
    advantages = torch.tensor([1.0, math.nan, -1.0], dtype=torch.float64)
    expected = gft_loss(clean, advantages[mask], everything(clean), tau=0.7, num_loss_tokens=3)
    loss = gft_loss(dirty, advantages, mask, tau=0.7, num_loss_tokens=3)
    assert loss == expected
    found = gradient_of(loss, dirty)
    assert found[1] == 0.0
    torch.testing.assert_close(found[mask], gradient_of(expected, clean))


@pytest.mark.parametrize("tau", [0.0, 0.7, 2.0])
def test_a_masked_minus_infinity_does_not_poison_the_logits(tau: float) -> None:
    logits = torch.zeros(2, 3, dtype=torch.float64).index_fill(1, torch.tensor([2]), -math.inf).requires_grad_()
    logprobs = torch.log_softmax(logits, -1)[torch.arange(2), torch.tensor([0, 2])]
    assert logprobs[1] == -math.inf
    mask = torch.tensor([True, False])
    loss = gft_loss(logprobs, torch.ones(2, dtype=torch.float64), mask, tau=tau, num_loss_tokens=1)
    (found,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(found).all() and found[0].any() and not found[1].any()


def test_nothing_but_masked_tokens_is_a_loss_of_zero() -> None:
    logprobs = logs(0.2, 0.8)
    nothing = torch.zeros(2, dtype=torch.bool)
    loss = gft_loss(logprobs, torch.ones(2, dtype=torch.float64), nothing, num_loss_tokens=7)
    assert loss == 0.0 and not gradient_of(loss, logprobs).any()


def test_loss_and_gradient_do_not_depend_on_the_cut() -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.log(torch.rand(60, generator=generator, dtype=torch.float64)).requires_grad_()
    advantages = torch.randn(60, generator=generator, dtype=torch.float64)
    mask = torch.rand(60, generator=generator) < 0.8

    def loss_of(parts: list[slice]) -> torch.Tensor:
        return sum(
            (gft_loss(whole[p], advantages[p], mask[p], tau=0.7, num_loss_tokens=48) for p in parts), 0 * whole[0]
        )

    expected = loss_of([slice(0, 60)])
    for cuts in ([0, 1, 60], [0, 20, 40, 60], list(range(61))):
        found = loss_of([slice(a, b) for a, b in itertools.pairwise(cuts)])
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
        torch.testing.assert_close(gradient_of(found, whole), gradient_of(expected, whole), rtol=1e-13, atol=0)


def test_rectified_fraction_rises_with_tau() -> None:
    logprobs = torch.log(torch.rand(1000, generator=torch.Generator().manual_seed(0)))
    taus = [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0, 1.01]
    fractions = [(rectified_coefficient(logprobs, tau) < 1).float().mean().item() for tau in taus]
    assert fractions == sorted(fractions) and len(set(fractions[:-1])) == len(taus) - 1
    assert fractions[0] == 0.0 and fractions[-1] == 1.0


def test_as_losses_of_the_logits() -> None:
    # an oracle that needs no log-prob: below tau the gradient is that of -A pi, at or above it that of -A log pi
    generator = torch.Generator().manual_seed(3)
    logits = (3 * torch.randn(40, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(5, (40,), generator=generator)
    advantages = torch.randn(40, generator=generator, dtype=torch.float64)
    probs = logits.softmax(-1).gather(1, targets[:, None]).squeeze(1)
    assert 5 <= (probs < 0.7).sum() <= 35
    oracle = torch.where(probs.detach() < 0.7, -advantages * probs, -advantages * probs.log()).sum() / 40
    logprobs = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    loss = gft_loss(logprobs, advantages, everything(logprobs), tau=0.7, num_loss_tokens=40)
    (expected,) = torch.autograd.grad(oracle, logits, retain_graph=True)
    (found,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", FLOATS)
def test_tau_zero_is_sft_and_tau_above_one_is_dft(dtype: torch.dtype) -> None:
    logprobs = torch.log(torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=dtype)).requires_grad_()
    logprobs.data[0] = 0.0  # a token that is certain
    ones = torch.ones(50, dtype=dtype)
    sft = gft_token_losses(logprobs, ones, 0.0)
    assert torch.equal(sft, -logprobs) and (gradient_of(sft, logprobs) == -1).all()
    dft = gft_token_losses(logprobs, ones, 2.0)
    torch.testing.assert_close(gradient_of(dft, logprobs), -logprobs.detach().exp())
    torch.testing.assert_close(dft, -logprobs.exp() * logprobs)


def test_float32_agrees_with_float64() -> None:
    generator = torch.Generator().manual_seed(5)
    wide = torch.log_softmax(4 * torch.randn(500, 8, generator=generator, dtype=torch.float64), -1)[:, 0]
    advantages = torch.randn(500, generator=generator, dtype=torch.float64)
    ref = wide + 0.3 * torch.randn(500, generator=generator, dtype=torch.float64)
    wide = wide[(wide.exp() - 0.7).abs() > 1e-5]  # rounding decides no side of tau
    advantages, ref = advantages[: len(wide)], ref[: len(wide)]

    def values(dtype: torch.dtype) -> list[torch.Tensor]:
        logprobs = wide.to(dtype).requires_grad_()
        parts = [
            gft_token_losses(logprobs, advantages.to(dtype), 0.7),
            kl_token_penalties(logprobs, ref.to(dtype)),
            clipped_token_losses(logprobs, ref.to(dtype), advantages.to(dtype), 0.2, 0.2),
        ]
        return [*parts, *(gradient_of(part, logprobs) for part in parts[:2])]

    for single, double in zip(values(torch.float32), values(torch.float64), strict=True):
        torch.testing.assert_close(single.double(), double, rtol=5e-6, atol=5e-6)


def ppo_by_hand(ratio: float, advantage: float, low: float, high: float) -> tuple[float, float]:
    """PPO's clipped loss and its derivative with respect to log pi, by cases (Schulman et al. 2017, figure 1)."""
    if advantage >= 0:
        if ratio > 1 + high:
            return -(1 + high) * advantage, 0.0
    elif ratio < 1 - low:
        return -(1 - low) * advantage, 0.0
    return -ratio * advantage, -ratio * advantage


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("advantage", [1.7, -1.7])
@pytest.mark.parametrize("ratio", [0.3, 0.85, 1.0, 1.25, 3.0])
def test_clipped_ratio_in_every_quadrant(ratio: float, advantage: float, dtype: torch.dtype) -> None:
    logprobs = logs(0.2 * ratio, dtype=dtype)
    old = torch.tensor([math.log(0.2)], dtype=dtype)
    advantages = torch.tensor([advantage], dtype=dtype)
    loss = clipped_token_losses(logprobs, old, advantages, 0.2, 0.28)
    value, slope = ppo_by_hand(ratio, advantage, 0.2, 0.28)
    rtol = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(loss, torch.tensor([value], dtype=dtype), rtol=rtol, atol=0)
    torch.testing.assert_close(gradient_of(loss, logprobs), torch.tensor([slope], dtype=dtype), rtol=rtol, atol=1e-12)


def test_clipping_bounds_are_not_swapped() -> None:
    objective = ObjectiveConfig(coefficient="clipped_ratio", clip_low=0.1, clip_high=0.5)
    logprobs = logs(0.2 * 1.4, 0.2 * 0.85)
    old = torch.full((2,), math.log(0.2), dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    found = gradient_of(token_losses(objective, logprobs, advantages, old, old), logprobs)
    torch.testing.assert_close(found, torch.tensor([-1.4, 0.0], dtype=torch.float64))


def test_kl_penalty_is_k3() -> None:
    logprobs = logs(0.5, 0.1, 0.9)
    ref = torch.tensor([math.log(p) for p in (0.5, 0.3, 0.3)], dtype=torch.float64)
    found = kl_token_penalties(logprobs, ref)
    expected = torch.tensor([0.0, 3 - math.log(3) - 1, 1 / 3 - math.log(1 / 3) - 1], dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    # towards the reference: up where pi is below it, down where above, nothing where they agree
    torch.testing.assert_close(gradient_of(found, logprobs), torch.tensor([0.0, -2.0, 2 / 3], dtype=torch.float64))
    assert found[0] == 0.0


def test_kl_penalty_is_never_negative_and_its_mean_estimates_kl() -> None:
    pi = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    ref = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    penalties = kl_token_penalties(pi.log(), ref.log())
    assert (penalties >= 0).all()
    torch.testing.assert_close((pi * penalties).sum(), (pi * (pi / ref).log()).sum())  # E_pi[k3] = KL(pi || ref)


def by_cases(objective: dict[str, Any], expected: Callable[..., torch.Tensor]) -> Any:
    return pytest.param(ObjectiveConfig(**objective), expected, id=",".join(f"{k}={v}" for k, v in objective.items()))


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        by_cases({"tau": 0.0}, lambda lp, a, ref, old: -a * lp),
        by_cases({"tau": 0.7}, lambda lp, a, ref, old: -a * torch.where(lp.exp() < 0.7, lp.exp(), 1.0) * lp),
        by_cases({"tau": 2.0}, lambda lp, a, ref, old: -a * lp.exp() * lp),
        by_cases(
            {"tau": 0.0, "kl_coef": 0.5},
            lambda lp, a, ref, old: -a * lp + 0.5 * ((ref - lp).exp() - (ref - lp) - 1),
        ),
        by_cases(
            {"coefficient": "clipped_ratio"},
            lambda lp, a, ref, old: -torch.minimum((lp - old).exp() * a, (lp - old).exp().clip(0.8, 1.2) * a),
        ),
        by_cases(
            {"coefficient": "clipped_ratio", "kl_coef": 0.1},
            lambda lp, a, ref, old: (
                -torch.minimum((lp - old).exp() * a, (lp - old).exp().clip(0.8, 1.2) * a)
                + 0.1 * ((ref - lp).exp() - (ref - lp) - 1)
            ),
        ),
    ],
)
def test_configured_objective(objective: ObjectiveConfig, expected: Callable[..., torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(7)
    logprobs, ref, old = torch.log(torch.rand(3, 200, generator=generator, dtype=torch.float64))
    advantages = torch.randn(200, generator=generator, dtype=torch.float64)
    found = token_losses(objective, logprobs, advantages, ref, old)
    torch.testing.assert_close(found, expected(logprobs, advantages, ref, old))


def test_the_training_loss_is_the_public_one() -> None:
    generator = torch.Generator().manual_seed(9)
    logprobs = torch.log(torch.rand(100, generator=generator, dtype=torch.float64))
    advantages = torch.randn(100, generator=generator, dtype=torch.float64)
    public = gft_loss(logprobs, advantages, everything(logprobs), tau=0.3, num_loss_tokens=100)
    configured = token_losses(ObjectiveConfig(tau=0.3), logprobs, advantages, logprobs, logprobs).sum() / 100
    assert public == configured


def test_a_mask_of_integers_or_floats_means_the_same() -> None:
    logprobs = torch.tensor([-0.1, -2.0, -0.5, -3.0])
    advantages = torch.tensor([1.0, -1.0, 0.5, 2.0])
    mask = torch.tensor([True, False, True, True])
    expected = gft_loss(logprobs, advantages, mask, tau=0.7, num_loss_tokens=3)
    for dtype in (torch.int64, torch.float32):
        assert gft_loss(logprobs, advantages, mask.to(dtype), tau=0.7, num_loss_tokens=3) == expected
