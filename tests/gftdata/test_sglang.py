"""The supervision of a SGLang child, with a stand-in that fails on demand. The real engine is met in tests/sglang."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gftdata.config import SglangConfig
from gftdata.engines import sglang
from gftdata.errors import UserError
from gftdata.tokens import Tokenizer, load_tokenizer
from gftdata.types import Refusal, Sample, SampleRequest, Sampling, Seed

FAKE = Path(__file__).parent / "aid" / "fake_sglang_worker.py"
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_tokens=8, stop=())
Open = Callable[..., sglang.SglangEngine]


@pytest.fixture(scope="module")
def tokenizer(demo: Path) -> Tokenizer:
    return load_tokenizer(str(demo / "model"))


@pytest.fixture
def open_fake(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    monkeypatch.setattr(sglang, "WORKER", FAKE)
    monkeypatch.setattr(sglang, "BACK_OFF_S", (0.01, 0.01, 0.01))
    engines = []

    def start(max_in_flight: int = 8, **options: Any) -> sglang.SglangEngine:
        options["log"] = str(tmp_path / "requests.log")
        config = SglangConfig(name="sglang", max_in_flight=max_in_flight, options=options)
        engines.append(sglang.SglangEngine("none", config, tokenizer))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def requests(*last_ids: int) -> list[SampleRequest]:
    return [SampleRequest(f"p{i}", 0, np.array([2, i], np.int32), Seed(i)) for i in last_ids]


def answered(engine: sglang.SglangEngine, *last_ids: int) -> tuple[Counter[str], dict[str, str]]:
    """Prompt -> how often it was answered, and the refusals with their reasons; checks each sample's content."""
    counts: Counter[str] = Counter()
    refusals: dict[str, str] = {}
    for answer in engine.sample(requests(*last_ids), SAMPLING):
        counts[answer.request.prompt_id] += 1
        if isinstance(answer, Refusal):
            refusals[answer.request.prompt_id] = answer.reason
        else:
            assert isinstance(answer, Sample)
            last = int(answer.request.prompt_ids[-1])
            assert answer.response_ids.tolist() == [last, last + 1, 1]
    return counts, refusals


def sent(tmp_path: Path) -> Counter[int]:
    return Counter(json.loads(line)[-1] for line in (tmp_path / "requests.log").read_text().splitlines())


def test_every_request_is_answered_once(open_fake: Open, tmp_path: Path) -> None:
    counts, refusals = answered(open_fake(), *range(3, 15))
    assert counts == Counter(f"p{i}" for i in range(3, 15))
    assert not refusals
    assert set(sent(tmp_path).values()) == {1}


def test_a_death_loses_and_doubles_nothing(open_fake: Open) -> None:
    engine = open_fake(die_once=[9])
    counts, refusals = answered(engine, *range(3, 15))
    assert counts == Counter(f"p{i}" for i in range(3, 15))
    assert not refusals
    assert engine.restarts == 1


def test_a_torn_answer_is_asked_again(open_fake: Open) -> None:
    engine = open_fake(torn=[9])
    counts, refusals = answered(engine, *range(3, 15))
    assert counts == Counter(f"p{i}" for i in range(3, 15))
    assert not refusals
    assert engine.restarts == 1


@pytest.mark.parametrize("poison", [[3], [9], [14], [5, 6], [3, 8, 14]])
def test_what_kills_the_engine_is_found_and_the_others_are_answered(open_fake: Open, poison: list[int]) -> None:
    counts, refusals = answered(open_fake(die=poison), *range(3, 15))
    assert counts == Counter(f"p{i}" for i in range(3, 15))
    assert set(refusals) == {f"p{i}" for i in poison}
    assert all("died" in reason for reason in refusals.values())


@pytest.mark.parametrize(("kind", "said"), [("nan", "NaN"), ("abort", "no room")])
def test_an_answer_that_is_none_is_asked_again_and_then_refused(
    open_fake: Open, tmp_path: Path, kind: str, said: str
) -> None:
    engine = open_fake(**{kind: [9]})
    counts, refusals = answered(engine, *range(3, 15))
    assert counts == Counter(f"p{i}" for i in range(3, 15))
    assert set(refusals) == {"p9"} and said in refusals["p9"]
    assert sent(tmp_path)[9] == sglang.TRIES
    assert engine.restarts == 0


def test_an_engine_that_does_not_start_says_why(open_fake: Open) -> None:
    with pytest.raises(UserError, match="ValueError: this model cannot be loaded"):
        open_fake(no_start=True)


def test_never_more_in_flight_than_asked(open_fake: Open) -> None:
    engine = open_fake(max_in_flight=3)
    taken = 0

    def counted() -> Iterator[SampleRequest]:
        nonlocal taken
        for request in requests(*range(3, 15)):
            taken += 1
            yield request

    for done, _ in enumerate(engine.sample(counted(), SAMPLING)):
        assert taken <= done + 3


def test_a_dropped_stream_leaves_the_engine_usable(open_fake: Open) -> None:
    engine = open_fake()
    stream = engine.sample(requests(*range(3, 15)), SAMPLING)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    counts, refusals = answered(engine, *range(3, 15))
    assert counts == Counter(f"p{i}" for i in range(3, 15)) and not refusals


def test_two_streams_at_once_do_not_mix(open_fake: Open) -> None:
    engine = open_fake(die_once=[12])
    first = engine.sample(requests(3, 4, 5, 6), SAMPLING)
    second = engine.sample(requests(10, 11, 12, 13), SAMPLING)
    found = [answer.request.prompt_id for pair in zip(first, second, strict=True) for answer in pair]
    assert Counter(found) == Counter(f"p{i}" for i in (3, 4, 5, 6, 10, 11, 12, 13))
    assert {int(p[1:]) < 9 for p in found[::2]} == {True}
