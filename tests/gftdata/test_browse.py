"""Which groups are shown, against choosing them by hand, and that texts are read only where a group is shown."""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from aid.data_sets import END, Made, group, save
from hypothesis import given, settings
from hypothesis import strategies as st

from gftdata.browse import Filter, show_groups
from gftdata.errors import UserError
from gftdata.locations import open_data
from gftdata.types import Group

SOURCES = ("self", "expert", "teacher:a")
responses = st.builds(
    Made,
    source=st.sampled_from(SOURCES),
    reward=st.sampled_from([None, 0.0, 0.5, 1.0]),
    ids=st.integers(1, 4).map(lambda length: (END,) * length),
)
filters = st.builds(
    Filter,
    id=st.sampled_from([None, None, None, "0", "row-3", f"{3:064x}", "nothing"]),
    sources=st.lists(st.sampled_from(SOURCES), max_size=2).map(tuple),
    min_reward=st.sampled_from([None, 0.25, 1.0]),
    max_reward=st.sampled_from([None, 1.0]),
    min_tokens=st.sampled_from([None, 2]),
    max_tokens=st.sampled_from([None, 3]),
    signal=st.sampled_from([None, True, False]),
)


def by_hand(made: list[Group], wanted: Filter) -> list[tuple[str, list[bool]]]:
    """prompt id and marks of the groups that fit."""
    found = []
    for one in made:
        rewards = {r.verdict.reward for r in one.responses} - {None}
        if wanted.signal is not None and wanted.signal != (len(rewards) > 1):
            continue
        if wanted.id is not None and not (
            one.prompt.prompt_id.startswith(wanted.id) or one.prompt.source_id == wanted.id
        ):
            continue
        marks = []
        for r in one.responses:
            reward, tokens = r.verdict.reward, len(r.completion.response_ids)
            bounded = wanted.min_reward is not None or wanted.max_reward is not None
            marks.append(
                (not wanted.sources or r.completion.source in wanted.sources)
                and not (bounded and reward is None)
                and (wanted.min_reward is None or reward is None or reward >= wanted.min_reward)
                and (wanted.max_reward is None or reward is None or reward <= wanted.max_reward)
                and (wanted.min_tokens is None or tokens >= wanted.min_tokens)
                and (wanted.max_tokens is None or tokens <= wanted.max_tokens)
            )
        asks = Filter(id=wanted.id, signal=wanted.signal) != wanted
        if any(marks) or not asks:
            found.append((one.prompt.prompt_id, [mark and asks for mark in marks]))
    return found


@given(st.lists(st.lists(responses, max_size=4), max_size=8), st.lists(filters, min_size=12, max_size=12))
@settings(max_examples=15, deadline=None)
def test_the_groups_that_fit_are_shown_in_order(members: list[list[Made]], wanted: list[Filter]) -> None:
    first = [Made(source) for source in SOURCES]  # so that every source is there
    made = [group(number, some) for number, some in enumerate([first, *members])]
    with tempfile.TemporaryDirectory() as folder:
        data = open_data(str(save(Path(folder), [made[:3], made[3:]], row_group_size=2)))
        for one in wanted:
            shown = show_groups(data, one, 100)
            assert [(g.prompt_id, [r.is_match for r in g.responses]) for g in shown] == by_hand(made, one)
            assert show_groups(data, one, 2) == shown[:2]


def test_a_group_is_shown_as_it_is(tmp_path: Path) -> None:
    made = Made("teacher:a", reward=None, text="line\nand [bold]", finish="length", ids=(3, 4), logprob=-0.25)
    (shown,) = show_groups(open_data(str(save(tmp_path, [[group(3, [made])]]))), Filter(), 5)
    assert asdict(shown) == {
        "prompt_id": f"{3:064x}",
        "source_id": "row-3",
        "data_source": "made up",
        "messages": ({"role": "user", "content": "question 3"},),
        "ground_truth": "1",
        "num_prompt_tokens": 4,
        "shard": "train-00000-of-00001.parquet",
        "responses": (
            {
                "text": "line\nand [bold]",
                "source": "teacher:a",
                "model": "m@1",
                "reward": None,
                "reward_status": "timeout",
                "finish_reason": "length",
                "num_tokens": 2,
                "mean_ref_logprob": -0.25,
                "is_match": False,
            },
        ),
    }


def test_texts_are_read_of_the_row_groups_of_shown_groups_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path, [[group(n, [Made()]) for n in range(first, first + 6)] for first in (0, 6)])
    read: list[tuple[int, Any]] = []
    original = pq.ParquetFile.read_row_group

    def counted(self: Any, number: int, columns: Any = None, **options: Any) -> Any:
        read.append((number, columns))
        return original(self, number, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    (shown,) = show_groups(open_data(str(folder)), Filter(id="row-10"), 3)
    assert shown.source_id == "row-10" and [number for number, _ in read] == [1]
    assert not {"prompt_ids", "response_ids", "ref_logprobs", "behavior_logprobs"} & set(read[0][1])


def test_filters_that_can_match_nothing_are_refused(data: Path, one_line: Any) -> None:
    for wanted, saying in (
        (Filter(sources=("teacher",)), r"no responses of source `teacher`; --source: expert, self"),
        (Filter(min_reward=1.0, max_reward=0.5), r"--min-reward 1 is above --max-reward 0.5"),
        (Filter(min_tokens=9, max_tokens=2), r"--min-tokens 9 is above --max-tokens 2"),
    ):
        with pytest.raises(UserError, match=saying) as refused:
            show_groups(open_data(str(data)), wanted, 1)
        one_line(refused.value)
