"""Derived data sets: rejudge, rescore, merge, filter, split, against naive Python over the groups themselves."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gftdata import derive as deriving
from gftdata import regroup
from gftdata.config import GenerateConfig, HfConfig, RewardConfig, validate_config
from gftdata.derive import Job, RejudgeConfig, RescoreConfig, derive, plan_rejudge, plan_rescore
from gftdata.errors import UserError
from gftdata.events import Event
from gftdata.generate import generate
from gftdata.manifest import (
    DATA,
    MANIFEST,
    WORK,
    Manifest,
    ModelRecord,
    PromptCounts,
    TokenizerRecord,
    read_manifest,
    write_manifest,
)
from gftdata.regroup import plan_filter, plan_merge, plan_split, position
from gftdata.rewards import judge
from gftdata.schema import groups_to_table, table_to_groups
from gftdata.shards import all_records, package_versions, publish_shard, shard_paths, verify
from gftdata.store import FolderStore
from gftdata.summary import summarise
from gftdata.types import Completion, Group, LogProbs, Message, Prompt, Response, ScoreRequest, Unscored, Verdict

OneLine = Callable[[BaseException], str]
Oracle = Callable[..., np.ndarray]
RIGHT, WRONG, HALF, UNJUDGED = Verdict(1.0, "ok"), Verdict(0.0, "ok"), Verdict(0.5, "ok"), Verdict(None, "timeout")
SIZES = (7, 0, 13, 1, 9)  # groups of each shard; an empty one is allowed
TRUTHLESS = 5  # rows of the generated data set from here on, as far as 2, have no ground truth


def group(number: int) -> Group:
    """One of many different groups: 0 to 5 responses of three sources, all kinds of verdicts, some of one kind only."""
    rng = np.random.default_rng(number)
    kinds = [(RIGHT, WRONG, HALF, UNJUDGED), (RIGHT,), (WRONG, UNJUDGED), (UNJUDGED,)][number % 7 % 4]

    def response(k: int) -> Response:
        length = int(rng.integers(1, 30))
        own = k > 1
        return Response(
            Completion(
                source=("expert", "teacher:a", "self", "self", "self")[k],
                text=f"text {rng.integers(3)} é",
                response_ids=rng.integers(0, 9, length).astype(np.int32),
                finish_reason="stop" if own else "given",
                model="m@1" if own else "data",
                seed=int(rng.integers(2**62)) if own else None,
                behavior_logprobs=-rng.exponential(size=length).astype(np.float16).astype(np.float32) if own else None,
            ),
            kinds[rng.integers(len(kinds))],
            -rng.exponential(size=length).astype(np.float16).astype(np.float32),
        )

    messages = (Message("system", "Be brief."), Message("user", f"question {number}"))
    prompt = Prompt(f"p{number}", f"id{number}", messages, "1", "s", (), '{"a": 1}', f"question {number}")
    prompt_ids = np.arange(1 + number % 4, dtype=np.int32)
    return Group(prompt, prompt_ids, tuple(response(k) for k in range(number % 11 % 6)))


def build(out: Path, groups: Sequence[Group], sizes: Sequence[int] = (), **changes: Any) -> Path:
    """A finished data set of these groups, one shard of each size; row groups of 4."""
    sizes = sizes or [len(groups)]
    assert sum(sizes) == len(groups)
    dtype = changes.pop("logprob_dtype", "float32")
    start = 0
    for shard, size in enumerate(sizes):
        publish_shard(
            FolderStore(out), shard, len(sizes), groups_to_table(groups[start : start + size], dtype), 4, dtype
        )
        start += size
    counted = dict.fromkeys(PromptCounts.model_fields, 1) | {"prompts": len(groups)}
    records = all_records(FolderStore(out), len(sizes))
    fields: dict[str, Any] = {
        "format": "gft-groups",
        "schema_version": 1,
        "toolkit_version": "0",
        "recipe": {"shards": {"groups_per_shard": 8, "row_group_size": 4}, "reward": {"name": "x"}},
        "models": (ModelRecord(role="reference", name="m", revision="1"),),
        "tokenizer": TokenizerRecord(hash="t", template_hash="c", end_id=1, stop_ids=(1,)),
        "engine": "none",
        "packages": package_versions(),
        "prompts": PromptCounts(**counted),
        "prompts_quarantined": 0,
        "teacher_samples_left_out": 2,
        "summary": summarise([out / DATA / record.name for record in records]),
        "shards": records,
    }
    write_manifest(FolderStore(out), Manifest(**fields | changes))
    shutil.rmtree(out / WORK)
    assert verify(out) == []
    return out


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return build(tmp_path / "data", [group(n) for n in range(30)], SIZES)


@pytest.fixture(scope="module", autouse=True)
def at_the_root(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(request.config.rootpath)
        yield


@pytest.fixture(scope="module")
def generated(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `gft generate` makes of 10 demo prompts, two of them without ground truth: shards of 4, row groups of 2."""
    folder = tmp_path_factory.mktemp("generated")
    rows = [json.loads(line) for line in (demo / "train.jsonl").read_text().splitlines()[:10]]
    for row in rows[TRUTHLESS : TRUTHLESS + 2]:
        row["answer"] = None
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": str(demo / "model"),
        "out": str(folder / "data"),
        "prompts": {
            "path": str(folder / "prompts.jsonl"),
            "columns": {"ground_truth": "answer", "expert": "expert"},
            "on_missing_ground_truth": "keep",
        },
        "reward": {"name": "numeric", "workers": 1},
        "responses": {"max_tokens": 26, "self": {"count": 3}},
        "engine": {"device": "cpu"},
        "shards": {"groups_per_shard": 4, "row_group_size": 2},
    }
    generate(validate_config(GenerateConfig, settings, "test"))
    return folder / "data"


