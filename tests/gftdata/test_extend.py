"""Adding prompts and responses to a finished data set: what is there is not done again, the whole is as if new."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from gftdata import generate as generation
from gftdata.config import GenerateConfig, validate_config
from gftdata.errors import UserError
from gftdata.events import Event
from gftdata.extend import number_samples
from gftdata.generate import generate
from gftdata.groups import sample_seed
from gftdata.manifest import read_manifest
from gftdata.pilot import run_pilot
from gftdata.prepare import preview
from gftdata.schema import table_to_groups
from gftdata.shards import shard_paths, verify
from gftdata.types import Group

MakeConfig = Callable[..., GenerateConfig]


@pytest.fixture(scope="module")
def make(demo: Path, other_model: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeConfig:
    rows = [json.loads(line) for line in (demo / "train.jsonl").read_text().splitlines()[:11]]
    rows.insert(4, rows[0])  # one prompt comes twice
    path = tmp_path_factory.mktemp("prompts") / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def config(out: Path, limit: int, own: int, other: int, **changes: Any) -> GenerateConfig:
        base: dict[str, Any] = {
            "model": str(demo / "model"),
            "out": str(out),
            "prompts": {
                "path": str(path),
                "limit": limit,
                "columns": {"ground_truth": "answer", "expert": "expert"},
            },
            "reward": {"name": "exact", "workers": 1},
            "responses": {
                "max_tokens": 26,
                "self": {"count": own},
                "teachers": [{"name": "other", "model": str(other_model), "count": other}] if other else [],
            },
            "engine": {"device": "cpu"},
            "shards": {"groups_per_shard": 4, "row_group_size": 2},
        }
        return validate_config(GenerateConfig, {**base, **changes}, "test")

    return config


@pytest.fixture(scope="module")
def before(make: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "before"
    generate(make(out, limit=7, own=2, other=2))
    return out


def groups_in(out: Path) -> list[Group]:
    return [group for path in shard_paths(out, read_manifest(out)) for group in table_to_groups(pq.read_table(path))]


def summary_of(out: Path) -> list[Any]:
    return [
        (
            group.prompt,
            [
                (
                    r.completion.source,
                    r.completion.text,
                    r.completion.seed,
                    r.completion.response_ids.tolist(),
                    r.verdict,
                )
                for r in group.responses
            ],
        )
        for group in groups_in(out)
    ]


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts what is drawn, judged and scored."""
    counts: Counter[str] = Counter()
    original = generation.judge_and_score

    def counting(out: Path, rows: Any, submit: Any, scorer: Any, on_event: Any) -> Any:
        def submitted(*arguments: Any) -> Any:
            counts["judged"] += 1
            return submit(*arguments)

        class Counting:
            def score(self, requests: Any) -> Any:
                counts["scored"] += len(requests)
                return scorer.score(requests)

        return original(out, rows, submitted, Counting(), on_event)

    monkeypatch.setattr(generation, "judge_and_score", counting)
    yield counts


def run(config: GenerateConfig, counts: Counter[str]) -> None:
    def listen(event: Event) -> None:
        counts[event.source] += event.kind == "sample"

    generate(config, listen)


def test_more_prompts_and_more_responses_are_all_that_is_done(
    make: MakeConfig, before: Path, tmp_path: Path, done: Counter[str]
) -> None:
    extended, whole = tmp_path / "extended", tmp_path / "whole"
    run(make(extended, limit=12, own=3, other=3, extend=str(before)), done)
    planned = preview(make(extended, limit=12, own=3, other=3, extend=str(before)))
    carried = Counter(r.completion.source for group in groups_in(before) for r in group.responses)
    assert carried["teacher:other"] < 7 * 2, "some were left out, and are not asked for again"
    assert (planned.carried_samples, planned.carried_groups, planned.groups_left_behind) == (7 * 4, 7, 0)
    assert planned.sampled_responses == 12 * 6 - planned.carried_samples
    assert verify(extended) == []
    assert done["self"] == 12 * 3 - carried["self"] == 12 * 3 - 7 * 2
    assert done["teacher:other"] == 12 * 3 - 7 * 2
    responses = sum(len(group.responses) for group in groups_in(extended))
    assert done["judged"] == done["scored"] == responses - carried.total()

    generate(make(whole, limit=12, own=3, other=3))
    assert summary_of(extended) == summary_of(whole)
    for a, b in zip(groups_in(extended), groups_in(whole), strict=True):
        for r, s in zip(a.responses, b.responses, strict=True):
            np.testing.assert_allclose(r.ref_logprobs, s.ref_logprobs, atol=3e-5, rtol=1e-5)
    # and what was carried is the same to the last bit
    old = {g.prompt.prompt_id: g for g in groups_in(before)}
    for group in groups_in(extended):
        if group.prompt.prompt_id in old:
            then = {r.completion.seed: r for r in old[group.prompt.prompt_id].responses if r.completion.seed}
            now = {r.completion.seed: r for r in group.responses if r.completion.seed in then}
            assert then.keys() == now.keys()
            for seed, response in then.items():
                assert response.ref_logprobs.tolist() == now[seed].ref_logprobs.tolist()
    assert read_manifest(extended).recipe["extend"] == "before"


def test_a_pilot_of_an_extension_is_refused(make: MakeConfig, before: Path, tmp_path: Path) -> None:
    config = make(tmp_path / "out", limit=12, own=3, other=3, extend=str(before))
    with pytest.raises(UserError, match="leave `extend` out"):
        run_pilot(config, preview(config), 2)


