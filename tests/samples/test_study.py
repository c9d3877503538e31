"""samples/study: its on-policy loop against `gft train`, its settings, and one of its tables from end to end."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gftdata.config import load_config
from gftdata.engines.hf import HfEngine, load_model
from gftdata.generate import generate
from gftdata.tokens import load_tokenizer
from gftdata.types import SELF, ScoreRequest
from gfttrain.config import TrainConfig
from gfttrain.train import train

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "samples" / "study"
sys.path.insert(0, str(STUDY))

import on_policy  # noqa: E402
import questions  # noqa: E402
import study as program  # noqa: E402


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> program.Study:
    monkeypatch.chdir(ROOT)
    return program.Study(program.SCALES["toy"], tmp_path, limit=24)


def without_teacher(study: program.Study) -> questions.Condition:
    """GFT, on prompts that lie beside the demo."""
    (study.out / "prompts.jsonl").write_text((ROOT / "samples" / "demo" / "train.jsonl").read_text())
    return questions.GFT


def test_never_drawn_again_is_gft_train(small: program.Study) -> None:
    condition = without_teacher(small)
    generate(small.generation(condition, 0))
    values = {"batch.groups_per_step": 8, "epochs": 2}
    one, other = (small.training(condition, 0).model_copy(update={"out": str(small.out / name)}) for name in ("a", "b"))
    one, other = (TrainConfig.model_validate(_changed(config, values)) for config in (one, other))
    responses = small.generation(condition, 0).responses
    sampling = responses.own.sampling.with_limit(responses.max_tokens)
    expected = load_file(train(one) / "model.safetensors")
    found = load_file(on_policy.train_on_policy(other, 100, "numeric", sampling) / "model.safetensors")
    start = load_file(ROOT / "samples" / "demo" / "model" / "model.safetensors")
    moved = max(float((expected[name] - start[name]).abs().max()) for name in expected)
    assert moved > 1e-4
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < moved / 100


def _changed(config: TrainConfig, values: dict[str, object]) -> dict[str, object]:
    settings = config.model_dump()
    settings["batch"]["groups_per_step"] = values["batch.groups_per_step"]
    return settings | {"epochs": values["epochs"]}


def test_samples_drawn_again_are_the_models(small: program.Study) -> None:
    condition = without_teacher(small)
    settings = small.generation(condition, 0)
    generate(settings)
    before = list(on_policy.read_groups(small.data(condition, 0)).values())[:6]
    model = load_model(settings.model, torch.float32, torch.device("cpu"))
    engine = HfEngine(model, load_tokenizer(settings.model), batch_size=64, batch_tokens=4096)
    after = on_policy.draw_again(before, engine, settings.responses.own.sampling.with_limit(48), "numeric", seed=1)
    assert [group.prompt for group in after] == [group.prompt for group in before]
    for old, new in zip(before, after, strict=True):
        sources = [[r.completion.source for r in group.responses] for group in (old, new)]
        assert sources[0] == sources[1] == ["expert"] + [SELF] * 7
        assert new.responses[0] is old.responses[0]
        own = new.responses[1:]
        assert [r.completion.text for r in own] != [r.completion.text for r in old.responses[1:]]
        for response in own:
            truth = new.prompt.ground_truth
            assert response.verdict.reward == float(response.completion.text.split(";")[-1].split("=")[-1] == truth)
        scores = engine.score([ScoreRequest(new.prompt_ids, r.completion.response_ids) for r in own])
        for response, score in zip(own, scores, strict=True):
            np.testing.assert_allclose(response.ref_logprobs, score, atol=1e-4)


@pytest.mark.parametrize("scale", program.SCALES)
def test_settings_of_every_condition(scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study = program.Study(program.SCALES[scale], tmp_path, None)
    asked = [q for q in questions.QUESTIONS if study.has_teacher or not q.teacher]
    conditions = questions.needed(asked)
    assert {c.name for q in asked for c in q.conditions} <= {c.name for c in conditions}
    places = set()
    for number, condition in enumerate(conditions):
        assert not condition.start or condition.start in [c.name for c in conditions[:number]]
        generation, training = study.generation(condition, 1), study.training(condition, 1)
        assert generation.responses.size == 8 and training.data == (generation.out,)
        assert training.model == generation.model, "the groups are of the model that is trained"
        assert training.seed == generation.seed == 1
        places.add(training.out)
    assert len(places) == len(conditions)
    assert study.evaluation("m", tmp_path).benchmarks


def test_rounds_are_the_objectives_they_are_called(small: program.Study) -> None:
    floor = small.training(questions.EVERY["round 2, floor -1"], 0)
    assert floor.objective.advantage_floor == -1.0 and floor.model.endswith("gft-seed-0/final")
    defaults = load_config(TrainConfig, ROOT / "samples" / "demo" / "train.yaml")
    assert small.training(questions.GFT, 0).optim == defaults.optim


@pytest.mark.slow
def test_a_table(small: program.Study) -> None:
    without_teacher(small)
    command = [sys.executable, str(STUDY / "study.py"), "--out", str(small.out), "--limit", "16", "--seeds", "1"]
    done = subprocess.run([*command, "--only", "ablation"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = (small.out / "tables.txt").read_text()
    assert table in done.stdout
    shown = [line.split("  ")[0] for line in table.splitlines()]
    assert [name for name in shown if name in ("base", "SFT", "GFT w/o GAL", "GFT w/o DCR", "GFT")][:5] == [
        "base",
        "SFT",
        "GFT w/o GAL",
        "GFT w/o DCR",
        "GFT",
    ]
    again = subprocess.run(
        [*command, "--only", "ablation", "--tables"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert table in again.stdout
