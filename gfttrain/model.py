"""The model in training: float32 master weights, the forward pass to log-probs, the export.

Shapes: B rows, L positions, N response tokens, V vocabulary.
"""

import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from gftdata.engines.hf import load_model
from gftdata.errors import UserError
from gftdata.tokens import Tokenizer
from gfttrain.config import TrainConfig
from gfttrain.stream import Batch, Example, collate

PACKING_TOLERANCE = 1e-2  # nats; rounding in float32 stays far below, a leak far above


def load_for_training(config: TrainConfig, device: torch.device) -> Any:
    """A transformers model with float32 weights: at a learning rate of 1e-6, bfloat16 would lose the updates.

    Without dropout, whatever its config says: with it, log-ratios would be noise and the update would depend on the cut
    into micro-batches.
    """
    model = load_model(config.model, torch.float32, device)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    if config.gradient_checkpointing:
        # transformers 5 renames it on the way; the older name warns where both are there
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model.train()


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """The precision of the forward pass."""
    dtype = config.dtype if config.dtype != "auto" else "float32" if device.type == "cpu" else "bfloat16"
    return nullcontext() if dtype == "float32" else torch.autocast(device.type, dtype=getattr(torch, dtype))


def response_logprobs(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi of each response token [N] (differentiable) and the entropy of its distribution [N], in nats."""
    logits_BLV = model(
        input_ids=batch.input_ids_BL,
        attention_mask=batch.attention_mask_BL,
        position_ids=batch.position_ids_BL,
        use_cache=False,
    ).logits
    logits_NV = logits_BLV[batch.predicts_BL]
    logprobs_NV = torch.log_softmax(logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)), dim=-1)
    with torch.no_grad():
        entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    return logprobs_NV.gather(-1, batch.target_ids_N.unsqueeze(-1)).squeeze(-1), entropy_N


@torch.no_grad()
def check_packing(model: Any, examples: Sequence[Example]) -> None:
    """Raise UserError where responses packed into one row do not get the log-probs that each has alone.

    Not every family separates them by their positions: state-space and linear-attention layers, and models that take
    positions from the attention mask or a bias, run over the border.
    """
    model.eval()  # dropout would differ
    device = next(model.parameters()).device
    packed_N, _ = response_logprobs(model, collate(examples, "packed").to(device))
    alone_N = torch.cat([response_logprobs(model, collate([example]).to(device))[0] for example in examples])
    model.train()
    if (packed_N - alone_N).abs().max() > PACKING_TOLERANCE:
        raise UserError(f"{type(model).__name__} mixes responses that are packed into one row; set batch.layout=padded")


def export(model: Any, tokenizer: Tokenizer, base_model: str, target: Path) -> None:
    """Write a folder that `from_pretrained` loads, in the base model's own width; there whole or not at all."""
    dtype = AutoConfig.from_pretrained(base_model).dtype or torch.float32
    staged = target.with_name(f".{target.name}.staged")
    shutil.rmtree(staged, ignore_errors=True)
    model.to(dtype).save_pretrained(staged)
    tokenizer.backend.save_pretrained(staged)
    shutil.rmtree(target, ignore_errors=True)
    staged.rename(target)
