"""Real parts for the tests: the demo model, tiny models with other tokenizers, and the naive oracle of log-probs."""

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "samples" / "demo"
CACHE = tempfile.mkdtemp(prefix="gft-tests-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
# read when huggingface_hub, datasets and torch are imported, which no test has done yet
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = CACHE
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin make tiny models 10 times slower on busy cores

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = ["What is 12+34? The answer is 46.", "user assistant system", "Let x be one of the numbers. Then x = 7."]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first: with several workers the last test is waited for by all."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def demo() -> Path:
    """samples/demo: `model` and train, eval, subtraction and reversal.jsonl."""
    return DEMO


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ChatML over byte-level BPE; pad equals EOS, and `<|im_end|>`, which ends a turn, is neither."""
    return save_chat_model(tmp_path_factory.mktemp("models") / "chat")


@pytest.fixture(scope="session")
def penalised_model(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Path:
    """`chat_model` with generation settings of its own that would change what is drawn."""
    folder = tmp_path_factory.mktemp("models") / "penalised"
    shutil.copytree(chat_model, folder)
    settings = {
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 1,
        "temperature": 0.01,
        "top_k": 1,
        "do_sample": True,
        "eos_token_id": [0, 2],
        "min_new_tokens": 9,
        "suppress_tokens": [10, 11, 12],
    }
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher for the demo's prompts with a vocabulary of its own: 10 to 14 are single tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocab = {"<unk>": 0, "</s>": 1}
    for piece in [*"=;+-9876543210", *(str(n) for n in range(10, 15))]:
        vocab[piece] = len(vocab)
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"1[0-4]|."), "isolated")
    backend.decoder = decoders.Fuse()
    return save_model(
        tmp_path_factory.mktemp("models") / "other", backend, eos_token="</s>", unk_token="<unk>", seed=3, spread=0.35
    )


def save_chat_model(folder: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return save_model(
        folder, backend, eos_token=special[0], pad_token=special[0], chat_template=CHATML, seed=1, spread=0.3
    )


def save_model(folder: Path, backend: Any, *, seed: int, spread: float, positions: int = 256, **special: Any) -> Path:
    """A Llama of random weights, and its tokenizer. The weights' `spread` decides how peaked its distributions are."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=spread,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def naive_logits() -> Callable[[str | Path, Sequence[int], Sequence[int]], np.ndarray]:
    """Oracle: (model, prompt ids [P], response ids [T]) -> float32 logits [T, V] of one unpadded forward pass."""
    import torch
    from transformers import AutoModelForCausalLM

    @cache
    def load(model: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def logits(model: str | Path, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> np.ndarray:
        ids = torch.tensor([[*map(int, prompt_ids), *map(int, response_ids)]])
        with torch.no_grad():
            all_logits = load(str(model))(input_ids=ids, use_cache=False).logits[0]
        return all_logits[len(prompt_ids) - 1 : -1].numpy()

    return logits


@pytest.fixture(scope="session")
def naive_logprobs(naive_logits: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Oracle: log softmax(logits / temperature) of the response's tokens [T], in float64 from float32 logits."""

    def logprobs(
        model: str | Path, prompt_ids: Sequence[int], response_ids: Sequence[int], temperature: float = 1.0
    ) -> np.ndarray:
        logits = naive_logits(model, prompt_ids, response_ids).astype(np.float64) / temperature
        logits -= logits.max(axis=-1, keepdims=True)
        chosen = logits[np.arange(len(response_ids)), np.asarray(response_ids)]
        return chosen - np.log(np.exp(logits).sum(axis=-1))

    return logprobs


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as a JSONL file of the test's own folder."""

    def write(rows: Iterable[Any], name: str = "prompts.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def one_line() -> Callable[[BaseException], str]:
    """The text of an error for the user, checked to be one line."""

    def text(error: BaseException) -> str:
        assert len(str(error).splitlines()) == 1, str(error)
        return str(error)

    return text
