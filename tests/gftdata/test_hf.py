"""The embedded engine against naive forward passes of the same models, and against itself in other batches."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gftdata.config import HfConfig
from gftdata.engines.hf import HfEngine, load_model, open_engine, pick_device
from gftdata.errors import UserError
from gftdata.tokens import decode_response, encode_prompt, encode_response, load_tokenizer
from gftdata.types import Message, Sample, SampleRequest, Sampling, ScoreRequest, Seed, TokenIds

Logprobs = Callable[..., np.ndarray]
ENDOFTEXT, IM_END = 0, 2
DEMO_PROMPTS = ["6", "65+29+72=", "71+9=", "=", "17+74+73=", "12+34+56+78=", "5"]
CHAT_PROMPTS = ["What is 12+34?", "x", "Let x be one of the numbers. Then x =", "é😀", "One of 7"]


def engine_for(model: Path, **settings: Any) -> HfEngine:
    return open_engine(str(model), HfConfig(device="cpu", **settings), load_tokenizer(str(model)))


@pytest.fixture(scope="module")
def demo_engine(demo: Path) -> HfEngine:
    return engine_for(demo / "model")


@pytest.fixture(scope="module")
def chat_engine(chat_model: Path) -> HfEngine:
    return engine_for(chat_model)


def seed_of(*parts: object) -> Seed:
    return Seed(int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1)


def requests_for(engine: HfEngine, texts: Iterable[str], count: int) -> list[SampleRequest]:
    return [
        SampleRequest(text, k, (), encode_prompt(engine.tokenizer, [Message("user", text)]), seed_of(text, k))
        for text in texts
        for k in range(count)
    ]


def draw(engine: HfEngine, requests: Sequence[SampleRequest], **sampling: Any) -> dict[tuple[str, int], Sample]:
    defaults: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 14, "stop": ()}
    samples = list(engine.sample(requests, Sampling(**defaults | sampling)))
    drawn = {(s.request.prompt_id, s.request.index): s for s in samples}
    assert len(drawn) == len(samples) == len(requests)
    assert sorted(drawn) == sorted((r.prompt_id, r.index) for r in requests)
    for sample in samples:
        assert len(sample.response_ids) == len(sample.behavior_logprobs) > 0
        assert (sample.response_ids.dtype, sample.behavior_logprobs.dtype) == (np.int32, np.float32)
        assert sample.text == decode_response(engine.tokenizer, sample.response_ids)
    return drawn


def assert_same_samples(a: dict[tuple[str, int], Sample], b: dict[tuple[str, int], Sample]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].response_ids.tolist() == b[key].response_ids.tolist(), key
        assert (a[key].text, a[key].finish_reason) == (b[key].text, b[key].finish_reason)
        np.testing.assert_allclose(a[key].behavior_logprobs, b[key].behavior_logprobs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("which", ["demo", "chat"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.9}, {"stop": ("1", "e")}])
def test_a_sample_does_not_depend_on_its_company(
    which: str, sampling: dict[str, Any], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: HfEngine = request.getfixturevalue(f"{which}_engine")
    requests = requests_for(engine, DEMO_PROMPTS if which == "demo" else CHAT_PROMPTS, 4)
    together = draw(engine, requests, **sampling)
    assert len({s.text for s in together.values()}) > len(together) // 3, "the samples differ from one another"
    order = np.random.default_rng(0).permutation(len(requests))
    assert_same_samples(draw(engine, [requests[i] for i in order], **sampling), together)
    assert_same_samples(draw(engine, requests[::3], **sampling), {k: together[k] for k in list_keys(requests[::3])})
    for batch_size in (1, 5):
        monkeypatch.setattr(engine, "batch_size", batch_size)
        assert_same_samples(draw(engine, requests, **sampling), together)


def list_keys(requests: Sequence[SampleRequest]) -> list[tuple[str, int]]:
    return [(r.prompt_id, r.index) for r in requests]


def test_another_seed_is_another_sample(demo_engine: HfEngine) -> None:
    requests = [
        SampleRequest("p", k, (), encode_prompt(demo_engine.tokenizer, [Message("user", "65+29+72=")]), Seed(seed))
        for k, seed in enumerate([5, 5, 6, 2**63 - 1])
    ]
    drawn = draw(demo_engine, requests, temperature=3.0)
    texts = [drawn["p", k].text for k in range(4)]
    assert texts[0] == texts[1] and len(set(texts)) == 3


def test_requests_are_taken_as_there_is_room(demo: Path) -> None:
    engine = engine_for(demo / "model", batch_size=2)
    taken = 0

    def requests() -> Iterable[SampleRequest]:
        nonlocal taken
        for request in requests_for(engine, [f"{n}+1=" for n in range(100)], 1):
            taken += 1
            yield request

    stream = engine.sample(requests(), Sampling(1.0, 1.0, 2, ()))
    next(stream)
    assert taken < 100
    assert sum(1 for _ in stream) == 99 and taken == 100


def test_no_requests(demo_engine: HfEngine) -> None:
    assert list(demo_engine.sample([], Sampling(1.0, 1.0, 4, ()))) == []
    assert demo_engine.score([]) == []


def random_scoring(engine: HfEngine, seed: int, count: int) -> list[ScoreRequest]:
    """Random ids; prompts of 1 to 40 tokens, each with several responses, not next to one another."""
    rng = np.random.default_rng(seed)
    vocabulary = engine.model.config.vocab_size
    lengths = [1, 1, 2, 3, 40, *rng.integers(1, 40, 4)]
    prompts = [rng.integers(0, vocabulary, n).astype(np.int32) for n in lengths]
    return [
        ScoreRequest(
            prompts[rng.integers(len(prompts))],
            rng.integers(0, vocabulary, rng.integers(1, 30)).astype(np.int32),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("which", ["demo", "chat"])
@pytest.mark.parametrize("batch_tokens", [1, 100, 100_000])
def test_scores_equal_a_naive_forward_pass(
    which: str,
    batch_tokens: int,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    naive_logprobs: Logprobs,
) -> None:
    engine: HfEngine = request.getfixturevalue(f"{which}_engine")
    model = engine.tokenizer.backend.name_or_path
    monkeypatch.setattr(engine, "batch_tokens", batch_tokens)
    requests = random_scoring(engine, batch_tokens, 40)
    scores = engine.score(requests)
    assert len(scores) == len(requests)
    for score, asked in zip(scores, requests, strict=True):
        assert score.dtype == np.float32 and (score <= 0).all()
        np.testing.assert_allclose(
            score, naive_logprobs(model, asked.prompt_ids, asked.response_ids), atol=3e-5, rtol=1e-5
        )


def test_scores_of_one_token_prompts_alone(chat_engine: HfEngine, chat_model: Path, naive_logprobs: Logprobs) -> None:
    requests = [ScoreRequest(np.array([p], np.int32), np.array([p, 5, IM_END], np.int32)) for p in (0, 7, 7, 9)]
    for score, asked in zip(chat_engine.score(requests), requests, strict=True):
        np.testing.assert_allclose(
            score, naive_logprobs(chat_model, asked.prompt_ids, asked.response_ids), atol=3e-5, rtol=1e-5
        )


@pytest.mark.parametrize("which", ["demo", "chat"])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (0.7, 0.8), (1.6, 0.9)])
def test_log_probs_at_drawing_and_at_scoring(
    which: str, temperature: float, top_p: float, request: pytest.FixtureRequest, naive_logprobs: Logprobs
) -> None:
    engine: HfEngine = request.getfixturevalue(f"{which}_engine")
    model = engine.tokenizer.backend.name_or_path
    requests = requests_for(engine, DEMO_PROMPTS[:4] if which == "demo" else CHAT_PROMPTS[:4], 4)
    samples = list(draw(engine, requests, temperature=temperature, top_p=top_p).values())
    scores = engine.score([ScoreRequest(s.request.prompt_ids, s.response_ids) for s in samples])
    for sample, score in zip(samples, scores, strict=True):
        pair = sample.request.prompt_ids, sample.response_ids
        np.testing.assert_allclose(
            sample.behavior_logprobs, naive_logprobs(model, *pair, temperature), atol=3e-5, rtol=1e-5
        )
        np.testing.assert_allclose(score, naive_logprobs(model, *pair), atol=3e-5, rtol=1e-5)
        if temperature == 1.0:
            np.testing.assert_allclose(sample.behavior_logprobs, score, atol=3e-5, rtol=1e-5)


def probabilities(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """transformers' own warpers as the oracle of what is drawn from."""
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    scores = torch.from_numpy(logits.astype(np.float64))[None]
    none = torch.empty(1, 0, dtype=torch.long)
    scores = TemperatureLogitsWarper(temperature)(none, scores)
    if top_p < 1.0:
        scores = TopPLogitsWarper(top_p)(none, scores)
    return scores.softmax(-1)[0].numpy()


