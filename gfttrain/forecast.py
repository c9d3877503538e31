"""What a run will take, before it takes it: positions, memory, time. For `gft train --dry-run`; nothing is trained.

Work is counted from the plan itself. Memory and time are estimates: the first by the rules below, the second from the
speed at which this device multiplies matrices.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gfttrain.config import TrainConfig
from gfttrain.head import chunk_tokens
from gfttrain.model import compute_dtype, outline, parameter_counts
from gfttrain.plan import LayoutTotals, layout_totals
from gfttrain.prepare import Prepared

MAX_STEPS_LAID_OUT = 2000  # of a longer run, evenly spread ones are laid out
GEMM_SHARE = 0.5  # of the speed of large matrix products, what training reaches; benchmarks/ measure it
GEMM_SIZE = {"cpu": 2048}  # of the products that are timed; 8192 elsewhere


@dataclass(frozen=True, slots=True)
class Forecast:
    """A run in numbers. Memory is per device."""

    steps_laid_out: int
    layout: LayoutTotals  # of those steps
    flops: float  # of all steps that are left
    weight_bytes: int  # weights, gradients and optimizer state
    activation_bytes: int  # of the largest micro-batch
    gemm_flops_per_second: float
    seconds: float


def forecast(
    config: TrainConfig,
    prepared: Prepared,
    device: torch.device,
    num_ranks: int = 1,
    gemm_flops_per_second: float | None = None,
) -> Forecast:
    """Lay out the steps that are left, and estimate what they take.

    The rate of matrix products is measured, unless it is given from an earlier forecast on the same device.
    """
    left = prepared.steps[prepared.first_step :]
    places = np.linspace(0, len(left) - 1, min(len(left), MAX_STEPS_LAID_OUT)).astype(int)
    steps = [left[place] for place in np.unique(places).tolist()]
    layout = layout_totals(prepared.index, prepared.selection, steps, config.batch, prepared.cost, num_ranks)
    scale = len(left) / max(1, len(steps))
    dtype = compute_dtype(config, device)
    rate = gemm_flops_per_second or measure_gemm(dtype, device)
    work = layout.slowest_rank_flops * scale * (4 / 3 if config.gradient_checkpointing else 1.0)
    outlined = outline(config.model)
    return Forecast(
        steps_laid_out=len(steps),
        layout=layout,
        flops=layout.flops * scale,
        weight_bytes=weight_bytes(config, outlined, dtype, num_ranks),
        activation_bytes=activation_bytes(config, outlined, dtype, layout.largest_micro_batch, device),
        gemm_flops_per_second=rate,
        seconds=work / (rate * GEMM_SHARE),
    )


def weight_bytes(config: TrainConfig, outlined: Any, dtype: torch.dtype, num_ranks: int) -> int:
    """float32 weights, and for those that are trained a gradient and Adam's two moments; sharded over the ranks.

    Where the forward pass is narrower, a copy of the weights in its width; the head's weight gradient is there once
    more while a micro-batch is computed.
    """
    every, _ = parameter_counts(outlined)
    text = outlined.config.get_text_config()
    trained = every if config.lora is None else _adapter_parameters(config, outlined)
    head = text.vocab_size * text.hidden_size * 4 if config.lora is None else 0
    narrow = every * dtype.itemsize if dtype != torch.float32 else 0
    return (every * 4 + trained * 12) // num_ranks + narrow + head


def _adapter_parameters(config: TrainConfig, outlined: Any) -> int:
    assert config.lora is not None
    head = outlined.get_output_embeddings()
    shapes = [m.weight.shape for m in outlined.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return sum(config.lora.rank * (rows + columns) for rows, columns in shapes)


def activation_bytes(
    config: TrainConfig, outlined: Any, dtype: torch.dtype, positions: int, device: torch.device
) -> int:
    """What a forward pass keeps for the backward pass, roughly, and the largest chunk of logits.

    A layer keeps, a position: about 10 vectors of the hidden size (inputs of the norms, their outputs, residuals,
    queries, the attention's output), keys and values twice, and 4 of the feed-forward's size. With checkpointing each
    layer keeps its input, and one layer at a time the rest.
    """
    text = outlined.config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv = (getattr(text, "num_key_value_heads", None) or heads) * head_dim
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    layer = (10 * text.hidden_size + 4 * kv + 4 * inner) * dtype.itemsize
    kept = text.hidden_size * dtype.itemsize
    layers = text.num_hidden_layers
    whole = kept * layers + layer if config.gradient_checkpointing else layer * layers
    chunk = min(positions, chunk_tokens(text.vocab_size, device))
    return int(positions * (whole + 2 * text.hidden_size * 4) + 3 * chunk * text.vocab_size * 4)


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
