"""benchmarks/gpu.py where there is no GPU: every line of it but those that only CUDA runs."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_smoke_run_checks_measures_and_writes(tmp_path: Path) -> None:
    results = tmp_path / "RESULTS.md"
    results.write_text("# Before\n")
    command = [sys.executable, str(SCRIPT), "--smoke", "--write", str(results)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    text = results.read_text()
    assert text.startswith("# Before\n\n## Smoke run: no measurement")
    assert f"`python benchmarks/gpu.py --smoke --write {results}`: all checks passed" in text
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| 12 + 8")]
    names = ["padded", "packed", "shared prefix", "+ fused head", "+ compile"]
    assert [row[2].strip() for row in rows] == names * 2  # 1.5b and 7b
    positions = [int(row[5].replace(",", "")) for row in rows]
    assert positions[0] > positions[1] > positions[2] == positions[3] == positions[4]
    assert all(float(row[4].replace(",", "")) > 0 for row in rows)
    assert "failed" not in text and "out of memory" not in text


def measured(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, failures: list[Exception | None]) -> list[Any]:
    """The rows of one variant whose micro-batches fail in turn."""
    real = gpu.measure

    def measure(*arguments: Any) -> Any:
        failure = failures.pop(0)
        with monkeypatch.context() as patch:
            if failure is not None:

                def fail(*_: Any, **__: Any) -> None:
                    raise failure

                patch.setattr(gpu, "run_micro_batch", fail)
            return real(*arguments)

    monkeypatch.setattr(gpu, "measure", measure)
    model = gpu.models(smoke=True)["1.5b"]
    return list(
        gpu.measure_variant("1.5b", model, gpu.SMOKE_SHAPES, gpu.VARIANTS[3], torch.device("cpu"), 256, float("inf"))
    )


def test_out_of_memory_is_said_and_half_the_tokens_tried(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = measured(gpu, monkeypatch, [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), None])
    assert [(row.micro_batch_tokens, row.problem) for row in rows] == [(256, "out of memory"), (128, None)]
    assert "| out of memory | | |" in rows[0].cells(None)
    gpu.check_rows(rows)  # that is no failure


def test_another_failure_is_said_and_ends_the_program_with_an_error(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = measured(gpu, monkeypatch, [RuntimeError("no kernel\nfor this")])
    assert [row.problem for row in rows] == ["failed: RuntimeError: no kernel"]
    with pytest.raises(SystemExit, match=r"1 rows failed, the first: 1.5b, \+ fused head: failed: RuntimeError"):
        gpu.check_rows(rows)


def test_mfu_is_flop_over_seconds_and_the_peak_of_the_named_device(gpu: ModuleType) -> None:
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H200", "NVIDIA A100-SXM4-80GB", "Tesla T4")
    assert [gpu.peak_of_name(name) for name in names] == [989e12, 756e12, 989e12, 312e12, None]
    row = gpu.Row("7b", gpu.SHAPES[0], "packed", 4096, response_tokens=100, flop=989e12, seconds=2.0)
    assert "| 50.0% |" in row.cells(989e12) and "| 50 |" in row.cells(989e12)


def test_flop_of_the_real_shapes_are_those_of_the_formula(gpu: ModuleType) -> None:
    # Qwen2.5-1.5B has 1.54 billion weights, 1.31 of them in its layers; 7B has 7.62 and 6.53 (their model cards)
    for name, inside, total in (("1.5b", 1.31e9, 1.54e9), ("7b", 6.53e9, 7.62e9)):
        config = gpu.models(smoke=False)[name].config
        outlined = gpu.outline(config)
        cost = gpu.training_cost(outlined)
        assert cost.per_token / 6 == pytest.approx(inside, rel=0.01)
        assert sum(p.numel() for p in outlined.parameters()) == pytest.approx(total, rel=0.01)
        assert outlined.config.rope_parameters["rope_theta"] == 1e6
