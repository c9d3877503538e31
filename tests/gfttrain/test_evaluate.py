"""An evaluation against judging and decoding again; stopped anywhere, it ends as one that never was."""

import importlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from training_helpers import DEMO, MODEL
from transformers import AutoModelForCausalLM

from gftdata.config import validate_config
from gftdata.engines.hf import open_engine
from gftdata.errors import UserError
from gftdata.groups import sample_seed
from gftdata.journal import read_journal
from gftdata.prompts import read_prompts
from gftdata.rewards import judge
from gftdata.store import FolderStore
from gftdata.tokens import encode_prompt, load_tokenizer
from gftdata.types import Prompt, Refusal, SampleRequest, ScoreRequest, Unscored
from gfttrain import evaluate as evaluation
from gfttrain.config import EvalConfig
from gfttrain.evaluate import Event, evaluate
from gfttrain.results import Estimate, Result, read_results
from gfttrain.samples import SAMPLES as SAMPLES_FILE
from gfttrain.samples import WORK, benchmark_folder, greedy_answers
from gfttrain.stream import Example, collate

PROMPTS, SAMPLES = 32, 8


SUMS = {"path": str(DEMO / "eval.jsonl"), "columns": {"ground_truth": "answer"}, "limit": PROMPTS}


def eval_settings(prompts: dict[str, Any] | None = None, **overrides: Any) -> EvalConfig:
    """One benchmark, `sums`."""
    settings: dict[str, Any] = {
        "model": str(MODEL),
        "benchmarks": [{"name": "sums", "prompts": {**SUMS, **(prompts or {})}}],
        "reward": {"name": "numeric", "workers": 1},
        "num_samples": SAMPLES,
        "k": [1, 2, SAMPLES],
        "sampling": {"temperature": 1.0},
        "max_tokens": 48,
        "reference": str(MODEL),
        "engine": {"device": "cpu"},
    }
    for key, value in overrides.items():
        settings[key] = {**settings[key], **value} if isinstance(settings.get(key), dict) else value
    return validate_config(EvalConfig, settings, "test")


def prompts_of(config: EvalConfig) -> list[Prompt]:
    return list(read_prompts(config.benchmarks[0].prompts, {}, needs_ground_truth=True))


def run(out: Path, prompts: dict[str, Any] | None = None, **overrides: Any) -> Result:
    return evaluate(eval_settings(prompts, out=str(out), **overrides))["sums"]


def value(found: Estimate | None) -> float:
    assert found is not None
    return found.value


def rows_of(out: Path, benchmark: str = "sums") -> list[dict[str, Any]]:
    """The samples, without the sums, which batches change in the last digits."""
    rows = pq.read_table(benchmark_folder(out, benchmark) / SAMPLES_FILE).to_pylist()
    return [{key: v for key, v in row.items() if not key.endswith("logprob_sum")} for row in rows]


# a whole evaluation


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evals") / "base"


@pytest.fixture(scope="module")
def events() -> list[Event]:
    return []


@pytest.fixture(scope="module")
def result(out: Path, events: list[Event]) -> Result:
    return evaluate(eval_settings(out=str(out)), events.append)["sums"]


def test_counts(result: Result, events: list[Event], out: Path) -> None:
    found = result
    assert found.model == str(MODEL)
    assert (found.prompts, found.prompts_too_long, found.samples_per_prompt) == (PROMPTS, 0, SAMPLES)
    assert found.unjudged_samples == 0
    assert events[0] == Event("benchmark", "sums", count=PROMPTS * (SAMPLES + 1))
    assert [event.kind for event in events[1:-1]] == ["sample"] * PROMPTS * (SAMPLES + 1)
    assert events[-1] == Event("reference", "sums", count=PROMPTS * SAMPLES)
    assert read_results(out) == {"sums": found}


