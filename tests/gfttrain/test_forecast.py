"""What --dry-run says of a run: counted from the plan, estimated by rules that are held to what is there."""

from pathlib import Path

import pytest
import torch
from training_helpers import train_settings

from gfttrain.config import TrainConfig
from gfttrain.fit import memory_parts
from gfttrain.forecast import forecast, measure_gemm
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
    assert expected.needed_bytes == sum(memory_parts(config, expected.layout.largest_micro_batch, CPU, 1))


def test_a_long_run_is_laid_out_in_part_and_scaled(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(config)
    whole = forecast(config, prepared, CPU)
    monkeypatch.setattr("gfttrain.forecast.MAX_STEPS_LAID_OUT", 6)
    part = forecast(config, prepared, CPU)
    assert part.steps_laid_out == 6
    assert part.flops == pytest.approx(whole.flops, rel=0.3) and part.flops == 2 * part.layout.flops


def test_gemm_rate_is_that_of_some_machine() -> None:
    assert 1e8 < measure_gemm(torch.float32, CPU) < 1e15
