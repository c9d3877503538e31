"""The fused head against a naive float64 version that holds all logits, for every objective."""

import math
from typing import Any

import pytest
import torch
from training_helpers import distance

from gftdata.engines.hf import token_logprobs
from gfttrain import head as fused
from gfttrain.config import ObjectiveConfig
from gfttrain.head import Head, fused_head
from gfttrain.objective import token_losses
from gfttrain.presets import METHODS

OBJECTIVES = {**METHODS, "GFT + KL": ObjectiveConfig(kl_coef=0.1), "tau 0.2": ObjectiveConfig(tau=0.2)}
HEADS = {
    "plain": Head(),
    "scaled": Head(scale=0.25),
    "capped": Head(softcap=2.0),
    "both": Head(scale=3.0, softcap=5.0),
}
N, D, V = 37, 16, 29


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "chunk_tokens", lambda vocab, device: 8)
    monkeypatch.setattr(fused, "CACHED_ELEMENTS", 3 * V)  # rows of a chunk that are worked on together


def problem(dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    made = {
        "hidden": draw(N, D),
        "weight": draw(V, D) * 0.6,
        "bias": draw(V) * 0.5,
        "advantages": draw(N),  # of both signs
        "ref": -draw(N).exp(),
        "old": -draw(N).exp(),
    }
    targets = torch.randint(V, (N,), generator=generator)
    return {**{name: tensor.to(dtype) for name, tensor in made.items()}, "targets": targets}


def losses_of(objective: ObjectiveConfig, p: dict[str, torch.Tensor]) -> Any:
    def losses(logprobs_C: torch.Tensor, chunk: slice) -> torch.Tensor:
        return token_losses(objective, logprobs_C, p["advantages"][chunk], p["ref"][chunk], p["old"][chunk])

    return losses


def naive(p: dict[str, torch.Tensor], objective: ObjectiveConfig, head: Head, bias: bool) -> list[torch.Tensor]:
    leaves = [p[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    logits = leaves[0] @ leaves[1].T + (leaves[2] if bias else 0.0)
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    logp = torch.log_softmax(logits, -1)
    logprobs = logp[torch.arange(N), p["targets"]]
    losses = losses_of(objective, p)(logprobs, slice(0, N))
    (losses.sum() / 7).backward()
    entropy = -(logp.exp() * logp).sum(-1)
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return [losses.detach(), logprobs.detach(), entropy.detach(), *gradients]


def ours(p: dict[str, torch.Tensor], objective: ObjectiveConfig, head: Head, bias: bool) -> list[torch.Tensor]:
    leaves = [p[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    total, *outputs = fused_head(
        leaves[0], leaves[1], leaves[2] if bias else None, p["targets"], losses_of(objective, p), head
    )
    (total / 7).backward()
    torch.testing.assert_close(total.detach(), outputs[0].sum())
    return [*outputs, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_equals_the_naive_version(name: str, head: str, bias: bool) -> None:
    p = problem(torch.float64)
    expected = naive(p, OBJECTIVES[name], HEADS[head], bias)
    found = ours(p, OBJECTIVES[name], HEADS[head], bias)
    assert len(found) == len(expected) == 5 + bias
    for one, other in zip(found, expected, strict=True):
        assert distance(one, other) < 1e-12
    narrow = {key: value if key == "targets" else value.float() for key, value in p.items()}
    for one, other in zip(ours(narrow, OBJECTIVES[name], HEADS[head], bias), expected, strict=True):
        assert one.dtype == torch.float32 and distance(one, other) < 1e-5


def test_not_less_accurate_than_the_naive_version_in_float32() -> None:
    wide = problem(torch.float64, seed=3)
    narrow = {key: value if key == "targets" else value.float() for key, value in wide.items()}
    # both against the float64 truth of the float32 numbers
    truth = naive({k: v if k == "targets" else v.double() for k, v in narrow.items()}, METHODS["GFT"], Head(), False)
    for one, other, exact in zip(
        ours(narrow, METHODS["GFT"], Head(), False), naive(narrow, METHODS["GFT"], Head(), False), truth, strict=True
    ):
        assert distance(one, exact) <= max(2 * distance(other, exact), 2e-7)


def test_at_tau_exactly_the_gradient_jumps_where_the_definition_says() -> None:
    # two words, logits (x, 0) for the target: pi = sigmoid(x); at pi == tau the coefficient is 1
    hidden = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0.0], [0.0]], dtype=torch.float64)  # pi = 0.5 exactly
    for tau, coefficient in ((0.5, 1.0), (math.nextafter(0.5, 1.0), 0.5)):
        own = weight.clone().requires_grad_()
        total, *_ = fused_head(
            hidden,
            own,
            None,
            torch.tensor([0]),
            lambda logprobs, chunk, tau=tau: token_losses(  # type: ignore[misc]
                ObjectiveConfig(tau=tau), logprobs, torch.tensor([-1.5]).double(), logprobs, logprobs
            ),
            Head(),
        )
        total.backward()
        # d(-A C log pi) / d logit_target = -A C (1 - pi)
        assert own.grad is not None
        assert own.grad[0].item() == pytest.approx(1.5 * coefficient * 0.5, rel=1e-12)


def test_a_frozen_head_gets_no_gradient_and_costs_none() -> None:
    p = problem(torch.float64)
    hidden = p["hidden"].clone().requires_grad_()
    total, *_ = fused_head(hidden, p["weight"], None, p["targets"], losses_of(METHODS["GFT"], p), Head())
    (total / 7).backward()
    assert p["weight"].grad is None
    assert distance(hidden.grad, naive(p, METHODS["GFT"], Head(), False)[3]) < 1e-12  # type: ignore[arg-type]


def test_nothing_is_computed_backward_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(torch.float64)
    calls: list[Any] = []
    whole = fused._unshaped
    monkeypatch.setattr(fused, "_unshaped", lambda *a: calls.append(a) or whole(*a))
    with torch.no_grad():
        total, _, logprobs, _ = fused_head(
            p["hidden"], p["weight"].requires_grad_(), None, p["targets"], losses_of(METHODS["GFT"], p), Head()
        )
    assert not calls and not total.requires_grad
    assert distance(logprobs, naive({**p, "weight": p["weight"].detach()}, METHODS["GFT"], Head(), False)[1]) < 1e-12


def test_bfloat16_products_with_float32_softmax() -> None:
    p = problem(torch.float32)
    hidden, weight = p["hidden"].clone().requires_grad_(), p["weight"].clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, losses, logprobs, _ = fused_head(
            hidden, weight, None, p["targets"], losses_of(METHODS["GFT"], p), Head()
        )
    (total / 7).backward()
    assert losses.dtype == logprobs.dtype == torch.float32 and weight.grad.dtype == torch.float32  # type: ignore[union-attr]
    expected = naive(p, METHODS["GFT"], Head(), False)
    assert 0 < distance(logprobs, expected[1]) < 0.02
    assert 0 < distance(weight.grad, expected[4]) < 0.05  # type: ignore[arg-type]


def test_a_constant_objective_gives_logprobs_and_no_gradient() -> None:
    p = problem(torch.float64)
    hidden = p["hidden"].clone().requires_grad_()
    total, losses, _, _ = fused_head(
        hidden, p["weight"], None, p["targets"], lambda logprobs, chunk: torch.zeros_like(logprobs.detach()), Head()
    )
    total.backward()
    assert not losses.any() and hidden.grad is not None and not hidden.grad.any()


def test_rounding_stays_small_over_a_large_vocabulary() -> None:
    # one likely token and very many unlikely ones: what a kernel loses that adds them up one after the other
    logits = torch.randn(64, 49152, generator=torch.Generator().manual_seed(0))
    logits[:, 0] = 14.0
    targets = torch.zeros(64, dtype=torch.int64)
    exact = (logits.double() - logits.double().logsumexp(-1, keepdim=True))[:, 0]
    one_hot = torch.eye(64)
    found = fused_head(one_hot, logits.T.contiguous(), None, targets, lambda logprobs, _: logprobs, Head())[2]
    for logprobs in (found, token_logprobs(logits, targets)):
        assert (logprobs.double() - exact).abs().max() < 2e-6


def test_no_tokens_at_all() -> None:
    p = problem(torch.float64)
    hidden, weight = p["hidden"][:0].clone().requires_grad_(), p["weight"].clone().requires_grad_()
    total, losses, *_ = fused_head(hidden, weight, None, p["targets"][:0], losses_of(METHODS["GFT"], p), Head())
    total.backward()
    assert total == 0 and len(losses) == 0 and weight.grad is not None and not weight.grad.any()
