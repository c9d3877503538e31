"""The authors' formula (arXiv:2604.14258), written down term by term, on tensors recorded from the demo's model.

Nothing of ours is in the oracle: rewards and logits go in, the loss and, by autograd, its gradient come out. What made
the tensors is data/record.py, which has the legend of their shapes too.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_helpers import MODEL

from gfttrain.advantage import segment_advantages
from gfttrain.config import ObjectiveConfig
from gfttrain.head import Head, fused_head
from gfttrain.objective import gft_loss, token_losses

TAUS = (0.1, 0.5, 0.7)  # the authors' script, their function's default, the best of the paper's sweep
Recorded = dict[str, torch.Tensor]
Ours = Callable[[Recorded, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return load_file(Path(__file__).parent / "data" / "recorded.safetensors")


def advantages_of_the_authors(recorded: Recorded, dtype: torch.dtype) -> torch.Tensor:
    """A_k = (R_k - mean(R)) / (std(R) + 1e-6) in each group, std with divisor K - 1; A = R in a group of one.

    There their code has mean 0 and std 1, and so R / (1 + 1e-6).
    """
    advantages_R = torch.empty(len(recorded["rewards_R"]), dtype=dtype)
    for group in recorded["group_R"].unique():
        members = recorded["group_R"] == group
        rewards_K = recorded["rewards_R"][members].to(dtype)
        if len(rewards_K) > 1:
            rewards_K = (rewards_K - rewards_K.mean()) / (torch.std(rewards_K) + 1e-6)
        advantages_R[members] = rewards_K
    return advantages_R


def loss_of_the_authors(recorded: Recorded, logits_RTV: torch.Tensor, tau: float) -> torch.Tensor:
    """The mean over response tokens of -A * C(pi) * log pi, C(pi) = stopgrad(pi) below tau and 1 from there on."""
    mask_RT = recorded["mask_RT"].to(logits_RTV.dtype)
    advantages_R = advantages_of_the_authors(recorded, logits_RTV.dtype)
    logp_RT = torch.log_softmax(logits_RTV, -1).gather(-1, recorded["targets_RT"].long().unsqueeze(-1)).squeeze(-1)
    pi_RT = logp_RT.exp().detach()
    coefficient_RT = torch.where(pi_RT < tau, pi_RT, torch.ones_like(pi_RT))
    return -(advantages_R[:, None] * coefficient_RT * logp_RT * mask_RT).sum() / mask_RT.sum()


def advantages_of_ours(recorded: Recorded) -> torch.Tensor:
    """Of each response token [N]."""
    sizes = torch.bincount(recorded["group_R"].long())
    offsets = np.concatenate([[0], sizes.cumsum(0).numpy()]).astype(np.int64)
    advantages_R = torch.from_numpy(segment_advantages(recorded["rewards_R"].numpy(), offsets))
    return advantages_R[:, None].expand(recorded["mask_RT"].shape)[recorded["mask_RT"]]


def by_the_public_function(
    recorded: Recorded, logits_NV: torch.Tensor, tau: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gft_loss` of log-probs that torch computes."""
    targets_N = recorded["targets_RT"][recorded["mask_RT"]].long()
    leaf_NV = logits_NV.clone().requires_grad_()
    logprobs_N = leaf_NV.log_softmax(-1).gather(-1, targets_N[:, None]).squeeze(-1)
    everything_N = torch.ones(len(targets_N), dtype=torch.bool)
    advantages_N = advantages_of_ours(recorded).to(logits_NV.dtype)
    loss = gft_loss(logprobs_N, advantages_N, everything_N, tau=tau, num_loss_tokens=len(targets_N))
    loss.backward()
    assert leaf_NV.grad is not None
    return loss.detach(), leaf_NV.grad


def by_the_trainer(recorded: Recorded, logits_NV: torch.Tensor, tau: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The fused head that the trainer runs: with the identity as its weight the hidden states are the logits."""
    targets_N = recorded["targets_RT"][recorded["mask_RT"]].long()
    leaf_NV = logits_NV.clone().requires_grad_()
    identity_VV = torch.eye(logits_NV.shape[1], dtype=logits_NV.dtype)
    advantages_N = advantages_of_ours(recorded).to(logits_NV.dtype)
    nothing_N = torch.zeros_like(advantages_N)
    objective = ObjectiveConfig(tau=tau)

    def losses(logprobs_C: torch.Tensor, chunk: slice) -> torch.Tensor:
        return token_losses(objective, logprobs_C, advantages_N[chunk], nothing_N[chunk], nothing_N[chunk])

    loss = fused_head(leaf_NV, identity_VV, None, targets_N, losses, Head())[0] / len(targets_N)
    loss.backward()
    assert leaf_NV.grad is not None
    return loss.detach(), leaf_NV.grad


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("ours", [by_the_public_function, by_the_trainer])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_our_loss_and_gradient_are_those_of_the_authors_formula(
    recorded: Recorded, ours: Ours, tau: float, dtype: torch.dtype, rtol: float
) -> None:
    logits_RTV = recorded["logits_RTV"].to(dtype, copy=True).requires_grad_()
    expected = loss_of_the_authors(recorded, logits_RTV, tau)
    expected.backward()
    assert logits_RTV.grad is not None
    mask_RT = recorded["mask_RT"]
    loss, gradient_NV = ours(recorded, logits_RTV.detach()[mask_RT], tau)
    assert expected != 0 and not logits_RTV.grad[~mask_RT].any()
    # advantages of a group cancel, so the loss is a hundred times smaller than what is summed up in it
    torch.testing.assert_close(loss, expected.detach(), rtol=rtol, atol=rtol / 100)
    difference = (gradient_NV - logits_RTV.grad[mask_RT]).norm() / logits_RTV.grad.norm()
    assert float(difference) < rtol


def test_the_recorded_groups_have_what_the_formula_tells_apart(recorded: Recorded) -> None:
    """Both signs of advantage, a group without signal, a group of one, and tokens on both sides of every tau."""
    advantages_R = advantages_of_the_authors(recorded, torch.float64)
    signs = [set(advantages_R[recorded["group_R"] == group].sign().tolist()) for group in range(4)]
    assert signs == [{-1.0, 1.0}, {-1.0, 1.0}, {0.0}, {1.0}]
    targets_RT1 = recorded["targets_RT"].long().unsqueeze(-1)
    probs_N = recorded["logits_RTV"].softmax(-1).gather(-1, targets_RT1).squeeze(-1)[recorded["mask_RT"]]
    for tau in TAUS:
        assert 0 < int((probs_N < tau).sum()) < len(probs_N)


@torch.no_grad()
def test_the_recorded_logits_are_those_of_the_demos_model(recorded: Recorded) -> None:
    """Row by row without padding, so neither padding nor a shift is taken on trust."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    for row, (ids_W, prompt) in enumerate(
        zip(recorded["input_ids_RW"].long(), recorded["prompt_tokens_R"].tolist(), strict=True)
    ):
        length = int(recorded["mask_RT"][row].sum())
        targets_T = recorded["targets_RT"][row, :length]
        assert torch.equal(targets_T.long(), ids_W[prompt : prompt + length])
        logits_LV = model(input_ids=ids_W[None, : prompt + length], use_cache=False).logits[0]
        found_TV = recorded["logits_RTV"][row, :length]
        torch.testing.assert_close(found_TV, logits_LV[prompt - 1 : -1], rtol=1e-4, atol=1e-4)
