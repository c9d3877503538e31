"""Every objective, elementwise in a token's log-prob, on one screen.

Shapes: T response tokens, of any number of responses. All log-probs are in nats.

A loss is a function of log pi of the token that was written, so its gradient is one scalar a token. Which responses
are used, and their advantages, were decided before (`plan.py`); what is left is the coefficient and the KL penalty.
"""

import torch

from gfttrain.config import ObjectiveConfig


def rectified_coefficient(logprobs_T: torch.Tensor, tau: float) -> torch.Tensor:
    """Dynamic Coefficient Rectification (arXiv:2604.14258): C(pi) = stopgrad(pi) where pi < tau, else 1. Shape [T].

    Below tau it cancels the 1/pi of d(log pi). tau = 0 gives 1 everywhere (SFT), tau > 1 gives pi everywhere (DFT,
    arXiv:2508.05629).
    """
    probs_T = logprobs_T.detach().exp()
    return torch.where(is_rectified(logprobs_T, tau), probs_T, torch.ones_like(probs_T))


def is_rectified(logprobs_T: torch.Tensor, tau: float) -> torch.Tensor:
    """Which tokens' coefficient is pi: those below tau. Bool [T]."""
    return logprobs_T.detach().exp() < tau


def gft_token_losses(logprobs_T: torch.Tensor, advantages_T: torch.Tensor, tau: float) -> torch.Tensor:
    """-A * C(pi) * log pi of each token. Shape [T]."""
    return -advantages_T * rectified_coefficient(logprobs_T, tau) * logprobs_T


def clipped_token_losses(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> torch.Tensor:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = pi / pi_old (PPO; GRPO and PSFT use it). Shape [T]."""
    ratios_T = (logprobs_T - old_logprobs_T).exp()
    clipped_T = ratios_T.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -torch.minimum(ratios_T * advantages_T, clipped_T * advantages_T)


def is_clipped(
    objective: ObjectiveConfig, logprobs_T: torch.Tensor, old_logprobs_T: torch.Tensor, advantages_T: torch.Tensor
) -> torch.Tensor:
    """Which tokens the clipped ratio gives no gradient: too far already in the direction of the advantage. Bool [T]."""
    ratios_T = (logprobs_T.detach() - old_logprobs_T).exp()
    above_T = (ratios_T > 1.0 + objective.clip_high) & (advantages_T > 0)
    return above_T | ((ratios_T < 1.0 - objective.clip_low) & (advantages_T < 0))


def kl_token_penalties(logprobs_T: torch.Tensor, ref_logprobs_T: torch.Tensor) -> torch.Tensor:
    """r - log r - 1 with r = pi_ref / pi: never negative, zero where they agree (the k3 estimator). Shape [T]."""
    log_ratios_T = ref_logprobs_T - logprobs_T
    return log_ratios_T.exp() - log_ratios_T - 1.0


def token_losses(
    objective: ObjectiveConfig,
    logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    ref_logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
) -> torch.Tensor:
    """The configured objective's loss of each token, before normalisation. Shape [T]."""
    if objective.coefficient == "rectified":
        losses_T = gft_token_losses(logprobs_T, advantages_T, objective.tau)
    else:
        low, high = objective.clip_low, objective.clip_high
        losses_T = clipped_token_losses(logprobs_T, old_logprobs_T, advantages_T, low, high)
    if objective.kl_coef > 0.0:
        losses_T = losses_T + objective.kl_coef * kl_token_penalties(logprobs_T, ref_logprobs_T)
    return losses_T


def gft_loss(
    logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    tau: float = 0.7,
    num_loss_tokens: int,
) -> torch.Tensor:
    """The GFT loss (arXiv:2604.14258): L = -1/N sum A C(pi) log pi. Returns a scalar.

    `mask_T` is False where a token takes no part (a prompt's, padding's, an unjudged response's). `num_loss_tokens` is
    N: the response tokens of the whole optimizer step, over all micro-batches and ranks, so that the sum of this loss
    over any split of a step is the same.
    """
    mask_T = mask_T.bool()  # transformers' masks are of integers, which would pick elements 0 and 1
    # chosen before, not zeroed after: what a masked place holds (-inf, NaN) must not reach the gradient
    return gft_token_losses(logprobs_T[mask_T], advantages_T[mask_T], tau).sum() / num_loss_tokens
