"""benchmarks/graders.py on answers of our own making, one of each kind that real ones were disagreed about."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(__file__).parent / "data"
REWARDS = ("math", "numeric")
SOLUTION = "He paid 6.\nA: 7"
FORMS: dict[str, dict[str, Any]] = {  # as their publishers write them
    "gpt3": {
        "question": "How many?",
        "ground_truth": "3 + 4 = 7\nA: 7",
        "6b_finetuning": {"is_correct": True, "solution": SOLUTION},
        "175b_finetuning": {"is_correct": False, "solution": "A: 6"},
    },
    "abel": {"id": 0, "prompt": "How many?", "response": "So 7. #### 7.", "pred": "7.", "gold": "7", "result": False},
    "mathcoder": {
        "messages": [{"role": "user", "content": [{"type": "text", "content": "How many?"}]}],
        "ground_truth": {"answer": "\\frac{2}{3}"},
        "debug_result": [
            {"role": "user", "content": "How many?"},
            {"role": "text", "content": "It is \\boxed{0.667}."},
            {"role": "text", "content": "0.667"},
        ],
    },
}


def table(lines: list[str]) -> dict[tuple[str, str], list[int]]:
    """(file, grader) -> answers, both right, both wrong, only the grader, only the label, unjudged."""
    rows = [line.split() for line in lines[1:] if line.split()[1] in REWARDS]
    return {(file, grader): [int(n.replace(",", "")) for n in numbers[:6]] for file, grader, *numbers in rows}


def disagreements(lines: list[str]) -> list[str]:
    return [line for line in lines if "; math " in line]


def test_where_our_rewards_do_not_say_what_a_reader_would(benchmark: Callable[..., list[str]]) -> None:
    """All of it: what else is in tests/benchmarks/data is judged as labelled there, with the reason beside it."""
    lines = benchmark("graders.py", str(DATA / "numbers.jsonl"), str(DATA / "formulas.jsonl"))
    assert table(lines) == {
        ("numbers", "math"): [14, 8, 5, 0, 1, 0],
        ("numbers", "numeric"): [14, 9, 4, 1, 0, 0],
        ("formulas", "math"): [12, 9, 3, 0, 0, 0],
    }
    assert disagreements(lines) == [
        "numbers line 10: label wrong; math wrong, numeric right",  # `#### 7`, and then it asks whether it was 8
        "numbers line 12: label right; math wrong, numeric right",  # 20.0\% for 20: math-verify's
    ]


def test_the_forms_in_which_answers_are_published(benchmark: Callable[..., list[str]], tmp_path: Path) -> None:
    for name, row in FORMS.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    lines = benchmark("graders.py", *(str(tmp_path / f"{name}.jsonl") for name in FORMS))
    assert table(lines) == {
        ("gpt3", "math"): [2, 1, 1, 0, 0, 0],
        ("gpt3", "numeric"): [2, 1, 1, 0, 0, 0],
        ("abel", "math"): [1, 0, 0, 1, 0, 0],
        ("abel", "numeric"): [1, 0, 0, 1, 0, 0],
        ("mathcoder", "math"): [1, 0, 0, 0, 1, 0],
    }
    said = "\n".join(lines)
    assert "abel line 1: label wrong; math right, numeric right\n  ground truth '7', the answer ends in 'So 7." in said
    assert "mathcoder line 1: label right; math wrong\n  ground truth '\\\\frac{2}{3}', the answer ends in" in said


@pytest.mark.parametrize("content", ['{"answer": 1}\n', ""])
def test_a_file_of_another_form_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "other.jsonl").write_text(content)
    command = [sys.executable, "benchmarks/graders.py", str(tmp_path / "other.jsonl")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 1 and "other.jsonl: " in done.stderr and "Traceback" not in done.stderr


def test_a_public_file_that_is_not_what_it_was_is_refused(tmp_path: Path) -> None:
    (tmp_path / "gsm8k-gpt3.jsonl").write_text("{}\n")
    command = [sys.executable, "benchmarks/graders.py", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 1 and "gsm8k-gpt3.jsonl: sha256" in done.stderr
