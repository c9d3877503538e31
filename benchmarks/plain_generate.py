"""Response groups as one would write them without this toolkit: the other side of `throughput.py`, which starts it.

    python plain_generate.py MODEL PROMPTS.jsonl OUT.parquet NUM_PROMPTS SAMPLES MAX_TOKENS BATCH

`datasets.map` in batches of BATCH responses; in each, `generate` at temperature 1, a reward (is the last number the
answer?) and a forward pass for the log-probs; `to_parquet` at the end, a row a prompt. Nothing of ours is imported.
Prints {"seconds": ..., "tokens": response tokens} without the model's start.
"""

import json
import re
import sys
import tempfile
import time
from typing import Any

import datasets
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer


def reward(text: str, answer: str) -> float:
    numbers = re.findall(r"-?\d+", text)
    return float(bool(numbers) and int(numbers[-1]) == int(answer))


def main() -> None:
    name, file, out = sys.argv[1:4]
    num_prompts, samples, max_tokens, batch = map(int, sys.argv[4:])
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()

    @torch.inference_mode()
    def respond(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        inputs = tokenizer(rows["question"], padding=True, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(
            **inputs,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=samples,
            max_new_tokens=max_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        start = inputs["input_ids"].shape[1]
        completions = output[:, start:]
        ends = (completions == tokenizer.eos_token_id).long()
        kept = (ends.cumsum(1) - ends) == 0  # up to the first end token, which is kept
        prompts_mask = inputs["attention_mask"].repeat_interleave(samples, 0)
        mask = torch.cat([prompts_mask, kept.long()], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=output, attention_mask=mask, position_ids=positions, use_cache=False).logits
        logps = logits[:, start - 1 : -1].log_softmax(-1).gather(-1, completions[..., None])[..., 0]
        lengths = kept.sum(1).tolist()
        ids = [row[:n].tolist() for row, n in zip(completions, lengths, strict=True)]
        scores = [row[:n].tolist() for row, n in zip(logps, lengths, strict=True)]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        answers = [answer for answer in rows["answer"] for _ in range(samples)]
        rewards = [reward(text, answer) for text, answer in zip(texts, answers, strict=True)]
        prompts = [row[m.bool()].tolist() for row, m in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]

        def grouped(values: list[Any]) -> list[list[Any]]:
            return [values[k : k + samples] for k in range(0, len(values), samples)]

        return {
            "prompt_ids": prompts,
            "responses": grouped(texts),
            "response_ids": grouped(ids),
            "ref_logprobs": grouped(scores),
            "rewards": grouped(rewards),
        }

    with tempfile.TemporaryDirectory() as cache:  # or the next run would find what this one made
        rows = load_dataset("json", data_files=file, split=f"train[:{num_prompts}]", cache_dir=cache)
        began = time.perf_counter()
        groups = rows.map(respond, batched=True, batch_size=max(1, batch // samples))
        groups.to_parquet(out)
        seconds = time.perf_counter() - began
        tokens = sum(len(ids) for group in groups["response_ids"] for ids in group)
    print(json.dumps({"seconds": seconds, "tokens": tokens}))


if __name__ == "__main__":
    main()
