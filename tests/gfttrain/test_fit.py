"""Memory by rules that are held to what is there, and micro-batches chosen by it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from training_helpers import MODEL, make_index, random_examples, train_settings
from transformers import AutoModelForCausalLM, LlamaConfig

from gftdata.errors import UserError
from gfttrain import fit
from gfttrain import train as training
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
    assert chosen(400, 400) == 4096  # with 2048, each prompt would be computed twice
    assert chosen(2000, 700) == 8192


@pytest.mark.parametrize("expected", [8192, 4096, 2048, 1024])
def test_elsewhere_as_large_as_fits(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, expected: int) -> None:
    prepared = planned(config, 200, 300)
    needed = needed_bytes(with_limit(config, expected), prepared, CUDA, 1)
    there = int(needed / fit.USABLE) + 1 if expected > 1024 else 1  # nothing fits into one byte
    monkeypatch.setattr(fit, "device_bytes", lambda device, num_ranks: there)
    assert with_micro_batches(config, prepared, CUDA, 1).batch.micro_batch_tokens == expected


def test_a_device_may_not_say_what_it_has(config: TrainConfig) -> None:
    prepared = planned(config, 200, 300)
    assert fit.device_bytes(torch.device("mps")) is None
    assert with_micro_batches(config, prepared, torch.device("mps"), 1).batch.micro_batch_tokens == 8192
    assert memory_notice(config, prepared, torch.device("mps"), 1) is None


def test_too_little_memory_is_said_with_what_to_lower(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = planned(config, 20, 300)
    assert memory_notice(config, prepared, CPU, 1) is None
    needs = {size: needed_bytes(with_limit(config, size), prepared, CUDA, 1) for size in (4096, 2048)}
    monkeypatch.setattr(fit, "device_bytes", lambda device, num_ranks: int(sum(needs.values()) / 2 / fit.USABLE))
    notice = memory_notice(config, prepared, CUDA, 1)
    assert notice is not None and "batch.micro_batch_tokens=2048 or gradient_checkpointing=true or lora" in notice
    assert memory_notice(with_limit(config, 2048), prepared, CUDA, 1) is None
    monkeypatch.setattr(fit, "device_bytes", lambda device, num_ranks: 1)
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


@pytest.mark.parametrize(
    ("ranks", "environment", "share"),
    [(2, {}, 2), (8, {"LOCAL_WORLD_SIZE": "4"}, 4), (6, {"SLURM_STEP_NUM_NODES": "3"}, 2)],
)
def test_ranks_share_a_machine(
    monkeypatch: pytest.MonkeyPatch, ranks: int, environment: dict[str, str], share: int
) -> None:
    whole = fit.device_bytes(CPU)
    assert whole is not None
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert fit.device_bytes(CPU, ranks) == whole // share


def test_what_lacks_is_said_before_a_model_is_loaded(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[training.Event] = []

    def load(*_: Any) -> Any:
        raise UserError("nothing is loaded here")

    monkeypatch.setattr(fit, "device_bytes", lambda device, num_ranks: 2**20)
    monkeypatch.setattr(training, "load_for_training", load)
    with pytest.raises(UserError, match="nothing is loaded here"):
        training.train(train_settings(data, tmp_path / "run"), said.append)
    (event,) = said
    assert event.kind == "notice" and "GiB of memory will be needed" in event.notices[0]
