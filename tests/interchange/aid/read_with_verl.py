"""Reads a Parquet file as verl's training does; writes the batches as JSON.

python read_with_verl.py FILE TOKENIZER OUT
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from torch.utils.data import DataLoader
from transformers import AutoTokenizer
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn

FILE, TOKENIZER, OUT = sys.argv[1:]

config = OmegaConf.create(
    {
        "cache_dir": f"{OUT}.cache",
        "prompt_key": "prompt",
        "max_prompt_length": 128,
        "filter_overlong_prompts": True,
        "filter_overlong_prompts_workers": 1,
        "return_raw_chat": True,
    }
)
dataset = RLHFDataset(FILE, AutoTokenizer.from_pretrained(TOKENIZER), config)


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


batches = []
for batch in DataLoader(dataset, batch_size=5, collate_fn=collate_fn):
    batches.append({key: plain(value) for key, value in batch.items() if key != "dummy_tensor"})
Path(OUT).write_text(json.dumps(batches))
