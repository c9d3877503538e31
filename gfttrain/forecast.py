"""What a run will take, before it takes it: positions, memory, time. For `gft train --dry-run`; nothing is trained.

Work is counted from the plan itself. Memory and time are estimates: the first by the rules of fit.py, the second from
the speed at which this device multiplies matrices.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch

from gfttrain.config import TrainConfig
from gfttrain.fit import device_bytes, memory_notice, memory_parts
from gfttrain.model import compute_dtype
from gfttrain.plan import LayoutTotals, layout_totals
from gfttrain.prepare import Prepared

MAX_STEPS_LAID_OUT = 2000  # of a longer run, evenly spread ones are laid out
GEMM_SHARE = 0.5  # of the speed of large matrix products, what training reaches; benchmarks/ measure it
AGAIN = {False: 1.0, True: 4 / 3, "selective": 1.1}  # work with what checkpointing computes again
GEMM_SIZE = {"cpu": 2048}  # of the products that are timed; 8192 elsewhere


@dataclass(frozen=True, slots=True)
class Forecast:
    """A run in numbers. Memory is per device."""

    steps_laid_out: int
    layout: LayoutTotals  # of those steps
    flops: float  # of all steps that are left
    weight_bytes: int  # weights, gradients and optimizer state
    activation_bytes: int  # of the largest micro-batch
    process_bytes: int  # beside the model
    device_bytes: int | None  # what there is for a rank
    memory_notice: str | None  # where that may not be enough
    gemm_flops_per_second: float
    seconds: float

    @property
    def needed_bytes(self) -> int:
        """The peak of a rank's memory."""
        return self.weight_bytes + self.activation_bytes + self.process_bytes


def forecast(
    config: TrainConfig,
    prepared: Prepared,
    device: torch.device,
    num_ranks: int = 1,
    gemm_flops_per_second: float | None = None,
) -> Forecast:
    """Lay out the steps that are left, and estimate what they take; `batch.micro_batch_tokens` is a number by now.

    The rate of matrix products is measured, unless it is given from an earlier forecast on the same device.
    """
    left = prepared.steps[prepared.first_step :]
    places = np.linspace(0, len(left) - 1, min(len(left), MAX_STEPS_LAID_OUT)).astype(int)
    steps = [left[place] for place in np.unique(places).tolist()]
    layout = layout_totals(prepared.index, prepared.selection, steps, config.batch, prepared.cost, num_ranks)
    scale = len(left) / max(1, len(steps))
    dtype = compute_dtype(config, device)
    rate = gemm_flops_per_second or measure_gemm(dtype, device)
    work = layout.slowest_rank_flops * scale * AGAIN[config.gradient_checkpointing]
    weights, activations, process = memory_parts(config, layout.largest_micro_batch, device, num_ranks)
    return Forecast(
        steps_laid_out=len(steps),
        layout=layout,
        flops=layout.flops * scale,
        weight_bytes=weights,
        activation_bytes=activations,
        process_bytes=process,
        device_bytes=device_bytes(device, num_ranks),
        memory_notice=memory_notice(config, prepared, device, num_ranks),
        gemm_flops_per_second=rate,
        seconds=work / (rate * GEMM_SHARE),
    )


def measure_gemm(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of large square matrix products on this device, the best of three; takes about a second."""
    size = GEMM_SIZE.get(device.type, 8192)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(4):  # the first warms up
        _synchronize(device)
        began = time.perf_counter()
        a @ b
        _synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