def chi_square_excess(counts: np.ndarray, expected: np.ndarray) -> float:
    """(statistic - df) / sqrt(2 df), about standard normal under the null; rare outcomes are pooled."""
    order = np.argsort(expected)
    bins, held = [[0.0, 0.0]], expected[order]
    for count, mean in zip(counts[order], held, strict=True):
        if bins[-1][1] >= 5:
            bins.append([0.0, 0.0])
        bins[-1][0] += count
        bins[-1][1] += mean
    table = np.array([b for b in bins if b[1] > 0])
    df = max(1, len(table) - 1)
    return float((((table[:, 0] - table[:, 1]) ** 2 / table[:, 1]).sum() - df) / np.sqrt(2 * df))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.6), (0.7, 0.9), (2.0, 0.95)])
def test_what_is_drawn_has_the_models_distribution(
    chat_model: Path, naive_logits: Logprobs, temperature: float, top_p: float
) -> None:
    count = 6000
    engine = engine_for(chat_model, batch_size=3000)
    (prompt_ids,) = {tuple(r.prompt_ids.tolist()) for r in requests_for(engine, ["x"], 1)}
    requests = requests_for(engine, ["x"], count)
    drawn = draw(engine, requests, temperature=temperature, top_p=top_p, max_tokens=2)
    firsts = np.array([drawn["x", k].response_ids[0] for k in range(count)])
    logits = naive_logits(chat_model, prompt_ids, [0])[0]

    def excess(observed: np.ndarray, expected: np.ndarray) -> float:
        return chi_square_excess(np.bincount(observed, minlength=len(expected)), expected * len(observed))

    expected = probabilities(logits, temperature, top_p)
    assert set(firsts) <= set(np.flatnonzero(expected)), "only the nucleus is drawn"
    assert abs(excess(firsts, expected)) < 5
    assert excess(firsts, probabilities(logits, temperature * 1.25, top_p)) > 10, "the test can tell"
    # the second token, given the most frequent first that ends nothing
    frequency = np.bincount(firsts, minlength=len(expected))
    frequency[[ENDOFTEXT, IM_END]] = 0
    first = int(frequency.argmax())
    seconds = np.array([s.response_ids[1] for s in drawn.values() if s.response_ids[0] == first])
    assert len(seconds) > 100
    expected = probabilities(naive_logits(chat_model, prompt_ids, [first, 0])[1], temperature, top_p)
    assert set(seconds) <= set(np.flatnonzero(expected))
    assert abs(excess(seconds, expected)) < 5


