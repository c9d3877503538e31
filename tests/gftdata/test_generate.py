"""The pipeline: what is in the shards, what survives a kill, what is refused and leaves nothing behind."""

import copy
import json
import multiprocessing
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from gftdata.config import GenerateConfig, validate_config
from gftdata.errors import UserError
from gftdata.events import Event
from gftdata.generate import generate
from gftdata.groups import sample_seed
from gftdata.journal import read_journal
from gftdata.manifest import MANIFEST, WORK, Manifest, read_manifest
from gftdata.prepare import preview, sole_writer
from gftdata.schema import table_to_groups
from gftdata.shards import shard_paths, verify
from gftdata.status import TASKS
from gftdata.store import FolderStore
from gftdata.tokens import encode_response, load_tokenizer
from gftdata.types import Group, Response

Oracle = Callable[..., np.ndarray]
OneLine = Callable[[BaseException], str]
MakeConfig = Callable[..., GenerateConfig]
NUM_PROMPTS, TEMPERATURE, TOP_P = 21, 0.7, 0.9
BOOK, OTHER = "teacher:book", "teacher:other"


def rows() -> list[dict[str, Any]]:
    """Demo prompts, some of them twice, with a teacher's texts in a nested column."""
    lines = Path("samples/demo/train.jsonl").read_text().splitlines()[: NUM_PROMPTS - 3]
    data = [json.loads(line) for line in lines]
    for n, row in enumerate(data):
        row["teacher"] = {"texts": [f"{row['answer']}", f"={n}", "unused"][: n % 4]}
    return [*data, data[0], data[5], data[0]]


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    result = copy.copy(base)
    for key, value in change.items():
        result[key] = merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return result


@pytest.fixture(scope="module", autouse=True)
def at_the_root(request: pytest.FixtureRequest) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(request.config.rootpath)
        yield


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


@pytest.fixture(scope="module")
def make_config(demo: Path, other_model: Path, prompts_file: Path) -> MakeConfig:
    def make(out: Path, **changes: Any) -> GenerateConfig:
        base: dict[str, Any] = {
            "model": str(demo / "model"),
            "out": str(out),
            "prompts": {"path": str(prompts_file), "columns": {"ground_truth": "answer", "expert": "expert"}},
            "reward": {"name": "exact", "workers": 1},
            "responses": {
                "max_tokens": 26,
                "self": {"count": 3, "sampling": {"temperature": TEMPERATURE, "top_p": TOP_P}},
                "teachers": [
                    {"name": "book", "column": "teacher.texts", "count": 2},
                    {"name": "other", "model": str(other_model), "count": 2},
                ],
            },
            "engine": {"batch_size": 16, "device": "cpu"},
            "shards": {"groups_per_shard": 6, "row_group_size": 4},
        }
        return validate_config(GenerateConfig, merged(base, changes), "test")

    return make


@pytest.fixture
def small(make_config: MakeConfig, tmp_path: Path) -> MakeConfig:
    """Expert and two short self samples of a few prompts: for tests of what happens around them."""

    def make(**changes: Any) -> GenerateConfig:
        little = {"responses": {"teachers": [], "max_tokens": 26, "self": {"count": 2}}, "prompts": {"limit": 8}}
        return make_config(**merged({"out": tmp_path / "out"} | little, changes))

    return make


