"""What a step reports: sums over its tokens, then their means; one JSON line a step.

Names: `data/...` are statistics of the step's groups, known before the forward pass and over all of them. The others
come from the forward pass and exclude groups without signal, which are not computed.

The mean of log pi - log pi_ref over stored responses is called a log-ratio, not a KL divergence: only on self samples
drawn at temperature 1 and top-p 1 does its negative estimate KL(ref || pi), reported there as `kl_ref_to_model`.

Shapes: N tokens of a micro-batch, S sources, W bins of weights.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gftdata.errors import UserError
from gftdata.index import Index
from gftdata.store import named, read_file, replacing
from gftdata.types import SELF
from gfttrain.config import ObjectiveConfig
from gfttrain.objective import is_clipped, is_rectified, rectified_coefficient
from gfttrain.plan import Selection, Step

Metrics = dict[str, float | int | list[int] | None]

STALE_RATIOS = (0.8, 1.25)  # a self token whose pi / pi_ref leaves this range counts as stale
WEIGHT_BINS = 16  # of the histograms of effective weights: [2^i, 2^(i+1)), the last open


class TokenSums:
    """Sums over the response tokens of a step, kept on the device until they are asked for."""

    def __init__(self, source_names: Sequence[str], objective: ObjectiveConfig, device: torch.device) -> None:
        self._sources = source_names
        self._objective = objective
        # float64 does not exist on Apple's GPUs
        dtype = torch.float32 if device.type == "mps" else torch.float64
        size = 5 + 5 * len(source_names) + 2 * WEIGHT_BINS
        self._all = torch.zeros(size, dtype=dtype, device=device)  # one vector: one reduction over ranks
        self._totals_5, by_source, weights = self._all.split([5, 5 * len(source_names), 2 * WEIGHT_BINS])
        self._by_source_S5 = by_source.view(-1, 5)
        self._weights_2W = weights.view(2, -1)

    @torch.no_grad()
    def add(
        self,
        losses_N: torch.Tensor,
        logprobs_N: torch.Tensor,
        entropy_N: torch.Tensor,
        advantages_N: torch.Tensor,
        ref_logprobs_N: torch.Tensor,
        old_logprobs_N: torch.Tensor,
        source_codes_N: torch.Tensor,
    ) -> None:
        """Add one micro-batch's tokens."""
        objective, dtype = self._objective, self._all.dtype
        one_N = torch.ones_like(losses_N)
        rectified_N = is_rectified(logprobs_N, objective.tau)
        clipped_N = torch.zeros_like(rectified_N)
        if objective.coefficient == "clipped_ratio":
            clipped_N = is_clipped(objective, logprobs_N, old_logprobs_N, advantages_N)
        parts = (one_N, losses_N, rectified_N, entropy_N, clipped_N)
        self._totals_5 += torch.stack([part.to(dtype).sum() for part in parts])
        log_ratio_N = logprobs_N - ref_logprobs_N
        low, high = STALE_RATIOS
        stale_N = (log_ratio_N < math.log(low)) | (log_ratio_N > math.log(high))
        kinds = (one_N, log_ratio_N, rectified_N, stale_N, entropy_N)
        self._by_source_S5.index_add_(0, source_codes_N, torch.stack([kind.to(dtype) for kind in kinds], 1))
        # log2 of 1/pi, and of C/pi after rectification
        before_N = -logprobs_N / math.log(2)
        after_N = before_N + rectified_coefficient(logprobs_N, objective.tau).log2()
        for row, bits_N in zip(self._weights_2W, (before_N, after_N), strict=True):
            # the nearest float below 2^i belongs to its bin: a weight of exactly 1 may come out as 2^-1e-8
            # and what is no number belongs to none, but must not end the run here: the loss of the step says it
            bins_N = (bits_N + 1e-4).floor().nan_to_num(nan=0.0).clamp(0, WEIGHT_BINS - 1).long()
            row.index_add_(0, bins_N, one_N.to(dtype))

    def means(self, num_loss_tokens: int, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda t: t) -> Metrics:
        """loss (over N), and means over the tokens that were computed; None where there were none.

        `reduce` sums a vector over ranks, in place.
        """
        reduce(self._all)
        tokens, loss, num_rectified, entropy, clipped = self._totals_5.tolist()
        metrics: Metrics = {
            "loss": loss / max(1, num_loss_tokens),
            "entropy": entropy / tokens if tokens else None,
        }
        rectifies = self._objective.coefficient == "rectified"
        if rectifies:
            metrics["rectified_fraction"] = num_rectified / tokens if tokens else None
        else:
            metrics["clipped_fraction"] = clipped / tokens if tokens else None
        for name, (count, ratio, rectified, stale, own_entropy) in zip(
            self._sources, self._by_source_S5.tolist(), strict=True
        ):
            if not count:
                continue
            metrics[f"log_ratio/{name}"] = ratio / count
            metrics[f"entropy/{name}"] = own_entropy / count
            if rectifies:
                metrics[f"rectified_fraction/{name}"] = rectified / count
            if name == SELF:
                metrics["stale_fraction"] = stale / count
        if rectifies:
            before, after = (row.long().tolist() for row in self._weights_2W)
            metrics["weights_before"], metrics["weights_after"] = before, after
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


def append_line(path: Path, metrics: Mapping[str, Any]) -> None:
    """One line of JSON; a value that is not finite becomes null, which JSON can say."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
    with named(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(clean) + "\n")


def cut_back(path: Path, steps: int) -> None:
    """Drop the lines of steps that a resumed run will do again, and a torn last line.

    Raises UserError for any other damaged one.
    """
    if not path.is_file():
        return
    lines = read_file(path).splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    with replacing(path) as file:
        file.writelines(line for number, line in enumerate(lines, 1) if _step_of(line, path, number) <= steps)


def _step_of(line: bytes, path: Path, number: int) -> int:
    try:
        step = json.loads(line)["step"]
        if isinstance(step, int):
            return step
    except (ValueError, TypeError, KeyError):
        pass
    raise UserError(f"{path}: line {number} is damaged: expected the metrics of a step; remove that line")
