"""Norms and gated feed-forwards that keep less for the backward pass, in models of transformers.

Autograd keeps what each elementwise operation needs. Of a gated feed-forward, down(act(gate) * up), that is gate,
act(gate), up and their product: together more than all the rest of a layer. Of an RMSNorm it is the input twice, once
normalised. Here a feed-forward keeps gate and up, a norm its input and a number a position; the rest is computed again
when it is asked for, the feed-forward's bit by bit the same. The norm's gradient is written out, which takes half of
autograd's passes over memory. Compiled layers stay as they are: the compiler computes again what it chooses to (of the
feed-forward it keeps three tensors).

Shapes: L positions (any leading dimensions), D hidden size, F the feed-forward's size.
"""

import inspect
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

# as transformers writes them, family after family; modules that say anything else stay as they are
GATED = [
    "down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))",
    "return down_proj",
]
NORM = [
    "input_dtype = hidden_states.dtype",
    "hidden_states = hidden_states.to(torch.float32)",
    "variance = hidden_states.pow(2).mean(-1, keepdim=True)",
    "hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)",
    "return self.weight * hidden_states.to(input_dtype)",
]


def use_in(model: nn.Module, *, gated: bool) -> None:
    """Make the norms of a model such ones, and its feed-forwards if asked for: activation checkpointing sees to those.

    Names, weights and outputs stay.
    """
    for module in model.modules():
        if is_norm(module):
            module.forward = MethodType(_norm, module)
        elif gated and is_gated(module):
            module.forward = MethodType(_gated, module)


def is_norm(module: nn.Module) -> bool:
    """Whether this is an RMSNorm that can keep less."""
    return _body(module) == NORM


def is_gated(module: nn.Module) -> bool:
    """Whether this is a gated feed-forward that can keep less."""
    return _body(module) == GATED


def _body(module: nn.Module) -> list[str]:
    """The lines of its class's forward; none where something has put in another one already."""
    kind: Any = type(module)
    return [] if "forward" in vars(module) else _lines(kind)


@cache
def _lines(kind: type[nn.Module]) -> list[str]:
    try:
        lines = inspect.getsource(kind.forward).splitlines()
    except (OSError, TypeError):  # made at runtime, or in C
        return []
    first = next((place for place, line in enumerate(lines) if line.lstrip().startswith("def ")), 0)
    return [line.strip() for line in lines[first + 1 :]]


# ---- gated feed-forwards


def _gated(self: Any, x: torch.Tensor) -> torch.Tensor:
    gate_LF, up_LF = self.gate_proj(x), self.up_proj(x)
    kept = _Kept(self.act_fn, gate_LF.detach(), up_LF.detach())
    with saved_tensors_hooks(kept.pack, kept.unpack):
        kept.activated_LF = self.act_fn(gate_LF)
        kept.product_LF = kept.activated_LF * up_LF
        out: torch.Tensor = self.down_proj(kept.product_LF)
    kept.activated_LF = kept.product_LF = None
    return out


class _Kept:
    """Stands in for act(gate) and act(gate) * up from the forward pass to the backward pass."""

    def __init__(self, act_fn: Any, gate_LF: torch.Tensor, up_LF: torch.Tensor) -> None:
        self.act_fn, self.gate_LF, self.up_LF = act_fn, gate_LF, up_LF
        device = gate_LF.device.type
        self.precision = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        self.activated_LF: torch.Tensor | None = None
        self.product_LF: torch.Tensor | None = None

    def pack(self, tensor: torch.Tensor) -> Any:
        """A tensor that autograd wants to keep, or what to compute in its place."""
        for compute, made in ((self._activate, self.activated_LF), (self._multiply, self.product_LF)):
            if made is not None and _is_all_of(tensor, made):
                return compute, tensor.shape
        return tensor

    def unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        compute, shape = packed
        with torch.no_grad(), torch.autocast(*self.precision):  # the backward pass runs outside of it
            computed: torch.Tensor = compute()
        return computed.view(shape)

    def _activate(self) -> torch.Tensor:
        activated_LF, self.activated_LF = self.activated_LF, None
        return self.act_fn(self.gate_LF) if activated_LF is None else activated_LF

    def _multiply(self) -> torch.Tensor:
        self.activated_LF = self._activate()  # which is asked for next
        return self.activated_LF * self.up_LF


def _is_all_of(tensor: torch.Tensor, made: torch.Tensor) -> bool:
    """Whether they are the same memory, be it in another shape."""
    return (
        tensor.data_ptr() == made.data_ptr()
        and tensor.numel() == made.numel() > 0
        and tensor.dtype == made.dtype
        and tensor.is_contiguous()
        and made.is_contiguous()
    )


# ---- norms


def _norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
    return out


class _RMSNorm(torch.autograd.Function):
    """x [L, D], weight [D] -> weight * x / sqrt(mean(x^2) + epsilon), normalised in float32."""

    @staticmethod
    def forward(ctx: Any, x_LD: torch.Tensor, weight_D: torch.Tensor, epsilon: float) -> torch.Tensor:
        wide_LD = x_LD.to(torch.float32)
        scale_L1 = torch.rsqrt(wide_LD.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x_LD, weight_D, scale_L1)
        return weight_D * (wide_LD * scale_L1).to(x_LD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_LD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_LD, weight_D, scale_L1 = ctx.saved_tensors
        normed_LD = x_LD.to(torch.float32) * scale_L1
        grad_x_LD = grad_weight_D = None
        if ctx.needs_input_grad[1]:
            grad_weight_D = (grad_LD * normed_LD.to(x_LD.dtype)).flatten(0, -2).sum(0)
        if ctx.needs_input_grad[0]:
            # d (x s) = s (dx - x s mean(x s dx)): what lies along x changes the norm and not the result
            inner_LD = (grad_LD * weight_D).to(torch.float32)
            along_L1 = torch.linalg.vecdot(inner_LD, normed_LD)[..., None] / x_LD.shape[-1]
            grad_x_LD = inner_LD.addcmul_(normed_LD, along_L1, value=-1).mul_(scale_L1).to(x_LD.dtype)
        return grad_x_LD, grad_weight_D, None