def test_every_sample_stands_in_a_file_of_its_own_row(result: Result, out: Path) -> None:
    folder = benchmark_folder(out, "sums")
    assert {path.name for path in folder.iterdir()} == {"recipe.json", "samples.parquet"}
    file = pq.ParquetFile(folder / "samples.parquet")
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    rows = file.read().to_pylist()
    prompts = prompts_of(eval_settings())
    order = [
        (p.prompt_id, greedy, k) for p in prompts for greedy, k in [*((False, k) for k in range(SAMPLES)), (True, 0)]
    ]
    assert [(row["prompt_id"], row["greedy"], row["index"]) for row in rows] == order
    assert [row["question"] for row in rows[:: SAMPLES + 1]] == [p.messages[-1].content for p in prompts]
    drawn = [row for row in rows if not row["greedy"]]
    assert value(result.mean_reward) == pytest.approx(np.mean([row["reward"] for row in drawn]))
    tokens = sum(row["num_tokens"] for row in drawn)
    assert result.entropy == pytest.approx(-sum(row["logprob_sum"] for row in drawn) / tokens)
    assert result.kl == pytest.approx(sum(r["logprob_sum"] - r["ref_logprob_sum"] for r in drawn) / tokens, abs=1e-9)
    assert all(row["ref_logprob_sum"] is None for row in rows if row["greedy"])
    assert [row["seed"] for row in drawn[:2]] == [sample_seed(0, prompts[0].prompt_id, "eval", k) for k in (0, 1)]


def test_agrees_with_sampling_and_judging_again(result: Result) -> None:
    found = result
    config = eval_settings()
    tokenizer = load_tokenizer(str(MODEL))
    engine = open_engine(str(MODEL), config.engine, tokenizer)
    prompts = {prompt.prompt_id: prompt for prompt in prompts_of(config)}
    assert len(prompts) == PROMPTS
    requests = [
        SampleRequest(p.prompt_id, k, (), encode_prompt(tokenizer, p.messages), sample_seed(0, p.prompt_id, "eval", k))
        for p in prompts.values()
        for k in range(SAMPLES)
    ]
    samples = list(engine.sample(requests, config.sampling.with_limit(48)))
    rewards = np.zeros((PROMPTS, SAMPLES))
    place = {prompt_id: row for row, prompt_id in enumerate(prompts)}
    for sample in samples:
        verdict = judge("numeric", prompts[sample.request.prompt_id], sample.text)
        assert verdict.reward is not None
        rewards[place[sample.request.prompt_id], sample.request.index] = verdict.reward
    per_prompt = rewards.mean(1)
    assert 0.1 < rewards.mean() < 0.9
    assert value(found.mean_reward) == pytest.approx(rewards.mean())
    once = found.pass_at[1]
    assert once.value == pytest.approx(rewards.mean())
    assert found.pass_at[SAMPLES].value == pytest.approx((rewards.max(1) == 1).mean())
    assert once.value < found.pass_at[2].value < found.pass_at[SAMPLES].value
    assert once.low is not None and once.high is not None and once.low < once.value < once.high
    assert once.high - once.low == pytest.approx(2 * 1.96 * per_prompt.std() / np.sqrt(PROMPTS), rel=0.05)
    lengths = [len(sample.response_ids) for sample in samples]
    assert found.mean_tokens == pytest.approx(np.mean(lengths))
    assert found.truncated_samples == sum(sample.finish_reason == "length" for sample in samples)
    # entropy: -log pi of the samples, here from scoring instead of decoding
    scores = engine.score([ScoreRequest(s.request.prompt_ids, s.response_ids) for s in samples])
    assert found.entropy == pytest.approx(-sum(float(s.sum()) for s in scores) / sum(lengths), rel=1e-4)


def test_kl_to_itself_is_nothing(result: Result) -> None:
    kl = result.kl
    assert kl is not None and abs(kl) < 1e-5