def test_samples_of_a_group_are_independent(chat_model: Path) -> None:
    """Token t of one sample says nothing of token t of the next: no stream of random numbers is shared."""
    engine = engine_for(chat_model, batch_size=1000)
    drawn = draw(engine, requests_for(engine, ["x"], 2000), max_tokens=1, temperature=4.0)
    firsts = [drawn["x", k].response_ids[0] for k in range(2000)]
    equal_neighbours = np.mean([a == b for a, b in zip(firsts[::2], firsts[1::2], strict=True)])
    expected = np.sum((np.bincount(firsts) / 2000) ** 2)
    assert abs(equal_neighbours - expected) < 5 * np.sqrt(expected / 1000)


def test_responses_end_with_their_end_token_or_at_the_limit(chat_engine: HfEngine, demo_engine: HfEngine) -> None:
    for engine, prompts, temperature in ((demo_engine, DEMO_PROMPTS, 1.0), (chat_engine, CHAT_PROMPTS, 1.0)):
        samples = draw(engine, requests_for(engine, prompts, 40), max_tokens=12, temperature=temperature).values()
        stop_ids = list(engine.tokenizer.stop_ids)
        reasons = set()
        for sample in samples:
            reasons.add(sample.finish_reason)
            ends = np.isin(sample.response_ids, stop_ids)
            assert not ends[:-1].any()
            if sample.finish_reason == "stop":
                assert ends[-1] and len(sample.response_ids) <= 12
            else:
                assert not ends[-1] and len(sample.response_ids) == 12
            assert not any(special in sample.text for special in ("<eos>", "<|im_end|>", "<|endoftext|>"))
        assert reasons == {"stop", "length"}, "both occur here"


def test_both_end_tokens_end_also_where_one_of_them_is_the_padding(chat_engine: HfEngine) -> None:
    backend = chat_engine.tokenizer.backend
    assert backend.pad_token_id == backend.eos_token_id == ENDOFTEXT
    samples = draw(chat_engine, requests_for(chat_engine, CHAT_PROMPTS, 200), max_tokens=12).values()
    lasts = {int(s.response_ids[-1]) for s in samples if s.finish_reason == "stop"}
    assert lasts == {ENDOFTEXT, IM_END}


def test_the_limit_of_one_token(demo_engine: HfEngine) -> None:
    for sample in draw(demo_engine, requests_for(demo_engine, DEMO_PROMPTS, 3), max_tokens=1).values():
        assert len(sample.response_ids) == 1


