"""The fused head: hidden states -> loss and gradients, in chunks of tokens, so that logits never exist whole.

Every objective is a function of a token's log-prob, so its gradient with respect to the logits is known as soon as the
log-prob is: (d loss / d log-prob) * (onehot - softmax). One pass over the vocabulary, forward and backward.

Shapes: N response tokens, C tokens of a chunk, R of them, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gfttrain import onednn

TokenLosses = Callable[[torch.Tensor, slice], torch.Tensor]  # log-probs [C], which tokens they are -> losses [C]

CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}  # logits of a chunk: 32 MiB and 512 MiB in float32
CACHED_ELEMENTS = 2**18  # logits that one pass after another works on, on a CPU: 1 MiB stays in its caches


@dataclass(frozen=True, slots=True)
class Head:
    """How a model gets from the last hidden state to logits: cap(scale * (h W^T + b))."""

    scale: float = 1.0
    softcap: float | None = None  # cap(x) = softcap * tanh(x / softcap)


def fused_head(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    token_losses: TokenLosses,
    head: Head,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (sum of the losses, losses [N], log-probs [N], entropies [N]); only the sum carries a gradient.

    In torch, with the logits in memory:

        logp_NV = log_softmax(cap(scale * (hidden_ND @ weight_VD.T + bias_V)).float(), -1)
        logprobs_N = logp_NV.gather(-1, targets_N[:, None])[:, 0]; entropy_N = -(logp_NV.exp() * logp_NV).sum(-1)
        losses_N = token_losses(logprobs_N, slice(0, N))

    `token_losses` is called with a chunk's log-probs, which require a gradient, and the slice of N that they are; it
    must be elementwise. Logits are in the dtype of `hidden_ND` (or of autocast), the softmax in float32 at least, the
    weight's gradient is summed up in float32 at least, and not computed where it is frozen. In nats.
    """
    dtype = torch.get_autocast_dtype(hidden_ND.device.type) if _autocast(hidden_ND) else hidden_ND.dtype
    needs = tuple(t is not None and t.requires_grad and torch.is_grad_enabled() for t in (hidden_ND, weight_VD, bias_V))
    total, losses_N, logprobs_N, entropy_N = _FusedHead.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, bias_V, targets_N, token_losses, head, dtype, needs
    )
    return total, losses_N, logprobs_N, entropy_N


def _autocast(tensor: torch.Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type)


