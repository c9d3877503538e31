"""What --dry-run says of a run: counted from the plan, estimated by rules that are held to what is there."""

from pathlib import Path

import pytest
import torch
from training_helpers import MODEL, train_settings
from transformers import AutoModelForCausalLM

from gfttrain.config import LoraConfig, TrainConfig
from gfttrain.forecast import activation_bytes, forecast, measure_gemm, weight_bytes
from gfttrain.model import outline
from gfttrain.prepare import prepare
from gfttrain.train import train

CPU = torch.device("cpu")


@pytest.fixture
def config(data: Path, tmp_path: Path) -> TrainConfig:
    return train_settings(data, tmp_path / "run", epochs=2, batch={"micro_batch_tokens": 300})


def test_positions_are_those_that_training_computes(config: TrainConfig) -> None:
    prepared = prepare(config)
    expected = forecast(config, prepared, CPU)
    assert expected.steps_laid_out == len(prepared.steps) == 12
    computed = 0

    def listener(event: object) -> None:
        nonlocal computed
        computed += getattr(event, "metrics", {}).get("computed_tokens", 0)

    train(config, listener)
    assert expected.layout.response_tokens == computed
    assert 0 < expected.layout.prefix_saving < 1 and expected.layout.packing_efficiency == 1
    assert expected.layout.largest_micro_batch <= 300
    assert expected.flops == expected.layout.flops and expected.seconds > 0


def test_a_long_run_is_laid_out_in_part_and_scaled(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(config)
    whole = forecast(config, prepared, CPU)
    monkeypatch.setattr("gfttrain.forecast.MAX_STEPS_LAID_OUT", 6)
    part = forecast(config, prepared, CPU)
    assert part.steps_laid_out == 6
    assert part.flops == pytest.approx(whole.flops, rel=0.3) and part.flops == 2 * part.layout.flops


def test_weights_gradients_and_moments_are_counted(config: TrainConfig) -> None:
    outlined = outline(str(MODEL))
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(MODEL).parameters())
    head = 18 * outlined.config.hidden_size * 4
    assert weight_bytes(config, outlined, torch.float32, 1) == 16 * parameters + head
    assert weight_bytes(config, outlined, torch.float32, 4) == 4 * parameters + head
    lora = config.model_copy(update={"lora": LoraConfig(rank=4)})
    assert weight_bytes(lora, outlined, torch.float32, 1) < 8 * parameters


def test_checkpointing_keeps_less(config: TrainConfig) -> None:
    outlined = outline(str(MODEL))
    less = config.model_copy(update={"gradient_checkpointing": True})
    plain, checkpointed = (activation_bytes(c, outlined, torch.float32, 5000, CPU) for c in (config, less))
    assert checkpointed < plain


def test_gemm_rate_is_that_of_some_machine() -> None:
    assert 1e8 < measure_gemm(torch.float32, CPU) < 1e15
