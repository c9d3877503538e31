"""Data sets made once a session by `gft generate`'s own function, from the demo model and prompts."""

import json
from pathlib import Path

import pytest
import transformers
from training_helpers import DEMO, MODEL

from gftdata.config import GenerateConfig, validate_config
from gftdata.generate import generate

transformers.utils.logging.disable_progress_bar()


def _generate(folder: Path, rows: list[dict[str, str | None]], **responses: object) -> Path:
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = folder / "data"
    config = validate_config(
        GenerateConfig,
        {
            "model": str(MODEL),
            "out": str(out),
            "prompts": {
                "path": str(prompts),
                "columns": {"ground_truth": "answer", "expert": "expert"},
                "on_missing_ground_truth": "keep",
            },
            "reward": {"name": "numeric", "workers": 1},
            "responses": {"max_tokens": 48, **responses},
            "shards": {"groups_per_shard": 16, "row_group_size": 8},
            "engine": {"device": "cpu"},
        },
        "test",
    )
    generate(config)
    return out


def _rows(count: int) -> list[dict[str, str | None]]:
    lines = (DEMO / "train.jsonl").read_text().splitlines()[:count]
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 groups of 1 expert, 1 teacher (every third one wrong) and 4 self responses, in 3 shards of 2 row groups."""
    rows = _rows(48)
    for number, row in enumerate(rows):
        row["hint"] = row["answer"] if number % 3 else "1"
    teacher = {"name": "hint", "column": "hint", "count": 1}
    return _generate(tmp_path_factory.mktemp("data"), rows, teachers=[teacher], self={"count": 4})


@pytest.fixture(scope="session")
def unjudged_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 groups of 1 expert and 3 self responses, two of them without a ground truth."""
    rows = _rows(12)
    rows[3]["answer"] = rows[7]["answer"] = None
    return _generate(tmp_path_factory.mktemp("unjudged"), rows, self={"count": 3})
