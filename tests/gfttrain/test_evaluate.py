"""pass@k against its closed form and a simulation; an evaluation against judging and decoding again."""

import importlib
import itertools
import json
import math
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from training_helpers import DEMO, MODEL
from transformers import AutoModelForCausalLM

from gftdata.config import validate_config
from gftdata.engines.hf import open_engine
from gftdata.errors import UserError
from gftdata.groups import sample_seed
from gftdata.prompts import read_prompts
from gftdata.rewards import judge
from gftdata.tokens import encode_prompt, load_tokenizer
from gftdata.types import Prompt, SampleRequest, ScoreRequest
from gfttrain.config import EvalConfig
from gfttrain.evaluate import EvalResult, Event, evaluate, pass_at_k, write_result
from gfttrain.stream import Example, collate

PROMPTS, SAMPLES = 32, 8


def eval_settings(**overrides: Any) -> EvalConfig:
    settings: dict[str, Any] = {
        "model": str(MODEL),
        "prompts": {"path": str(DEMO / "eval.jsonl"), "columns": {"ground_truth": "answer"}, "limit": PROMPTS},
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
    return list(read_prompts(config.prompts, {}, needs_ground_truth=True))


# pass@k


@pytest.mark.parametrize("n", [1, 2, 5, 16, 64])
def test_pass_at_k_is_the_closed_form(n: int) -> None:
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        expected = 1 - math.comb(n - c, k) / math.comb(n, k)
        assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12), (c, k)


def test_pass_at_k_counts_the_subsets() -> None:
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            right = [True] * c + [False] * (n - c)
            subsets = list(itertools.combinations(right, k))
            assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(subset) for subset in subsets]))


def test_pass_at_k_of_many_prompts_at_once() -> None:
    found = pass_at_k([4, 4, 4, 2], [0, 1, 4, 2], 2)
    np.testing.assert_allclose(found, [0.0, 0.5, 1.0, 1.0])
    np.testing.assert_allclose(pass_at_k(8, np.arange(9), 1), np.arange(9) / 8)


def test_pass_at_k_of_too_few_samples_is_unknown() -> None:
    assert np.isnan(pass_at_k([3, 0], [3, 0], 4)).all()
    assert math.isnan(pass_at_k(0, 0, 1))


def test_pass_at_k_does_not_overflow() -> None:
    assert 0.99 < pass_at_k(100_000, 100, 10_000) <= 1
    assert pass_at_k(1000, 0, 500) == 0
    assert pass_at_k(1000, 501, 500) == 1


# a whole evaluation


@pytest.fixture(scope="module")
def result() -> tuple[EvalResult, list[Event]]:
    events: list[Event] = []
    return evaluate(eval_settings(), events.append), events


def test_counts(result: tuple[EvalResult, list[Event]]) -> None:
    found, events = result
    assert found.model == str(MODEL)
    assert (found.prompts, found.prompts_too_long, found.samples_per_prompt) == (PROMPTS, 0, SAMPLES)
    assert found.unjudged_samples == 0
    assert events[0] == Event("start", count=PROMPTS * (SAMPLES + 1))
    assert [event.kind for event in events[1:]] == ["sample"] * PROMPTS * (SAMPLES + 1)


def test_agrees_with_sampling_and_judging_again(result: tuple[EvalResult, list[Event]]) -> None:
    found, _ = result
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
    assert found.mean_reward == pytest.approx(rewards.mean())
    assert found.pass_at[1] == pytest.approx(rewards.mean())
    assert found.pass_at[SAMPLES] == pytest.approx((rewards.max(1) == 1).mean())
    assert found.pass_at[1] < found.pass_at[2] < found.pass_at[SAMPLES]
    assert found.pass_at_1_stderr == pytest.approx(per_prompt.std(ddof=1) / math.sqrt(PROMPTS))
    lengths = [len(sample.response_ids) for sample in samples]
    assert found.mean_tokens == pytest.approx(np.mean(lengths))
    assert found.truncated_samples == sum(sample.finish_reason == "length" for sample in samples)
    # entropy: -log pi of the samples, here from scoring instead of decoding
    scores = engine.score([ScoreRequest(s.request.prompt_ids, s.response_ids) for s in samples])
    assert found.entropy == pytest.approx(-sum(float(s.sum()) for s in scores) / sum(lengths), rel=1e-4)


def test_kl_to_itself_is_nothing(result: tuple[EvalResult, list[Event]]) -> None:
    kl = result[0].kl
    assert kl is not None and abs(kl) < 1e-5


