"""Groups made by `gft generate`'s own function from the demo's model and prompts: 1 expert and 3 self responses."""

from pathlib import Path

from gftdata.config import GenerateConfig, validate_config
from gftdata.generate import generate

DEMO = Path(__file__).resolve().parents[2] / "samples" / "demo"


def make_demo_data(folder: Path, groups: int) -> Path:
    """FOLDER/data, in shards of 8 groups and row groups of 4."""
    settings = {
        "model": str(DEMO / "model"),
        "out": str(folder / "data"),
        "prompts": {
            "path": str(DEMO / "train.jsonl"),
            "columns": {"ground_truth": "answer", "expert": "expert"},
            "limit": groups,
        },
        "reward": {"name": "numeric", "workers": 1},
        "responses": {"self": {"count": 3}, "max_tokens": 48},
        "shards": {"groups_per_shard": 8, "row_group_size": 4},
        "engine": {"device": "cpu"},
    }
    generate(validate_config(GenerateConfig, settings, "test"))
    return folder / "data"
