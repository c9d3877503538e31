"""DPO with TRL on a data set's pairs, with the tokens and the reference log-probs that are stored: no reference model.

    gft export runs/demo/data --format trl-dpo --tokens --out runs/rl/pairs.parquet
    .venv-trl/bin/python samples/rl/dpo.py --model samples/demo/model --pairs runs/rl/pairs.parquet --out runs/rl/dpo

TRL 1.16 reads `ref_chosen_logps` in its loss, but by itself it computes them anew, on texts that it tokenised anew. The
two overridden methods leave both out; they are private, so that another version may name them otherwise.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from trl import DPOConfig, DPOTrainer


class StoredReferenceTrainer(DPOTrainer):
    """Takes prompt_ids, chosen_ids, rejected_ids, ref_chosen_logps and ref_rejected_logps as they are."""

    def _prepare_dataset(self, dataset: Dataset, *arguments: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *arguments: Any) -> Dataset:
        return dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the reference model of the data set: the log-probs are its own")
    parser.add_argument("--pairs", required=True, help="what gft export --format trl-dpo --tokens wrote")
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-4, help="the demo's; some 1e-6 for real models")
    given = parser.parse_args()
    config = DPOConfig(
        output_dir=given.out,
        max_steps=given.steps,
        learning_rate=given.lr,
        per_device_train_batch_size=16,
        precompute_ref_log_probs=True,  # so that no reference model is loaded
        max_length=None,  # a cut response would not be what the log-probs are of
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    data = load_dataset("parquet", data_files=given.pairs, split="train")
    trainer = StoredReferenceTrainer(given.model, args=config, train_dataset=data)
    trainer.train()
    final = Path(given.out) / "final"
    trainer.save_model(str(final))
    print(f"loss before the first update: {trainer.state.log_history[0]['loss']:.4f} (log 2 is 0.6931)")
    print(f"Trained model: {final}")


if __name__ == "__main__":
    main()
