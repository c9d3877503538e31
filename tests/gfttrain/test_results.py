"""Results in a run's folder: what is written is read back, and a torn line costs nothing but itself."""

from dataclasses import replace
from pathlib import Path

import pytest

from gftdata.errors import UserError
from gfttrain.results import EVALS, Estimate, Result, append_result, read_results


def result(benchmark: str, value: float) -> Result:
    return Result(
        benchmark=benchmark,
        model="runs/gft/final",
        revision="abc",
        finished_at="2026-11-26T02:00:00+00:00",
        prompts=3,
        prompts_too_long=0,
        samples_per_prompt=2,
        unjudged_samples=0,
        truncated_samples=1,
        mean_tokens=4.5,
        mean_reward=Estimate(value, 0.1, 0.9),
        pass_at={1: Estimate(value, 0.1, 0.9), 16: Estimate(1.0, None, None)},
        greedy=None,
        entropy=0.25,
        kl=None,
        settings={"prompts": {"path": "x.jsonl"}, "k": [1, 16]},
    )


def test_the_last_line_of_a_benchmark_counts(tmp_path: Path) -> None:
    assert read_results(tmp_path) == {}
    first, other, again = result("sums", 0.25), result("words", 0.5), result("sums", 0.75)
    for each in (first, other, again):
        append_result(tmp_path / "run", each)
    assert read_results(tmp_path / "run") == {"sums": again, "words": other}
    assert list(read_results(tmp_path / "run")) == ["sums", "words"]


def test_a_torn_line_is_passed_over_and_goes_with_the_next(tmp_path: Path) -> None:
    append_result(tmp_path, result("sums", 0.25))
    whole = (tmp_path / EVALS).read_bytes()
    for length in (1, len(whole) // 2, len(whole) - 1):
        (tmp_path / EVALS).write_bytes(whole + whole[:length])
        assert read_results(tmp_path) == {"sums": result("sums", 0.25)}
        append_result(tmp_path, result("words", 0.5))
        assert read_results(tmp_path) == {"sums": result("sums", 0.25), "words": result("words", 0.5)}


def test_characters_that_end_lines_elsewhere_and_torn_ones(tmp_path: Path) -> None:
    odd = replace(result("sums", 0.25), model="runs/\u2028\x85\x0b/é")
    append_result(tmp_path, odd)
    assert read_results(tmp_path) == {"sums": odd}
    whole = (tmp_path / EVALS).read_bytes()
    (tmp_path / EVALS).write_bytes(whole + whole[: whole.index("é".encode()) + 1])  # half of a character
    assert read_results(tmp_path) == {"sums": odd}


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    append_result(tmp_path, result("sums", 0.25))
    append_result(tmp_path, replace(result("sums", 0.25), benchmark="words"))
    lines = (tmp_path / EVALS).read_text().splitlines(keepends=True)
    (tmp_path / EVALS).write_text(lines[0].replace('"prompts": 3', '"prompts": "three"') + lines[1])
    with pytest.raises(UserError, match=r"evals\.jsonl, line 1: is no result of gft eval"):
        read_results(tmp_path)
