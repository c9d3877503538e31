"""Trains a step or two with each of TRL's trainers on the exports in a folder; writes what they made of the data.

python train_with_trl.py FOLDER MODEL CHAT_MODEL
"""

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

FOLDER, MODEL, CHAT_MODEL = Path(sys.argv[1]), sys.argv[2], sys.argv[3]


def load(name: str) -> Dataset:
    return load_dataset("parquet", data_files=str(FOLDER / f"{name}.parquet"), split="train")


def settings(name: str) -> dict[str, Any]:
    return {
        "output_dir": str(FOLDER / f"run-{name}"),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-5,
        "max_length": None,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def sft(name: str, model: str) -> dict[str, Any]:
    trainer = SFTTrainer(model, args=SFTConfig(**settings(name)), train_dataset=load(name))
    made = trainer.train_dataset
    return {"losses": losses(trainer), "input_ids": made["input_ids"][:], "labels": made["labels"][:]}


def dpo(name: str, model: str) -> dict[str, Any]:
    """Stock TRL, which computes the reference log-probs itself, and what it says where they are there already."""
    with_columns, error = load(name), ""
    arguments = settings(name) | {"precompute_ref_log_probs": True}
    try:
        DPOTrainer(model, args=DPOConfig(**arguments), train_dataset=with_columns)
    except ValueError as found:
        error = str(found)
    columns = ["ref_chosen_logps", "ref_rejected_logps"]
    trainer = DPOTrainer(model, args=DPOConfig(**arguments), train_dataset=with_columns.remove_columns(columns))
    computed = {column: trainer.train_dataset[column][:] for column in columns}
    ids = {column: trainer.train_dataset[column][:] for column in ("prompt_ids", "chosen_ids", "rejected_ids")}
    return {"losses": losses(trainer), "error": error} | computed | ids


def kto(name: str, model: str) -> dict[str, Any]:
    trainer = KTOTrainer(model, args=KTOConfig(**settings(name)), train_dataset=load(name))
    return {"losses": losses(trainer), "labels": trainer.train_dataset["label"][:]}


report = {
    "sft": sft("sft", MODEL),
    "sft-ids": sft("sft-ids", MODEL),
    "dpo": dpo("dpo", MODEL),
    "kto": kto("kto", MODEL),
    "chat-sft": sft("chat-sft", CHAT_MODEL),
    "chat-kto": kto("chat-kto", CHAT_MODEL),
}
(FOLDER / "report.json").write_text(json.dumps(report))
