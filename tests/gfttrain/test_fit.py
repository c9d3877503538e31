"""Memory by rules that are held to what is there, and micro-batches chosen by it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from training_helpers import MODEL, make_index, random_examples, train_settings
from transformers import AutoModelForCausalLM, LlamaConfig

from gfttrain import fit
from gfttrain.config import LoraConfig, TrainConfig
from gfttrain.distributed import alone
from gfttrain.fit import activation_bytes, memory_notice, needed_bytes, weight_bytes, with_limit, with_micro_batches
from gfttrain.model import load_for_training, outline
from gfttrain.plan import make_schedule, select
from gfttrain.prepare import Prepared, prepare
from gfttrain.stream import collate

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def config(data: Path, tmp_path: Path) -> TrainConfig:
    config = train_settings(data, tmp_path / "run", epochs=2)
    return config.model_copy(update={"batch": config.batch.model_copy(update={"micro_batch_tokens": "auto"})})


def planned(config: TrainConfig, prompt: int, response: int, responses: int = 8, groups: int = 16) -> Prepared:
    """The demo's run on other groups: one step of groups of a size."""
    index = make_index([[("self", float(r % 2), response) for r in range(responses)]] * groups, prompt_tokens=prompt)
    selection = select(index, config.objective)
    batch = config.batch.model_copy(update={"groups_per_step": groups})
    steps = make_schedule(index, selection, batch, seed=0, epochs=1, max_steps=None, skip_unjudged=False)
    return replace(prepare(config), index=index, selection=selection, steps=steps)


def test_weights_gradients_and_moments_are_counted(config: TrainConfig) -> None:
    outlined = outline(str(MODEL))
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(MODEL).parameters())
    head = 18 * outlined.config.hidden_size * 4
    assert weight_bytes(config, outlined, torch.float32, 1) == 16 * parameters + head
    assert weight_bytes(config, outlined, torch.float32, 4) == 4 * parameters + head
    lora = config.model_copy(update={"lora": LoraConfig(rank=4)})
    assert weight_bytes(lora, outlined, torch.float32, 1) < 8 * parameters


@pytest.mark.parametrize("checkpointing", [False, "selective", True])
def test_activations_are_about_what_a_forward_pass_keeps(
    config: TrainConfig, tmp_path: Path, checkpointing: Any
) -> None:
    size = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=18, num_hidden_layers=12, **size))
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_bytes((MODEL / "tokenizer.json").read_bytes())
    config = config.model_copy(update={"model": str(tmp_path / "model"), "gradient_checkpointing": checkpointing})
    policy = load_for_training(config, alone(CPU))
    batch = collate(random_examples(40), "shared_prefix")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        kept = policy(batch, lambda logprobs_C, chunk: -logprobs_C)
    assert kept[0].requires_grad
    measured = sum(event.self_cpu_memory_usage for event in found.key_averages())
    positions = batch.input_ids_BL.numel()
    outlined = outline(config.model)
    expected = activation_bytes(config, outlined, torch.float32, positions, CPU)
    if checkpointing:  # without the layer that the backward pass will have at a time
        plain = config.model_copy(update={"gradient_checkpointing": False})
        expected -= activation_bytes(plain, outlined, torch.float32, positions, CPU) // 12
    assert 0.6 * expected < measured < 1.2 * expected


def test_a_given_number_is_taken(config: TrainConfig) -> None:
    given = with_limit(config, 77)
    for device in (CPU, CUDA):
        assert with_micro_batches(given, prepare(given), device, 1) is given


def test_on_a_cpu_as_small_as_costs_no_speed(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(prompt: int, response: int) -> Any:
        return with_micro_batches(config, planned(config, prompt, response), CPU, 1).batch.micro_batch_tokens

    assert chosen(20, 600) == 8192  # of a tiny model, whose micro-batches are over at once
    monkeypatch.setattr(fit, "MICRO_BATCH_FLOPS", 0.0)
    assert chosen(20, 600) == 2048  # its prompts cost nothing
    assert chosen(400, 400) == 4096  # two in three of its positions would be prompts computed again
    assert chosen(2000, 700) == 8192


@pytest.mark.parametrize("gib", [10.0, 1.0, 0.0])
def test_elsewhere_as_large_as_fits(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    prepared = planned(config, 200, 300)
    sizes = (8192, 4096, 2048, 1024)
    needs = {size: needed_bytes(with_limit(config, size), prepared, CUDA, 1) for size in sizes}
    there = {10.0: 10 * needs[8192], 1.0: int(needs[2048] / fit.USABLE) + 1, 0.0: 1}[gib]
    monkeypatch.setattr(fit, "device_bytes", lambda device: there)
    expected = {10.0: 8192, 1.0: 2048, 0.0: 1024}[gib]
    assert with_micro_batches(config, prepared, CUDA, 1).batch.micro_batch_tokens == expected


def test_what_a_device_is_asked_may_stay_unknown(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = planned(config, 200, 300)
    assert fit.device_bytes(torch.device("mps")) is None
    assert with_micro_batches(config, prepared, torch.device("mps"), 1).batch.micro_batch_tokens == 8192
    assert memory_notice(config, prepared, torch.device("mps"), 1) is None


def test_too_little_memory_is_said_with_what_to_lower(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = planned(config, 20, 300)
    assert memory_notice(config, prepared, CPU, 1) is None
    needs = {size: needed_bytes(with_limit(config, size), prepared, CUDA, 1) for size in (4096, 2048)}
    monkeypatch.setattr(fit, "device_bytes", lambda device: int(sum(needs.values()) / 2 / fit.USABLE))
    notice = memory_notice(config, prepared, CUDA, 1)
    assert notice is not None and "batch.micro_batch_tokens=2048 or gradient_checkpointing=true or lora" in notice
    assert memory_notice(with_limit(config, 2048), prepared, CUDA, 1) is None
    monkeypatch.setattr(fit, "device_bytes", lambda device: 1)
    everything = config.model_copy(update={"gradient_checkpointing": True, "lora": LoraConfig(rank=4)})
    assert str(memory_notice(everything, prepared, CUDA, 1)).endswith("use more devices")


@pytest.mark.parametrize(
    ("line", "folder", "file"),
    [
        ("4:memory:/job/step", "sys/fs/cgroup/memory/job", "memory.limit_in_bytes"),
        ("0::/job/step", "sys/fs/cgroup/job", "memory.max"),
    ],
)
def test_limits_of_batch_systems_count(tmp_path: Path, line: str, folder: str, file: str) -> None:
    assert fit._group_limits(tmp_path) == []
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"2:cpu:/\n{line}\n")
    assert fit._group_limits(tmp_path) == []
    (tmp_path / folder / "step").mkdir(parents=True)
    (tmp_path / folder / "step" / file).write_text("max\n")
    (tmp_path / folder / file).write_text("12345\n")
    assert fit._group_limits(tmp_path) == [12345]


def test_the_memory_of_this_machine_is_known() -> None:
    found = fit.device_bytes(CPU)
    assert found is not None and 2**28 < found < 2**50
