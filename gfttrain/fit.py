"""What a run needs of its device's memory, and how large its micro-batches should be. Pure, but for asking the device.

Memory is estimated by rules, per device.
"""

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gfttrain import lean
from gfttrain.config import LARGEST_MICRO_BATCH, TrainConfig
from gfttrain.head import chunk_tokens
from gfttrain.model import compute_dtype, outline, parameter_counts
from gfttrain.plan import Step, layout_totals
from gfttrain.prepare import Prepared

SAMPLED_STEPS = 32  # that micro-batches are chosen from
SMALLEST_MICRO_BATCH = {"cpu": 2048}  # from here on a CPU multiplies at its full speed; 1024 elsewhere
MICRO_BATCH_FLOPS = 5e11  # of one on a CPU, seconds of work: what each costs anew in calls is little beside it
EXTRA_FLOPS = 1.05  # what smaller micro-batches may cost on a CPU, in prompts that are computed again
USABLE = 0.9  # share of a device's memory
PROCESS_BYTES = {"cpu": 600 * 2**20}  # Python, torch and the other libraries


def with_micro_batches(config: TrainConfig, prepared: Prepared, device: torch.device, num_ranks: int) -> TrainConfig:
    """The config with a number for `batch.micro_batch_tokens` where that is auto.

    On a CPU the smallest that costs no speed: it holds less, and beyond some thousand tokens gains nothing. Elsewhere
    the largest, up to LARGEST_MICRO_BATCH, that is expected to fit into the memory. The same for a run that goes on,
    on the same device.
    """
    if config.batch.micro_batch_tokens != "auto":
        return config
    sizes = [LARGEST_MICRO_BATCH]
    while sizes[-1] > SMALLEST_MICRO_BATCH.get(device.type, 1024):
        sizes.append(sizes[-1] // 2)
    choose = _cheap if device.type == "cpu" else _fitting
    return choose([with_limit(config, size) for size in sizes], prepared, device, num_ranks)


def with_limit(config: TrainConfig, size: int) -> TrainConfig:
    """The config with micro-batches of at most so many tokens."""
    return config.model_copy(update={"batch": config.batch.model_copy(update={"micro_batch_tokens": size})})


def _cheap(configs: Sequence[TrainConfig], prepared: Prepared, device: torch.device, num_ranks: int) -> TrainConfig:
    steps = _some(prepared.steps)

    def flops(config: TrainConfig) -> float:
        return layout_totals(prepared.index, prepared.selection, steps, config.batch, prepared.cost, num_ranks).flops

    least = flops(configs[0])
    for config in reversed(configs[1:]):
        enough = prepared.cost.per_token * config.batch.limit >= MICRO_BATCH_FLOPS
        if enough and flops(config) <= EXTRA_FLOPS * least:
            return config
    return configs[0]


def _fitting(configs: Sequence[TrainConfig], prepared: Prepared, device: torch.device, num_ranks: int) -> TrainConfig:
    there = device_bytes(device, num_ranks)
    for config in configs:
        if there is None or needed_bytes(config, prepared, device, num_ranks) <= USABLE * there:
            return config
    return configs[-1]


def _some(steps: Sequence[Step]) -> list[Step]:
    places = np.linspace(0, len(steps) - 1, min(len(steps), SAMPLED_STEPS)).astype(int)
    return [steps[place] for place in np.unique(places).tolist()]


def memory_notice(config: TrainConfig, prepared: Prepared, device: torch.device, num_ranks: int) -> str | None:
    """What to lower where a run is expected to need more memory than its device has."""
    there, needed = device_bytes(device, num_ranks), needed_bytes(config, prepared, device, num_ranks)
    if there is None or needed <= USABLE * there:
        return None
    size = config.batch.limit
    while size > 1 and needed_bytes(with_limit(config, size), prepared, device, num_ranks) > USABLE * there:
        size //= 2
    ways = [] if size <= 1 else [f"batch.micro_batch_tokens={size}"]
    if config.gradient_checkpointing is not True:
        ways.append("gradient_checkpointing=true")
    if config.lora is None:
        ways.append("lora.rank=32")
    advice = f"set {' or '.join(ways)} (--set)" if ways else "use more devices"
    return f"about {needed / 2**30:.1f} GiB of memory will be needed, and there are {there / 2**30:.1f}: {advice}"


def needed_bytes(config: TrainConfig, prepared: Prepared, device: torch.device, num_ranks: int) -> int:
    """The peak of one rank, roughly: the largest micro-batch of some steps, weights, gradients, optimizer, process."""
    steps = _some(prepared.steps)
    totals = layout_totals(prepared.index, prepared.selection, steps, config.batch, prepared.cost, num_ranks)
    return sum(memory_parts(config, totals.largest_micro_batch, device, num_ranks))


def memory_parts(config: TrainConfig, positions: int, device: torch.device, num_ranks: int) -> tuple[int, int, int]:
    """Bytes of (weights, gradients and optimizer; activations of a micro-batch of so many positions; the process)."""
    outlined, dtype = _outline(config.model), compute_dtype(config, device)
    return (
        weight_bytes(config, outlined, dtype, num_ranks),
        activation_bytes(config, outlined, dtype, positions, device),
        PROCESS_BYTES.get(device.type, 0),
    )


_outline = lru_cache(maxsize=1)(outline)  # asked for each size of micro-batch, and slow to build for large models


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

    A layer keeps, a position: about 10 vectors of the hidden size (inputs of the norms, these normalised, the norms'
    outputs, queries, the attention's output, residuals), keys and values twice, and 4 of the feed-forward's size; with
    lean.py 8 and 2. With checkpointing each layer keeps its input, and one layer at a time the rest; selective, also
    what its products gave: 7 vectors of the hidden size in all (attention in parts gives two), keys and values, and 2
    of the feed-forward's.
    """
    text = outlined.config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv = (getattr(text, "num_key_value_heads", None) or heads) * head_dim
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    modules = [] if config.compile else list(outlined.modules())
    norms, gated = (
        any(map(lean.is_norm, modules)),
        any(map(lean.is_gated, modules)) and not config.gradient_checkpointing,
    )
    layer = (8 if norms else 10) * text.hidden_size + 4 * kv + (2 if gated else 4) * inner
    kept = {False: layer, True: text.hidden_size, "selective": 7 * text.hidden_size + 2 * kv + 2 * inner}
    whole = kept[config.gradient_checkpointing] * text.num_hidden_layers
    if config.gradient_checkpointing:
        whole += layer
    chunk = min(positions, chunk_tokens(text.vocab_size, device))
    return int(positions * (whole * dtype.itemsize + 2 * text.hidden_size * 4) + 3 * chunk * text.vocab_size * 4)


def device_bytes(device: torch.device, num_ranks: int = 1) -> int | None:
    """A rank's memory: a GPU's, or its share of the machine's, or of less where these processes may not have all of it.

    None where it cannot be found out.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu":
        return None
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_group_limits(Path("/"))]
    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", 1))  # of srun; torchrun says how many ranks are here
    return min(limits) // int(os.environ.get("LOCAL_WORLD_SIZE", -(-num_ranks // nodes)))


def _group_limits(root: Path) -> list[int]:
    """The limits of this process's control groups (Linux; those of batch systems and containers), in bytes."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "memory":
            base, file = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        elif not controllers:
            base, file = root / "sys/fs/cgroup", "memory.max"
        else:
            continue
        inner = base / group.lstrip("/")
        for folder in (inner, *inner.parents):  # a limit of any group around it holds
            if not folder.is_relative_to(base):
                break
            try:
                found.append(int((folder / file).read_text()))
            except (OSError, ValueError):  # not seen from inside a container, or the word max
                continue
    return found
