"""Norms and feed-forwards that keep less: transformers' numbers, from less memory, where they are known."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from training_helpers import count_tokens, distance, gradient, random_examples, tiny_policy, train_settings
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from gfttrain import lean
from gfttrain.config import ObjectiveConfig
from gfttrain.distributed import alone
from gfttrain.model import load_for_training
from gfttrain.objective import token_losses

CPU = torch.device("cpu")


def kept_numbers(module: nn.Module, x: torch.Tensor) -> int:
    """float32 numbers that are still there after a forward pass: its output, and what the backward pass waits with."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        out = module(x)
    assert out.requires_grad
    return sum(event.self_cpu_memory_usage for event in found.key_averages()) // 4


def norm(dtype: torch.dtype = torch.float32) -> LlamaRMSNorm:
    made = LlamaRMSNorm(24, eps=1e-5).to(dtype)
    nn.init.normal_(made.weight, 1.0, 0.3)
    return made


def feed_forward(bias: bool = False) -> LlamaMLP:
    return LlamaMLP(LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=2, mlp_bias=bias))


def made_lean(module: nn.Module) -> nn.Module:
    twin = type(module).__new__(type(module))
    twin.__dict__.update(module.__dict__)  # the same parameters
    lean.use_in(twin, gated=True)
    assert "forward" in vars(twin) and "forward" not in vars(module)
    return twin


def results(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor | None]:
    """Output, gradient of the input, gradients of the parameters."""
    module.zero_grad()
    leaf = x.detach().requires_grad_(x.requires_grad)
    out = module(leaf)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    return [out.detach(), leaf.grad, *(None if p.grad is None else p.grad.clone() for p in module.parameters())]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (1, 3, 2, 24)])
