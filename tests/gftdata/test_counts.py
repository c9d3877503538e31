"""Counts against counting by hand, one group after another, and against the manifest's summary."""

import math
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aid.data_sets import END, Made, group, save
from hypothesis import given, settings
from hypothesis import strategies as st

from gftdata import counts as counting
from gftdata.audit import summary_differences
from gftdata.counts import BINS, EXAMPLES, Counts, Sighting, count
from gftdata.errors import UserError
from gftdata.locations import open_data
from gftdata.types import Group

responses = st.builds(
    Made,
    source=st.sampled_from(["self", "expert", "teacher:a"]),
    reward=st.sampled_from([None, 0.0, 0.5, 1.0, 1.0]),
    text=st.sampled_from(["a", "b", ""]),
    finish=st.sampled_from(["stop", "length", "given"]),
    ids=st.integers(1, 4).map(lambda length: (END,) * length),
    logprob=st.sampled_from([0.0, -0.5, -2.0]),
    status=st.sampled_from(["timeout", "error:ValueError"]),
)
groups = st.lists(st.tuples(st.lists(responses, max_size=6), st.sampled_from("xyz")), max_size=9)


def by_hand(made: list[Group]) -> dict[str, Any]:
    """Everything in Counts that the manifest's summary does not hold."""

    def rewards(members: list[Any]) -> list[float]:
        return [r.verdict.reward for r in members if r.verdict.reward is not None]

    def bins(rates: list[list[float]]) -> tuple[int, ...]:
        found = Counter(
            0 if (rate := sum(r == 1 for r in judged) / len(judged)) == 0 else 5 if rate == 1 else math.ceil(4 * rate)
            for judged in rates
            if judged
        )
        return tuple(found[number] for number in range(len(BINS)))

    def seen(condition: Any) -> dict[str, Sighting]:
        found: dict[str, list[str]] = {}
        for one in made:
            for r in one.responses:
                if condition(r, r.completion):
                    found.setdefault(r.completion.source, []).append(one.prompt.prompt_id)
        return {s: Sighting(len(ids), tuple(dict.fromkeys(ids))[:EXAMPLES]) for s, ids in found.items()}

    def sighting(chosen: list[Group]) -> Sighting:
        return Sighting(len(chosen), tuple(one.prompt.prompt_id for one in chosen[:EXAMPLES]))

    sources = list(dict.fromkeys(r.completion.source for one in made for r in one.responses))
    details = {}
    for source in sources:
        own = [[r for r in one.responses if r.completion.source == source] for one in made]
        own = [members for members in own if members]
        judged = [reward for members in own for reward in rewards(members)]
        details[source] = {
            "groups": len(own),
            "varied_groups": sum(len(set(rewards(members))) > 1 for members in own),
            "lowest_reward": min(judged, default=None),
            "highest_reward": max(judged, default=None),
            "unjudged": Counter(r.verdict.status for m in own for r in m if r.verdict.reward is None),
            "pass_rates": bins([rewards(members) for members in own]),
        }
    keys = [(one.prompt.messages, one.prompt.ground_truth) for one in made]
    return {
        "details": details,
        "pass_rates": bins([rewards(list(one.responses)) for one in made]),
        "truncated": seen(lambda r, c: c.finish_reason == "length"),
        "ends_at_once": seen(lambda r, c: c.finish_reason != "length" and len(c.response_ids) <= 1),
        "unjudged": seen(lambda r, c: r.verdict.reward is None),
        "failing": seen(lambda r, c: c.source == "expert" and r.verdict.reward not in (None, 1.0)),
        "without_signal": sighting([one for one in made if len(set(rewards(list(one.responses)))) == 1]),
        "groups_unjudged": sighting([one for one in made if not rewards(list(one.responses))]),
        "repeated_prompts": sighting([one for n, one in enumerate(made) if keys[n] in keys[:n]]),
    }


def assert_as_by_hand(found: Counts, made: list[Group]) -> None:
    expected = by_hand(made)
    details = expected.pop("details")
    assert [detail.source for detail in found.details] == list(details)
    for detail in found.details:
        for name, value in details[detail.source].items():
            assert getattr(detail, name) == value, (detail.source, name)
    for name, value in expected.items():
        assert getattr(found, name) == value, name


@given(st.lists(groups, min_size=1, max_size=3))
@settings(max_examples=25, deadline=None)
def test_counts_are_those_of_counting_by_hand_and_the_summary_is_the_manifests(shards: list[Any]) -> None:
    numbers = iter(range(1000))
    made = [[group(next(numbers), members, question) for members, question in shard] for shard in shards]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        data = open_data(str(save(Path(folder), made)))
        every = [one for shard in made for one in shard]
        for at_once in (1, 5, 1000):
            patch.setattr(counting, "GROUPS_AT_ONCE", at_once)
            found = count(data)
            assert_as_by_hand(found, every)
            assert summary_differences(data.manifest.summary, found.summary) == []
        whole = count(data, deep=True)
        assert whole == replace(found, texts_compared=True)


def test_reading_by_ranges_gives_the_same(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of remote data, though from files: its prompts are not compared unless that is asked for."""
    source = open_data(str(data))
    found = count(source)
    monkeypatch.setattr(counting, "GROUPS_AT_ONCE", 9)
    monkeypatch.setattr(counting, "is_remote", lambda location: True)
    assert found.repeated_prompts == Sighting()
    assert count(source) == replace(found, repeated_prompts=None)
    assert count(source, deep=True) == replace(found, texts_compared=True)


def test_the_summary_of_generated_data_is_its_manifests(data: Path) -> None:
    source = open_data(str(data))
    found = count(source)
    assert summary_differences(source.manifest.summary, found.summary) == []
    assert found.summary.groups == 24 and found.row_counts == ()
    own, expert = (next(d for d in found.details if d.source == name) for name in ("self", "expert"))
    assert own.logprob_gap == 0.0
    means = {s.source: s.mean_ref_logprob for s in source.manifest.summary.sources}
    assert expert.logprob_gap == pytest.approx(means["expert"] - means["self"])


def test_prompt_lengths(tmp_path: Path) -> None:
    lengths = [*range(1, 101)]
    made = [group(n, [Made()], prompt_ids=(5,) * length) for n, length in enumerate(lengths)]
    found = count(open_data(str(save(tmp_path, [made])))).prompt_lengths
    assert found is not None and (found.mean, found.median, found.p95, found.max) == (50.5, 50, 95, 100)


def test_what_cannot_be_read_names_the_file(tmp_path: Path, one_line: Any) -> None:
    folder = save(tmp_path, [[group(n, [Made()])] for n in range(3)])
    path = sorted((folder / "data").iterdir())[1]
    whole = path.read_bytes()
    source = open_data(str(folder))
    path.write_bytes(whole[:4] + b"\xff" * (len(whole) // 2) + whole[4 + len(whole) // 2 :])
    with pytest.raises(UserError, match=path.name) as damaged:
        count(source)
    one_line(damaged.value)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=path.name):
        count(source)
    path.unlink()
    with pytest.raises(UserError, match=path.name):
        count(source)
