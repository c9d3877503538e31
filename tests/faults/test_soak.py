"""Long runs: memory that does not grow, nothing left open, nobody left running."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aid.broken import World
from aid.injector import AID, ROOT

Count = Callable[[int, int], int]
Tried = Callable[[str, int], None]

# What the allocators of C and Arrow hold goes up and down by some MB; a leak of 170 bytes a group is more in 50,000
NOISE_BYTES = 8 * 2**20
ARROW_THREADS = 8 + (os.cpu_count() or 1)  # its pools for reading and for work grow to that as they are asked


def soak(*words: str | Path | int) -> dict[str, Any]:
    path = os.pathsep.join([str(AID.parent), str(AID.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(AID / "soak.py"), *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def growth(samples: list[tuple[int, int]]) -> float:
    """Bytes by which a fitted line rises over the second half; the first fills what is kept on purpose."""
    half = np.array(samples[len(samples) // 2 :], float)
    x = half[:, 0] - half[:, 0].mean()
    return float((x * half[:, 1]).sum() / (x * x).sum() * np.ptp(x))


def check(found: dict[str, Any]) -> None:
    slope, last = growth(found["samples"]), found["samples"][-1][1]
    before, after = found["before"], found["after"]
    print(f"{len(found['samples'])} samples, {last / 2**20:.0f} MB at the end, second half: {slope / 2**20:+.2f} MB")
    print(f"before {before}, after {after}")
    assert slope <= NOISE_BYTES, f"{slope / 2**20:.1f} MB more over the second half"
    assert after["descriptors"] <= before["descriptors"] and after["children"] <= before["children"]
    assert after["threads"] <= before["threads"] + ARROW_THREADS


def test_a_leak_is_found_and_noise_is_not() -> None:
    rng = np.random.default_rng(0)
    flat = [(500 * n, int(5e8 + 1e6 * rng.standard_normal())) for n in range(200)]
    assert abs(growth(flat)) < NOISE_BYTES / 4
    leaking = [(groups, size + 400 * groups) for groups, size in flat]
    assert growth(leaking) == pytest.approx(400 * 50_000, rel=0.1) and growth(leaking) > NOISE_BYTES


@pytest.mark.timeout(3600)
def test_generating_for_long(num_cases: Count, tried: Tried, tmp_path: Path) -> None:
    groups = num_cases(5_000, 100_000)
    tried("soak: groups generated", groups)
    check(soak("generate", tmp_path, groups))


@pytest.mark.timeout(3600)
def test_training_for_long(world: World, num_cases: Count, tried: Tried, tmp_path: Path) -> None:
    groups = num_cases(500, 10_000)
    tried("soak: groups trained on", groups)
    check(soak("train", tmp_path, groups, world.data))
