"""The forward pass, and the invariances of its gradient: no cut and no layout changes an update."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_helpers import (
    FAMILIES,
    MODEL,
    NARROW_INSIDE,
    PACKED,
    PADDED_ONLY,
    TOLERANCE,
    Loss,
    as_policy,
    count_tokens,
    distance,
    flat_gradient,
    gradient,
    logprobs_of,
    random_examples,
    tiny_policy,
    train_settings,
)
from transformers import AutoModelForCausalLM

from gftdata.errors import UserError
from gftdata.index import Index, read_index
from gftdata.manifest import read_manifest
from gftdata.shards import shard_paths
from gfttrain.attention import NAME
from gfttrain.config import ObjectiveConfig
from gfttrain.distributed import alone
from gfttrain.model import (
    Policy,
    autocast,
    check_layout,
    decoder_layers,
    load_for_training,
    no_losses,
    outline,
    parameter_counts,
    self_check,
    training_cost,
)
from gfttrain.objective import token_losses
from gfttrain.plan import Layout, Piece, Selection, select
from gfttrain.presets import METHODS
from gfttrain.stream import Example, ShardReader, collate, singles

CPU = alone(torch.device("cpu"))
LAYOUTS: tuple[Layout, ...] = ("shared_prefix", "packed", "padded")


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


def one_by_one(model: Any, examples: list[Example]) -> torch.Tensor:
    """log pi of every response token by plain forward passes without padding, positions or masks of ours."""
    found = []
    for one in (one for example in examples for one in singles(example)):
        ids = torch.tensor([[*one.prompt_ids, *one.response_ids[0]]], dtype=torch.long)
        logprobs = model(input_ids=ids).logits.log_softmax(-1)[0]
        first = len(one.prompt_ids)
        found += [logprobs[place - 1, ids[0, place]] for place in range(first, ids.shape[1])]
    return torch.stack(found)


CASES = [*((f, "padded") for f in FAMILIES), *((f, layout) for f in PACKED for layout in ("shared_prefix", "packed"))]


@pytest.mark.parametrize(("family", "layout"), CASES)
@torch.no_grad()
def test_logprobs_equal_one_plain_forward_a_response(family: str, layout: Layout) -> None:
    examples = random_examples(5)
    # transformers' own padding of gemma2 gives NaN in float64: its mask's smallest float64 is no float32
    dtype = torch.float32 if (family, layout) == ("gemma2", "padded") else torch.float64
    expected = one_by_one(tiny_policy(family, dtype, "padded").model, examples)
    found = logprobs_of(tiny_policy(family, dtype, layout), examples, layout)
    # bloom computes its position bias in float32 whatever the model's width
    tolerance = 1e-4 if dtype == torch.float32 else 1e-5 if family in ("bloom", *NARROW_INSIDE) else 1e-10
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_entropy_is_that_of_the_whole_distribution() -> None:
    policy = tiny_policy("llama")
    (one,) = singles(random_examples(1, most=1)[0])
    *_, entropy = policy(collate([one], dtype=torch.float64), no_losses)
    ids = torch.tensor([[*one.prompt_ids, *one.response_ids[0]]], dtype=torch.long)
    logits = policy.model(input_ids=ids).logits[0, len(one.prompt_ids) - 1 : -1]
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy())


def random_pieces(examples: list[Example], sizes: int, seed: int) -> list[list[Example]]:
    order = np.random.default_rng(seed).permutation(len(examples))
    return [[examples[i] for i in part] for part in np.array_split(order, sizes)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_does_not_depend_on_the_cut_or_the_layout(name: str, dtype: torch.dtype) -> None:
    policies = {layout: tiny_policy("llama", dtype, layout) for layout in LAYOUTS}
    examples = random_examples(12)
    responses = [one for example in examples for one in singles(example)]
    alone_ = [[one] for one in responses]
    expected = gradient(policies["padded"], alone_, "padded", LOSSES[name], count_tokens(examples))
    assert expected.norm() > 1e-3
    for layout in LAYOUTS:
        for parts in (1, 2, 8):
            pieces = random_pieces(examples, parts, seed=parts)
            found = gradient(policies[layout], pieces, layout, LOSSES[name], count_tokens(examples))
            assert distance(found, expected) < TOLERANCE[dtype], (layout, parts)
    # a group that is cut has its prompt computed twice, and nothing else changes
    found = gradient(policies["shared_prefix"], [responses[:9], responses[9:]], "shared_prefix", LOSSES[name], 1)
    assert distance(found / count_tokens(examples), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", [f for f in PACKED if f != "llama"])
def test_gradient_is_that_of_each_response_alone_in_other_families(family: str, dtype: torch.dtype) -> None:
    examples = random_examples(5)
    single = [[one] for example in examples for one in singles(example)]
    expected = gradient(tiny_policy(family, dtype, "padded"), single, "padded", GFT, count_tokens(examples))
    for layout in LAYOUTS:
        if (family, layout, dtype) == ("gemma2", "padded", torch.float64):
            continue  # see above
        policy = tiny_policy(family, dtype, layout)
        found = gradient(policy, [examples[:3], examples[3:]], layout, GFT, count_tokens(examples))
        tolerance = max(TOLERANCE[dtype], 1e-5 * (family in NARROW_INSIDE))
        assert distance(found, expected) < tolerance, layout


@pytest.mark.parametrize("family", PADDED_ONLY)
def test_a_family_that_cannot_be_packed_is_refused(family: str) -> None:
    policy = tiny_policy(family, torch.float32, "padded")
    with pytest.raises(UserError, match=r"batch\.layout=padded"):
        check_layout(policy.model, "shared_prefix")
        policy.model.set_attn_implementation(NAME)
        self_check(policy, random_examples(2), "shared_prefix", lambda: autocast_off(), torch.float32)
    check_layout(policy.model, "padded")


def autocast_off() -> Any:
    return torch.autocast("cpu", enabled=False)


@pytest.mark.parametrize("family", PACKED)
def test_a_family_that_can_be_packed_is_let_through(family: str) -> None:
    policy = tiny_policy(family, torch.float32)
    check_layout(policy.model, "shared_prefix")
    assert self_check(policy, random_examples(2), "shared_prefix", autocast_off, torch.float32) < 1e-3


def test_the_self_check_finds_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy("llama", torch.float32)
    examples = random_examples(2, most=4, seed=1)
    monkeypatch.setattr(
        "gfttrain.attention._in_parts",
        lambda q, k, v, *_: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    )
    with pytest.raises(UserError, match=r"differ from those of each alone by .* nats a token; set batch.layout=padded"):
        self_check(policy, examples, "shared_prefix", autocast_off, torch.float32)


def test_the_self_check_finds_a_head_that_does_more() -> None:
    policy = tiny_policy("granite", torch.float32)
    policy.head = type(policy.head)()  # as if nothing were known of logits_scaling
    with pytest.raises(UserError, match="differ from those"):
        self_check(policy, random_examples(2), "shared_prefix", autocast_off, torch.float32)


def test_layers_that_are_no_attention_are_refused() -> None:
    policy = tiny_policy("llama", torch.float32)
    policy.model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(UserError, match=r"layers of kind linear_attention.*set batch.layout=padded"):
        check_layout(policy.model, "shared_prefix")


def test_counts_and_cost_of_a_model() -> None:
    outlined = outline(str(MODEL))
    loaded = AutoModelForCausalLM.from_pretrained(MODEL)
    every, inside = parameter_counts(outlined)
    assert every == sum(p.numel() for p in loaded.parameters())
    assert inside == sum(p.numel() for p in loaded.model.layers.parameters())
    cost = training_cost(outlined)
    hidden, layers = loaded.config.hidden_size, loaded.config.num_hidden_layers
    assert cost.per_token == 6 * inside
    assert cost.per_pair == 12 * hidden * layers  # heads * head size = hidden here
    assert cost.per_response_token == 6 * hidden * loaded.config.vocab_size
    assert len(decoder_layers(outlined)) == layers


def demo_policy(tmp_path: Path, **settings: Any) -> Policy:
    return load_for_training(train_settings(tmp_path, tmp_path, **settings), CPU)


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, layout: Layout) -> None:
    examples = random_examples(6)
    gradients = []
    for checkpointing in (False, True, "selective"):
        policy = demo_policy(tmp_path, gradient_checkpointing=checkpointing, batch={"layout": layout})
        assert any(getattr(part, "gradient_checkpointing", False) for part in policy.modules()) == bool(checkpointing)
        gradients.append(gradient(policy, [examples], layout, GFT, count_tokens(examples)))
    assert distance(gradients[1], gradients[0]) < 1e-6 and distance(gradients[2], gradients[0]) < 1e-6


def test_training_weights_are_float32_whatever_the_base_is(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(MODEL).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    policy = demo_policy(tmp_path, model=str(tmp_path / "half"))
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    assert policy.training


def test_bfloat16_is_of_the_forward_pass_alone(tmp_path: Path) -> None:
    examples = random_examples(6)
    config = train_settings(tmp_path, tmp_path, dtype="bfloat16")
    policy = load_for_training(config, CPU)
    batch = collate(examples)
    with autocast(config, torch.device("cpu")):
        total, _, found, _ = policy(batch, lambda logprobs, chunk: -logprobs)
    exact = one_by_one(policy.model, examples).detach()
    assert found.dtype == torch.float32
    assert 0 < (found - exact).abs().max() < 0.5 and (found - exact).abs().mean() < 0.1
    total.backward()
    assert {parameter.grad.dtype for parameter in policy.parameters()} == {torch.float32}  # type: ignore[union-attr]


def test_lora_trains_adapters_alone(tmp_path: Path) -> None:
    policy = demo_policy(tmp_path, lora={"rank": 4})
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert len({id(p) for p in policy.parameters()}) == len([*policy.named_parameters()])
    examples = random_examples(4)
    found = gradient(policy, [examples[:2], examples[2:]], "shared_prefix", GFT, count_tokens(examples))
    assert found.norm() > 0
    assert all(p.grad is None for p in policy.parameters() if not p.requires_grad)


def test_lora_names_the_modules_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lora.targets \('nowhere',\).*the linear modules are down_proj, gate_proj"):
        demo_policy(tmp_path, lora={"targets": ["nowhere"]})


def test_adapters_start_as_nothing(tmp_path: Path) -> None:
    examples = random_examples(3)
    expected = logprobs_of(demo_policy(tmp_path), examples, "shared_prefix")
    found = logprobs_of(demo_policy(tmp_path, lora={"rank": 4}), examples, "shared_prefix")
    torch.testing.assert_close(found, expected)


@pytest.fixture(scope="module")
def index(data: Path) -> Index:
    return read_index(shard_paths(data, read_manifest(data)))


def demo_examples(index: Index, selection: Selection, groups: range, chosen_R: Any) -> list[Example]:
    pieces = []
    for group in groups:
        begin, end = index.offsets[group], index.offsets[group + 1]
        responses = tuple((begin + np.flatnonzero(chosen_R[begin:end])).tolist())
        if responses:
            pieces.append(Piece(group, responses, 0, 0.0))
    return ShardReader(index, selection, 8, lambda number: index.paths[number]).examples(tuple(pieces))


def demo_model(dtype: torch.dtype) -> Policy:
    return as_policy(AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).train())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_skipping_groups_without_signal_changes_no_gradient(index: Index, dtype: torch.dtype) -> None:
    selection = select(index, ObjectiveConfig())
    trained = demo_examples(index, selection, range(16), selection.trained_R)
    everything = demo_examples(index, selection, range(16), selection.used_R)
    assert 0 < count_tokens(trained) < count_tokens(everything)
    policy = demo_model(dtype)
    num_tokens = int(selection.loss_tokens_G[:16].sum())
    assert num_tokens == count_tokens(everything)
    found = gradient(policy, [trained], "shared_prefix", GFT, num_tokens)
    expected = gradient(policy, [everything], "shared_prefix", GFT, num_tokens)
    assert distance(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sft_is_transformers_own_loss(index: Index, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers computes its loss in float32: with a float64 model, let `float()` keep the width, for both
    narrow = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda t: t if t.dtype == torch.float64 else narrow(t))
    objective = METHODS["SFT"]
    selection = select(index, objective)
    examples = demo_examples(index, selection, range(12), selection.trained_R)
    assert len(examples) == 12 and {index.source_names[c] for e in examples for c in e.source_codes} == {"expert"}
    policy = demo_model(dtype)
    num_tokens = count_tokens(examples)
    found = gradient(policy, [examples[:7], examples[7:]], "shared_prefix", loss_of(objective), num_tokens)
    found_loss = -logprobs_of(policy, examples, "shared_prefix").mean()

    width = max(len(e.prompt_ids) + len(e.response_ids[0]) for e in examples)
    input_ids = torch.zeros(len(examples), width, dtype=torch.long)
    attention_mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)
    for row, e in enumerate(examples):
        first, length = len(e.prompt_ids), len(e.prompt_ids) + len(e.response_ids[0])
        input_ids[row, :length] = torch.tensor([*e.prompt_ids, *e.response_ids[0]])
        attention_mask[row, :length] = 1
        labels[row, first:length] = input_ids[row, first:length]
    policy.zero_grad(set_to_none=True)
    theirs = policy.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss
    theirs.backward()
    assert theirs.dtype == dtype
    torch.testing.assert_close(found_loss, theirs.detach(), rtol=TOLERANCE[dtype], atol=0)
    assert distance(found, flat_gradient(policy)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_authors_update_on_one_micro_batch(index: Index, dtype: torch.dtype) -> None:
    """Their formula as they run it: padded, all logits in memory, the token mean of the micro-batch."""
    selection = select(index, ObjectiveConfig(tau=0.7))
    groups = [g for g in range(16) if selection.advantages_R[index.offsets[g] : index.offsets[g + 1]].any()][:4]
    examples = [demo_examples(index, selection, range(g, g + 1), selection.used_R)[0] for g in groups]
    policy = demo_model(dtype)
    loss_ours = []

    def recorded(logprobs: torch.Tensor, advantages: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
        losses = GFT(logprobs, advantages, ref)
        loss_ours.append(losses.detach())
        return losses

    found = gradient(policy, [examples], "shared_prefix", recorded, count_tokens(examples))

    rows = [(e, k) for e in examples for k in range(len(e.response_ids))]
    prompt_width = max(len(e.prompt_ids) for e in examples)
    response_width = max(len(e.response_ids[k]) for e, k in rows)
    ids = torch.zeros(len(rows), prompt_width + response_width, dtype=torch.long)
    real = torch.zeros_like(ids)
    for n, (e, k) in enumerate(rows):  # prompts padded on the left, responses on the right, as RL frameworks do
        begin, end = prompt_width - len(e.prompt_ids), prompt_width + len(e.response_ids[k])
        ids[n, begin:end] = torch.tensor([*e.prompt_ids, *e.response_ids[k]])
        real[n, begin:end] = 1
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    policy.zero_grad(set_to_none=True)
    logits = policy.model(input_ids=ids, attention_mask=real, position_ids=positions).logits
    logp = torch.log_softmax(logits[:, prompt_width - 1 : -1], -1)
    logprobs = logp.gather(-1, ids[:, prompt_width:, None])[..., 0]
    mask = real[:, prompt_width:].to(dtype)
    advantages = torch.tensor([[e.advantages[k]] for e, k in rows], dtype=dtype)
    probs = logprobs.exp().detach()
    coefficient = torch.where(probs < 0.7, probs, torch.ones_like(probs))
    loss = -(advantages * coefficient * logprobs * mask).sum() / mask.sum()
    loss.backward()
    torch.testing.assert_close(torch.cat(loss_ours).sum() / mask.sum(), loss.detach(), rtol=TOLERANCE[dtype], atol=1e-7)
    assert distance(found, flat_gradient(policy)) < TOLERANCE[dtype]


@torch.no_grad()
def test_stored_reference_is_the_models_own(index: Index) -> None:
    selection = select(index, ObjectiveConfig(advantage="one"))
    examples = demo_examples(index, selection, range(48), selection.used_R)
    policy = demo_model(torch.float32)
    for layout in LAYOUTS:
        if layout == "padded":
            policy.model.set_attn_implementation("sdpa")
        found = logprobs_of(policy, examples, layout)
        assert (found - collate(examples, layout).ref_logprobs_N).abs().max() < 1e-4
