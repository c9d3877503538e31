"""`gft import` and `gft export`: what they print, and that mistakes end in one line."""

import json
from pathlib import Path

from aid.commands import Gft

ROOT = Path(__file__).resolve().parents[2]


def rows(count: int) -> str:
    """verl's layout, with a worked answer and two of a teacher; the last row is no prompt."""
    lines = (ROOT / "samples/demo/train.jsonl").read_text().splitlines()[:count]
    made = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": row["question"]}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": row["answer"]},
            "extra_info": {"index": n, "answer": row["expert"], "model_answer": [row["answer"], "1"]},
        }
        for n, row in enumerate(map(json.loads, lines))
    ]
    made[-1]["prompt"] = []
    return "".join(json.dumps(row) + "\n" for row in made)


def test_import_generate_export(gft: Gft) -> None:
    Path("sums.jsonl").write_text(rows(9))
    done = gft("import", "authors", "sums.jsonl", "--out", "in", "--model", ROOT / "samples/demo/model")
    assert done.code == 0, done.err
    assert "in/prompts.jsonl: 8 of 9 rows" in done.out
    assert "left out     1 whose prompt is not a chat of texts that ends with the user's" in done.out
    assert "8 rows with an expert's, 16 of a teacher" in done.out
    settings = ["--set", "reward={name: numeric, workers: 1}", "--set", "responses.max_tokens=48"]
    assert gft("generate", "in/generate.yaml", *settings).code == 0
    done = gft("export", "in/data", "--format", "verl", "--out", "back")
    assert done.code == 0, done.err
    assert "back/train.parquet: 8 rows for verl" in done.out and "left out      32 responses of self" in done.out
    done = gft("export", "in/data", "--format", "trl-dpo", "--out", "dpo.parquet", "--pairs", "all", "--source", "self")
    assert done.code == 0, done.err
    assert "8 responses of expert (--source); 16 responses of teacher:qwen2.5-math-72b (--source)" in done.out
    assert "note: TRL turns the texts into tokens again" in done.out


def test_mistakes_end_in_one_line(gft: Gft) -> None:
    Path("sums.jsonl").write_text(rows(3))
    for arguments, saying in (
        (("import", "verl", "sums.jsonl", "--out", "in", "--teacher", "model_answer"), "`extra_info.model_answer`"),
        (("import", "parquet", "sums.jsonl", "--out", "in"), "expected authors or verl"),
        (("export", "none", "--format", "verl", "--out", "x"), "none: no such data set folder"),
        (("export", "none", "--format", "trl", "--out", "x"), "unknown format 'trl'"),
    ):
        done = gft(*arguments)
        assert done.code == 2 and done.err.startswith("error: ") and len(done.err.splitlines()) == 1
        assert saying in done.err, done.err
