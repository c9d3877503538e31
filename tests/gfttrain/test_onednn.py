"""Products by oneDNN: the same numbers as torch's own, taken where they are faster and nowhere else."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training_helpers import count_tokens, distance, gradient, random_examples, tiny_policy, train_settings

from gfttrain import onednn
from gfttrain.config import ObjectiveConfig
from gfttrain.distributed import alone
from gfttrain.model import load_for_training
from gfttrain.objective import token_losses

Shapes = list[tuple[int, ...]]
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Shapes:
    """Whatever can be is oneDNN's, on any machine and of any size. Gives the shapes of the products that were."""
    shapes: Shapes = []
    real = onednn._product

    def counted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        shapes.append((*x.shape, len(weight)))
        return real(x, weight, bias)

    monkeypatch.setattr(onednn, "_product", counted)
    monkeypatch.setattr(onednn, "is_faster_here", lambda: True)
    monkeypatch.setattr(onednn, "LEAST", 1)
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in onednn.CACHES})  # it sets them
    return shapes


def layers(bias: bool) -> tuple[nn.Linear, onednn.Linear]:
    """The same weights in torch's class and in ours."""
    plain, ours = nn.Linear(24, 40, bias=bias), onednn.Linear(24, 40, bias=bias)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shape", [(7, 24), (1, 7, 24), (2, 3, 5, 24)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_gives_the_same(bias: bool, shape: tuple[int, ...], strided: bool, taken: Shapes) -> None:
    results = []
    x, slope = torch.randn(shape), torch.randn(*shape[:-1], 40)
    if strided:  # rows that do not lie one after the other, as heads that were transposed
        x, slope = (t.movedim(0, -1).contiguous().movedim(-1, 0) for t in (x, slope))
        assert not x.is_contiguous() or shape[0] == 1
    for layer in layers(bias):
        leaf = x.detach().requires_grad_()
        out = layer(leaf)
        out.backward(slope)
        results.append([out, leaf.grad, *(p.grad for p in layer.parameters())])
    assert len(taken) == 2
    for found, expected in zip(results[1], results[0], strict=True):
        assert found is not None and expected is not None
        assert found.shape == expected.shape and distance(found, expected) < 1e-6


@pytest.mark.parametrize("frozen", ["weight", "input", "bias"])
def test_what_is_frozen_gets_no_gradient(frozen: str, taken: Shapes) -> None:
    plain, ours = layers(bias=True)
    given = torch.randn(5, 24)
    results = []
    for layer in (plain, ours):
        layer.weight.requires_grad_(frozen != "weight")
        layer.bias.requires_grad_(frozen != "bias")
        x = given.clone().requires_grad_(frozen != "input")
        layer(x).square().sum().backward()
        results.append([x.grad, layer.weight.grad, layer.bias.grad])
    for found, expected in zip(results[1], results[0], strict=True):
        assert (found is None) == (expected is None)
        assert found is None or distance(found, expected) < 1e-5
    assert len(taken) == (1 if frozen == "input" else 2)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch's, of `flags`
def test_where_it_is_not_taken(taken: Shapes, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ours = layers(bias=False)
    x = torch.randn(5, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(x).equal(plain(x)) and ours(x).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert ours(x).equal(plain(x))
    assert onednn.linear(x.double(), plain.weight.double()).dtype == torch.float64
    monkeypatch.setattr(onednn, "LEAST", 5 * 24 * 40 + 1)
    assert ours(x).equal(plain(x))
    monkeypatch.setattr(onednn, "LEAST", 1)
    monkeypatch.setattr(onednn, "is_faster_here", lambda: False)
    assert ours(x).equal(plain(x))
    model = nn.Sequential(nn.Linear(3, 4))
    onednn.use_in(model)
    assert type(model[0]) is nn.Linear and not taken


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_a_step_has_the_same_gradient(family: str, taken: Shapes, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = random_examples(3)
    objective = ObjectiveConfig()

    def step() -> torch.Tensor:
        policy = tiny_policy(family, torch.float32)
        names = list(policy.state_dict())
        onednn.use_in(policy.model)
        assert list(policy.state_dict()) == names

        def loss(logprobs: torch.Tensor, advantages: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
            return token_losses(objective, logprobs, advantages, ref, ref)

        return gradient(policy, [examples], "shared_prefix", loss, count_tokens(examples))

    found = step()
    # 7 linears in each of 2 layers, and the head for one chunk, forward and backward
    assert len(taken) == 2 * (2 * 7 + 1)
    assert {(count_tokens(examples), 32, 18), (count_tokens(examples), 18, 32)} <= set(taken)
    with monkeypatch.context() as patch:
        patch.setattr(onednn, "is_faster_here", lambda: False)
        assert distance(found, step()) < 1e-5


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, onednn.Linear),
        ({"lora": {"rank": 2}}, onednn.Linear),
        ({"compile": True}, nn.Linear),  # the compiler has products of its own
    ],
)
def test_which_models_have_it(
    settings: dict[str, Any], kind: type, taken: Shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: None)
    policy = load_for_training(train_settings(tmp_path, tmp_path, **settings), alone(torch.device("cpu")))
    kinds = {type(module) for module in policy.modules() if isinstance(module, nn.Linear)}
    assert kinds == {kind}
    assert (os.environ.get("LRU_CACHE_CAPACITY") == "32") == (kind is onednn.Linear)


class Computed(TorchDispatchMode):
    """How often the operation itself ran: selective checkpointing answers from what it kept before it comes to that."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is onednn.multiply.default
        return func(*args, **(kwargs or {}))


def test_selective_checkpointing_keeps_its_products(taken: Shapes, tmp_path: Path) -> None:
    examples = random_examples(3)
    gradients, counts = {}, {}
    for checkpointing in (False, "selective", True):
        settings = train_settings(tmp_path, tmp_path, gradient_checkpointing=checkpointing)
        policy = load_for_training(settings, alone(torch.device("cpu")))
        with Computed() as computed:
            gradients[checkpointing] = gradient(
                policy, [examples], "shared_prefix", lambda logprobs, advantages, _: -advantages * logprobs, 10
            )
        counts[checkpointing] = computed.count
    assert gradients["selective"].equal(gradients[False]) and gradients[True].equal(gradients[False])
    assert 0 < counts["selective"] == counts[False] < counts[True]


@pytest.mark.parametrize(
    ("capability", "vendor", "expected"),
    [
        ("AVX512", "AuthenticAMD", True),
        ("AVX2", "AuthenticAMD", False),
        ("AVX512", "GenuineIntel", False),
        ("AVX512", None, False),
    ],
)
def test_it_is_for_cpus_of_amd_with_avx_512(
    capability: str, vendor: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_text(path: Path, **_: Any) -> str:
        if vendor is None:
            raise FileNotFoundError(path)
        return f"processor\t: 0\nvendor_id\t: {vendor}\n"

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(Path, "read_text", read_text)
    assert onednn.is_faster_here.__wrapped__() is expected
    monkeypatch.setattr(onednn, "multiply", None)
    assert not onednn.is_faster_here.__wrapped__()
