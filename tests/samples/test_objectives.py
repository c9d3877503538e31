"""samples/objectives as they stand: one file for each method, each trains."""

import json
import math
import re
from pathlib import Path

import pytest

from gftdata.config import GenerateConfig, load_config, load_settings
from gftdata.generate import generate
from gfttrain.config import TrainConfig
from gfttrain.presets import METHODS, folder_name, objectives_folder
from gfttrain.train import train

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "samples" / "objectives"
FILES = sorted(FOLDER.glob("*.yaml"))

# the rows of METHOD.md section 4
ROWS = [
    "SFT",
    "SFT (mix)",
    "RFT (rejection sampling)",
    "DFT",
    "DFT + anchor",
    "PSFT",
    "GRPO, offline",
    "GFT w/o GAL",
    "GFT w/o DCR",
    "GFT (no mix)",
    "GFT",
]
SPELLED = {"RFT (rejection sampling)": "RFT", "GRPO, offline": "GRPO (offline)"}
METHOD_NAMES = [SPELLED.get(row, row) for row in ROWS]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 groups of 1 expert, 1 teacher (every third one wrong) and 3 self responses."""
    folder = tmp_path_factory.mktemp("objectives")
    rows = [json.loads(line) for line in (ROOT / "samples/demo/train.jsonl").read_text().splitlines()[:16]]
    for number, row in enumerate(rows):
        row["hint"] = row["answer"] if number % 3 else "1"
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": str(ROOT / "samples/demo/model"),
        "out": str(folder / "data"),
        "prompts": {
            "path": str(folder / "prompts.jsonl"),
            "columns": {"question": "question", "ground_truth": "answer", "expert": "expert"},
        },
        "reward": {"name": "numeric", "workers": 1},
        "responses": {
            "teachers": [{"name": "hint", "column": "hint", "count": 1}],
            "self": {"count": 3},
            "max_tokens": 48,
        },
        "engine": {"device": "cpu"},
    }
    generate(load_settings(GenerateConfig, settings, "test"))
    return folder / "data"


def test_there_is_a_file_for_each_method() -> None:
    assert objectives_folder() == FOLDER
    assert list(METHODS) == METHOD_NAMES
    assert {path.stem for path in FILES} == {folder_name(name) for name in METHOD_NAMES}


@pytest.mark.parametrize("method", METHODS)
def test_a_file_says_what_it_is_and_differs_in_the_objective_only(method: str) -> None:
    path = FOLDER / f"{folder_name(method)}.yaml"
    lines = path.read_text().splitlines()
    comment = [line for line in lines if line.startswith("#")]
    assert comment == lines[: len(comment)] and comment[0].startswith(f"# {method}: ")
    assert comment[-1] == f"# From the repository's root: gft train samples/objectives/{path.name}"
    assert "arXiv:" in " ".join(comment)

    config = load_config(TrainConfig, path)
    assert config.objective == METHODS[method]
    demo = load_config(TrainConfig, ROOT / "samples/demo/train.yaml")
    same = {"objective": config.objective, "out": f"runs/objectives/{path.stem}"}
    assert config == demo.model_copy(update=same)

    written = set(config.objective.model_fields_set)
    ratio = {"coefficient", "clip_low", "clip_high", "old_policy"}
    if config.objective.old_policy == "refreshed":
        ratio.add("refresh_every")
    weight = {"coefficient", "tau"} if config.objective.coefficient == "rectified" else ratio
    selected = {"sources", "advantage", "kl_coef"} | ({"min_reward"} if method == "RFT" else set())
    assert written == selected | weight, "the method is spelled out, whatever the defaults are"


def test_the_readme_lists_them() -> None:
    rows = re.findall(r"^\| `(.+)` \| (.+?) \| (.+) \| (.+) \| (.+) \|$", (FOLDER / "README.md").read_text(), re.M)
    assert [(file, method.removesuffix(" (rejection sampling)")) for file, method, *_ in rows] == [
        (f"{folder_name(method)}.yaml", method) for method in METHODS
    ]
    for _, method, responses, advantage, coefficient in rows:
        objective = METHODS[method.removesuffix(" (rejection sampling)")]
        everything = objective.min_reward is not None
        assert responses == ("all with reward 1" if everything else ", ".join(objective.sources))
        assert advantage == ("1" if objective.advantage == "one" else "group")
        clipped = objective.coefficient == "clipped_ratio"
        assert coefficient.startswith("clipped ratio") == clipped
        if not clipped:
            rectified = "pi" if objective.tau > 1 else "C(pi)"
            assert coefficient.split(",")[0] == ("1" if objective.tau == 0 else rectified)
        assert ("penalty" in coefficient) == (objective.kl_coef > 0)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_trains(path: Path, shards: Path, tmp_path: Path) -> None:
    overrides = ["max_steps=2", "batch.groups_per_step=8", "device=cpu"]
    places = {"model": str(ROOT / "samples/demo/model"), "data": str(shards), "out": str(tmp_path / "run")}
    final = train(load_config(TrainConfig, path, overrides, places))
    assert (final / "model.safetensors").is_file()
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    assert all(math.isfinite(step["loss"]) and math.isfinite(step["grad_norm"]) for step in steps)
    assert all(step["computed_tokens"] > 0 for step in steps)
