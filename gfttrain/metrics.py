"""What a step reports: sums over its tokens, then their means; one JSON line a step.

Names: `data/...` are statistics of the step's groups, known before the forward pass and over all of them. The others
come from the forward pass and exclude groups without signal, which are not computed.

The mean of log pi - log pi_ref over stored responses is called a log-ratio, not a KL divergence: only on self samples
drawn at temperature 1 and top-p 1 does its negative estimate KL(ref || pi).
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gftdata.shards import Index
from gfttrain.plan import Selection, Step

Metrics = dict[str, float | int | None]


class TokenSums:
    """Sums over the response tokens of a step, kept on the device until they are asked for."""

    def __init__(self, source_names: Sequence[str], device: torch.device) -> None:
        self._sources = source_names
        # float64 does not exist on Apple's GPUs
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._totals_4 = torch.zeros(4, dtype=self._dtype, device=device)  # tokens, loss, rectified, entropy
        self._by_source_S2 = torch.zeros(len(source_names), 2, dtype=self._dtype, device=device)  # tokens, log-ratio

    @torch.no_grad()
    def add(
        self,
        losses_N: torch.Tensor,
        logprobs_N: torch.Tensor,
        entropy_N: torch.Tensor,
        ref_logprobs_N: torch.Tensor,
        source_codes_N: torch.Tensor,
        tau: float,
    ) -> None:
        """Add one micro-batch's tokens."""
        rectified_N = logprobs_N.exp() < tau
        parts = (torch.ones_like(losses_N), losses_N, rectified_N, entropy_N)
        self._totals_4 += torch.stack([part.to(self._dtype).sum() for part in parts])
        log_ratio_N = (logprobs_N - ref_logprobs_N).to(self._dtype)
        self._by_source_S2.index_add_(0, source_codes_N, torch.stack([torch.ones_like(log_ratio_N), log_ratio_N], 1))

    def means(self, num_loss_tokens: int, *, rectified: bool) -> Metrics:
        """loss (over N), and means over the tokens that were computed; None where there were none."""
        tokens, loss, num_rectified, entropy = self._totals_4.tolist()
        metrics: Metrics = {
            "loss": loss / max(1, num_loss_tokens),
            "entropy": entropy / tokens if tokens else None,
        }
        if rectified:
            metrics["rectified_fraction"] = num_rectified / tokens if tokens else None
        for name, (count, log_ratio) in zip(self._sources, self._by_source_S2.tolist(), strict=True):
            if count:
                metrics[f"log_ratio/{name}"] = log_ratio / count
        metrics["computed_tokens"] = int(tokens)
        return metrics


def data_metrics(index: Index, selection: Selection, step: Step) -> Metrics:
    """Rewards of the step's groups by source, over judged responses, and how many groups have a signal."""
    responses = np.concatenate([np.arange(index.offsets[g], index.offsets[g + 1]) for g in step.groups])
    metrics: Metrics = {"data/groups": len(step.groups), "data/loss_tokens": step.num_loss_tokens}
    with_signal = sum(bool(selection.advantages_R[index.offsets[g] : index.offsets[g + 1]].any()) for g in step.groups)
    metrics["data/groups_with_signal"] = with_signal
    metrics["data/responses_unjudged"] = int(np.isnan(index.rewards[responses]).sum())
    for code, name in enumerate(index.source_names):
        rewards = index.rewards[responses[index.source_codes[responses] == code]]
        judged: npt.NDArray[np.float32] = rewards[np.isfinite(rewards)]
        if len(judged):
            metrics[f"data/reward/{name}"] = float(judged.mean(dtype=np.float64))
            metrics[f"data/pass_rate/{name}"] = float((judged == 1.0).mean())
    return metrics


def append_line(path: Path, metrics: Metrics) -> None:
    """One line of JSON; a value that is not finite becomes null, which JSON can say."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(clean) + "\n")


def cut_back(path: Path, steps: int) -> None:
    """Drop the lines of steps that a resumed run will do again."""
    if not path.is_file():
        return
    kept = [line for line in path.read_text().splitlines(keepends=True) if _step_of(line) <= steps]
    staged = path.with_suffix(".staged")
    with staged.open("w") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)


def _step_of(line: str) -> float:
    try:
        data: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:  # a torn last line
        return math.inf
    return float(data["step"])