def test_kl_to_another_model_is_the_mean_over_tokens(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(MODEL, other)
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    with torch.no_grad():
        model.model.norm.weight *= 0.7
    model.save_pretrained(other)
    changes: dict[str, Any] = {"reference": str(other), "greedy": False, "num_samples": 32, "k": [1]}
    config = eval_settings({"limit": 8}, **changes)
    found = run(tmp_path / "out", {"limit": 8}, **changes).kl
    # exact KL at every position of some of pi's own samples: its mean is what the estimate estimates
    tokenizer = load_tokenizer(str(MODEL))
    engine = open_engine(str(MODEL), config.engine, tokenizer)
    base = AutoModelForCausalLM.from_pretrained(MODEL)
    requests = [
        SampleRequest(p.prompt_id, k, (), encode_prompt(tokenizer, p.messages), sample_seed(7, p.prompt_id, "", k))
        for p in prompts_of(config)
        for k in range(32)
    ]
    samples = engine.sample(requests, config.sampling.with_limit(48))
    one, codes = np.zeros(1), np.zeros(1, np.int32)
    examples = [
        Example(s.request.prompt_ids, (s.response_ids,), (s.behavior_logprobs,), one, codes, (0,)) for s in samples
    ]
    batch = collate(examples, "padded")
    with torch.no_grad():
        pi, ref = (
            m(batch.input_ids_BL, attention_mask=batch.attention_mask_BL)
            .logits.flatten(0, 1)[batch.predicts_N]
            .log_softmax(-1)
            for m in (base, model)
        )
    exact = float((pi.exp() * (pi - ref)).sum(-1).mean())
    assert exact > 0.005
    assert found == pytest.approx(exact, rel=0.2)


def test_greedy_is_transformers_greedy(result: Result, out: Path) -> None:
    tokenizer = load_tokenizer(str(MODEL))
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    texts, rewards = [], []
    for prompt in prompts_of(eval_settings()):
        ids = torch.from_numpy(encode_prompt(tokenizer, prompt.messages)).long()[None]
        mask = torch.ones_like(ids)
        output = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=48)
        texts.append(tokenizer.backend.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
        rewards.append(judge("numeric", prompt, texts[-1]).reward)
    assert value(result.greedy) == pytest.approx(np.mean(np.array(rewards) == 1.0))
    answers = greedy_answers(out, "sums")
    assert [answer.text for answer in answers] == texts
    assert [answer.reward for answer in answers] == rewards
    assert answers[0].question == prompts_of(eval_settings())[0].messages[-1].content


def same(found: Result, expected: Result) -> None:
    """The results of the same samples, from other batches."""
    exact = replace(found, finished_at=expected.finished_at, entropy=expected.entropy, kl=expected.kl)
    assert exact == expected
    assert found.entropy == pytest.approx(expected.entropy, rel=1e-5)
    assert found.kl == pytest.approx(expected.kl, abs=1e-6)


def test_an_evaluation_is_repeatable_and_its_seed_matters(result: Result, out: Path, tmp_path: Path) -> None:
    same(run(tmp_path, engine={"batch_size": 37}), result)
    assert rows_of(tmp_path) == rows_of(out)
    other = run(tmp_path / "seed", seed=1, reference=None)
    assert other.mean_tokens != result.mean_tokens
    assert other.greedy == result.greedy  # greedy has no seed
    assert other.kl is None


def test_what_needs_samples_of_the_model_itself_is_not_claimed_otherwise(tmp_path: Path) -> None:
    found = run(tmp_path, {"limit": 4}, reference=None, sampling={"temperature": 0.5}, num_samples=2, k=[1])
    assert found.entropy is None and found.kl is None


# responses that cannot be judged


REWARDS = """
def sometimes(prompt, text):
    if int(prompt.ground_truth) % 2 or len(text) % 2 == 0:
        return None
    return len(text) % 3 == 0


def never(prompt, text):
    raise LookupError
"""


@pytest.fixture
def own_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Rewards of the user's own, which are imported by name from the working directory, in other processes too.

    `sometimes` cannot judge prompts with an odd answer, nor texts of even length.
    """
    (tmp_path / "own_eval_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_eval_rewards", raising=False)
    return importlib.import_module("own_eval_rewards")


def test_unjudged_samples_are_left_out_and_counted(own_rewards: ModuleType, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "reward": {"name": "own_eval_rewards:sometimes"},
        "num_samples": 6,
        "k": [1, 6],
        "reference": None,
    }
    config, found = eval_settings({"limit": 16}, **changes), run(tmp_path / "out", {"limit": 16}, **changes)
    tokenizer = load_tokenizer(str(MODEL))
    engine = open_engine(str(MODEL), config.engine, tokenizer)
    ones, means, unjudged = [], [], 0
    for prompt in prompts_of(config):
        ids = encode_prompt(tokenizer, prompt.messages)
        requests = [
            SampleRequest(prompt.prompt_id, k, (), ids, sample_seed(0, prompt.prompt_id, "eval", k)) for k in range(6)
        ]
        drawn = engine.sample(requests, config.sampling.with_limit(48))
        rewards = [r for r in (own_rewards.sometimes(prompt, s.text) for s in drawn) if r is not None]
        unjudged += 6 - len(rewards)
        ones += [np.mean([r == 1.0 for r in rewards])] if rewards else []
        means += [np.mean(rewards)] if rewards else []
    assert 0 < len(ones) < 16
    assert found.unjudged_samples == unjudged
    assert found.pass_at[1].value == pytest.approx(np.mean(ones))  # over prompts with a judged sample
    assert value(found.mean_reward) == pytest.approx(np.mean(means))
    statuses = {(row["reward"] is None, row["status"]) for row in rows_of(tmp_path / "out")}
    assert statuses == {(False, "ok"), (True, "error:none")}


def test_pass_at_k_that_no_prompt_has_samples_for_is_left_out(own_rewards: ModuleType, tmp_path: Path) -> None:
    # of each prompt some sample is unjudged
    reward = {"name": "own_eval_rewards:sometimes"}
    found = run(tmp_path / "out", {"limit": 6}, reward=reward, num_samples=16, k=[1, 16], reference=None)
    assert found.pass_at.keys() == {1}
    assert read_results(tmp_path / "out")["sums"] == found


def test_nothing_judged_is_an_error_and_judging_again_needs_no_sampling(
    own_rewards: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"reward": {"name": "own_eval_rewards:never"}, "num_samples": 2, "k": [1]}
    with pytest.raises(UserError, match=r"sums: none of 6 samples could be judged \(error:LookupError\); look at"):
        run(tmp_path / "out", {"limit": 3}, **settings)
    (tmp_path / "own_eval_rewards.py").write_text(REWARDS.replace("raise LookupError", "return 1.0"))
    assert len(journal_of(tmp_path / "out")) == 9 and read_results(tmp_path / "out") == {}
    refuse_to_sample(monkeypatch)
    assert run(tmp_path / "out", {"limit": 3}, **settings).pass_at[1].value == 1.0


# stopped and continued


def journal_of(out: Path) -> list[tuple[str, int, int]]:
    return list(read_journal(FolderStore(benchmark_folder(out, "sums")), 0))


def refuse_to_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gftdata.engines.hf.HfEngine.sample", lambda *_: pytest.fail("nothing is missing"))


def test_killed_at_random_times_and_continued_it_ends_the_same(result: Result, out: Path, tmp_path: Path) -> None:
    """SIGKILL, twice; the processes come from a server that has torch loaded, to be quick."""
    seed = time.time_ns() % 10**6
    print("seed of the kills:", seed)
    rng = random.Random(seed)
    config = eval_settings(out=str(tmp_path), engine={"batch_size": 8})
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gfttrain.evaluate", "gftdata.engines.hf"])
    journal = benchmark_folder(tmp_path, "sums") / WORK / "journal" / "00000"
    lines: list[int] = []
    for _ in range(2):
        process = context.Process(target=evaluate, args=(config,))
        process.start()
        begun = len(list(journal.glob("*")))
        while process.is_alive() and len(list(journal.glob("*"))) == begun:
            time.sleep(0.01)
        process.join(rng.uniform(0.0, 0.4))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        lines.append(sum(path.read_bytes().count(b"\n") for path in journal.glob("*")))
        assert lines[-1] == len(journal_of(tmp_path)), "no sample was drawn twice"
    print("samples at each kill:", lines)
    assert lines and 0 < lines[-1] <= PROMPTS * (SAMPLES + 1)
    torn = max(journal.glob("*"))
    torn.write_bytes(torn.read_bytes() + b'01234567 {"source": "self", "row"')
    events: list[Event] = []
    found = evaluate(config, events.append)["sums"]
    assert events[0] == Event("benchmark", "sums", count=PROMPTS * (SAMPLES + 1), done=lines[-1])
    assert sum(event.kind == "sample" for event in events) == PROMPTS * (SAMPLES + 1) - lines[-1]
    same(found, result)
    assert rows_of(tmp_path) == rows_of(out)
    assert not (benchmark_folder(tmp_path, "sums") / WORK).exists()


def test_a_stop_at_the_end_costs_no_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before samples.parquet, before the result, before the journals go; then, at last, not."""
    settings: dict[str, Any] = {"num_samples": 2, "k": [1]}
    expected = run(tmp_path / "whole", {"limit": 4}, **settings)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for where in ("write_samples", "append_result", "drop_journals"):
        with monkeypatch.context() as context:
            context.setattr(evaluation, where, stop)
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / "stopped", {"limit": 4}, **settings)
        refuse_to_sample(monkeypatch)
    same(run(tmp_path / "stopped", {"limit": 4}, **settings), expected)
    assert rows_of(tmp_path / "stopped") == rows_of(tmp_path / "whole")
    assert len((tmp_path / "stopped" / "evals.jsonl").read_text().splitlines()) == 1
    assert not (benchmark_folder(tmp_path / "stopped", "sums") / WORK).exists()


