"""TRL's own DFT loss of the rows of an export, as SFTTrainer makes one batch of them, and its gradient.

python dft_of_trl.py FILE MODEL OUT    # OUT.json: the loss; OUT.safetensors: gradients by parameter
"""

import json
import sys
from pathlib import Path

from datasets import load_dataset
from safetensors.torch import save_file
from trl import SFTConfig, SFTTrainer

FILE, MODEL, OUT = sys.argv[1:]

config = SFTConfig(
    output_dir=f"{OUT}.run",
    loss_type="dft",
    max_length=None,
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    model_init_kwargs={"dtype": "float32"},
    report_to="none",
)
rows = load_dataset("parquet", data_files=FILE, split="train")
trainer = SFTTrainer(MODEL, args=config, train_dataset=rows)
batch = trainer.data_collator(list(trainer.train_dataset))
trainer.model.train()
tokens = (batch["labels"] != -100).sum()
loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=tokens)
loss.backward()
save_file({name: p.grad.clone() for name, p in trainer.model.named_parameters()}, f"{OUT}.safetensors")
Path(f"{OUT}.json").write_text(json.dumps({"loss": loss.item(), "tokens": tokens.item()}))