def test_kl_to_another_model_is_the_mean_over_tokens(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(MODEL, other)
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    with torch.no_grad():
        model.model.norm.weight *= 0.7
    model.save_pretrained(other)
    config = eval_settings(reference=str(other), greedy=False, num_samples=32, k=[1], prompts={"limit": 8})
    found = evaluate(config).kl
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


def test_greedy_is_transformers_greedy(result: tuple[EvalResult, list[Event]]) -> None:
    found, _ = result
    tokenizer = load_tokenizer(str(MODEL))
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    texts, rewards = [], []
    for prompt in prompts_of(eval_settings()):
        ids = torch.from_numpy(encode_prompt(tokenizer, prompt.messages)).long()[None]
        mask = torch.ones_like(ids)
        output = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=48)
        texts.append(tokenizer.backend.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
        rewards.append(judge("numeric", prompt, texts[-1]).reward)
    assert found.greedy == pytest.approx(np.mean(np.array(rewards) == 1.0))
    assert [answer.text for answer in found.answers] == texts[: len(found.answers)]
    assert [answer.reward for answer in found.answers] == rewards[: len(found.answers)]
    assert found.answers[0].question == prompts_of(eval_settings())[0].messages[-1].content


def test_an_evaluation_is_repeatable_and_its_seed_matters(result: tuple[EvalResult, list[Event]]) -> None:
    again = evaluate(eval_settings(engine={"batch_size": 37}))  # other batches, the same samples
    for field in ("pass_at", "greedy", "mean_tokens", "truncated_samples", "answers"):
        assert getattr(again, field) == getattr(result[0], field), field
    assert again.entropy == pytest.approx(result[0].entropy, rel=1e-5)
    other = evaluate(eval_settings(seed=1, reference=None))
    assert other.mean_tokens != result[0].mean_tokens
    assert other.greedy == result[0].greedy  # greedy has no seed
    assert other.kl is None


def test_what_needs_samples_of_the_model_itself_is_not_claimed_otherwise() -> None:
    found = evaluate(
        eval_settings(reference=None, sampling={"temperature": 0.5}, num_samples=2, k=[1], prompts={"limit": 4})
    )
    assert found.entropy is None and found.kl is None


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.5}, {"temperature": 1.5}, {"temperature": 1.0, "top_p": 0.9}, {"stop": [";"]}]
)
def test_a_reference_needs_samples_of_the_model_itself(sampling: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="the KL estimate needs"):
        eval_settings(sampling=sampling)
    assert eval_settings(sampling=sampling, reference=None)


def test_pass_at_k_needs_k_samples() -> None:
    with pytest.raises(UserError, match="pass@16 needs num_samples of at least 16, found 8"):
        eval_settings(k=[1, 16])


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


def test_unjudged_samples_are_left_out_and_counted(own_rewards: ModuleType) -> None:
    config = eval_settings(reward={"name": "own_eval_rewards:sometimes"}, num_samples=6, k=[1, 2, 6], reference=None)
    found = evaluate(config)
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
        ones += [np.mean(rewards)] if rewards else []
        means += rewards
    assert 0 < len(ones) < PROMPTS
    assert found.unjudged_samples == unjudged
    assert found.pass_at[1] == pytest.approx(np.mean(ones))  # over prompts with a judged sample
    assert found.mean_reward == pytest.approx(np.mean(means))
    assert found.pass_at_1_stderr == pytest.approx(np.std(ones, ddof=1) / math.sqrt(len(ones)))


def test_pass_at_k_that_no_prompt_has_samples_for_is_left_out(own_rewards: ModuleType, tmp_path: Path) -> None:
    # of each prompt some sample is unjudged
    config = eval_settings(
        reward={"name": "own_eval_rewards:sometimes"}, num_samples=16, k=[1, 16], reference=None, prompts={"limit": 6}
    )
    found = evaluate(config)
    assert found.pass_at.keys() == {1} and math.isfinite(found.pass_at[1])
    write_result(path=tmp_path / "result.json", config=config, result=found)
    assert json.loads((tmp_path / "result.json").read_text())["result"]["pass_at"].keys() == {"1"}


def test_nothing_judged_is_an_error(own_rewards: ModuleType) -> None:
    config = eval_settings(reward={"name": "own_eval_rewards:never"}, num_samples=2, k=[1], prompts={"limit": 3})
    with pytest.raises(UserError, match=r"none of 6 samples could be judged \(error:LookupError\)"):
        evaluate(config)


# prompts


def test_prompts_that_are_too_long_are_counted_or_an_error(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [{"question": q, "answer": "1"} for q in ("1+2+3=", "11+22+33=", "1+1+1=")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = {"path": str(path), "limit": None, "max_prompt_tokens": 7}
    settings = {"num_samples": 2, "k": [1], "greedy": False, "reference": None}
    found = evaluate(eval_settings(prompts=prompts, **settings))
    assert (found.prompts, found.prompts_too_long) == (2, 1)
    for unforgiving in ({"on_too_long": "error"}, {"max_prompt_tokens": 1}):
        with pytest.raises(UserError, match=r"of 3 prompts are longer than prompts.max_prompt_tokens"):
            evaluate(eval_settings(prompts={**prompts, **unforgiving}, **settings))


def test_a_reference_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(MODEL, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["3"], vocab["4"] = vocab["4"], vocab["3"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = eval_settings(reference=str(other), num_samples=1, k=[1], greedy=False, prompts={"limit": 2})
    with pytest.raises(UserError, match="has another tokenizer"):
        evaluate(config)


def test_missing_things_are_user_errors(tmp_path: Path) -> None:
    for override in (
        {"model": str(tmp_path / "nowhere")},
        {"prompts": {"path": str(tmp_path / "none.jsonl")}},
        {"prompts": {"columns": {"ground_truth": "solution"}}},
    ):
        with pytest.raises(UserError):
            evaluate(eval_settings(**override))