@pytest.mark.parametrize("look", [1, 2])  # after the drawing: to score, to finish
def test_a_journal_that_cannot_be_seen_for_a_moment_is_no_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: int
) -> None:
    """As on a shared file system: its samples would count as given up by the engine."""
    settings: dict[str, Any] = {"num_samples": 2, "k": [1]}
    looks = 0

    def read(*where: Any) -> Any:
        nonlocal looks
        looks += 1
        return {} if looks == 1 + look else read_journal(*where)

    with monkeypatch.context() as context:
        context.setattr(evaluation, "read_journal", read)
        with pytest.raises(UserError, match=r"evals/sums/\.work: 12 samples that were there are not"):
            run(tmp_path / "seen", {"limit": 4}, **settings)
    refuse_to_sample(monkeypatch)
    same(run(tmp_path / "seen", {"limit": 4}, **settings), run(tmp_path / "seen", {"limit": 4}, **settings))
    assert not any(row["finish_reason"] == "refused" for row in rows_of(tmp_path / "seen"))


def test_a_signal_ends_it_and_the_same_command_continues(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gftdata.tasks import Stopped, stop_on_signals

    drawn = 0

    def on_event(event: Event) -> None:
        nonlocal drawn
        drawn += event.kind == "sample"
        if drawn == 100:
            os.kill(os.getpid(), signal.SIGUSR1)

    config = eval_settings(out=str(tmp_path))
    with pytest.raises(Stopped, match="SIGUSR1"), stop_on_signals():
        evaluate(config, on_event)
    assert len(journal_of(tmp_path)) == drawn == 100
    same(evaluate(config)["sums"], result)


def test_what_is_finished_is_not_sampled_again_and_another_recipe_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"num_samples": 2, "k": [1], "reference": None}
    first = run(tmp_path, {"limit": 4}, **settings)
    events: list[Event] = []
    again = evaluate(eval_settings({"limit": 4}, out=str(tmp_path), **settings), events.append)
    assert again == {"sums": first} and events == [Event("there", "sums")]
    # what is counted may change without sampling
    with monkeypatch.context() as context:
        context.setattr(evaluation, "open_engine", lambda *_: pytest.fail("a model was loaded"))
        both = run(tmp_path, {"limit": 4}, **{**settings, "k": [2]})
        assert both.pass_at.keys() == {1, 2} and both.pass_at[1] == first.pass_at[1]
        assert evaluate(eval_settings({"limit": 4}, out=str(tmp_path), engine={"batch_size": 5}, **settings)).keys()
    # and what is sampled begins anew; the old lines stay
    for number, change in enumerate(({"seed": 1}, {"num_samples": 3})):
        events.clear()
        evaluate(eval_settings({"limit": 4}, out=str(tmp_path), **{**settings, **change}), events.append)
        note = "`num_samples` was 2 and is now 3 (also different: `seed`)" if number else "`seed` was 0 and is now 1"
        assert events[0] == Event("anew", "sums", note=note)
        lines = (tmp_path / "evals.jsonl").read_text().splitlines()
        assert len(lines) == 4 + number
    run(tmp_path, {"limit": 5}, **settings)
    assert read_results(tmp_path)["sums"].prompts == 5
    assert len(rows_of(tmp_path)) == 5 * 3