@pytest.fixture(scope="module")
def finished(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    generate(make_config(out))
    return out


def groups_in(out: Path) -> list[Group]:
    return [group for path in shard_paths(out, read_manifest(out)) for group in table_to_groups(pq.read_table(path))]


def of_source(groups: list[Group], source: str) -> list[tuple[Group, Response]]:
    return [(g, r) for g in groups for r in g.responses if r.completion.source == source]


def assert_same_data(a: Path, b: Path) -> None:
    """Rows equal in everything; log-probs up to the rounding that other batches bring."""
    for x, y in zip(groups_in(a), groups_in(b), strict=True):
        assert x.prompt == y.prompt and x.prompt_ids.tolist() == y.prompt_ids.tolist()
        for r, s in zip(x.responses, y.responses, strict=True):
            assert r.verdict == s.verdict
            c, d = r.completion, s.completion
            for name in ("source", "text", "finish_reason", "model", "seed"):
                assert getattr(c, name) == getattr(d, name), name
            assert c.response_ids.tolist() == d.response_ids.tolist()
            np.testing.assert_allclose(r.ref_logprobs, s.ref_logprobs, atol=3e-5, rtol=1e-5)
            assert (c.behavior_logprobs is None) == (d.behavior_logprobs is None)
            if c.behavior_logprobs is not None:
                np.testing.assert_allclose(c.behavior_logprobs, d.behavior_logprobs, atol=3e-5, rtol=1e-5)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file and folder, but for the signs of life of the attempts."""
    paths = (p for p in sorted(folder.rglob("*")) if p.parent != folder / TASKS)
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in paths}


def raise_interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def refusal(one_line: OneLine, config: GenerateConfig) -> str:
    with pytest.raises(UserError) as caught:
        generate(config)
    return one_line(caught.value)


# ---- what a finished data set holds


def test_every_prompt_is_there_once_in_the_order_of_the_source(finished: Path) -> None:
    assert verify(finished) == []
    groups = groups_in(finished)
    assert [g.prompt.messages[0].content for g in groups] == [row["question"] for row in rows()]
    assert [g.prompt.ground_truth for g in groups] == [row["answer"] for row in rows()]
    ids = [g.prompt.prompt_id for g in groups]
    assert len(set(ids)) == NUM_PROMPTS
    assert ids[-3:] == [ids[0] + "-2", ids[5] + "-2", ids[0] + "-3"]
    manifest = read_manifest(finished)
    assert [record.rows for record in manifest.shards] == [6, 6, 6, 3]
    assert (manifest.prompts.rows_read, manifest.prompts.prompts) == (NUM_PROMPTS, NUM_PROMPTS)
    assert sorted(p.name for p in (finished / WORK).iterdir()) == ["engines", "lock", "plan.json", "records", "tasks"]


def test_groups_hold_what_the_config_asks_for_in_its_order(finished: Path, demo: Path) -> None:
    tokenizer = load_tokenizer(str(demo / "model"))
    left_out = 0
    for group, row in zip(groups_in(finished), rows(), strict=True):
        order = [r.completion.source for r in group.responses]
        assert order == sorted(order, key=["expert", BOOK, OTHER, "self"].index)
        counts = Counter(order)
        assert counts["self"] == 3 and counts["expert"] == 1
        assert counts[BOOK] == min(2, len(row["teacher"]["texts"]))
        left_out += 2 - counts[OTHER]
        given = [r.completion for r in group.responses if r.completion.finish_reason == "given"]
        assert [c.text for c in given] == [row["expert"], *row["teacher"]["texts"][:2]]
        for completion in given:
            assert completion.response_ids.tolist() == [
                *tokenizer.backend(completion.text)["input_ids"],
                tokenizer.end_id,
            ]
            assert (completion.model, completion.seed, completion.behavior_logprobs) == ("data", None, None)
    manifest = read_manifest(finished)
    assert manifest.prompts.given_missing == sum(2 - min(2, len(row["teacher"]["texts"])) for row in rows()) > 0
    assert manifest.teacher_samples_left_out == left_out > 0, "some are too long in this vocabulary"


def test_reference_logprobs_equal_a_naive_float32_pass(finished: Path, demo: Path, naive_logprobs: Oracle) -> None:
    """Also for samples drawn at temperature 0.7, for expert text and for another tokenizer's."""
    groups = groups_in(finished)
    checked: Counter[str] = Counter()
    for group in groups:
        for response in group.responses:
            expected = naive_logprobs(demo / "model", group.prompt_ids, response.completion.response_ids)
            np.testing.assert_allclose(response.ref_logprobs, expected, atol=5e-5, rtol=1e-5)
            checked[response.completion.source] += 1
    assert set(checked) == {"expert", BOOK, OTHER, "self"}


def test_self_samples_are_of_the_policy_that_was_asked_for(
    finished: Path, demo: Path, naive_logprobs: Oracle, naive_logits: Oracle
) -> None:
    groups = groups_in(finished)
    mine = of_source(groups, "self")
    assert len(mine) == 3 * NUM_PROMPTS
    outside = 0
    for group, response in mine:
        completion = response.completion
        assert completion.behavior_logprobs is not None
        expected = naive_logprobs(demo / "model", group.prompt_ids, completion.response_ids, TEMPERATURE)
        np.testing.assert_allclose(completion.behavior_logprobs, expected, atol=5e-5, rtol=1e-5)
        assert completion.model.startswith("demo/model@")
        logits = naive_logits(demo / "model", group.prompt_ids, completion.response_ids).astype(np.float64)
        for row, token in zip(logits / TEMPERATURE, completion.response_ids, strict=True):
            probs = np.exp(row - row.max())
            probs /= probs.sum()
            assert probs[probs > probs[token]].sum() < TOP_P + 1e-5, "in the nucleus"
        plain = np.exp(logits - logits.max(axis=1, keepdims=True))
        outside += int((plain.max(axis=1) / plain.sum(axis=1) < TOP_P).sum())
    assert outside > 20, "the nucleus had something to exclude"


def test_the_teachers_text_is_encoded_in_the_starting_models_vocabulary(
    finished: Path, demo: Path, other_model: Path
) -> None:
    tokenizer = load_tokenizer(str(demo / "model"))
    theirs = of_source(groups_in(finished), OTHER)
    assert len(theirs) > NUM_PROMPTS // 2
    for _, response in theirs:
        completion = response.completion
        assert completion.model.startswith("other@") and completion.seed is not None
        assert completion.behavior_logprobs is None
        ended = completion.finish_reason == "stop"
        assert completion.response_ids.tolist() == encode_response(tokenizer, completion.text, ended=ended).tolist()
        assert len(completion.response_ids) <= 26
    assert {r.completion.finish_reason for _, r in theirs} == {"stop", "length"}, "both occur here"


def test_verdicts_are_of_the_text(finished: Path) -> None:
    groups = groups_in(finished)
    for group in groups:
        for response in group.responses:
            assert response.verdict.status == "ok"
            right = response.completion.text.strip() == group.prompt.ground_truth
            assert response.verdict.reward == float(right)
    assert sum(r.verdict.reward or 0 for _, r in of_source(groups, BOOK)) > 0


def test_seeds_identify_a_sample(finished: Path) -> None:
    groups = groups_in(finished)
    seeds = [r.completion.seed for g in groups for r in g.responses if r.completion.seed is not None]
    assert len(set(seeds)) == len(seeds)
    for group in groups:
        mine = [r.completion.seed for r in group.responses if r.completion.source == "self"]
        assert mine == [sample_seed(0, group.prompt.prompt_id, "self", k) for k in range(3)]
    assert all(0 <= sample_seed(run, "p", "self", k) < 2**63 for run in (0, -1, 2**70) for k in range(50))


def test_the_manifest_says_what_was_done(finished: Path, make_config: MakeConfig, demo: Path) -> None:
    manifest = read_manifest(finished)
    tokenizer = load_tokenizer(str(demo / "model"))
    assert (manifest.tokenizer.hash, manifest.tokenizer.end_id) == (tokenizer.hash, tokenizer.end_id)
    assert [(m.role, m.name) for m in manifest.models] == [
        ("reference", "demo/model"),
        (OTHER, "other"),
        ("self", "demo/model"),
    ]
    assert str(finished.parent) not in (finished / MANIFEST).read_text(), "no folder of this machine"
    assert manifest.recipe["prompts"]["path"] == "sums.jsonl"
    assert manifest.recipe["responses"]["self"]["sampling"]["temperature"] == TEMPERATURE


def test_texts_of_the_recipe_that_look_like_paths_are_kept(small: MakeConfig) -> None:
    config = small(
        prompts={"limit": 1, "template": "/no_think/{question}", "data_source": "/x/y"},
        responses={"self": {"count": 1, "sampling": {"stop": ["/", "/a/b"]}}},
    )
    recipe = generate(config).recipe
    assert recipe["prompts"]["template"] == "/no_think/{question}"
    assert recipe["prompts"]["data_source"] == "/x/y"
    assert recipe["responses"]["self"]["sampling"]["stop"] == ["/", "/a/b"]


def test_samples_do_not_depend_on_how_they_are_computed(
    finished: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(
        tmp_path / "out", engine={"batch_size": 3, "batch_tokens": 64}, shards={"groups_per_shard": 100}
    )
    generate(config)
    assert_same_data(tmp_path / "out", finished)


def test_another_seed_gives_other_samples_of_the_same_prompts(
    finished: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    generate(make_config(tmp_path / "out", seed=1))
    before, now = groups_in(finished), groups_in(tmp_path / "out")
    assert [g.prompt for g in before] == [g.prompt for g in now]
    texts = [[r.completion.text for _, r in of_source(groups, "self")] for groups in (before, now)]
    assert np.mean([a == b for a, b in zip(*texts, strict=True)]) < 0.6


# ---- what others' readers make of it


def test_duckdb_polars_and_datasets_read_the_shards(finished: Path, tmp_path: Path) -> None:
    import datasets
    import duckdb
    import polars

    groups = groups_in(finished)
    paths = str(finished / "data" / "train-*.parquet")
    with duckdb.connect() as connection:
        cursor = connection.execute(
            "select * from read_parquet(?, filename=true, file_row_number=true) order by filename, file_row_number",
            [paths],
        )
        names = [column[0] for column in cursor.description or ()]
        by_duckdb = [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
        (tokens,) = (
            connection.execute("select sum(list_sum(num_tokens)) from read_parquet(?)", [paths]).fetchone() or ()
        )
    assert tokens == read_manifest(finished).summary.response_tokens
    by_polars = polars.scan_parquet(paths).collect().to_dicts()
    loaded = datasets.load_dataset(str(finished), cache_dir=str(tmp_path))
    assert list(loaded) == ["train"]
    by_datasets = list(loaded["train"])
    for found in (by_duckdb, by_polars, by_datasets):
        assert len(found) == len(groups)
        for row, group in zip(found, groups, strict=True):
            assert row["prompt_id"] == group.prompt.prompt_id
            assert [m["content"] for m in row["prompt"]] == [m.content for m in group.prompt.messages]
            assert row["responses"] == [r.completion.text for r in group.responses]
            assert row["rewards"] == [r.verdict.reward for r in group.responses]
            assert row["seeds"] == [r.completion.seed for r in group.responses]
            for k, response in enumerate(group.responses):
                assert list(row["response_ids"][k]) == response.completion.response_ids.tolist()
                assert np.array_equal(np.float32(row["ref_logprobs"][k]), response.ref_logprobs)
                behavior = response.completion.behavior_logprobs
                assert (row["behavior_logprobs"][k] is None) == (behavior is None)
                assert behavior is None or np.array_equal(np.float32(row["behavior_logprobs"][k]), behavior)


def test_half_precision_log_probs(small: MakeConfig, tmp_path: Path) -> None:
    import duckdb
    import polars

    full, half = (
        small(out=str(tmp_path / dtype), shards={"groups_per_shard": 4, "logprob_dtype": dtype})
        for dtype in ("float32", "float16")
    )
    for config in (full, half):
        generate(config)
        assert verify(Path(config.out)) == []
    paths = f"{half.out}/data/*.parquet"
    expected = [r.ref_logprobs.astype(np.float16) for g in groups_in(Path(full.out)) for r in g.responses]
    with duckdb.connect() as connection:
        by_duckdb = connection.execute("select ref_logprobs from read_parquet(?)", [paths]).fetchall()
    by_polars = polars.scan_parquet(paths).select("ref_logprobs").collect().rows()
    for found in (by_duckdb, by_polars):
        flat = [np.float16(logprobs) for (group,) in found for logprobs in group]
        assert all(np.array_equal(a, b) for a, b in zip(flat, expected, strict=True))


# ---- stopped and continued


class Stop(Exception):
    pass


def run_until(config: GenerateConfig, event_number: int | None, counts: Counter[str]) -> Manifest | None:
    """Run; raise inside the listener at its event number so-and-so. None where that stopped the run."""
    seen = 0

    def listen(event: Event) -> None:
        nonlocal seen
        seen += 1
        counts[event.kind] += 1
        if event.kind == "sample":
            counts[event.source] += 1
        if seen == event_number:
            raise Stop

    try:
        return generate(config, listen)
    except Stop:
        return None


@pytest.mark.parametrize("seed", [0, 1])
def test_interrupted_at_random_events_and_continued_it_ends_the_same(
    finished: Path, make_config: MakeConfig, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    out = tmp_path / "out"
    counts: Counter[str] = Counter()
    stops = 0
    while run_until(make_config(out, engine={"batch_size": rng.randint(1, 40)}), rng.randint(1, 100), counts) is None:
        stops += 1
        assert not (out / MANIFEST).exists()
    assert stops >= 3
    assert verify(out) == []
    assert_same_data(out, finished)
    assert (counts["self"], counts[OTHER]) == (3 * NUM_PROMPTS, 2 * NUM_PROMPTS), "no journaled sample is drawn again"
    assert sum(record.rows for record in read_manifest(out).shards) == NUM_PROMPTS


def test_stopped_after_the_last_shard_only_the_manifest_is_written(
    small: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small()
    events: Counter[str] = Counter()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("gftdata.finalize.write_manifest", raise_interrupt)
        generate(config, lambda event: events.update([event.kind]))
    out = Path(config.out)
    assert not (out / MANIFEST).exists()
    monkeypatch.setattr("gftdata.generate.open_engine", lambda *args: pytest.fail("a model was loaded"))
    again: list[Event] = []
    assert generate(config, again.append) == read_manifest(out)
    assert [(e.kind, e.count, e.done) for e in again] == [("groups", 8, 8)]
    assert verify(out) == []
    assert events["shard"] == 2 and events["sample"] == 16 and events["judged"] == 24


def test_a_manifest_that_was_deleted_is_missed(small: MakeConfig, one_line: OneLine) -> None:
    config = small()
    generate(config)
    (Path(config.out) / MANIFEST).unlink()
    assert "was finished before, and its manifest.json is gone" in refusal(one_line, config)


def test_a_finished_set_is_left_alone(small: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small()
    manifest = generate(config)
    before = tree(Path(config.out))
    monkeypatch.setattr("gftdata.generate.open_engine", lambda *args: pytest.fail("a model was loaded"))
    assert generate(config) == manifest
    assert tree(Path(config.out)) == before


def test_killed_at_random_times_and_continued_it_ends_the_same(
    finished: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    """SIGKILL, twice (hundreds of times: tests/faults); from a server that has torch loaded, to be quick."""
    seed = time.time_ns() % 10**6
    print("seed of the kills:", seed)
    rng = random.Random(seed)
    out = tmp_path / "out"
    config = make_config(out, engine={"batch_size": 2})
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gftdata.generate", "gftdata.engines.hf"])
    progress = []
    for _ in range(2):
        process = context.Process(target=generate, args=(config,))
        process.start()
        while process.is_alive() and not (out / WORK / "plan.json").exists():
            time.sleep(0.02)
        process.join(rng.uniform(0.0, 1.2))
        process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0)
        if not (out / MANIFEST).exists():
            journaled = sum(len(read_journal(FolderStore(out), shard)) for shard in range(4))
            progress.append((len(list((out / "data").glob("*"))), journaled))
    print("shards and journaled samples at each kill:", progress)
    assert progress, "at least one kill came before the end"
    generate(config)
    assert verify(out) == []
    assert_same_data(out, finished)


def test_torn_and_double_journals_do_no_harm(finished: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tmp_path / "out")
    assert run_until(config, 60, Counter()) is None
    files = [p for p in (tmp_path / "out" / WORK / "journal").rglob("*.jsonl") if p.stat().st_size]
    assert files
    for path in files:
        whole = path.read_bytes()
        path.with_name("9" + path.name).write_bytes(whole)
        path.write_bytes(whole[:-7])
    generate(config)
    assert_same_data(tmp_path / "out", finished)


def test_prompts_are_fixed_when_the_output_is_created(small: MakeConfig, write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl(rows()[:8])
    config = small(prompts={"path": str(path)})
    assert run_until(config, 9, Counter()) is None
    path.unlink()
    generate(config)
    assert [g.prompt.messages[0].content for g in groups_in(Path(config.out))] == [r["question"] for r in rows()[:8]]


def test_a_kill_while_prompts_are_written_is_begun_anew(small: MakeConfig) -> None:
    config = small()
    left = Path(config.out) / WORK / "prompts"
    left.mkdir(parents=True)
    for shard in range(9):
        (left / f"{shard:05d}.jsonl").write_text("{half")
    generate(config)
    assert verify(Path(config.out)) == [] and len(groups_in(Path(config.out))) == 8


def test_what_ends_before_the_first_shard_is_taken_back_or_can_be_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "made" / "out"
    with pytest.raises(OSError), sole_writer(out):
        (out / "data").mkdir()  # as where the publication of the first shard fails
        raise OSError
    assert not (tmp_path / "made").exists()
    with pytest.raises(OSError), sole_writer(out):
        (out / "data").mkdir()
        monkeypatch.setattr(Path, "rmdir", raise_interrupt_of_disk)
        raise OSError
    assert (out / WORK).is_dir()
    with pytest.raises(OSError), sole_writer(tmp_path / "other"):
        journal = tmp_path / "other" / WORK / "journal" / "00000"
        journal.mkdir(parents=True)
        (journal / "a.jsonl").write_text("a sample")
        monkeypatch.setattr(Path, "iterdir", raise_interrupt_of_disk)
        raise OSError
    assert (journal / "a.jsonl").exists(), "on a disk that cannot be looked at nothing is taken back"


def raise_interrupt_of_disk(*args: object) -> None:
    raise OSError(5, "Input/output error")


# ---- refused


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 3}, "`seed` was 0 and is now 3"),
        ({"responses": {"max_tokens": 27}}, "`responses.max_tokens` was 26 and is now 27"),
        (
            {"responses": {"self": {"sampling": {"top_p": 0.8}}}},
            "`responses.self.sampling.top_p` was 0.9 and is now 0.8",
        ),
        ({"reward": {"name": "numeric"}}, "`reward.name` was 'exact' and is now 'numeric'"),
        ({"prompts": {"limit": 7}}, "`prompts.limit` was 8 and is now 7"),
        ({"shards": {"groups_per_shard": 3}}, "`shards.groups_per_shard` was 6 and is now 3"),
    ],
)
def test_another_config_is_refused_and_compute_settings_are_not(
    small: MakeConfig, one_line: OneLine, change: dict[str, Any], key: str
) -> None:
    config = small()
    out = Path(config.out)
    assert run_until(config, 9, Counter()) is None
    before = tree(out)
    for use in (generate, preview):
        with pytest.raises(UserError) as caught:
            use(small(**change))
        assert str(out) in one_line(caught.value) and key in str(caught.value)
    assert tree(out) == before
    if "seed" in change:
        generate(small(engine={"batch_size": 5, "batch_tokens": 99}, reward={"workers": 2}))
        assert verify(out) == []
        assert key in refusal(one_line, small(**change)), "also when it is finished"


def test_another_model_at_the_same_place_is_refused(
    small: MakeConfig, demo: Path, tmp_path: Path, one_line: OneLine
) -> None:
    model = tmp_path / "model"
    shutil.copytree(demo / "model", model)
    config = small(model=str(model))
    assert run_until(config, 9, Counter()) is None
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    assert "was begun with" in refusal(one_line, config) and "restore that model" in refusal(one_line, config)
    shutil.rmtree(model)
    assert str(model) in refusal(one_line, config)


def test_a_folder_of_something_else_is_refused_and_untouched(small: MakeConfig, one_line: OneLine) -> None:
    config = small()
    out = Path(config.out)
    contents: list[Callable[[], Any]] = [
        lambda: (out / "notes.txt").write_text("mine"),
        lambda: (out / "data").mkdir(),
        lambda: (out / MANIFEST).write_text("{}"),
        lambda: ((out / WORK).mkdir(), (out / "notes.txt").write_text("mine")),
    ]
    for create in contents:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        create()
        before = tree(out)
        for use in (generate, preview):
            with pytest.raises(UserError) as caught:
                use(config)
            assert one_line(caught.value).startswith(f"{out}: not empty and not a data set")
        assert tree(out) == before
    shutil.rmtree(out)
    out.write_text("a file")
    assert "cannot be a folder" in refusal(one_line, config)
    assert out.read_text() == "a file"


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no such file": ({"prompts": {"path": "none.jsonl"}}, "no such prompt file"),
    "no such model": ({"model": "./none"}, "./none: no such model folder"),
    "no such teacher": (
        {"responses": {"teachers": [{"name": "t", "model": "./none"}]}},
        "./none: ",
    ),
    "teacher on no hub": (
        {"responses": {"teachers": [{"name": "t", "model": "no-such-org/none"}]}},
        "no-such-org/none: ",
    ),
    "no such reward": ({"reward": {"name": "numerix"}}, "numerix"),
    "no expert column": ({"prompts": {"columns": {"expert": "solution"}}}, "no column `solution`"),
    "no teacher column": (
        {"responses": {"teachers": [{"name": "t", "column": "nope"}]}},
        "no column `nope`",
    ),
    "no ground truth": ({"prompts": {"columns": {"ground_truth": None}}}, "row 1: no ground truth"),
    "too long": (
        {"prompts": {"max_prompt_tokens": 8, "on_too_long": "error"}},
        "prompt 1 has 9 tokens, over prompts.max_prompt_tokens=8",
    ),
    "all too long": ({"prompts": {"max_prompt_tokens": 8}}, "no prompt is left of 8: 8 are longer than"),
    "context": ({"responses": {"max_tokens": 120}}, "holds 128 tokens, but the longest prompt has 9"),
    "no template": ({"prompts": {"system": "1"}}, "no chat template"),
    "no device": ({"engine": {"device": "cuda:77"}}, "device `cuda:77` cannot be used"),
}


@pytest.mark.parametrize("name", [name for name in BAD if name != "no device"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_mistake_leaves_nothing_behind(small: MakeConfig, one_line: OneLine, name: str, existing: bool) -> None:
    change, said = BAD[name]
    config = small(**change)
    out = Path(config.out)
    if existing:
        out.mkdir()
    assert said in refusal(one_line, config)
    assert tree(out) == {} and out.exists() == existing
    with pytest.raises(UserError) as caught:
        preview(config)
    assert said in one_line(caught.value)
    assert tree(out) == {} and out.exists() == existing


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "1=", "answer": "1"}, "row 300: no column `expert`"),
        ({"question": "1=", "answer": None, "expert": "1"}, "row 300: no ground truth"),
        ({"question": 3, "answer": "1", "expert": "1"}, "row 300: column `question`"),
        ({"question": "1=", "answer": "1", "expert": "\ud800"}, "row 300: "),
        ({"question": "1" * 110, "answer": "1", "expert": "1"}, "holds 128 tokens, but the longest prompt has 110"),
    ],
)
def test_a_mistake_in_row_300_leaves_nothing_behind(
    small: MakeConfig, demo: Path, tmp_path: Path, one_line: OneLine, row: dict[str, Any], said: str
) -> None:
    lines = (demo / "train.jsonl").read_text().splitlines()
    lines[299] = json.dumps(row)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    config = small(prompts={"path": str(path), "limit": None})
    assert said in refusal(one_line, config)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl"]


def test_a_teacher_that_cannot_hold_the_prompts_is_found_before_work(
    small: MakeConfig, other_model: Path, tmp_path: Path, one_line: OneLine
) -> None:
    short = tmp_path / "short"
    shutil.copytree(other_model, short)
    config_file = short / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"max_position_embeddings": 30}))
    config = small(responses={"teachers": [{"name": "t", "model": str(short)}]})
    assert f"{short} holds 30 tokens, but the longest prompt has 9" in refusal(one_line, config)
    assert not Path(config.out).exists()


