"""The summary against counting by hand, over files with every kind of group."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from math import ceil
from pathlib import Path
from statistics import mean

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gftdata.schema import groups_to_table, parquet_options
from gftdata.summary import summarise
from gftdata.types import Completion, Group, Message, Prompt, Response, Verdict

PASS, FAIL, HALF, NONE = Verdict(1.0, "ok"), Verdict(0.0, "ok"), Verdict(0.5, "ok"), Verdict(None, "timeout")
TENTH = Verdict(0.1, "ok")
GROUPS: list[tuple[list[Verdict], str]] = [
    ([PASS, FAIL, FAIL], "signal"),
    ([], "unjudged"),
    ([PASS, PASS, NONE], "without"),
    ([NONE, NONE], "unjudged"),
    ([FAIL, NONE, HALF], "signal"),
    ([TENTH] * 7, "without"),
    ([], "unjudged"),
]


def group(number: int, verdicts: list[Verdict]) -> Group:
    rng = np.random.default_rng(number)

    def response(k: int, verdict: Verdict) -> Response:
        length = int(rng.integers(1, 40))
        source = ["expert", "teacher:a", "self"][min(k, 2)]
        reason = "given" if k == 0 else "length" if rng.random() < 0.5 else "stop"
        text = rng.choice(["same", "same", "Same", "", "other"])
        completion = Completion(source, text, np.zeros(length, np.int32), reason, "m", None, None)  # type: ignore[arg-type]
        return Response(completion, verdict, -rng.exponential(size=length).astype(np.float32))

    prompt = Prompt(f"p{number}", None, (Message("user", "q"),), None, "s", (), "{}", "q")
    return Group(prompt, np.zeros(1, np.int32), tuple(response(k, v) for k, v in enumerate(verdicts)))


def write(folder: Path, parts: list[list[Group]], dtype: str = "float32") -> list[Path]:
    paths = [folder / f"{n}.parquet" for n in range(len(parts))]
    for path, members in zip(paths, parts, strict=True):
        pq.write_table(groups_to_table(members, dtype), path, row_group_size=2, **parquet_options(dtype))
    return paths


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("cut", [0, 2, 5, 7])
def test_it_counts_as_one_does_by_hand(tmp_path: Path, cut: int, dtype: str) -> None:
    groups = [group(n, verdicts) for n, (verdicts, _) in enumerate(GROUPS)]
    summary = summarise(write(tmp_path, [groups[:cut], groups[cut:]], dtype))
    kinds = [kind for _, kind in GROUPS]
    responses = [r for g in groups for r in g.responses]
    assert summary.groups == len(GROUPS)
    assert summary.groups_without_signal == kinds.count("without")
    assert summary.groups_unjudged == kinds.count("unjudged")
    assert summary.responses == len(responses)
    assert summary.response_tokens == sum(len(r.ref_logprobs) for r in responses)
    assert [s.source for s in summary.sources] == ["expert", "teacher:a", "self"]
    for found in summary.sources:
        mine = [r for r in responses if r.completion.source == found.source]
        rewards = [r.verdict.reward for r in mine if r.verdict.reward is not None]
        assert (found.responses, found.judged) == (len(mine), len(rewards))
        assert found.mean_reward == pytest.approx(mean(rewards))
        assert found.pass_rate == pytest.approx(mean(reward == 1.0 for reward in rewards))
        assert found.mean_tokens == pytest.approx(mean(len(r.ref_logprobs) for r in mine))
        reasons = Counter(r.completion.finish_reason for r in mine)
        assert (found.finish_reasons, found.truncated) == (reasons, reasons["length"])
        lengths = sorted(len(r.ref_logprobs) for r in mine)
        assert found.median_tokens == lengths[ceil(0.5 * len(lengths)) - 1]
        assert found.p95_tokens == lengths[ceil(0.95 * len(lengths)) - 1]
        assert found.max_tokens == lengths[-1]
        texts = [[r.completion.text for r in g.responses if r.completion.source == found.source] for g in groups]
        assert found.identical == sum(text in before[:k] for before in texts for k, text in enumerate(before))
        assert found.groups_all_identical == sum(len(t) > 1 and all(text == t[0] for text in t) for t in texts)
        every_token = np.concatenate([r.ref_logprobs for r in mine]).astype(np.float64)
        assert found.mean_ref_logprob == pytest.approx(every_token.mean(), rel=1e-6)


def test_a_source_that_nobody_judged_has_no_rate(tmp_path: Path) -> None:
    (source,) = summarise(write(tmp_path, [[group(0, [NONE])]])).sources
    assert (source.judged, source.mean_reward, source.pass_rate) == (0, None, None)


def test_nothing_but_empty_groups(tmp_path: Path) -> None:
    summary = summarise(write(tmp_path, [[group(0, []), group(1, [])]]))
    assert (summary.groups, summary.responses, summary.response_tokens) == (2, 0, 0)
    assert (summary.groups_without_signal, summary.groups_unjudged, summary.sources) == (0, 2, ())


def of_source(number: int, texts: Iterable[str], length: int = 1) -> Group:
    """A group of `self` responses."""
    rewarded = group(number, [PASS])
    (response,) = rewarded.responses
    ids, ref_logprobs = np.zeros(length, np.int32), np.full(length, -1, np.float32)
    made = [
        Response(replace(response.completion, source="self", text=text, response_ids=ids), PASS, ref_logprobs)
        for text in texts
    ]
    return replace(rewarded, responses=tuple(made))


def test_repetitions_are_those_of_one_group(tmp_path: Path) -> None:
    texts = ["aaa", "ab", "a", "", "aab", "aa", "b", "abcb", "bb"]
    groups = [of_source(n, t) for n, t in enumerate(texts)]
    for cut in (0, 1, 5):
        (source,) = summarise(write(tmp_path, [groups[:cut], groups[cut:]])).sources
        assert source.groups_all_identical == 3
        assert source.identical == sum(len(t) - len(set(t)) for t in texts) == 6


def test_quantiles_are_numpys_inverted_cdf(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for count in (*range(1, 45), 199, 200, 201):
        lengths = rng.integers(1, 30, count)
        groups = [of_source(n, "a", int(length)) for n, length in enumerate(lengths)]
        (source,) = summarise(write(tmp_path, [groups[: count // 2], groups[count // 2 :]])).sources
        expected = [np.quantile(lengths, q, method="inverted_cdf") for q in (0.5, 0.95, 1.0)]
        assert [source.median_tokens, source.p95_tokens, source.max_tokens] == expected


def test_the_order_of_shards_changes_nothing_but_the_order_of_sources(tmp_path: Path) -> None:
    groups = [group(n, verdicts) for n, (verdicts, _) in enumerate(GROUPS * 30)]
    paths = write(tmp_path, [groups[i : i + 30] for i in range(0, len(groups), 30)])
    forward, backward = summarise(paths), summarise(paths[::-1])
    assert forward.model_dump(exclude={"sources"}) == backward.model_dump(exclude={"sources"})
    by_name = {source.source: source for source in backward.sources}
    for source in forward.sources:
        found = by_name[source.source].model_dump()
        for name, value in source.model_dump().items():
            assert found[name] == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value), name


def test_memory_does_not_grow_with_the_number_of_shards(tmp_path: Path) -> None:
    def peak(parts: int) -> int:
        paths = write(tmp_path, [[of_source(n, texts) for n in range(256)]]) * parts
        earlier, counting = pa.default_memory_pool(), pa.proxy_memory_pool(pa.system_memory_pool())
        pa.set_memory_pool(counting)
        try:
            assert summarise(paths).groups == 256 * parts
        finally:
            pa.set_memory_pool(earlier)
        return int(counting.max_memory())

    texts = [f"{k}" * 2000 for k in range(8)]
    assert 0 < peak(20) < 1.2 * peak(2)