def chunk_tokens(vocab_size: int, device: torch.device) -> int:
    """Tokens of a chunk: few enough for its logits to stay small, enough to keep the matrix products efficient."""
    return max(64, CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cuda"]) // vocab_size)


class _FusedHead(torch.autograd.Function):
    """Gradients are computed in the forward pass and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        token_losses: TokenLosses,
        head: Head,
        dtype: torch.dtype,
        needs: tuple[bool, bool, bool],
    ) -> tuple[torch.Tensor, ...]:
        with torch.autocast(hidden_ND.device.type, enabled=False):
            return _forward(ctx, hidden_ND, weight_VD, bias_V, targets_N, token_losses, head, dtype, needs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale = grads[0]
        gradients = [None if t is None else t.mul_(scale.to(t.dtype)) for t in ctx.gradients]
        ctx.gradients = None
        return (*gradients, None, None, None, None, None)


def _forward(
    ctx: Any,
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    token_losses: TokenLosses,
    head: Head,
    dtype: torch.dtype,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, ...]:
    wide = torch.promote_types(dtype, torch.float32)
    num_tokens, device = len(targets_N), hidden_ND.device
    losses_N, logprobs_N, entropy_N = (torch.empty(num_tokens, dtype=wide, device=device) for _ in range(3))
    grad_hidden_ND = torch.empty_like(hidden_ND) if needs[0] else None
    grad_weight_VD = torch.zeros(weight_VD.shape, dtype=wide, device=device) if needs[1] else None
    grad_bias_V = torch.zeros_like(bias_V) if needs[2] and bias_V is not None else None
    used_VD = weight_VD.to(dtype)
    size = chunk_tokens(len(weight_VD), device)
    for start in range(0, num_tokens, size):
        chunk = slice(start, min(start + size, num_tokens))
        hidden_CD, targets_C1 = hidden_ND[chunk].to(dtype), targets_N[chunk, None]
        logits_CV = onednn.linear(hidden_CD, used_VD)
        if bias_V is not None:
            logits_CV += bias_V.to(dtype)
        logits_CV = _shaped(logits_CV.to(wide), head)
        probs_CV = logits_CV if head.softcap is None else torch.empty_like(logits_CV)
        _softmax(logits_CV, targets_C1, probs_CV, logprobs_N[chunk], entropy_N[chunk])
        losses_N[chunk], slopes_C = _losses_and_slopes(token_losses, logprobs_N[chunk], chunk)
        if any(needs):
            # d loss / d logits = slope * (onehot - softmax), in place of the probabilities
            slopes_C1 = slopes_C.unsqueeze(-1)
            grad_CV = probs_CV.mul_(-slopes_C1).scatter_add_(-1, targets_C1, slopes_C1)
            grad_CV = _unshaped(grad_CV, logits_CV, head).to(dtype)
            if grad_hidden_ND is not None:
                grad_hidden_ND[chunk] = onednn.linear(grad_CV, used_VD.T)
            if grad_weight_VD is not None:
                if grad_weight_VD.dtype == dtype:
                    grad_weight_VD.addmm_(grad_CV.T, hidden_CD)
                else:
                    grad_weight_VD += grad_CV.T @ hidden_CD
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0, dtype=wide).to(grad_bias_V.dtype)
    if grad_weight_VD is not None:
        grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
    ctx.gradients = (grad_hidden_ND, grad_weight_VD, grad_bias_V)
    ctx.mark_non_differentiable(losses_N, logprobs_N, entropy_N)
    return losses_N.sum(), losses_N, logprobs_N, entropy_N


def _softmax(
    logits_CV: torch.Tensor,
    targets_C1: torch.Tensor,
    probs_CV: torch.Tensor,
    logprobs_C: torch.Tensor,
    entropy_C: torch.Tensor,
) -> None:
    """Fill the last three: probabilities (which may take the logits' place), the targets' log-probs, entropies."""
    size = max(1, CACHED_ELEMENTS // logits_CV.shape[1]) if logits_CV.device.type == "cpu" else len(logits_CV)
    for start in range(0, len(logits_CV), size):
        rows = slice(start, start + size)
        # not log_softmax, whose kernel on a CPU adds up one after the other: up to 6 times the rounding error
        logp_RV = logits_CV[rows] - logits_CV[rows].logsumexp(-1, keepdim=True)
        torch.exp(logp_RV, out=probs_CV[rows])
        logprobs_C[rows] = logp_RV.gather(-1, targets_C1[rows]).squeeze(-1)
        entropy_C[rows] = -torch.linalg.vecdot(probs_CV[rows], logp_RV)


def _shaped(logits_CV: torch.Tensor, head: Head) -> torch.Tensor:
    if head.scale != 1.0:
        logits_CV = logits_CV * head.scale
    if head.softcap is not None:
        logits_CV = head.softcap * torch.tanh(logits_CV / head.softcap)
    return logits_CV


def _unshaped(grad_CV: torch.Tensor, logits_CV: torch.Tensor, head: Head) -> torch.Tensor:
    """The gradient before scale and cap: d cap(x) / dx = 1 - (cap(x) / softcap)^2."""
    if head.softcap is not None:
        grad_CV = grad_CV * (1.0 - (logits_CV / head.softcap) ** 2)
    return grad_CV if head.scale == 1.0 else grad_CV * head.scale


def _losses_and_slopes(
    token_losses: TokenLosses, logprobs_C: torch.Tensor, chunk: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """The objective and its derivative, by autograd on the small vector: one definition of each objective serves."""
    with torch.enable_grad():
        leaf_C = logprobs_C.detach().requires_grad_()
        losses_C = token_losses(leaf_C, chunk)
        if not losses_C.requires_grad:  # a constant: log-probs are asked for, not gradients
            return losses_C, torch.zeros_like(losses_C)
        (slopes_C,) = torch.autograd.grad(losses_C.sum(), leaf_C)
    return losses_C.detach(), slopes_C
