"""The summary against counting by hand, over files with every kind of group."""

from pathlib import Path
from statistics import mean

import numpy as np
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
        completion = Completion(source, "", np.zeros(length, np.int32), reason, "m", None, None)  # type: ignore[arg-type]
        return Response(completion, verdict, -rng.exponential(size=length).astype(np.float32))

    prompt = Prompt(f"p{number}", None, (Message("user", "q"),), None, "s", (), "{}")
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
        assert found.truncated == sum(r.completion.finish_reason == "length" for r in mine)
        every_token = np.concatenate([r.ref_logprobs for r in mine]).astype(np.float64)
        assert found.mean_ref_logprob == pytest.approx(every_token.mean(), rel=1e-6)


def test_a_source_that_nobody_judged_has_no_rate(tmp_path: Path) -> None:
    (source,) = summarise(write(tmp_path, [[group(0, [NONE])]])).sources
    assert (source.judged, source.mean_reward, source.pass_rate) == (0, None, None)


def test_nothing_but_empty_groups(tmp_path: Path) -> None:
    summary = summarise(write(tmp_path, [[group(0, []), group(1, [])]]))
    assert (summary.groups, summary.responses, summary.response_tokens) == (2, 0, 0)
    assert (summary.groups_without_signal, summary.groups_unjudged, summary.sources) == (0, 2, ())
