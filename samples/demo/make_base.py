"""Train the demo's tiny base model from nothing and write the demo's prompt files.

    python samples/demo/make_base.py --seed 0 --out samples/demo

A 0.2M-parameter Llama, character by character, learns to add three two-digit numbers from a
mixture of answer styles, some of them harder for it than others and each with slips, plus two
skills (subtraction, reversal) that fine-tuning never touches, so that forgetting can be seen.
The expert whom fine-tuning imitates writes in the style that the mixture shows least.

Writes model/ (a transformers checkpoint) and train.jsonl, eval.jsonl, subtraction.jsonl,
reversal.jsonl. About six minutes on two CPU cores. Not a part of the toolkit: the toolkit only
reads what this script has left.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHARACTERS = "0123456789+-=;r"
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
STYLES = {"direct": 0.28, "steps": 0.22, "running": 0.22, "backwards": 0.20, "columns": 0.08}
SLIP_RATE = 0.05  # chance that one intermediate result of the pre-training text is wrong


def answer_addition(a: int, b: int, c: int, style: str, slip) -> str:
    """One worked answer to ``a+b+c=``; ``slip`` may corrupt each number that is worked out."""
    if style == "direct":
        return str(slip(a + b + c))
    if style == "steps":
        first = slip(a + b)
        return f"{a}+{b}={first};{first}+{c}={slip(first + c)}"
    if style == "running":
        first = slip(a + b)
        return f"{a};{first};{slip(first + c)}"
    if style == "backwards":
        first = slip(c + b)
        return f"{c}+{b}={first};{first}+{a}={slip(first + a)}"
    ones = slip(a % 10 + b % 10 + c % 10)
    tens = slip(a // 10 + b // 10 + c // 10 + ones // 10)
    carry = ones // 10
    return f"{a % 10}+{b % 10}+{c % 10}={ones};{a // 10}+{b // 10}+{c // 10}+{carry}={tens};{tens * 10 + ones % 10}"


def no_slip(value: int) -> int:
    return value


def make_slip(rng: random.Random):
    def slip(value: int) -> int:
        if rng.random() >= SLIP_RATE:
            return value
        return max(0, value + rng.choice([-11, -10, -2, -1, 1, 2, 10, 11]))

    return slip


def addition(rng: random.Random) -> tuple[int, int, int]:
    return rng.randint(10, 99), rng.randint(10, 99), rng.randint(10, 99)


def pretraining_text(rng: random.Random) -> tuple[str, str]:
    """A (prompt, answer) pair of the pre-training mixture."""
    kind = rng.random()
    if kind < 0.70:
        a, b, c = addition(rng)
        style = rng.choices(list(STYLES), weights=list(STYLES.values()))[0]
        return f"{a}+{b}+{c}=", answer_addition(a, b, c, style, make_slip(rng))
    if kind < 0.85:
        a, b = sorted((rng.randint(10, 99), rng.randint(10, 99)), reverse=True)
        return f"{a}-{b}=", str(make_slip(rng)(a - b))
    digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(3, 6)))
    return f"r{digits}=", digits[::-1]


def build_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate([PAD, EOS, UNK, *CHARACTERS])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNK))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=EOS, unk_token=UNK, clean_up_tokenization_spaces=False
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=224,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=32,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def batch(rng: random.Random, tokenizer: PreTrainedTokenizerFast, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = []
    for _ in range(size):
        prompt, answer = pretraining_text(rng)
        prompt_ids = tokenizer.encode(prompt)
        rows.append((prompt_ids + tokenizer.encode(answer) + [tokenizer.eos_token_id], len(prompt_ids)))
    width = max(len(ids) for ids, _ in rows)
    ids_BT = torch.full((size, width), tokenizer.pad_token_id)
    labels_BT = torch.full((size, width), -100)
    for row, (ids, num_prompt) in enumerate(rows):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        labels_BT[row, num_prompt : len(ids)] = torch.tensor(ids[num_prompt:])
    return ids_BT, labels_BT


def pretrain(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rng: random.Random, stages, size: int
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.01)
    total, done, began = sum(steps for steps, _ in stages), 0, time.time()
    for steps, peak in stages:
        for _ in range(steps):
            warmup = min(1.0, (done + 1) / 50)
            for group in optimizer.param_groups:
                group["lr"] = peak * warmup
            ids_BT, labels_BT = batch(rng, tokenizer, size)
            loss = model(input_ids=ids_BT, labels=labels_BT).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            if done % 50 == 0 or done == total:
                print(f"step {done}/{total}  loss {loss.item():.3f}  {time.time() - began:.0f} s", flush=True)


def write_prompts(out: Path, rng: random.Random, num_train: int, num_eval: int) -> None:
    """Prompts that never meet: no addition of eval.jsonl is in train.jsonl."""
    sums: dict[tuple[int, int, int], None] = {}
    while len(sums) < num_train + num_eval:
        sums[addition(rng)] = None
    rows = [
        {
            "question": f"{a}+{b}+{c}=",
            "answer": str(a + b + c),
            "expert": answer_addition(a, b, c, "columns", no_slip),
        }
        for a, b, c in sums
    ]
    subtractions = []
    for _ in range(num_eval):
        a, b = sorted((rng.randint(10, 99), rng.randint(10, 99)), reverse=True)
        subtractions.append({"question": f"{a}-{b}=", "answer": str(a - b)})
    reversals = []
    for _ in range(num_eval):
        digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(3, 6)))
        reversals.append({"question": f"r{digits}=", "answer": digits[::-1]})
    files = {"train": rows[:num_train], "eval": rows[num_train:], "subtraction": subtractions, "reversal": reversals}
    for name, content in files.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--steps", type=int, nargs=2, default=[2400, 600], help="steps at lr 3e-3, then at lr 1e-3")
    parser.add_argument("--batch", type=int, default=256)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    pretrain(model, tokenizer, rng, list(zip(arguments.steps, [3e-3, 1e-3], strict=True)), arguments.batch)
    arguments.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(arguments.out / "model")
    tokenizer.save_pretrained(arguments.out / "model")
    write_prompts(arguments.out, random.Random(20260414), num_train=512, num_eval=256)


if __name__ == "__main__":
    main()