def test_a_teacher_without_template_refuses_a_system_message_before_work(
    make_config: MakeConfig, chat_model: Path, other_model: Path, tmp_path: Path, one_line: OneLine
) -> None:
    config = make_config(
        tmp_path / "out",
        model=str(chat_model),
        prompts={"system": "s"},
        responses={"teachers": [{"name": "t", "model": str(other_model)}]},
    )
    said = refusal(one_line, config)
    assert f"prompt 1: {other_model}: the tokenizer has no chat template" in said
    assert not (tmp_path / "out").exists()


# ---- counted, never silent


def test_prompts_too_long_are_skipped_and_counted(small: MakeConfig, write_jsonl: Callable[..., Path]) -> None:
    data = rows()[:8]
    for n in (1, 4, 7):
        data[n] = data[n] | {"question": "1+" * 20 + "1="}
    config = small(prompts={"path": str(write_jsonl(data)), "max_prompt_tokens": 41})
    manifest = generate(config)
    assert manifest.prompts.model_dump() == {
        "rows_read": 8,
        "prompts": 5,
        "prompts_too_long": 3,
        "duplicates": 0,
        "near_duplicates": 0,
        "duplicates_removed": 0,
        "contaminated": 0,
        "given_missing": 0,
        "given_left_out": 0,
    }
    assert verify(Path(config.out)) == []
    kept = [g.prompt.messages[0].content for g in groups_in(Path(config.out))]
    assert kept == [data[n]["question"] for n in (0, 2, 3, 5, 6)]