def test_what_stands_in_the_folder_is_of_the_last_recipe_only(tmp_path: Path) -> None:
    """A benchmark that is begun anew and stopped has no samples.parquet of the old one beside its journal."""
    settings: dict[str, Any] = {"num_samples": 2, "k": [1], "reference": None, "greedy": False}
    first = run(tmp_path, {"limit": 4}, **settings)

    def stop(event: Event) -> None:
        if event.kind == "sample":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(eval_settings({"limit": 4}, out=str(tmp_path), seed=5, **settings), stop)
    assert not (benchmark_folder(tmp_path, "sums") / SAMPLES_FILE).exists()
    assert read_results(tmp_path)["sums"] == first, "the old line is history until the new one is there"
    assert run(tmp_path, {"limit": 4}, **settings).pass_at == first.pass_at


def test_a_second_evaluation_of_the_same_folder_waits_for_nobody(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"num_samples": 1, "k": [1], "reference": None, "greedy": False}

    def also(event: Event) -> None:
        if event.kind == "sample":
            with pytest.raises(UserError, match="another gft eval is writing there"):
                run(tmp_path, {"limit": 2}, **settings)

    evaluate(eval_settings({"limit": 2}, out=str(tmp_path), **settings), also)


# several benchmarks


def test_several_benchmarks_in_one_call_with_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def open_and_note(model: str, *rest: Any) -> Any:
        opened.append(model)
        return open_hf(model, *rest)

    open_hf = evaluation.open_engine
    monkeypatch.setattr(evaluation, "open_engine", open_and_note)
    data: dict[str, Any] = {
        "model": str(MODEL),
        "out": str(tmp_path),
        "reward": {"name": "numeric", "workers": 1},
        "sampling": {"temperature": 1.0},
        "max_tokens": 48,
        "num_samples": 2,
        "greedy": False,
        "engine": {"device": "cpu"},
        "benchmarks": [
            {"name": "sums", "prompts": SUMS | {"limit": 4}, "num_samples": 3, "reference": str(MODEL)},
            {"name": "reversal", "prompts": SUMS | {"path": str(DEMO / "reversal.jsonl"), "limit": 3}},
        ],
    }
    found = evaluate(validate_config(EvalConfig, data, "test"))
    assert list(found) == ["sums", "reversal"]
    assert opened == [str(MODEL)] * 2, "once to sample, once to score"
    assert [r.prompts * r.samples_per_prompt for r in found.values()] == [12, 6]
    assert found["sums"].kl is not None and found["reversal"].kl is None
    assert read_results(tmp_path) == found
    assert len(rows_of(tmp_path, "reversal")) == 6


