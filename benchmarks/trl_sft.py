"""TRL's SFTTrainer with the DFT loss on response groups: the other side of `train_vs_trl.py`, which starts it.

    .venv-trl/bin/python benchmarks/trl_sft.py '{"model": ..., "data": ..., "steps": 3, "settings": {...}, "mark": ...}'

Runs in TRL's own environment and imports nothing of ours. Reads the groups from our shards and flattens them: one row a
response, token ids and a completion mask. A step is the whole data set, so `steps` are epochs. `settings` go to
SFTConfig as they are; `attn_implementation` goes to the model. The file `mark` is written when the first step is done.
The last line printed is JSON.
"""

import json
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import accelerate
import pyarrow.parquet as pq
import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """When training began and when each optimizer step ended, and the processor time then; reading the data counts."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark
        self.times: list[float] = []
        self.processor: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())
        self.processor.append(time.process_time())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if not self.mark.exists():
            self.mark.write_text("1\n")
        self.times.append(time.perf_counter())
        self.processor.append(time.process_time())


def differences(times: list[float]) -> list[float]:
    return [end - start for start, end in pairwise(times)]


def flattened(data: Path) -> list[dict[str, list[int]]]:
    """One row a response. Longest first, so that a batch has as little padding as grouping by length can reach."""
    rows = []
    for path in sorted((data / "data").glob("*.parquet")):
        for group in pq.read_table(path, columns=["prompt_ids", "response_ids"]).to_pylist():
            for response in group["response_ids"]:
                mask = [0] * len(group["prompt_ids"]) + [1] * len(response)
                rows.append({"input_ids": group["prompt_ids"] + response, "completion_mask": mask})
    return sorted(rows, key=lambda row: -len(row["input_ids"]))


def main() -> None:
    options = json.loads(sys.argv[1])
    settings = dict(options["settings"])
    attention = settings.pop("attn_implementation", "sdpa")
    rows = flattened(Path(options["data"]))
    clock = Clock(Path(options["mark"]))
    with tempfile.TemporaryDirectory() as out:
        config = SFTConfig(
            **{
                "output_dir": out,
                "use_cpu": True,
                "bf16": False,
                "model_init_kwargs": {"dtype": "float32", "attn_implementation": attention},
                "loss_type": "dft",
                "completion_only_loss": True,
                "num_train_epochs": options["steps"],
                "gradient_accumulation_steps": -(-len(rows) // settings["per_device_train_batch_size"]),
                "gradient_checkpointing": False,
                "train_sampling_strategy": "sequential",
                "max_length": None,
                "learning_rate": 1e-6,
                "lr_scheduler_type": "constant",
                "weight_decay": 0.01,
                "optim": "adamw_torch_fused",
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "dataloader_pin_memory": False,
                **settings,
            }
        )
        trainer = SFTTrainer(
            options["model"],
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(options["model"]),
            callbacks=[clock],
        )
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    versions = {module.__name__: module.__version__ for module in (trl, torch, transformers, accelerate)}
    print(
        json.dumps(
            {
                "seconds": differences(clock.times),
                "processor_seconds": differences(clock.processor),
                "losses": [entry["loss"] for entry in logs],
                "grad_norms": [entry["grad_norm"] for entry in logs],
                "versions": versions,
            }
        )
    )


if __name__ == "__main__":
    main()