def test_given_texts_that_lack_or_are_too_long_are_counted_and_never_cut(
    small: MakeConfig, write_jsonl: Callable[..., Path]
) -> None:
    data = rows()[:6]
    experts = ["1" * 25, "1" * 26, None, "", ["1", "2"], "2"]
    for row, expert in zip(data, experts, strict=True):
        row["expert"] = expert
    config = small(prompts={"path": str(write_jsonl(data))}, responses={"max_tokens": 26})
    manifest = generate(config)
    assert (manifest.prompts.given_missing, manifest.prompts.given_left_out) == (2, 1)
    found = [
        [r.completion.text for r in g.responses if r.completion.source == "expert"] for g in groups_in(Path(config.out))
    ]
    assert found == [["1" * 25], [], [], [], ["1"], ["2"]]
    assert manifest.teacher_samples_left_out == 0
    assert verify(Path(config.out)) == []


def test_responses_without_ground_truth_stay_unjudged_where_that_is_wanted(
    small: MakeConfig, write_jsonl: Callable[..., Path]
) -> None:
    data = rows()[:4]
    data[2]["answer"] = None
    config = small(prompts={"path": str(write_jsonl(data)), "on_missing_ground_truth": "keep"})
    manifest = generate(config)
    for group in groups_in(Path(config.out)):
        for response in group.responses:
            known = group.prompt.ground_truth is not None
            assert response.verdict.status == ("ok" if known else "no_ground_truth")
            assert (response.verdict.reward is None) == (not known)
    assert manifest.summary.groups_unjudged == 1
    assert [(s.source, s.responses, s.judged) for s in manifest.summary.sources] == [("expert", 4, 3), ("self", 8, 6)]
    assert verify(Path(config.out)) == []