@pytest.mark.parametrize("stop", [("1",), ("=1", "=2"), (";", "12"), ("+", "zzz")])
def test_stop_texts_cut_what_would_be_drawn_without_them(demo_engine: HfEngine, stop: tuple[str, ...]) -> None:
    """The oracle: the same sample without stop texts, cut at the first token that completes one of them."""
    requests = requests_for(demo_engine, DEMO_PROMPTS, 8)
    free, stopped = (draw(demo_engine, requests, stop=s) for s in ((), stop))
    cuts = 0
    for key, sample in free.items():
        ids: TokenIds = sample.response_ids
        reason = sample.finish_reason
        for n in range(1, len(ids) + 1):
            if any(text in decode_response(demo_engine.tokenizer, ids[:n]) for text in stop):
                cuts += n < len(ids)
                ids, reason = ids[:n], "stop"
                break
        assert stopped[key].response_ids.tolist() == ids.tolist(), key
        assert stopped[key].finish_reason == reason
        np.testing.assert_allclose(
            stopped[key].behavior_logprobs, sample.behavior_logprobs[: len(ids)], atol=2e-5, rtol=1e-5
        )
    assert cuts > 0


def test_a_stop_text_that_spans_tokens_and_characters(chat_engine: HfEngine) -> None:
    requests = requests_for(chat_engine, CHAT_PROMPTS, 20)
    free = draw(chat_engine, requests)
    texts = [s.text for s in free.values() if len(s.text) > 6]
    stop = tuple(text[2:5] for text in texts[:6])
    for key, sample in draw(chat_engine, requests, stop=stop).items():
        if any(s in free[key].text for s in stop):
            assert sample.finish_reason == "stop"
            assert any(s in sample.text for s in stop)
            before = decode_response(chat_engine.tokenizer, sample.response_ids[:-1])
            assert not any(s in before for s in stop)
        else:
            assert sample.response_ids.tolist() == free[key].response_ids.tolist()


def test_a_models_own_generation_settings_do_not_alter_samples(
    chat_engine: HfEngine, chat_model: Path, penalised_model: Path
) -> None:
    engine = engine_for(penalised_model)
    assert engine.tokenizer.stop_ids == chat_engine.tokenizer.stop_ids
    requests = requests_for(chat_engine, CHAT_PROMPTS, 10)
    for sampling in ({}, {"temperature": 0.7, "top_p": 0.9}):
        assert_same_samples(draw(engine, requests, **sampling), draw(chat_engine, requests, **sampling))


def test_what_does_not_fit_is_refused(demo_engine: HfEngine, one_line: Callable[[BaseException], str]) -> None:
    requests = requests_for(demo_engine, ["1" * 120], 1)
    assert len(draw(demo_engine, requests, max_tokens=8)) == 1
    with pytest.raises(UserError) as caught:
        draw(demo_engine, requests, max_tokens=9)
    assert "take 129 tokens and the model holds 128" in one_line(caught.value)
    ids = np.ones(64, np.int32)
    assert len(demo_engine.score([ScoreRequest(ids, ids)])[0]) == 64
    with pytest.raises(UserError) as caught:
        demo_engine.score([ScoreRequest(ids, ids), ScoreRequest(ids, np.ones(65, np.int32))])
    assert "take 129 tokens" in one_line(caught.value)


def test_a_model_that_gives_no_numbers_is_refused(demo: Path, one_line: Callable[[BaseException], str]) -> None:
    engine = engine_for(demo / "model")
    with torch.no_grad():
        engine.model.model.norm.weight.fill_(float("nan"))
    requests = requests_for(engine, DEMO_PROMPTS[:2], 1)
    with pytest.raises(UserError) as caught:
        draw(engine, requests)
    assert "engine.dtype=float32" in one_line(caught.value)
    with pytest.raises(UserError) as caught:
        engine.score([ScoreRequest(r.prompt_ids, encode_response(engine.tokenizer, "1", ended=True)) for r in requests])
    assert "engine.dtype=float32" in one_line(caught.value)


def test_a_lower_precision_is_what_was_asked_for(chat_model: Path, chat_engine: HfEngine) -> None:
    engine = engine_for(chat_model, dtype="bfloat16")
    assert engine.model.dtype == torch.bfloat16
    assert chat_engine.model.dtype == torch.float32, "auto on a CPU"
    requests = random_scoring(engine, 0, 10)
    for low, high in zip(engine.score(requests), chat_engine.score(requests), strict=True):
        assert low.dtype == np.float32
        assert 1e-4 < np.abs(low - high).max() < 1.0


def test_devices_and_models_that_are_not_there(tmp_path: Path, one_line: Callable[[BaseException], str]) -> None:
    for name in ("nonsense", "cuda:99"):
        with pytest.raises(UserError) as caught:
            pick_device(name)
        assert f"device `{name}` cannot be used" in one_line(caught.value)
    assert pick_device("cpu") == torch.device("cpu")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        load_model(str(tmp_path), torch.float32, torch.device("cpu"))
    assert f"{tmp_path}: cannot load this model" in one_line(caught.value)
