"""GRPO with TRL from where `gft train` ended: on the data set's prompts, with the reward that judged its groups.

    gft export runs/demo/data --format trl-grpo --out runs/rl/prompts.parquet
    PYTHONPATH=. .venv-trl/bin/python samples/rl/grpo.py --model runs/demo/gft/final \\
        --prompts runs/rl/prompts.parquet --reward numeric --out runs/rl/grpo

Needs TRL, and of the toolkit only `gftdata.rewards` and what it imports. The settings fit the demo's tiny model.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

from gftdata.rewards import judge, resolve
from gftdata.types import Message, Prompt


def make_reward(name: str) -> Any:
    """TRL's kind of reward function, which asks the toolkit's reward `name`: None where it cannot judge.

    Nothing limits its time here: what an adversarial answer may do to a reward, it does to the training process.
    """
    resolve(name)  # an unknown name ends here, not in the first step

    def reward(
        prompts: list[Any],
        completions: list[Any],
        prompt_id: list[str],
        data_source: list[str],
        ground_truth: list[str | None],
        extra: list[str],
        **further: Any,
    ) -> list[float | None]:
        rewards = []
        for k, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            chat = tuple(Message(message["role"], message["content"]) for message in messages)
            text = completion if isinstance(completion, str) else completion[-1]["content"]
            asked = Prompt(
                prompt_id=prompt_id[k],
                source_id=None,
                messages=chat,
                ground_truth=ground_truth[k],
                data_source=data_source[k],
                given=(),
                extra=extra[k],
                question=chat[-1].content,
            )
            rewards.append(judge(name, asked, text).reward)
        return rewards

    reward.__name__ = name
    return reward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="RUN/final of gft train")
    parser.add_argument("--prompts", required=True, help="what gft export --format trl-grpo wrote")
    parser.add_argument("--reward", required=True, help="reward.name of the data set's generate.yaml")
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-4, help="the demo's; some 1e-6 for real models")
    parser.add_argument("--prompts-per-step", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=48)
    given = parser.parse_args()
    config = GRPOConfig(
        output_dir=given.out,
        max_steps=given.steps,
        learning_rate=given.lr,
        num_generations=8,
        per_device_train_batch_size=8 * given.prompts_per_step,
        max_completion_length=given.max_tokens,
        temperature=1.0,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=False,
        logging_steps=max(1, given.steps // 5),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    data = load_dataset("parquet", data_files=given.prompts, split="train")
    trainer = GRPOTrainer(given.model, make_reward(given.reward), config, train_dataset=data)
    trainer.train()
    final = Path(given.out) / "final"
    trainer.save_model(str(final))
    print(f"Trained model: {final}")


if __name__ == "__main__":
    main()