def test_groups_without_responses_go_through(small: MakeConfig, write_jsonl: Callable[..., Path]) -> None:
    data = rows()[:5]
    for n in (0, 2):
        data[n]["expert"] = None
    for out, missing in (("some", (0, 2)), ("all", range(5))):
        for n in missing:
            data[n]["expert"] = None
        config = small(
            out=str(write_jsonl(data).parent / out),
            prompts={"path": str(write_jsonl(data))},
            responses={"self": {"count": 0}},
            shards={"groups_per_shard": 2},
        )
        manifest = generate(config)
        assert verify(Path(config.out)) == []
        assert [len(g.responses) for g in groups_in(Path(config.out))] == [int(n not in missing) for n in range(5)]
        assert manifest.summary.groups == 5 and manifest.summary.responses == 5 - len(missing)
        assert manifest.summary.groups_unjudged == len(missing)
        assert manifest.prompts.given_missing == len(missing)


def test_a_chat_model_whose_padding_is_its_eos(
    make_config: MakeConfig, chat_model: Path, tmp_path: Path, naive_logprobs: Oracle
) -> None:
    config = make_config(
        tmp_path / "out",
        model=str(chat_model),
        prompts={"system": "Be brief.", "template": r"{question} \boxed{}", "limit": 6},
        responses={"max_tokens": 40, "teachers": [], "self": {"sampling": {"temperature": 1.0, "top_p": 1.0}}},
    )
    manifest = generate(config)
    assert manifest.tokenizer.end_id == 2 and manifest.tokenizer.stop_ids == (0, 2)
    groups = groups_in(tmp_path / "out")
    for group in groups:
        assert [m.role for m in group.prompt.messages] == ["system", "user"]
        for response in group.responses:
            ids = response.completion.response_ids
            expected = naive_logprobs(chat_model, group.prompt_ids, ids)
            np.testing.assert_allclose(response.ref_logprobs, expected, atol=5e-5, rtol=1e-5)
            if response.completion.source == "expert":
                assert ids[-1] == 2 and 0 not in ids
    assert len(of_source(groups, "expert")) == 6 and len(of_source(groups, "self")) == 18


def test_the_preview_says_what_a_run_then_does(make_config: MakeConfig, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = preview(make_config(out))
    assert not out.exists()
    manifest = read_manifest(finished)
    groups = groups_in(finished)
    assert before.prompts == manifest.prompts
    assert (before.num_shards, before.shards_published) == (4, 0)
    assert before.prompt_tokens == sum(len(g.prompt_ids) for g in groups)
    given = [r for g in groups for r in g.responses if r.completion.finish_reason == "given"]
    assert before.given_tokens == sum(len(r.ref_logprobs) for r in given)
    assert before.sampled_responses == 5 * NUM_PROMPTS
    assert before.max_sampled_tokens == 5 * NUM_PROMPTS * 26
    assert preview(make_config(finished)).shards_published == 4
