"""Large float32 products of linear layers by oneDNN, on the CPUs where it is faster than MKL.

torch multiplies float32 matrices with MKL, which on AMD's CPUs does not use AVX-512; oneDNN, which torch brings as
well, does. On a Zen 4 with SmolLM2's shapes it is 1.1 to 1.2 times as fast for x W^T and dy W and 1.8 times for logits;
for dy^T x it is no faster, so the gradient of the weight stays with MKL (`benchmarks/products.py`; the table stands
in the README). The rule looks at machine and shape alone, so the same run does the same sums again.
`torch.backends.mkldnn.flags(enabled=False)` turns it off.

Shapes: N tokens, I inputs, O outputs.
"""

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

# multiplications of a product that is worth it: for a new shape oneDNN makes a kernel, which takes it a millisecond
LEAST = 2**26
# how many kernels oneDNN and torch's binding keep, one a shape: rows differ in length, and 1,024 kernels, their
# default, held 0.7 GiB; a model's layers and head need about ten at a time
CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}

multiply: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # a private op: without it, MKL's are taken


@cache
def is_faster_here() -> bool:
    """Whether this machine is one of those: an AMD CPU with AVX-512."""
    if multiply is None or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def linear(x: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """x [..., I] -> x W^T [..., O], without a gradient."""
    return _product(x, weight_OI, None) if _serves(x, weight_OI) else x @ weight_OI.T


class Linear(nn.Linear):
    """nn.Linear by oneDNN where that is faster; as ever where it is not."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not _serves(input, self.weight):
            return super().forward(input)
        out: torch.Tensor = _Linear.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return out


def use_in(model: nn.Module) -> None:
    """Make the linear layers of a model such ones, if that is faster here. Names, weights and hooks stay."""
    if is_faster_here():
        for name, capacity in CACHES.items():  # read at the first product
            os.environ.setdefault(name, capacity)
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = Linear


def _serves(x: torch.Tensor, weight_OI: torch.Tensor) -> bool:
    return bool(
        is_faster_here()
        and x.device.type == "cpu"
        and x.dtype == weight_OI.dtype == torch.float32
        and x.numel() * len(weight_OI) >= LEAST
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
    )


def _product(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    out: torch.Tensor = multiply(x, weight_OI, bias_O, "none", [], "")
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight_OI if needs_x else None)
        return _product(x, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        grad_NO = grad.flatten(0, -2)
        grad_x = None if weight_OI is None else _product(grad, weight_OI.T, None)
        grad_weight_OI = None if x is None else grad_NO.T @ x.flatten(0, -2)
        grad_bias_O = grad_NO.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight_OI, grad_bias_O