# engines


class Grudging:
    """A real engine that gives up what a test says."""

    def __init__(self, inner: Any, refuses: Callable[[SampleRequest], bool]) -> None:
        self.inner, self.refuses = inner, refuses

    def sample(self, requests: Any, sampling: Any) -> Any:
        kept = []
        for request in requests:
            if self.refuses(request):
                yield Refusal(request, "too hard")
            else:
                kept.append(request)
        yield from self.inner.sample(kept, sampling)

    def close(self) -> None:
        self.inner.close()


def grudging(monkeypatch: pytest.MonkeyPatch, refuses: Callable[[SampleRequest], bool]) -> None:
    open_hf = evaluation.open_engine
    monkeypatch.setattr(evaluation, "open_engine", lambda *args: Grudging(open_hf(*args), refuses))


def test_what_the_engine_gives_up_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"num_samples": 4, "k": [1], "reference": None, "greedy": False}
    grudging(monkeypatch, lambda request: request.index == 3)
    found = run(tmp_path, {"limit": 3}, **settings)
    assert found.unjudged_samples == 3 and found.truncated_samples == 0
    given_up = [row for row in rows_of(tmp_path) if row["finish_reason"] == "refused"]
    assert [(row["index"], row["status"], row["reward"]) for row in given_up] == [(3, "error:refused", None)] * 3
    assert found.mean_tokens == np.mean([r["num_tokens"] for r in rows_of(tmp_path) if r["num_tokens"]])


def test_refusals_alone_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grudging(monkeypatch, lambda request: True)
    settings: dict[str, Any] = {"num_samples": 4, "k": [1], "reference": None}
    with pytest.raises(UserError, match="8 requests were refused with no answer between: too hard"):
        run(tmp_path / "few", {"limit": 2}, **settings)
    with pytest.raises(UserError, match="32 requests were refused"):
        run(tmp_path / "many", {"limit": 20}, **settings)


def test_a_sample_that_the_reference_cannot_score_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:
        context.setattr("gftdata.engines.hf.HfEngine.score", lambda _, asked: [Unscored("too long")] * len(asked))
        with pytest.raises(UserError, match="benchmark sums: the reference cannot score a sample: too long"):
            run(tmp_path, {"limit": 2}, num_samples=1, k=[1])
    assert len(journal_of(tmp_path)) == 4
    refuse_to_sample(monkeypatch)
    assert run(tmp_path, {"limit": 2}, num_samples=1, k=[1]).kl == pytest.approx(0, abs=1e-5)


def test_the_engine_is_closed_before_the_reference_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    open_hf = evaluation.open_engine

    def opening(*args: Any) -> Any:
        engine = open_hf(*args)
        said.append("open")
        close = engine.close
        monkeypatch.setattr(engine, "close", lambda: (said.append("closed"), close()))
        return engine

    monkeypatch.setattr(evaluation, "open_engine", opening)
    run(tmp_path, {"limit": 2}, num_samples=1, k=[1])
    assert said == ["open", "closed", "open", "closed"]
