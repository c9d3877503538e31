"""What several tests of gfttrain share: synthetic indexes, tiny models of several families, gradients."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from gftdata.config import validate_config
from gftdata.index import Index
from gfttrain.attention import NAME
from gfttrain.config import TrainConfig
from gfttrain.model import Policy, no_losses
from gfttrain.plan import Layout
from gfttrain.stream import Batch, Example, collate

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "samples" / "demo"
MODEL = DEMO / "model"

Group = Sequence[tuple[str, float | None, int]]  # (source, reward, response tokens) of each response


def make_index(groups: Sequence[Group], *, prompt_tokens: Sequence[int] | int = 5, row_group: int = 4) -> Index:
    """An index of one imaginary shard that holds these groups."""
    flat = [response for group in groups for response in group]
    names = tuple(dict.fromkeys(source for source, _, _ in flat))
    number = np.arange(len(groups), dtype=np.int32)
    return Index(
        paths=(Path("imaginary.parquet"),),
        path_of_group=np.zeros(len(groups), np.int32),
        row_group_of_group=number // row_group,
        row_of_group=number % row_group,
        offsets=np.concatenate([[0], np.cumsum([len(group) for group in groups])]).astype(np.int64),
        num_prompt_tokens=np.broadcast_to(np.asarray(prompt_tokens, np.int32), len(groups)).copy(),
        num_tokens=np.array([tokens for _, _, tokens in flat], dtype=np.int32),
        rewards=np.array([np.nan if reward is None else reward for _, reward, _ in flat], dtype=np.float32),
        source_names=names,
        source_codes=np.array([names.index(source) for source, _, _ in flat], dtype=np.int32),
    )


def random_groups(rng: np.random.Generator, count: int, *, null_rate: float = 0.1) -> list[Group]:
    """Groups of 1 to 8 responses of all sources with 0/1 rewards, some null."""
    sources = np.array(["expert", "teacher:a", "self", "self"])
    return [
        [
            (str(rng.choice(sources)), None if rng.random() < null_rate else float(rng.integers(2)), int(tokens))
            for tokens in rng.integers(1, 40, rng.integers(1, 9))
        ]
        for _ in range(count)
    ]


def train_settings(data: Path, out: Path, /, **overrides: Any) -> TrainConfig:
    """A short run of the demo model; blocks are merged, other keys replaced."""
    settings: dict[str, Any] = {
        "model": str(MODEL),
        "data": str(data),
        "out": str(out),
        "optim": {"lr": 1e-3},
        "batch": {"groups_per_step": 8, "micro_batch_tokens": 1024},
        "checkpoint": {"every_steps": 2, "keep": 2},
        "device": "cpu",
    }
    for key, value in overrides.items():
        settings[key] = {**settings[key], **value} if isinstance(settings.get(key), dict) else value
    return validate_config(TrainConfig, settings, "test")


SLIDING = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False},
    "mistral": {"sliding_window": 7},
    "gemma2": {**SLIDING, "query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    "gemma3_text": SLIDING,
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.5},
    "cohere": {"logit_scale": 0.3},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "bloom": {"n_layer": 2, "n_head": 2, "hidden_dropout": 0.0},
}
PADDED_ONLY = ("bloom",)  # its position bias knows nothing of segments
PACKED = [family for family in FAMILIES if family not in PADDED_ONLY]


def tiny_policy(family: str, dtype: torch.dtype = torch.float64, layout: Layout = "shared_prefix") -> Policy:
    """A random model of a few thousand weights, of the demo model's vocabulary size."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](
        **{
            "vocab_size": 18,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": 1,
            "attention_dropout": 0.0,
            **FAMILIES[family],
        }
    )
    model = AutoModelForCausalLM.from_config(config).to(dtype).train()
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform, so that a leak between responses shows
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * 0.3)
    return as_policy(model, layout)


def as_policy(model: Any, layout: Layout = "shared_prefix") -> Policy:
    """A model for a layout; one in float64 in that width throughout, where transformers computes norms in float32."""
    for module in model.modules():
        if model.dtype == torch.float64 and type(module).__name__ in PLAIN_NORMS:
            module.forward = partial(_wide_norm, module)
    if layout != "padded":
        model.set_attn_implementation(NAME)
    return Policy(model)


PLAIN_NORMS = ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "MistralRMSNorm", "GraniteRMSNorm")
NARROW_INSIDE = ("gemma2", "gemma3_text", "cohere")  # norms or positions of their own kinds, in float32 at any width


def _wide_norm(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(hidden, module.weight.shape, module.weight, module.variance_epsilon)


def random_examples(count: int, *, seed: int = 0, vocab: int = 18, longest: int = 20, most: int = 4) -> list[Example]:
    """Groups of 1 to `most` responses, of 1 to `longest` - 1 tokens."""
    rng = np.random.default_rng(seed)
    examples = []
    number = 0
    for _ in range(count):
        size = int(rng.integers(1, most + 1))
        prompt = rng.integers(3, vocab, rng.integers(1, 9)).astype(np.int32)
        responses = [rng.integers(1, vocab, rng.integers(1, longest)).astype(np.int32) for _ in range(size)]
        refs = [-rng.exponential(1.0, len(ids)).astype(np.float32) for ids in responses]
        codes = np.arange(number, number + size, dtype=np.int32) % 3
        examples.append(
            Example(
                prompt, tuple(responses), tuple(refs), rng.normal(size=size), codes, tuple(range(number, number + size))
            )
        )
        number += size
    return examples


def count_tokens(examples: Sequence[Example]) -> int:
    return sum(len(ids) for example in examples for ids in example.response_ids)


Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # log-probs, advantages, ref -> losses


def logprobs_of(policy: Policy, examples: Sequence[Example], layout: Layout) -> torch.Tensor:
    dtype = next(policy.parameters()).dtype
    with torch.no_grad():
        return policy(collate(examples, layout, dtype), no_losses)[2]


def gradient(
    policy: Policy, pieces: Sequence[Sequence[Example]], layout: Layout, loss: Loss, num_loss_tokens: int
) -> torch.Tensor:
    """The gradient over all parameters, as one vector, of a step that is cut into `pieces`."""
    policy.zero_grad(set_to_none=True)
    dtype = next(policy.parameters()).dtype
    for piece in pieces:
        batch = collate(piece, layout, dtype)

        def losses(logprobs_C: torch.Tensor, chunk: slice, b: Batch = batch) -> torch.Tensor:
            return loss(logprobs_C, b.advantages_N[chunk], b.ref_logprobs_N[chunk])

        (policy(batch, losses)[0] / num_loss_tokens).backward()
    return flat_gradient(policy)


def flat_gradient(module: torch.nn.Module) -> torch.Tensor:
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
    return torch.cat([part.reshape(-1) for part in parts]).clone()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected| in the Euclidean norm."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-300))


TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