@pytest.fixture(scope="module")
def tuned(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with other weights."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path_factory.mktemp("models") / "tuned"
    shutil.copytree(demo / "model", folder)
    weights, rng = load_file(folder / "model.safetensors"), np.random.default_rng(0)
    moved = {name: w + 0.02 * rng.standard_normal(w.shape).astype(w.dtype) for name, w in weights.items()}
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def rejudge_config(name: str = "numeric", **settings: Any) -> RejudgeConfig:
    return RejudgeConfig(reward=RewardConfig(name=name, workers=1, **settings))


def rescore_config(model: Path, **engine: Any) -> RescoreConfig:
    return RescoreConfig(model=str(model), engine=HfConfig(device="cpu", **engine))


def groups_in(folder: Path) -> list[Group]:
    paths = shard_paths(folder, read_manifest(folder))
    return [group for path in paths for group in table_to_groups(pq.ParquetFile(path).read())]


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return [
        row for path in shard_paths(folder, read_manifest(folder)) for row in pq.ParquetFile(path).read().to_pylist()
    ]


def without(rows: list[dict[str, Any]], *columns: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in columns} for row in rows]


def rows_of_shards(folder: Path) -> list[int]:
    return [record.rows for record in read_manifest(folder).shards]


def tree(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def check_sound(folder: Path, job: Job, sources: Sequence[Path]) -> Manifest:
    """A derived data set is whole, says where it comes from, and is one that can be derived from."""
    assert verify(folder) == []
    manifest = read_manifest(folder)
    assert manifest.derived[-1] == job.derivation
    expected = tuple(hashlib.sha256((source / MANIFEST).read_bytes()).hexdigest() for source in sources)
    assert manifest.derived[-1].sources == expected
    paths = shard_paths(folder, manifest)
    assert manifest.summary == summarise(paths)
    again = derive(plan_filter(folder, folder.with_name(f"{folder.name}-again")))
    assert [step.by for step in again.derived] == [*(step.by for step in manifest.derived), "filter"]
    return manifest


def refusal(one_line: OneLine, plan: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        plan(*arguments, **options)
    return one_line(caught.value)


def stop_after(shards: int) -> Callable[[Event], None]:
    """A listener that ends the run when so many shards have been published."""
    left = shards

    def listen(event: Event) -> None:
        nonlocal left
        left -= event.kind == "shard"
        if not left:
            raise KeyboardInterrupt

    return listen


def stopped_and_continued(plan: Callable[[], Job], whole: Path) -> list[Event]:
    """Stop a job after its first shard and continue it: the same bytes of values, nothing done twice."""
    out = plan().out
    with pytest.raises(KeyboardInterrupt):
        derive(plan(), stop_after(1))
    assert not (out / MANIFEST).exists()
    published = {path: path.stat().st_ino for path in (out / DATA).iterdir()}
    assert len(published) == 1
    events: list[Event] = []
    made = derive(plan(), events.append)
    for path, inode in published.items():
        assert path.stat().st_ino == inode
    assert rows_in(out) == rows_in(whole)
    assert verify(out) == []
    first = read_manifest(whole).shards[0].rows
    assert (events[0].kind, events[0].done, events[0].count) == ("groups", first, made.summary.groups)
    assert derive(plan(), lambda event: pytest.fail("it is finished")) == made
    return events


# ---- rejudge


def test_the_same_reward_gives_the_same_data_set(generated: Path, tmp_path: Path) -> None:
    before = tree(generated)
    job = plan_rejudge(generated, tmp_path / "new", rejudge_config())
    assert not (tmp_path / "new").exists()
    made = derive(job)
    assert rows_in(tmp_path / "new") == rows_in(generated)
    manifest = check_sound(tmp_path / "new", job, [generated])
    assert manifest == made
    assert rows_of_shards(tmp_path / "new") == [4, 4, 2]
    source = read_manifest(generated)
    assert manifest.summary == source.summary and manifest.prompts == source.prompts
    assert tree(generated) == before


def test_another_reward_replaces_rewards_and_status_and_nothing_else(generated: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    job = plan_rejudge(generated, tmp_path / "new", rejudge_config("exact", timeout_s=5.0))
    derive(job, events.append)
    manifest = check_sound(tmp_path / "new", job, [generated])
    before, now = rows_in(generated), rows_in(tmp_path / "new")
    assert without(before, "rewards", "reward_status") == without(now, "rewards", "reward_status")
    for group, row in zip(groups_in(generated), now, strict=True):
        verdicts = [judge("exact", group.prompt, r.completion.text) for r in group.responses]
        assert row["rewards"] == [verdict.reward for verdict in verdicts]
        assert row["reward_status"] == [verdict.status for verdict in verdicts]
    assert [row["rewards"] for row in before] != [row["rewards"] for row in now]
    assert now[TRUTHLESS]["reward_status"] == ["no_ground_truth"] * 4
    source = read_manifest(generated)
    settings = {"name": "exact", "timeout_s": 5.0, "memory_gb": 4.0}
    assert manifest.recipe == source.recipe | {"reward": settings}
    assert manifest.derived[0].settings == {"reward": settings}
    assert manifest.summary.groups_unjudged == 2
    assert sum(event.kind == "judged" for event in events) == sum(len(row["rewards"]) for row in now)


def test_judging_keeps_float16_empty_groups_and_empty_shards(tmp_path: Path) -> None:
    groups = [group(n) for n in range(30)]
    data = build(tmp_path / "data", groups, SIZES, logprob_dtype="float16")
    job = plan_rejudge(data, tmp_path / "new", rejudge_config("exact"))
    derive(job)
    manifest = check_sound(tmp_path / "new", job, [data])
    columns = "rewards", "reward_status"
    assert without(rows_in(tmp_path / "new"), *columns) == without(rows_in(data), *columns)
    assert rows_of_shards(tmp_path / "new") == list(SIZES)
    types = pq.read_schema(shard_paths(tmp_path / "new", manifest)[0]).field("ref_logprobs").type
    assert types.value_type.value_type == pa.float16()


def test_a_stopped_rejudging_continues(generated: Path, tmp_path: Path) -> None:
    derive(plan_rejudge(generated, tmp_path / "whole", rejudge_config("exact")))
    events = stopped_and_continued(
        lambda: plan_rejudge(generated, tmp_path / "new", rejudge_config("exact")), tmp_path / "whole"
    )
    assert sum(event.kind == "judged" for event in events) == 6 * 4


def test_only_the_same_derivation_is_continued(generated: Path, data: Path, tmp_path: Path, one_line: OneLine) -> None:
    out = tmp_path / "new"
    with pytest.raises(KeyboardInterrupt):
        derive(plan_rejudge(generated, out, rejudge_config("exact")), stop_after(2))
    before = tree(out)
    said = refusal(one_line, plan_rejudge, generated, out, rejudge_config("numeric"))
    assert "`reward.name` was 'exact' and is now 'numeric'" in said
    said = refusal(one_line, plan_rejudge, data, out, rejudge_config("exact"))
    was, now = (hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()[:12] for folder in (generated, data))
    assert "other data" in said and was in said and now in said
    assert "by gft rejudge, not by gft filter" in refusal(one_line, plan_filter, generated, out)
    assert tree(out) == before
    plan_rejudge(generated, out, RejudgeConfig(reward=RewardConfig(name="exact", workers=2)))  # only how it is computed


def test_a_job_whose_output_was_taken_meanwhile_is_refused(data: Path, tmp_path: Path, one_line: OneLine) -> None:
    job = plan_filter(data, tmp_path / "new")
    with pytest.raises(KeyboardInterrupt):
        derive(plan_filter(data, tmp_path / "new", max_pass=0.5), stop_after(1))
    assert "`max_pass` was 0.5 and is now 1.0" in refusal(one_line, derive, job)
    derive(plan_filter(data, tmp_path / "new", max_pass=0.5))
    assert "`max_pass` was 0.5 and is now 1.0" in refusal(one_line, derive, job)


# ---- rescore


def test_the_same_model_gives_the_same_log_probs(generated: Path, demo: Path, tmp_path: Path) -> None:
    job = plan_rescore(generated, tmp_path / "new", rescore_config(demo / "model", batch_tokens=99))
    made = derive(job)
    assert check_sound(tmp_path / "new", job, [generated]).models == read_manifest(generated).models
    assert made.engine == read_manifest(generated).engine
    before, now = rows_in(generated), rows_in(tmp_path / "new")
    scores = "ref_logprobs", "ref_logprob_means"
    assert without(before, *scores) == without(now, *scores)
    for old, new in zip(before, now, strict=True):
        np.testing.assert_allclose(new["ref_logprob_means"], old["ref_logprob_means"], atol=1e-5)
        for mine, its in zip(new["ref_logprobs"], old["ref_logprobs"], strict=True):
            np.testing.assert_allclose(mine, its, atol=1e-5)


def test_another_models_log_probs_equal_a_naive_pass(
    generated: Path, tuned: Path, naive_logprobs: Oracle, tmp_path: Path
) -> None:
    job = plan_rescore(generated, tmp_path / "new", rescore_config(tuned, dtype="float32"))
    derive(job)
    manifest = check_sound(tmp_path / "new", job, [generated])
    scores = "ref_logprobs", "ref_logprob_means"
    assert without(rows_in(generated), *scores) == without(rows_in(tmp_path / "new"), *scores)
    moved = 0.0
    for old, group, row in zip(
        groups_in(generated), groups_in(tmp_path / "new"), rows_in(tmp_path / "new"), strict=True
    ):
        for k, response in enumerate(group.responses):
            expected = naive_logprobs(tuned, group.prompt_ids, response.completion.response_ids)
            np.testing.assert_allclose(response.ref_logprobs, expected, atol=5e-5, rtol=1e-5)
            assert row["ref_logprob_means"][k] == pytest.approx(expected.mean(), abs=5e-5)
            moved = max(moved, float(np.abs(response.ref_logprobs - old.responses[k].ref_logprobs).max()))
    assert moved > 0.01
    reference, *others = read_manifest(generated).models
    assert manifest.models[1:] == tuple(others)
    assert (manifest.models[0].role, manifest.models[0].name) == ("reference", "tuned")
    assert manifest.models[0].revision != reference.revision
    assert manifest.derived[0].settings["engine"] == {"name": "hf", "dtype": "float32"}


def test_a_stopped_rescoring_continues(generated: Path, tuned: Path, tmp_path: Path) -> None:
    derive(plan_rescore(generated, tmp_path / "whole", rescore_config(tuned)))
    stopped_and_continued(lambda: plan_rescore(generated, tmp_path / "new", rescore_config(tuned)), tmp_path / "whole")


class Picky:
    """A scorer that cannot score some prompts, and says -1 of every token of the others."""

    version = "picky 1"

    def score(self, requests: Sequence[ScoreRequest]) -> list[LogProbs | Unscored]:
        return [
            Unscored(f"refuses prompt of {len(r.prompt_ids)}")
            if len(r.prompt_ids) == 2
            else -np.ones(len(r.response_ids), np.float32)
            for r in requests
        ]

    def close(self) -> None:
        pass


def as_if_of(data: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a made-up data set pass for one of this model's tokenizer, and a made-up engine score it."""
    from gftdata.prepare import tokenizer_record
    from gftdata.tokens import load_tokenizer

    manifest = read_manifest(data)
    record = tokenizer_record(load_tokenizer(str(model)))
    write_manifest(FolderStore(data), manifest.model_copy(update={"tokenizer": record}))
    monkeypatch.setattr(deriving, "open_engine", lambda *_: Picky())


def test_what_cannot_be_scored_is_quarantined_and_stays_so(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = [group(n) for n in range(30)]
    data = build(tmp_path / "data", groups, (7, 0, 13, 4, 6), logprob_dtype="float16")
    as_if_of(data, demo / "model", monkeypatch)
    lost = [g.prompt.prompt_id for g in groups if len(g.prompt_ids) == 2 and g.responses]
    assert len(lost) > 4

    def plan() -> Job:
        return plan_rescore(data, tmp_path / "new", rescore_config(demo / "model"))

    job, events = plan(), list[Event]()
    with pytest.raises(KeyboardInterrupt):
        derive(job, stop_after(2))
    derive(plan(), events.append)
    manifest = check_sound(tmp_path / "new", job, [data])
    assert manifest.engine == "picky 1"
    assert manifest.prompts_quarantined == len(lost) and manifest.prompts.prompts == 30
    lines = [json.loads(line) for line in (tmp_path / "new" / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(line["prompt_id"] for line in lines) == sorted(lost)
    assert {line["reason"] for line in lines} == {"refuses prompt of 2"}
    kept = [row for row in rows_in(data) if row["prompt_id"] not in lost]
    for before, now in zip(kept, rows_in(tmp_path / "new"), strict=True):
        assert now["ref_logprobs"] == [[-1.0] * n for n in before["num_tokens"]]
        assert now["ref_logprob_means"] == [-1.0] * len(before["num_tokens"])
        scores = "ref_logprobs", "ref_logprob_means"
        assert without([before], *scores) == without([now], *scores)

    a, b = plan_split(tmp_path / "new", tmp_path / "a", tmp_path / "b", share=0.4)
    derive(a), derive(b)
    both = derive(plan_merge([tmp_path / "a", tmp_path / "b"], tmp_path / "both"))
    assert both.prompts_quarantined == len(lost), "none of them is counted twice"
    assert verify(tmp_path / "a") == verify(tmp_path / "both") == []
    (tmp_path / "new" / "quarantine.jsonl").unlink()
    assert derive(plan_filter(tmp_path / "new", tmp_path / "f")).prompts_quarantined == len(lost)
    assert verify(tmp_path / "f") == []


def test_what_was_quarantined_before_a_stop_stays_out(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = build(tmp_path / "data", [group(n) for n in range(30)], SIZES)
    as_if_of(data, demo / "model", monkeypatch)
    job = plan_rescore(data, tmp_path / "new", rescore_config(demo / "model"))

    def listen(event: Event) -> None:
        if event.kind == "quarantined" and list((tmp_path / "new" / DATA).glob("*")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        derive(job, listen)
    lost = deriving.quarantined(FolderStore(tmp_path / "new"))
    assert len(lost) > 1
    monkeypatch.setattr(Picky, "score", lambda _, requests: [-np.ones(len(r.response_ids)) for r in requests])
    manifest = derive(job)
    assert verify(tmp_path / "new") == []
    assert manifest.prompts_quarantined == len(lost)
    ids = [row["prompt_id"] for row in rows_in(tmp_path / "new")]
    assert ids == [row["prompt_id"] for row in rows_in(data) if row["prompt_id"] not in lost]


def test_an_engine_that_scores_nothing_is_refused(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_line: OneLine
) -> None:
    groups = [group(n) for n in range(1, 60, 4)]
    data = build(tmp_path / "data", [g for g in groups if g.responses])
    as_if_of(data, demo / "model", monkeypatch)
    job = plan_rescore(data, tmp_path / "new", rescore_config(demo / "model"))
    assert "could be scored: refuses prompt of 2" in refusal(one_line, derive, job)
    assert not (tmp_path / "new").exists()


def test_an_engine_that_fails_half_way_loses_no_shard(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_line: OneLine
) -> None:
    groups = [g for n in range(40) if (g := group(n)).responses and len(g.prompt_ids) != 2][:18]
    data = build(tmp_path / "data", groups, (6, 6, 6))
    as_if_of(data, demo / "model", monkeypatch)
    calls = []

    class Failing(Picky):
        def score(self, requests: Sequence[ScoreRequest]) -> list[LogProbs | Unscored]:
            calls.append(len(requests))
            return [Unscored("out of order")] * len(requests) if len(calls) == 2 else super().score(requests)

    monkeypatch.setattr(deriving, "open_engine", lambda *_: Failing())

    def plan() -> Job:
        return plan_rescore(data, tmp_path / "new", rescore_config(demo / "model"))

    assert "not one of 6 groups could be scored: out of order" in refusal(one_line, derive, plan())
    assert derive(plan()).summary.groups == 18


def test_a_model_that_reads_other_tokens_is_refused(
    generated: Path, demo: Path, other_model: Path, tmp_path: Path, one_line: OneLine
) -> None:
    said = refusal(one_line, plan_rescore, generated, tmp_path / "new", rescore_config(other_model))
    assert "tokenizer" in said and "prompts.reuse" in said
    shutil.copytree(demo / "model", tmp_path / "chat")
    settings = json.loads((tmp_path / "chat" / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (tmp_path / "chat" / "tokenizer_config.json").write_text(json.dumps(settings))
    said = refusal(one_line, plan_rescore, generated, tmp_path / "new", rescore_config(tmp_path / "chat"))
    assert "chat template" in said and "prompts.reuse" in said
    shutil.copytree(demo / "model", tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 12}))
    said = refusal(one_line, plan_rescore, generated, tmp_path / "new", rescore_config(tmp_path / "short"))
    longest = max(len(g.prompt_ids) + len(r.completion.response_ids) for g in groups_in(generated) for r in g.responses)
    assert "holds 12 tokens" in said and f"has {longest}" in said
    assert not (tmp_path / "new").exists()


# ---- split and merge


@pytest.mark.parametrize("logprob_dtype", ["float32", "float16"])
def test_what_was_split_and_merged_is_all_there(tmp_path: Path, logprob_dtype: str) -> None:
    data = build(tmp_path / "data", [group(n) for n in range(30)], SIZES, logprob_dtype=logprob_dtype)
    before = tree(data)
    jobs = plan_split(data, tmp_path / "a", tmp_path / "b", share=0.4, groups_per_shard=5)
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    for job in jobs:
        derive(job)
        check_sound(job.out, job, [data])
    rows = rows_in(data)
    sides = [row["prompt_id"] for side in "ab" for row in rows_in(tmp_path / side)]
    expected = [row for row in rows if position(0, row["prompt"]) < 0.4]
    assert rows_in(tmp_path / "a") == expected
    assert rows_in(tmp_path / "b") == [row for row in rows if row not in expected]
    assert (jobs[0].num_groups, jobs[1].num_groups) == (len(expected), 30 - len(expected))
    assert 5 < len(expected) < 19
    assert set(rows_of_shards(tmp_path / "b")[:-1]) == {5}

    merged = plan_merge([tmp_path / "a", tmp_path / "b"], tmp_path / "both", groups_per_shard=100)
    derive(merged)
    manifest = check_sound(tmp_path / "both", merged, [tmp_path / "a", tmp_path / "b"])
    assert [row["prompt_id"] for row in rows_in(tmp_path / "both")] == sides
    by_id = {row["prompt_id"]: row for row in rows_in(tmp_path / "both")}
    assert [by_id[row["prompt_id"]] for row in rows] == rows
    assert [step.by for step in manifest.derived] == ["split", "split", "merge"]
    assert [step.settings.get("side") for step in manifest.derived] == ["a", "b", None]
    assert rows_of_shards(tmp_path / "both") == [30]
    assert tree(data) == before


def test_a_prompt_is_on_the_same_side_in_every_data_set(tmp_path: Path) -> None:
    """Whatever its id, its ground truth, its row, and the data set around it."""
    groups = [group(n) for n in range(40)]
    twins = [
        Group(
            Prompt(f"{g.prompt.prompt_id}-2", None, g.prompt.messages, "7", "other", (), "{}", g.prompt.question),
            g.prompt_ids,
            g.responses[:1],
        )
        for g in reversed(groups[::2])
    ]
    build(tmp_path / "x", groups, (20, 20))
    build(tmp_path / "y", twins)
    chosen = {}
    for name in "xy":
        first, second = plan_split(tmp_path / name, tmp_path / f"{name}a", tmp_path / f"{name}b", share=0.5, seed=3)
        derive(first), derive(second)
        chosen[name] = {g.prompt.question for g in groups_in(tmp_path / f"{name}a")}
    assert chosen["y"] == chosen["x"] & {g.prompt.question for g in twins}
    assert 0 < len(chosen["y"]) < len(twins)


def test_the_share_is_met_and_seeds_differ() -> None:
    chats = [[{"role": "user", "content": f"{n} äß"}] for n in range(20_000)]
    for share in (0.05, 0.5):
        placed = [np.array([position(seed, chat) < share for chat in chats]) for seed in (0, 1)]
        for side in placed:
            assert abs(side.mean() - share) < 4 * np.sqrt(share * (1 - share) / len(chats))
        assert abs((placed[0] & placed[1]).mean() - share**2) < 0.01
    system = [{"role": "system", "content": "0 äß"}]
    assert position(0, chats[0]) != position(0, system) != position(0, [*system, *chats[0]])
    assert min(position(n, chats[0]) for n in range(999)) >= 0 and max(position(n, chats[0]) for n in range(999)) < 1


def test_a_merge_keeps_order_and_adds_what_was_counted(tmp_path: Path) -> None:
    x = build(tmp_path / "x", [group(n) for n in range(12)], (5, 7))
    teacher = ModelRecord(role="teacher:a", name="t", revision="2")
    reference = ModelRecord(role="reference", name="m at another place", revision="1")
    counts = dict.fromkeys(PromptCounts.model_fields, 10) | {"prompts": 8, "near_duplicates": None}
    y = build(
        tmp_path / "y",
        [group(n) for n in range(20, 28)],
        prompts=PromptCounts(**counts),
        models=(reference, teacher),
        engine="another",
    )
    job = plan_merge([x, y], tmp_path / "new")
    derive(job)
    manifest = check_sound(tmp_path / "new", job, [x, y])
    assert rows_in(tmp_path / "new") == rows_in(x) + rows_in(y)
    assert rows_of_shards(tmp_path / "new") == [8, 8, 4], "as the recipe of the first says"
    assert manifest.models == (ModelRecord(role="reference", name="m", revision="1"), teacher)
    expected = dict.fromkeys(PromptCounts.model_fields, 11) | {"prompts": 20, "near_duplicates": None}
    assert manifest.prompts == PromptCounts(**expected)
    assert manifest.teacher_samples_left_out == 4
    assert (manifest.engine, manifest.recipe) == (read_manifest(x).engine, read_manifest(x).recipe)


def test_counts_are_added_field_by_field() -> None:
    one = PromptCounts(**{name: n for n, name in enumerate(PromptCounts.model_fields)})
    assert regroup.added_counts([one, one, one]).model_dump() == {k: 3 * v for k, v in one.model_dump().items()}
    unknown = one.model_copy(update={"near_duplicates": None})
    assert regroup.added_counts([unknown, unknown]).near_duplicates is None


def test_a_prompt_that_is_in_two_data_sets(tmp_path: Path, one_line: OneLine) -> None:
    x = build(tmp_path / "x", [group(n) for n in range(8)])
    changed = [Group(g.prompt, g.prompt_ids, g.responses[:1]) for g in (group(n) for n in (5, 20, 2, 21))]
    y, z = build(tmp_path / "y", changed), build(tmp_path / "z", [group(20), group(30)])
    said = refusal(one_line, plan_merge, [x, y, z], tmp_path / "new")
    assert "3 of 14 groups" in said and "--duplicates first" in said
    assert not (tmp_path / "new").exists()
    job = plan_merge([x, y, z], tmp_path / "new", duplicates="first")
    assert (sum(job.left_out.values()), job.num_groups) == (3, 11)
    derive(job)
    check_sound(tmp_path / "new", job, [x, y, z])
    assert rows_in(tmp_path / "new") == [*rows_in(x), rows_in(y)[1], rows_in(y)[3], rows_in(z)[1]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer": TokenizerRecord(hash="u", template_hash="c", end_id=1, stop_ids=(1,))}, "the tokenizer of"),
        ({"tokenizer": TokenizerRecord(hash="t", template_hash="d", end_id=1, stop_ids=(1,))}, "the chat template of"),
        ({"tokenizer": TokenizerRecord(hash="t", template_hash="c", end_id=2, stop_ids=(1,))}, "the end token of"),
        ({"models": (ModelRecord(role="reference", name="m", revision="2"),)}, "the reference model of"),
        ({"logprob_dtype": "float16"}, "the log-prob dtype of"),
    ],
)
def test_data_sets_of_two_kinds_are_not_merged(
    tmp_path: Path, one_line: OneLine, changes: dict[str, Any], words: str
) -> None:
    x, y = build(tmp_path / "x", [group(1)]), build(tmp_path / "y", [group(2)])
    z = build(tmp_path / "z", [group(3)], **changes)
    said = refusal(one_line, plan_merge, [x, y, z], tmp_path / "new")
    assert words.replace("reference", "revision of the reference") in said
    assert f"of {z} is" in said and f", of {x}" in said and str(y) not in said
    assert "gft rescore" in said and "prompts.reuse" in said
    assert not (tmp_path / "new").exists()


# ---- filter


def naive_filter(
    groups: Sequence[Group], low: float, high: float, names: Sequence[str], with_signal: bool
) -> tuple[list[str], dict[str, int]]:
    """Ids that are kept, and how many are left out for which reason."""
    kept: list[str] = []
    left_out = {"judged": 0, "below": 0, "above": 0, "equal": 0}
    for g in groups:
        judged = [r.verdict.reward for r in g.responses if r.verdict.reward is not None]
        asked = [
            r.verdict.reward
            for r in g.responses
            if r.verdict.reward is not None and (not names or r.completion.source in names)
        ]
        if not asked:
            left_out["judged"] += 1
            continue
        rate = sum(reward == 1 for reward in asked) / len(asked)
        if rate < low:
            left_out["below"] += 1
        elif rate > high:
            left_out["above"] += 1
        elif with_signal and len(set(judged)) == 1:
            left_out["equal"] += 1
        else:
            kept.append(g.prompt.prompt_id)
    return kept, left_out


@pytest.mark.parametrize(
    ("low", "high", "names", "with_signal"),
    [
        (0.0, 1.0, (), False),
        (0.0, 1.0, (), True),
        (0.25, 0.75, (), False),
        (0.5, 0.5, (), True),
        (1 / 3, 1.0, ("self",), False),
        (0.0, 2 / 3, ("self", "teacher:a"), True),
        (0.0, 0.0, ("expert",), False),
        (1.0, 1.0, ("expert", "self"), True),
    ],
)
def test_filtering_equals_a_naive_loop(
    tmp_path: Path, low: float, high: float, names: tuple[str, ...], with_signal: bool
) -> None:
    groups = [group(n) for n in range(120)]
    data = build(tmp_path / "data", groups, (50, 0, 70))
    expected, left_out = naive_filter(groups, low, high, names, with_signal)
    assert 0 < len(expected) < 120
    job = plan_filter(
        data, tmp_path / "new", min_pass=low, max_pass=high, names=names, with_signal=with_signal, groups_per_shard=7
    )
    assert list(job.left_out.values()) == list(left_out.values())
    assert (job.num_groups, job.index.num_groups) == (len(expected), 120)
    assert not (tmp_path / "new").exists()
    derive(job)
    manifest = check_sound(tmp_path / "new", job, [data])
    kept = set(expected)
    assert rows_in(tmp_path / "new") == [row for row in rows_in(data) if row["prompt_id"] in kept]
    assert job.num_responses == manifest.summary.responses
    assert max(rows_of_shards(tmp_path / "new")) <= 7
    before = read_manifest(data)
    assert (manifest.recipe, manifest.models) == (before.recipe, before.models)
    known = manifest.prompts.model_dump(exclude_none=True)
    assert known == {"rows_read": len(expected), "prompts": len(expected)}, "the rest is said of the whole"
    assert manifest.teacher_samples_left_out is None


def test_a_stopped_filter_continues(data: Path, tmp_path: Path) -> None:
    derive(plan_filter(data, tmp_path / "whole", max_pass=0.9, groups_per_shard=4))
    stopped_and_continued(
        lambda: plan_filter(data, tmp_path / "new", max_pass=0.9, groups_per_shard=4), tmp_path / "whole"
    )


def test_rows_are_read_by_row_groups_and_each_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[str, int]] = []
    original = deriving.read_table

    def counted(path: Path, row_group: int, columns: Sequence[str] | None = None) -> pa.Table:
        assert columns is None
        table = original(path, row_group)
        assert table.num_rows <= 4
        reads.append((path.name, row_group))
        return table

    monkeypatch.setattr(deriving, "read_table", counted)
    derive(plan_filter(data, tmp_path / "new", groups_per_shard=3))
    assert len(reads) == len(set(reads)) == sum(-(-size // 4) for size in SIZES)


# ---- what is refused


def test_mistakes_are_said_in_one_line_and_write_nothing(data: Path, tmp_path: Path, one_line: OneLine) -> None:
    new = tmp_path / "new"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    before = tree(tmp_path)
    assert "no such data set" in refusal(one_line, plan_filter, tmp_path / "none", new)
    assert "no manifest.json" in refusal(one_line, plan_filter, tmp_path / "mine", new)
    assert "not empty" in refusal(one_line, plan_filter, data, tmp_path / "mine")
    for inside in (data, data / "sub", tmp_path / "mine" / ".." / "data"):
        assert "is only read" in refusal(one_line, plan_filter, data, inside)
    assert "expected 0 <= --min-pass <= --max-pass <= 1" in refusal(one_line, plan_filter, data, new, min_pass=1.1)
    assert "from 0.9 to 0.1" in refusal(one_line, plan_filter, data, new, min_pass=0.9, max_pass=0.1)
    said = refusal(one_line, plan_filter, data, new, names=("self", "teacher:b"))
    assert "`teacher:b`" in said and "self" in said and "teacher:a" in said and "expert" in said
    said = refusal(one_line, plan_filter, data, new, min_pass=0.97, max_pass=0.98)
    assert "none of 30 groups" in said and "with a pass rate below 0.97" in said
    for share in (0.0, 1.0, -1.0, float("nan")):
        assert "between 0 and 1" in refusal(one_line, plan_split, data, new, tmp_path / "b", share=share)
    for b in (new, new / "b", tmp_path):
        assert "neither inside the other" in refusal(one_line, plan_split, data, new, b, share=0.5)
    assert "none of 30 groups" in refusal(one_line, plan_split, data, new, tmp_path / "b", share=1e-6)
    assert "unknown reward" in refusal(one_line, plan_rejudge, data, new, rejudge_config("numerik"))
    assert "no-model" in refusal(one_line, plan_rescore, data, new, rescore_config(Path("./no-model")))
    assert "cuda:7" in refusal(
        one_line, plan_rescore, data, new, RescoreConfig(model="x", engine=HfConfig(device="cuda:7"))
    )
    assert tree(tmp_path) == before and not new.exists()


def test_unfinished_empty_and_damaged_inputs(data: Path, tmp_path: Path, one_line: OneLine) -> None:
    with pytest.raises(KeyboardInterrupt):
        derive(plan_filter(data, tmp_path / "half", groups_per_shard=4), stop_after(1))
    assert "an unfinished data set" in refusal(one_line, plan_filter, tmp_path / "half", tmp_path / "new")
    nothing = build(tmp_path / "nothing", [], (0,))
    assert "holds no groups" in refusal(one_line, plan_filter, nothing, tmp_path / "new")
    path = shard_paths(data, read_manifest(data))[2]
    whole = path.read_bytes()
    job = plan_filter(data, tmp_path / "new")
    path.write_bytes(whole[: len(whole) // 2])
    for said in (refusal(one_line, plan_filter, data, tmp_path / "other"), refusal(one_line, derive, job)):
        assert path.name in said and "damaged" in said
    path.unlink()
    assert path.name in refusal(one_line, plan_filter, data, tmp_path / "other")
    shutil.copy(shard_paths(data, read_manifest(data))[0], path)
    assert "damaged or changed: sha256" in refusal(one_line, plan_rejudge, data, tmp_path / "other", rejudge_config())


def test_an_output_of_gft_generate_is_not_continued(data: Path, tmp_path: Path, one_line: OneLine) -> None:
    (tmp_path / "new" / WORK).mkdir(parents=True)
    plan_filter(data, tmp_path / "new")
    (tmp_path / "new" / WORK / "plan.json").write_text("{}")
    assert "not begun by gft filter" in refusal(one_line, plan_filter, data, tmp_path / "new")


def test_training_takes_what_was_derived(generated: Path, demo: Path, tmp_path: Path) -> None:
    from gfttrain.config import TrainConfig
    from gfttrain.prepare import prepare

    derive(plan_rejudge(generated, tmp_path / "judged", rejudge_config("numeric")))
    derive(plan_rescore(tmp_path / "judged", tmp_path / "scored", rescore_config(demo / "model")))
    a, b = plan_split(tmp_path / "scored", tmp_path / "a", tmp_path / "b", share=0.5)
    derive(a), derive(b)
    derive(plan_merge([tmp_path / "b", tmp_path / "a"], tmp_path / "merged"))
    derive(plan_filter(tmp_path / "merged", tmp_path / "filtered", with_signal=True))
    config = TrainConfig(model=str(demo / "model"), data=(str(tmp_path / "filtered"),), out=str(tmp_path / "run"))
    prepared = prepare(config)
    assert prepared.notices == ()
    assert prepared.index.num_groups == len(groups_in(tmp_path / "filtered")) > 2
    assert prepared.steps
    steps = [step.by for step in read_manifest(tmp_path / "filtered").derived]
    assert steps == ["rejudge", "rescore", "split", "rejudge", "rescore", "split", "merge", "filter"]