def test_fewer_responses_of_a_source_are_the_first_ones(
    make: MakeConfig, before: Path, tmp_path: Path, done: Counter[str]
) -> None:
    run(make(tmp_path / "less", limit=5, own=1, other=2, extend=str(before)), done)
    assert done["self"] == 0
    for old, new in zip(groups_in(before)[:5], groups_in(tmp_path / "less"), strict=True):
        (own,) = [r for r in new.responses if r.completion.source == "self"]
        assert own.completion.seed == sample_seed(0, old.prompt.prompt_id, "self", 0)


def test_an_interrupted_extension_is_continued(make: MakeConfig, before: Path, tmp_path: Path) -> None:
    config = make(tmp_path / "cut", limit=12, own=3, other=3, extend=str(before))
    for stop_at in ("teacher:other", "self", "shard"):

        def stop(event: Event, stop_at: str = stop_at) -> None:
            if stop_at in (event.source if event.kind == "sample" else "", event.kind):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            generate(config, stop)
    generate(config)
    generate(make(tmp_path / "whole", limit=12, own=3, other=3))
    assert summary_of(tmp_path / "cut") == summary_of(tmp_path / "whole")


def test_a_new_teacher_is_drawn_for_all(make: MakeConfig, before: Path, tmp_path: Path, demo: Path) -> None:
    teachers = make(tmp_path, limit=7, own=2, other=2).model_dump(mode="json", by_alias=True)["responses"]
    teachers["teachers"].append({"name": "more", "model": str(demo / "model"), "count": 1})
    config = make(tmp_path / "more", limit=7, own=2, other=2, extend=str(before), responses=teachers)
    drawn: Counter[str] = Counter()
    run(config, drawn)
    assert drawn["teacher:more"] == 7 and drawn["self"] == 0
    for group in groups_in(tmp_path / "more"):
        assert Counter(r.completion.source for r in group.responses)["self"] == 2


def test_samples_without_seeds_are_known_by_their_order() -> None:
    seeds = [int(sample_seed(5, "p", "self", k)) for k in range(4)]
    sources = ["expert", "t", "t", "self", "self"]
    known = number_samples(5, "p", 3, sources, [None, None, None, seeds[2], seeds[0]], {"t": 2, "self": 4})
    assert known == [("expert", 3, 0), ("t", 3, 0), ("t", 3, 1), ("self", 3, 2), ("self", 3, 0)]
    # a foreign seed takes the first free number
    known = number_samples(5, "p", 0, ["self"] * 3, [seeds[0], 123, seeds[1]], {"self": 3})
    assert [k for *_, k in known] == [0, 2, 1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "`seed` was 0 and is now 1"),
        ({"reward": {"name": "numeric"}}, "`reward.name` was 'exact' and is now 'numeric'"),
        ({"shards": {"logprob_dtype": "float16"}}, "`shards.logprob_dtype`"),
    ],
)
def test_another_recipe_is_refused(
    make: MakeConfig,
    before: Path,
    tmp_path: Path,
    change: dict[str, Any],
    said: str,
    one_line: Callable[[BaseException], str],
) -> None:
    with pytest.raises(UserError) as caught:
        generate(make(tmp_path / "out", limit=12, own=3, other=3, extend=str(before), **change))
    assert said in one_line(caught.value)
    assert not (tmp_path / "out").exists()


def test_another_model_another_teacher_and_no_data_set_are_refused(
    make: MakeConfig, before: Path, tmp_path: Path, chat_model: Path, other_model: Path, demo: Path
) -> None:
    config = make(tmp_path / "out", limit=7, own=2, other=2, extend=str(before))
    other_teacher = config.responses.teachers[0].model_copy(update={"model": str(demo / "model")})
    changed = config.responses.model_copy(update={"teachers": (other_teacher,)})
    for wrong, said in [
        (config.model_copy(update={"model": str(other_model)}), "`model` was"),
        (config.model_copy(update={"responses": changed}), "of teacher:other, `model` was"),
        (make(tmp_path / "out", limit=7, own=2, other=0, extend=str(before)), "has responses of teacher:other"),
        (make(tmp_path / "out", limit=7, own=2, other=2, extend=str(tmp_path)), "no manifest.json"),
        (make(tmp_path / "out", limit=7, own=2, other=2, extend="./nothing"), "no such data set folder"),
    ]:
        with pytest.raises(UserError, match=said):
            generate(wrong)
        assert not (tmp_path / "out").exists()


def test_a_data_set_that_changed_meanwhile_is_not_mixed_in(make: MakeConfig, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    generate(make(source, limit=4, own=1, other=0))
    config = make(out, limit=8, own=2, other=0, extend=str(source))

    def stop(event: Event) -> None:
        if event.kind == "sample":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(config, stop)
    shutil.rmtree(source)
    generate(make(source, limit=3, own=1, other=0))
    with pytest.raises(UserError, match="was begun to extend another content"):
        generate(config)


def test_prompts_of_another_kind_have_nothing_to_extend(
    make: MakeConfig, before: Path, tmp_path: Path, demo: Path
) -> None:
    prompts = {
        "path": str(demo / "train.jsonl"),
        "limit": 3,
        "columns": {"ground_truth": "answer", "expert": "expert"},
        "template": "{question}+",
    }
    with pytest.raises(UserError, match="has none of these prompts"):
        generate(make(tmp_path / "out", limit=3, own=2, other=2, extend=str(before), prompts=prompts))
    assert not (tmp_path / "out").exists()


def test_a_finished_extension_needs_its_source_no_more(make: MakeConfig, tmp_path: Path) -> None:
    source = tmp_path / "source"
    generate(make(source, limit=3, own=1, other=0))
    config = make(tmp_path / "out", limit=5, own=1, other=0, extend=str(source))
    finished = generate(config)
    assert [step.by for step in finished.derived] == ["extend"]
    assert finished.derived[0].settings == {"groups_carried": 3, "groups_left_behind": 0}
    shutil.rmtree(source)
    assert generate(config) == finished
