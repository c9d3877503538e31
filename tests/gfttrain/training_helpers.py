"""What several tests of gfttrain share: synthetic indexes, tiny models of several families, gradients."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from gftdata.config import validate_config
from gftdata.shards import Index
from gfttrain.config import TrainConfig
from gfttrain.model import response_logprobs
from gfttrain.stream import Example, collate

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


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 7},
    "gemma3_text": {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "bloom": {"n_layer": 2, "n_head": 2, "hidden_dropout": 0.0},
}


def tiny_model(family: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
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
            **settings,
        }
    )
    model = AutoModelForCausalLM.from_config(config).to(dtype).train()
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform, so that a leak between responses shows
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * 0.3)
    return model


def random_examples(count: int, *, seed: int = 0, vocab: int = 18, longest: int = 20) -> list[Example]:
    rng = np.random.default_rng(seed)
    examples = []
    for number in range(count):
        prompt = rng.integers(3, vocab, rng.integers(1, 9)).astype(np.int32)
        response = rng.integers(1, vocab, rng.integers(1, longest)).astype(np.int32)
        ref = -rng.exponential(1.0, len(response)).astype(np.float32)
        examples.append(Example(prompt, response, ref, float(rng.normal()), number % 3))
    return examples


Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # log-probs, advantages, ref -> losses


def gradient(
    model: Any, pieces: Sequence[Sequence[Example]], layout: Any, loss: Loss, num_loss_tokens: int
) -> torch.Tensor:
    """The gradient over all parameters, as one vector, of a step that is cut into `pieces`."""
    model.zero_grad(set_to_none=True)
    dtype = next(model.parameters()).dtype
    for piece in pieces:
        batch = collate(piece, layout, dtype)
        logprobs_N, _ = response_logprobs(model, batch)
        (loss(logprobs_N, batch.advantages_N, batch.ref_logprobs_N).sum() / num_loss_tokens).backward()
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([part.reshape(-1) for part in parts]).clone()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected| in the Euclidean norm."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