def test_a_norm_gives_the_same(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    x = (3 * torch.randn(shape, dtype=dtype)).requires_grad_()
    plain = norm(dtype)
    expected, found = results(plain, x), results(made_lean(plain), x)
    assert found[0] is not None and expected[0] is not None and found[0].equal(expected[0])
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None and theirs is not None and ours.dtype == theirs.dtype
        assert distance(ours, theirs) < tolerance


def test_the_gradient_of_a_norm_is_that_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "float32", torch.float64)  # what is normalised is in double as well
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: lean._RMSNorm.apply(x, weight, 1e-5), (x, weight))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (0, 24)])
def test_a_feed_forward_gives_the_same_bit_by_bit(shape: tuple[int, ...], bias: bool, autocast: bool) -> None:
    plain = feed_forward(bias)
    x = torch.randn(shape, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected, found = results(plain, x), results(made_lean(plain), x)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None and theirs is not None and ours.equal(theirs)


def test_what_is_computed_again_is_so_in_the_precision_of_before() -> None:
    plain = feed_forward()
    plain.act_fn = nn.Linear(40, 40)  # bfloat16 within autocast; outside of it an error, for the widths are two
    x = torch.randn(5, 24, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = results(plain, x), results(made_lean(plain), x)
        assert all(a is not None and b is not None and a.equal(b) for a, b in zip(found, expected, strict=True))
        out = made_lean(plain)(x)
    x.grad = None
    out.float().square().sum().backward()  # as the trainer does: out of autocast
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("frozen", ["x", "gate_proj", "up_proj", "down_proj", "all but down_proj"])
def test_a_feed_forward_of_which_a_part_is_frozen(frozen: str) -> None:
    plain = feed_forward()
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(
            ("down_proj" in name) if frozen == "all but down_proj" else not name.startswith(frozen)
        )
    x = torch.randn(5, 24, requires_grad=frozen not in ("x", "all but down_proj"))
    for ours, theirs in zip(results(made_lean(plain), x), results(plain, x), strict=True):
        assert (ours is None) == (theirs is None) and (ours is None or theirs is None or ours.equal(theirs))


@pytest.mark.parametrize("frozen", [True, False])
def test_a_norm_of_which_a_part_is_frozen(frozen: bool) -> None:
    plain = norm()
    plain.weight.requires_grad_(not frozen)
    x = torch.randn(5, 24, requires_grad=frozen)
    for ours, theirs in zip(results(made_lean(plain), x), results(plain, x), strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or theirs is None or distance(ours, theirs) < 1e-6


def test_a_backward_pass_may_be_done_twice() -> None:
    module, x = made_lean(feed_forward()), torch.randn(5, 24, requires_grad=True)
    out = module(x).square().sum()
    first, second = (torch.autograd.grad(out, x, retain_graph=True)[0] for _ in range(2))
    assert first.equal(second)


def test_what_is_kept() -> None:
    plain, x = norm(), torch.randn(50, 24, requires_grad=True)
    assert kept_numbers(plain, x) == 2 * 50 * 24 + 50  # normalised, scale, output; the input was there before
    assert kept_numbers(made_lean(plain), x) == 50 * 24 + 50
    feed = feed_forward()
    assert kept_numbers(feed, x) == 50 * 24 + 4 * 50 * 40
    assert kept_numbers(made_lean(feed), x) == 50 * 24 + 2 * 50 * 40


@pytest.mark.parametrize(
    ("family", "norms", "gated"),
    [("llama", 5, 2), ("qwen2", 5, 2), ("qwen3", 9, 2), ("mistral", 5, 2), ("granite", 5, 2), ("gemma2", 0, 2)],
)
def test_a_step_has_the_same_gradient(family: str, norms: int, gated: int) -> None:
    examples = random_examples(3)
    objective = ObjectiveConfig()

    def loss(logprobs: torch.Tensor, advantages: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
        return token_losses(objective, logprobs, advantages, ref, ref)

    gradients = []
    for use in (False, True):
        policy = tiny_policy(family, torch.float32)
        names = list(policy.state_dict())
        assert sum(map(lean.is_norm, policy.modules())) == norms and sum(map(lean.is_gated, policy.modules())) == gated
        if use:
            lean.use_in(policy.model, gated=True)
            assert sum("forward" in vars(module) for module in policy.modules()) == norms + gated
            assert list(policy.state_dict()) == names
        gradients.append(gradient(policy, [examples], "shared_prefix", loss, count_tokens(examples)))
    assert distance(gradients[1], gradients[0]) < 1e-6


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_other_modules_stay_as_they_are(family: str) -> None:
    policy = tiny_policy(family, torch.float32)
    lean.use_in(policy.model, gated=True)
    assert not any("forward" in vars(module) for module in policy.modules())


def test_a_forward_that_was_put_in_before_stays() -> None:
    module = feed_forward()
    module.forward = lambda x: x  # type: ignore[method-assign]
    lean.use_in(module, gated=True)
    assert module(3) == 3


@pytest.mark.parametrize(
    ("settings", "norms", "gated"),
    [
        ({}, True, True),
        ({"lora": {"rank": 2}}, True, True),
        ({"gradient_checkpointing": "selective"}, True, False),
        ({"gradient_checkpointing": True}, True, False),
        ({"compile": True}, False, False),
    ],
)
def test_which_models_have_it(
    settings: dict[str, Any], norms: bool, gated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: None)
    examples = random_examples(3)
    config = train_settings(tmp_path, tmp_path, **settings)
    policy = load_for_training(config, alone(CPU))
    found = [vars(module)["forward"].__func__ for module in policy.modules() if "forward" in vars(module)]
    assert (lean._norm in found, lean._gated in found) == (norms, gated)

    def gradients() -> torch.Tensor:
        return gradient(policy, [examples], "shared_prefix", lambda logprobs, *_: -logprobs, count_tokens(examples))

    ours = gradients()
    for module in policy.modules():
        if getattr(vars(module).get("forward"), "__func__", None) in (lean._norm, lean._gated):
            del module.forward
    assert distance(ours, gradients()) < 1e-5
