"""The real SGLang on a CPU, in an environment of its own: GFT_SGLANG_PYTHON names its interpreter."""

import os
from pathlib import Path
from typing import Any

import pytest

AID = Path(__file__).parent / "aid"
CPU_OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch_native",
    "disable_overlap_schedule": True,
    "disable_cuda_graph": True,
    "mem_fraction_static": 0.3,
    "max_total_tokens": 32768,
}


@pytest.fixture(scope="session")
def engine_settings() -> dict[str, Any]:
    """The `engine` block of a config. SGLang's CPU path imports a name from vllm that it never calls: see `aid`."""
    python = os.environ.get("GFT_SGLANG_PYTHON")
    if python is None:
        pytest.fail("GFT_SGLANG_PYTHON names no interpreter with SGLang; run `make test-sglang`")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(AID), os.environ.get("PYTHONPATH")]))
    return {"name": "sglang", "python": python, "max_in_flight": 64, "options": CPU_OPTIONS}
