"""The forward pass, and the invariances of its gradient: no cut and no layout changes an update."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_helpers import (
    FAMILIES,
    MODEL,
    TOLERANCE,
    Loss,
    distance,
    gradient,
    random_examples,
    tiny_model,
    train_settings,
)
from transformers import AutoModelForCausalLM

from gftdata.errors import UserError
from gftdata.shards import Index, read_index, read_manifest, shard_paths
from gfttrain.compare import METHODS
from gfttrain.config import ObjectiveConfig
from gfttrain.model import autocast, check_packing, load_for_training, response_logprobs
from gfttrain.objective import token_losses
from gfttrain.plan import Row, Selection, select
from gfttrain.stream import Example, ShardReader, collate

WRONG_WHEN_PACKED = ("opt", "bloom")  # positions or attention that know nothing of position_ids
RIGHT_WHEN_PACKED = [family for family in FAMILIES if family not in WRONG_WHEN_PACKED]


def loss_of(objective: ObjectiveConfig) -> Loss:
    def loss(logprobs: torch.Tensor, advantages: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
        return token_losses(objective, logprobs, advantages, ref, ref)

    return loss


GFT = loss_of(ObjectiveConfig())
LOSSES = {
    "GFT": GFT,
    "GFT + KL": loss_of(ObjectiveConfig(kl_coef=0.1)),
    "SFT": loss_of(METHODS["SFT"]),
    "GRPO": loss_of(METHODS["GRPO (offline)"]),
}


def count(examples: list[Example]) -> int:
    return sum(len(example.response_ids) for example in examples)


def one_by_one(model: Any, examples: list[Example]) -> torch.Tensor:
    """log pi of every response token by plain forward passes without padding, positions or masks of ours."""
    found = []
    for example in examples:
        ids = torch.tensor([[*example.prompt_ids, *example.response_ids]], dtype=torch.long)
        logprobs = model(input_ids=ids).logits.log_softmax(-1)[0]
        first = len(example.prompt_ids)
        found += [logprobs[place - 1, ids[0, place]] for place in range(first, ids.shape[1])]
    return torch.stack(found)


@pytest.mark.parametrize(
    ("family", "layout"), [*((f, "padded") for f in FAMILIES), *((f, "packed") for f in RIGHT_WHEN_PACKED)]
)
@torch.no_grad()
def test_logprobs_equal_one_plain_forward_a_response(family: str, layout: Any) -> None:
    model = tiny_model(family)
    examples = random_examples(7)
    found, _ = response_logprobs(model, collate(examples, layout, torch.float64))
    rtol = 1e-6 if family == "bloom" else 1e-10  # bloom computes its position bias in float32
    torch.testing.assert_close(found, one_by_one(model, examples), rtol=rtol, atol=rtol)


@torch.no_grad()
def test_entropy_is_that_of_the_whole_distribution() -> None:
    model = tiny_model("llama")
    (example,) = random_examples(1)
    _, entropy = response_logprobs(model, collate([example], dtype=torch.float64))
    ids = torch.tensor([[*example.prompt_ids, *example.response_ids]], dtype=torch.long)
    logits = model(input_ids=ids).logits[0, len(example.prompt_ids) - 1 : -1]
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy())


def random_pieces(examples: list[Example], sizes: int, seed: int) -> list[list[Example]]:
    order = np.random.default_rng(seed).permutation(len(examples))
    return [[examples[i] for i in part] for part in np.array_split(order, sizes)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_does_not_depend_on_the_cut_or_the_layout(name: str, dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype)
    examples = random_examples(24)
    expected = gradient(model, [examples], "padded", LOSSES[name], count(examples))
    assert expected.norm() > 1e-3
    for layout in ("padded", "packed"):
        for parts in (1, 2, 8, 24):
            pieces = random_pieces(examples, parts, seed=parts)
            found = gradient(model, pieces, layout, LOSSES[name], count(examples))
            assert distance(found, expected) < TOLERANCE[dtype], (layout, parts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", [f for f in RIGHT_WHEN_PACKED if f != "llama"])
def test_gradient_padded_equals_packed_in_other_families(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype)
    examples = random_examples(8)
    expected = gradient(model, [[example] for example in examples], "padded", GFT, count(examples))
    for layout in ("padded", "packed"):
        found = gradient(model, [examples[:5], examples[5:]], layout, GFT, count(examples))
        # gemma3 computes its norms and positions in float32 whatever the model's width
        assert distance(found, expected) < (max(TOLERANCE[dtype], 1e-6 * (family == "gemma3_text"))), layout


@pytest.mark.parametrize("family", WRONG_WHEN_PACKED)
def test_a_family_that_cannot_be_packed_is_refused(family: str) -> None:
    with pytest.raises(UserError, match=r"batch\.layout=padded"):
        check_packing(tiny_model(family, torch.float32), random_examples(2))


@pytest.mark.parametrize("family", RIGHT_WHEN_PACKED)
def test_a_family_that_can_be_packed_is_let_through(family: str) -> None:
    model = tiny_model(family, torch.float32)
    check_packing(model, random_examples(2))
    assert model.training


def test_the_packing_check_is_not_misled_by_dropout() -> None:
    model = tiny_model("llama", torch.float32, attention_dropout=0.5)
    before = torch.get_rng_state()
    check_packing(model, random_examples(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    examples = random_examples(6)
    gradients = []
    for checkpointing in (False, True):
        config = train_settings(tmp_path, tmp_path, gradient_checkpointing=checkpointing)
        model = load_for_training(config, torch.device("cpu"))
        assert any(getattr(part, "gradient_checkpointing", False) for part in model.modules()) == checkpointing
        gradients.append(gradient(model, [examples], "padded", GFT, count(examples)))
    assert distance(gradients[1], gradients[0]) < 1e-6


def test_training_weights_are_float32_whatever_the_base_is(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(MODEL).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    config = train_settings(tmp_path, tmp_path, model=str(tmp_path / "half"))
    model = load_for_training(config, torch.device("cpu"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.training


def test_bfloat16_is_of_the_forward_pass_alone(tmp_path: Path) -> None:
    examples = random_examples(6)
    config = train_settings(tmp_path, tmp_path, dtype="bfloat16")
    model = load_for_training(config, torch.device("cpu"))
    with autocast(config, torch.device("cpu")):
        found, _ = response_logprobs(model, collate(examples))
    exact = one_by_one(model, examples)
    assert found.dtype == torch.float32
    assert 0 < (found - exact).abs().max() < 0.5 and (found - exact).abs().mean() < 0.1
    found.sum().backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.fixture(scope="module")
def index(data: Path) -> Index:
    return read_index(shard_paths(data, read_manifest(data)))


def demo_examples(index: Index, selection: Selection, groups: range, rows: Any) -> list[Example]:
    chosen = [
        Row(g, k, 0)
        for g in groups
        for k in range(index.offsets[g + 1] - index.offsets[g])
        if rows[index.offsets[g] + k]
    ]
    return ShardReader(index, selection, 8).examples(chosen)


def demo_model(dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).train()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_skipping_groups_without_signal_changes_no_gradient(index: Index, dtype: torch.dtype) -> None:
    selection = select(index, ObjectiveConfig())
    trained = demo_examples(index, selection, range(16), selection.trained_R)
    everything = demo_examples(index, selection, range(16), selection.used_R)
    assert 0 < len(trained) < len(everything)
    model = demo_model(dtype)
    num_tokens = int(selection.loss_tokens_G[:16].sum())
    assert num_tokens == count(everything)
    found = gradient(model, [trained], "padded", GFT, num_tokens)
    expected = gradient(model, [everything], "padded", GFT, num_tokens)
    assert distance(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sft_is_transformers_own_loss(index: Index, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers computes its loss in float32: with a float64 model, let `float()` keep the width, for both
    narrow = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda t: t if t.dtype == torch.float64 else narrow(t))
    objective = METHODS["SFT"]
    selection = select(index, objective)
    examples = demo_examples(index, selection, range(12), selection.trained_R)
    assert len(examples) == 12 and {index.source_names[e.source_code] for e in examples} == {"expert"}
    model = demo_model(dtype)
    found = gradient(model, [examples[:7], examples[7:]], "padded", loss_of(objective), count(examples))
    with torch.no_grad():
        logprobs = [response_logprobs(model, collate([e], dtype=dtype))[0] for e in examples]
    found_loss = -torch.cat(logprobs).mean()

    width = max(len(e.prompt_ids) + len(e.response_ids) for e in examples)
    input_ids = torch.zeros(len(examples), width, dtype=torch.long)
    attention_mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)
    for row, e in enumerate(examples):
        first, length = len(e.prompt_ids), len(e.prompt_ids) + len(e.response_ids)
        input_ids[row, :length] = torch.tensor([*e.prompt_ids, *e.response_ids])
        attention_mask[row, :length] = 1
        labels[row, first:length] = input_ids[row, first:length]
    model.zero_grad(set_to_none=True)
    theirs = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss
    theirs.backward()
    expected = torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()])
    assert theirs.dtype == dtype
    torch.testing.assert_close(found_loss, theirs.detach(), rtol=TOLERANCE[dtype], atol=0)
    assert distance(found, expected) < TOLERANCE[dtype]


@torch.no_grad()
def test_stored_reference_is_the_models_own(index: Index) -> None:
    selection = select(index, ObjectiveConfig(advantage="one"))
    examples = demo_examples(index, selection, range(48), selection.used_R)
    model = demo_model(torch.float32)
    for layout in ("padded", "packed"):
        batch = collate(examples, layout)  # type: ignore[arg-type]
        found, _ = response_logprobs(model, batch)
        assert (found - batch.ref_logprobs_N).abs().max() < 1e-4
